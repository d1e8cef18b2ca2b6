"""The command line's own run of tiny-llava, killed at random moments, ends in the same bits."""

from __future__ import annotations

import multiprocessing as mp
import random
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparsify_vlm import cli
from sparsify_vlm.training.metrics import read_metrics

STEPS = 24
COMMAND = [
    *("tiny-llava", "--transcode", "--cross_layer", "8", "--num_latents", "64", "--k", "4"),
    *("--batch_size", "2", "--max_steps", str(STEPS), "--save_every", "4", "--device", "cpu"),
]


def main(arguments: list[str]) -> None:
    """In a process of its own."""
    torch.set_num_threads(1)
    raise SystemExit(cli.main(["train", *arguments]))


def started(arguments: list[str]) -> mp.process.BaseProcess:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["test_killed", "sparsify_vlm.training.run"])
    process = context.Process(target=main, args=(arguments,))
    process.start()
    return process


def finished(arguments: list[str]) -> int | None:
    process = started(arguments)
    process.join(120)
    return process.exitcode


def steps_done(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


@pytest.mark.slow
def test_run_killed_three_times_equals_an_undisturbed_one(tmp_path: Path) -> None:
    command = [*COMMAND, "--save_dir", str(tmp_path)]
    assert finished([*command, "--run_name", "whole"]) == 0
    run, chance = tmp_path / "killed", random.Random()
    again: list[str] = []
    moments = sorted(chance.sample(range(STEPS - 2), 3))
    for moment in moments:
        process = started([*command, "--run_name", "killed", *again])
        while steps_done(run) <= moment and process.is_alive():
            time.sleep(0.002)
        time.sleep(chance.random() * 0.05)
        process.kill()
        process.join()
        again = ["--resume"]
    assert finished([*command, "--run_name", "killed", *again]) == 0, moments
    coders = [f"language_model.model.layers.{i}.mlp" for i in range(8)]
    for name in coders:
        whole, killed = (
            load_file(tmp_path / r / name / "sae.safetensors") for r in ("whole", "killed")
        )
        assert whole.keys() == killed.keys()
        for key, value in whole.items():
            assert torch.equal(value, killed[key]), (name, key, moments)
    assert sorted(p.name for p in run.iterdir() if p.name.startswith("language")) == coders
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == list(
        range(1, STEPS + 1)
    )
    states = [tmp_path / r / "resume" / f"step-{STEPS:08d}" for r in ("whole", "killed")]
    whole, killed = (load_file(state / "tensors.safetensors") for state in states)
    for key, value in whole.items():
        assert torch.equal(value, killed[key]), (key, moments)


@pytest.mark.slow
def test_resume_of_a_finished_run_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", *COMMAND, "--save_dir", str(tmp_path), "--max_steps", "2"]
    assert cli.main(command) == 0
    capsys.readouterr()
    assert cli.main([*command, "--resume"]) == 0
    assert "is finished: 2 steps" in capsys.readouterr().out
    assert cli.main(command) == 1
    assert "--overwrite" in capsys.readouterr().err
