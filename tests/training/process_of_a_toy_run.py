"""Run by torchrun in test_data_parallel.py: trains toy coders, or dies while doing so."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from toy_source import ToySource, toy_config, toy_trainer

from sparsify_vlm.errors import UserError
from sparsify_vlm.training.distributed import joined_world
from sparsify_vlm.training.step import moments

VARIANTS: dict[str, dict[str, Any]] = {
    "signum": {"optimizer": "signum", "skip_connection": True},
    "adam": {"optimizer": "adam", "grad_acc_steps": 2, "micro_acc_steps": 2},
    "muon": {"optimizer": "muon", "post_encoder_scale": True},
    "sae": {"optimizer": "adam", "transcode": False, "cross_layer": 0},
}


def compare_runs(save_dir: Path) -> None:
    """Every variant, in float64 so that only the order of the sums differs from one process."""
    with joined_world() as world:
        for name, variant in VARIANTS.items():
            cfg = toy_config(save_dir, run_name=name, **variant)
            source = ToySource(world, dtype=torch.float64)
            toy_trainer(cfg, source, dtype=torch.float64).fit()


def die(save_dir: Path) -> None:
    """The second process is killed in its tenth step, unable to say anything."""
    with joined_world() as world:
        trainer = toy_trainer(toy_config(save_dir), ToySource(world))
        real = moments
        calls = 0

        def deadly(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if world.rank == 1 and calls == 10:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)

        trainer.fit.__globals__["moments"] = deadly
        trainer.fit()


if __name__ == "__main__":
    try:
        {"compare": compare_runs, "die": die}[sys.argv[1]](Path(sys.argv[2]))
    except UserError as error:
        sys.exit(f"error: {error}")
