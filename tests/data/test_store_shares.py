"""Shares of a store: kills at every step, other numbers of processes, against one process."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from stores import Made, contents, die_before, make, manifest, write

from sparsify_vlm.data import ActivationStore
from sparsify_vlm.data.store_format import read_shards
from sparsify_vlm.data.store_shares import Share, has_parts
from sparsify_vlm.data.store_writer import StoreWriter
from sparsify_vlm.errors import UserError

SAMPLES = 2
MADE = make(11, SAMPLES)
ABOUT = {"batch_size": SAMPLES}


def share(folder: Path, rank: int, world: int, **changes: Any) -> Share:
    store = StoreWriter(folder, manifest(**ABOUT | changes), 40)
    return Share(store, rank, world)


def run(folder: Path, rank: int, world: int, made: Made = MADE) -> bool:
    """One process's capture. Returns whether it joined the store."""
    with share(folder, rank, world) as mine:
        if not mine.store.complete:
            for number, batch in enumerate(made.batches):
                if mine.wants(number):
                    batch.number = number
                    mine.add(batch)
            mine.finish()
    return mine.store.complete


def run_all(folder: Path, ranks: Sequence[int]) -> None:
    joined = [run(folder, rank, len(ranks)) for rank in ranks]
    assert joined[-1]
    assert not any(joined[: min(len(ranks), len(MADE.batches)) - 1])


def by_sample(store: ActivationStore) -> dict[int, list[torch.Tensor]]:
    """All columns of every sample's rows."""
    rows = store.rows(range(len(store)))
    table = [rows.x.transpose(0, 1), rows.y.transpose(0, 1), rows.input_ids, rows.position]
    table += [rows.role, rows.patch]
    return {
        int(number): [column[rows.sample == number] for column in table]
        for number in rows.sample.unique()
    }


def assert_same_samples(folder: Path, single: Path) -> None:
    ours, theirs = (by_sample(ActivationStore(path)) for path in (folder, single))
    assert ours.keys() == theirs.keys()
    for number, columns in ours.items():
        for one, other in zip(columns, theirs[number], strict=True):
            assert torch.equal(one, other)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("single") / "store", MADE, **ABOUT)


@pytest.mark.parametrize("ranks", [[0], [0, 1], [1, 0], [2, 0, 1], list(range(12))], ids=str)
def test_shares_make_the_store_of_one_process(
    tmp_path: Path, single: Path, ranks: list[int]
) -> None:
    """In whatever order they end, and with more processes than batches."""
    run_all(tmp_path / "s", ranks)
    assert not has_parts(tmp_path / "s")
    assert_same_samples(tmp_path / "s", single)
    store, one = (ActivationStore(path) for path in (tmp_path / "s", single))
    assert store.manifest["tokens"] == one.manifest["tokens"]
    assert sorted(store.manifest["skipped"]) == sorted(one.manifest["skipped"])
    numbers = [number for shard in store.shards for number in shard.numbers or []]
    assert sorted(numbers) == list(range(11))


def test_the_order_in_which_processes_end_changes_nothing(tmp_path: Path) -> None:
    run_all(tmp_path / "a", [0, 1, 2])
    run_all(tmp_path / "b", [2, 1, 0])
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def _mortal(folder: Path, rank: int, world: int, moment: int) -> int:
    """A process that dies without any clean-up before its `moment`-th step; its exit status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    mortal = die_before(moment)
    os.unlink = os.rmdir = mortal(os.unlink)
    try:
        run(folder, rank, world)
    finally:
        os._exit(0)


@pytest.mark.parametrize("after", [[0, 1], [0], [1, 2, 0]], ids=str)
def test_killed_at_any_step_and_continued(tmp_path: Path, single: Path, after: list[int]) -> None:
    """Process 1 of 2 dies; then as many, fewer or more processes go on."""
    moment, status = -len(after) % 3, 9  # between them the three try every step
    while status == 9:
        moment += 3
        folder = tmp_path / f"killed{moment}"
        run(folder, 0, 2)
        status = _mortal(folder, 1, 2, moment)
        for rank in after:
            run(folder, rank, len(after))
        assert_same_samples(folder, single)
        assert not has_parts(folder)
    assert moment > 20


def test_killed_in_both_and_continued_by_three(tmp_path: Path, single: Path) -> None:
    assert _mortal(tmp_path / "s", 0, 2, 12) == _mortal(tmp_path / "s", 1, 2, 17) == 9
    before = {
        tuple(shard.numbers or ())
        for part in (tmp_path / "s").glob("part_*")
        for shard in read_shards(part)
    }
    assert before
    run_all(tmp_path / "s", [0, 1, 2])
    after = {tuple(shard.numbers or ()) for shard in read_shards(tmp_path / "s")}
    assert before <= after  # what was finished was not captured again
    assert_same_samples(tmp_path / "s", single)


def test_begun_by_one_process_and_continued_by_two(tmp_path: Path, single: Path) -> None:
    with StoreWriter(tmp_path, manifest(**ABOUT), 40) as writer:
        for batch in MADE.batches[:7]:
            writer.add(batch)
        writer.flush()
    run_all(tmp_path, [0, 1])
    assert_same_samples(tmp_path, single)


def test_batches_without_samples(tmp_path: Path) -> None:
    """Their skipped samples are listed, also where a process has nothing else."""
    made = make(4, SAMPLES)
    for number in (1, 3):
        empty = make(1, 0).batches[0]
        empty.skipped = [f"bad{number}{i}: broken" for i in range(2)]
        made.batches[number] = empty
    for rank in (0, 1):
        run(tmp_path, rank, 2, made)
    store = ActivationStore(tmp_path)
    assert store.n_samples == 4
    assert store.manifest["skipped"] == [
        f"bad{number}{i}: broken" for number in (1, 3) for i in range(2)
    ]
    assert sorted(by_sample(store)) == [0, 1, 4, 5]


def test_nothing_captured_is_an_error(tmp_path: Path) -> None:
    made = make(2, 0)
    assert not run(tmp_path, 0, 2, made)
    with pytest.raises(UserError, match="nothing was captured"):
        run(tmp_path, 1, 2, made)


def test_another_capture_is_refused(tmp_path: Path) -> None:
    run(tmp_path, 0, 2)
    with (
        pytest.raises(UserError, match="model org/some-model there, org/other"),
        share(tmp_path, 1, 2, model="org/other"),
    ):
        pass
    assert run(tmp_path, 1, 2)


@pytest.mark.parametrize(("rank", "world"), [(1, 2), (0, 1)])
def test_a_process_of_an_earlier_run_is_not_doubled(tmp_path: Path, rank: int, world: int) -> None:
    with (
        share(tmp_path, 1, 2),
        pytest.raises(UserError, match="another process is capturing"),
        share(tmp_path, rank, world),
    ):
        pass
    run_all(tmp_path, [0, 1])


def test_complete_store_is_left_alone(tmp_path: Path) -> None:
    run_all(tmp_path, [0, 1])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert run(tmp_path, 0, 3)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
