"""Started by test_tensor_parallel.py: trains toy coders that several processes hold together."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from toy_source import ToySource, toy_config, toy_trainer

from sparsify_vlm.training import upstream
from sparsify_vlm.training.distributed import World
from sparsify_vlm.training.parallel import mesh

upstream.imported("sign_sgd")  # takes seconds, once instead of in every process
STEPS, BROKEN_OFF = 10, 7


@dataclass
class Run:
    """A toy run in float64, so that only the order of sums differs from one process."""

    folder: Path
    name: str
    tp: int = 1
    kind: str = "auto"
    settings: dict[str, Any] = field(default_factory=dict)
    breaks_off: bool = False
    """Whether the data ends after `BROKEN_OFF` of the `STEPS` steps."""

    def fit(self, world: World) -> None:
        """Train to the end; all processes of `world` call it."""
        changed = {"max_steps": STEPS, "save_every": STEPS, "optimizer": "adam", **self.settings}
        cfg = toy_config(
            self.folder, run_name=self.name, tp=self.tp, tp_layout=self.kind, **changed
        )
        data, row = mesh(world, self.tp)
        batches = None if self.breaks_off else 40
        source = ToySource(data, batches, torch.float64)
        toy_trainer(cfg, source, dtype=torch.float64, row=row).fit()


@dataclass
class Runs:
    """Several, one after the other."""

    runs: list[Run]

    def __call__(self, world: World) -> None:
        for run in self.runs:
            run.fit(world)
