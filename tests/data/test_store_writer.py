"""Writing an activation store: kills at every step, full disks, other captures, slow disks."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from stores import LAYERS, Made, contents, die_before, make, manifest, write

from sparsify_vlm.data import store_writer
from sparsify_vlm.data.store_writer import StoreWriter
from sparsify_vlm.errors import UserError

MADE = make(9)


@pytest.fixture
def undisturbed(tmp_path: Path) -> dict:
    return contents(write(tmp_path / "undisturbed", MADE))


def _in_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked process and return its exit status."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _write_until(folder: Path, moment: int) -> None:
    """Write the store; die without any clean-up before the `moment`-th fsync, rename or append."""
    die_before(moment)
    write(folder, MADE)


def test_killed_at_any_step_and_continued_equals_undisturbed(
    tmp_path: Path, undisturbed: dict
) -> None:
    moment, status = 0, 9
    while status == 9:
        moment += 1
        folder = tmp_path / f"killed{moment}"
        status = _in_child(lambda: _write_until(folder, moment))  # noqa: B023
        assert contents(write(folder, MADE)) == undisturbed
    assert status == 0
    assert moment > 20


def test_killed_again_and_again(tmp_path: Path, undisturbed: dict) -> None:
    folder, kills = tmp_path / "store", 0
    while _in_child(lambda: _write_until(folder, 11)) == 9:
        kills += 1
        assert kills < 30
    assert kills > 2
    assert contents(folder) == undisturbed


def test_line_cut_off_by_a_kill_does_not_count(tmp_path: Path, undisturbed: dict) -> None:
    folder = tmp_path / "store"
    assert _in_child(lambda: _write_until(folder, 20)) == 9
    lines = folder / "shards.jsonl"
    assert lines.read_text().endswith("\n")
    lines.write_text(lines.read_text() + '{"name": "batch_0000')
    assert contents(write(folder, MADE)) == undisturbed


def test_complete_store_is_left_alone(tmp_path: Path) -> None:
    folder = write(tmp_path / "store", MADE)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    write(folder, MADE)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_full_disk_keeps_finished_shards(
    tmp_path: Path, undisturbed: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, real, files = tmp_path / "store", store_writer.write_tensor_file, []

    def full(path: Path, *args: object) -> str:
        files.append(path)
        if len(files) == 4:
            path.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real(path, *args)

    monkeypatch.setattr(store_writer, "write_tensor_file", full)
    with pytest.raises(UserError, match="1 finished shards are intact"):
        write(folder, MADE)
    names = {path.name for path in folder.iterdir()}
    assert {"batch_00000_x.safetensors", "batch_00000_y.safetensors"} < names
    assert not any(name.endswith(".tmp") for name in names)
    assert contents(write(folder, MADE)) == undisturbed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "org/other"}, "model org/some-model there, org/other asked for"),
        ({"dataset": {"name": "scenes", "fingerprint": "g"}}, "dataset fingerprint f there, g"),
        ({"n_targets": 3}, "n_targets 2 there, 3 asked for"),
    ],
)
def test_another_capture_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    folder = write(tmp_path / "store", MADE)
    before = contents(folder)
    with pytest.raises(UserError, match=message):
        write(folder, MADE, **change)
    assert contents(folder) == before


def test_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"not empty and holds no capture \(it has thesis.tex\)"):
        write(tmp_path, MADE)
    assert contents(tmp_path) == {"thesis.tex": b"years of work"}


def test_two_captures_at_once_are_refused(tmp_path: Path) -> None:
    with (
        StoreWriter(tmp_path, manifest(), 40),
        pytest.raises(UserError, match="another process is capturing"),
    ):
        write(tmp_path, MADE)
    write(tmp_path, MADE)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_named(tmp_path: Path, wrong: float) -> None:
    made = make(9)
    made.batches[6].y[LAYERS - 1, 2, 3] = wrong
    with pytest.raises(UserError, match=r"y of language_model.model.layers.2.mlp in batch 6 \(s12"):
        write(tmp_path / "store", made)
    assert (tmp_path / "store" / "batch_00000_x.safetensors").exists()


def test_large_finite_values_are_kept(tmp_path: Path) -> None:
    """Their sum overflows float32."""
    made = make(2)
    made.batches[0].x[1, :3, 0] = torch.finfo(torch.bfloat16).max
    write(tmp_path / "store", made)


def test_nothing_captured_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing was captured"):
        write(tmp_path / "store", Made([], MADE.x, MADE.y, MADE.input_ids))


def test_model_does_not_wait_for_a_slow_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = store_writer.write_tensor_file

    def slow(*args: object) -> str:
        time.sleep(0.3)
        return real(*args)

    monkeypatch.setattr(store_writer, "write_tensor_file", slow)
    with StoreWriter(tmp_path, manifest(), 40) as writer:
        start = time.perf_counter()
        for batch in MADE.batches[:6]:  # two shards
            writer.add(batch)
        assert time.perf_counter() - start < 0.25
        writer.finish()
        assert time.perf_counter() - start > 0.6  # x and y of a shard are written side by side
