"""Two processes under torchrun do what one process with twice the batch does."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from families import build
from process_of_a_toy_run import VARIANTS
from toy_source import ToySource, toy_config, toy_trainer

from sparsify_vlm.coders import load_clt
from sparsify_vlm.data import DataConfig
from sparsify_vlm.training import CoderConfig, RunConfig, TrainConfig, train
from sparsify_vlm.training.metrics import read_metrics

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent


def torchrun(*arguments: object, timeout: float = 150) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--standalone", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


def test_toy_runs_with_every_optimizer(tmp_path: Path) -> None:
    done = torchrun(HERE / "process_of_a_toy_run.py", "compare", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    for name, variant in VARIANTS.items():
        cfg = toy_config(tmp_path / "one", run_name=name, **variant)
        alone = toy_trainer(cfg, ToySource(dtype=torch.float64), dtype=torch.float64)
        alone.fit()
        one = load_clt(tmp_path / "one" / name).state_dict()
        two = load_clt(tmp_path / "two" / name).state_dict()
        moved = max(float(value.abs().max()) for value in one.values())
        for key, value in one.items():
            # Muon rounds its updates to bfloat16, the others have float64's rounding only.
            atol = (1e-6 if name == "muon" else 1e-9) * moved
            torch.testing.assert_close(two[key], value, rtol=0, atol=atol, msg=f"{name} {key}")
        lines = [read_metrics(tmp_path / n / name / "metrics.jsonl")[-1] for n in ("one", "two")]
        assert lines[0]["tokens"] == lines[1]["tokens"]
        assert lines[0]["fvu"] == pytest.approx(lines[1]["fvu"], rel=1e-4)
        assert lines[0]["l0"] == lines[1]["l0"]


def test_command_line_on_a_vision_language_model(tmp_path: Path) -> None:
    folder = build("llava", tmp_path)
    common = {"lr": 1e-3, "lr_warmup_steps": 0, "optimizer": "adam", "max_steps": 4}
    shapes = DataConfig(dataset="shapes", max_examples=24)
    sae = CoderConfig(transcode=True, cross_layer=3, num_latents=64, k=4)
    cfg = TrainConfig(sae=sae, batch_size=6, save_dir=str(tmp_path), run_name="one", **common)
    train(cfg, shapes, RunConfig(model=str(folder)), quiet=True)
    flags = [f"--{name}={value}" for name, value in common.items()]
    flags += ["--cross_layer=3", "--num_latents=64", "--k=4", "--batch_size=3", "--transcode"]
    flags += [f"--save_dir={tmp_path}", "--run_name=two", "--max_examples=24"]
    done = torchrun("-m", "sparsify_vlm", "train", folder, "shapes", *flags)
    assert done.returncode == 0, done.stderr
    one, two = (load_clt(tmp_path / name).state_dict() for name in ("one", "two"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-3, msg=key)
    lines = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    assert lines[0][-1]["tokens"] == lines[1][-1]["tokens"]
    for a, b in zip(*lines, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["fvu"]["image"] == pytest.approx(b["fvu"]["image"], rel=1e-4)


def test_a_process_that_dies_ends_the_others(tmp_path: Path) -> None:
    start = time.monotonic()
    done = torchrun(HERE / "process_of_a_toy_run.py", "die", tmp_path, timeout=120)
    assert time.monotonic() - start < 90
    assert done.returncode != 0
    assert "process 1 of 2 was killed" in done.stderr
    assert "--resume" in done.stderr
    resumed = toy_trainer(toy_config(tmp_path, resume=True))
    assert resumed.step == 5
