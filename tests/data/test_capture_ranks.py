"""Capture under torchrun: real processes, against a capture in one process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsify_vlm.data import ActivationStore
from sparsify_vlm.data.capture import CaptureConfig, _device, capture
from sparsify_vlm.data.store_format import read_shards
from sparsify_vlm.models import LoadedModel

ROOT = Path(__file__).parents[2]
SAMPLES = 150


def torchrun(n: int, *command: str, **changes: Any) -> subprocess.Popen:
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    out: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*line, *command], env=environment, cwd=ROOT, **out | changes)


def options(folder: Path, samples: int = SAMPLES) -> list[str]:
    given = ["--model", "tiny-llava", "--dataset", "shapes", "--max_examples", str(samples)]
    sizes = ["--batch_size", "4", "--shard_tokens", "400", "--device", "cpu"]
    return [*given, *sizes, "--output_dir", str(folder)]


def by_id(store: ActivationStore) -> dict[int, list[torch.Tensor]]:
    rows = store.rows(range(len(store)))
    table = [rows.x.transpose(0, 1), rows.y.transpose(0, 1), rows.input_ids, rows.position]
    table += [rows.role, rows.patch]
    return {
        int(number): [column[rows.sample == number] for column in table]
        for number in rows.sample.unique()
    }


@pytest.fixture(scope="module")
def single(vlm: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> dict:
    cfg = CaptureConfig(
        model="tiny-llava",
        output_dir=str(tmp_path_factory.mktemp("single") / "s"),
        dataset="shapes",
        max_examples=SAMPLES,
        batch_size=4,
        shard_tokens=400,
        quiet=True,
    )
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return by_id(ActivationStore(capture(cfg, vlm)))
    finally:
        torch.set_num_threads(before)


def assert_same(folder: Path, single: dict) -> None:
    ours = by_id(ActivationStore(folder))
    assert ours.keys() == single.keys()
    for number, columns in ours.items():
        assert all(map(torch.equal, columns, single[number]))


def test_two_processes_make_the_store_of_one(tmp_path: Path, single: dict) -> None:
    process = torchrun(2, "scripts/capture_activations.py", *options(tmp_path / "s"))
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert said.count(f"{SAMPLES} samples, ") == 1
    assert_same(tmp_path / "s", single)
    assert {path.suffix for path in (tmp_path / "s").iterdir()} == {
        ".json",
        ".jsonl",
        ".safetensors",
    }


def _finished(folder: Path, rank: int) -> int:
    path = folder / f"part_{rank:02d}"
    return len(read_shards(path)) if path.exists() else 0


def _rank_of(launcher: int, rank: int) -> int:
    """The process id of a rank, among the launcher's children."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in variables:
            return int(child)
    raise AssertionError(f"rank {rank} does not run")


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "then"), [(0, 2), (1, 3), (1, 1)])
def test_a_killed_process_ends_the_others_and_the_store_continues(
    tmp_path: Path, single: dict, victim: int, then: int
) -> None:
    folder = tmp_path / "s"
    program = ("-m", "sparsify_vlm", "capture", *options(folder))
    process = torchrun(2, *program)
    while not (_finished(folder, victim) >= 1 or process.poll() is not None):
        time.sleep(0.005)
    os.kill(_rank_of(process.pid, victim), signal.SIGKILL)
    start = time.monotonic()
    assert process.wait(timeout=60) != 0
    assert time.monotonic() - start < 60
    if then == 1:
        subprocess.run([sys.executable, *program], check=True, capture_output=True, cwd=ROOT)
    else:
        again = torchrun(then, *program)
        said, _ = again.communicate(timeout=200)
        assert again.returncode == 0, said
    assert_same(folder, single)


def test_an_error_is_told_in_one_line(tmp_path: Path) -> None:
    """A folder with something else: nothing is written into it."""
    folder = tmp_path / "s"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    process = torchrun(2, "-m", "sparsify_vlm", "capture", *options(folder, 20))
    said, _ = process.communicate(timeout=200)
    assert process.returncode != 0
    assert "is not empty and holds no capture (it has thesis.tex)" in said
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("device", "world", "expected"),
    [
        (None, 2, "cuda:1"),
        ("cuda", 2, "cuda:1"),
        ("cuda:0", 2, "cuda:0"),
        ("cpu", 2, "cpu"),
        (None, 1, None),
        ("cuda", 1, "cuda"),
    ],
)
def test_every_process_has_its_own_gpu(
    monkeypatch: pytest.MonkeyPatch, device: str | None, world: int, expected: str | None
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setenv("LOCAL_RANK", "3" if world > 1 else "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    cfg = CaptureConfig(model="tiny-llava", output_dir="s", device=device)
    assert _device(cfg) == expected
