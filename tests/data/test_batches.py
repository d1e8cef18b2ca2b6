from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest

from sparsify_vlm.data import BadSample, DataConfig, SampleSource, batches, open_samples, prefetched
from sparsify_vlm.models import LoadedModel

CTX_LEN = 64
N = 23


@pytest.fixture
def source(vlm: LoadedModel) -> SampleSource:
    return open_samples(DataConfig(max_examples=N), vlm)


def ids(source: SampleSource, vlm: LoadedModel, size: int, **options: Any) -> list[list[str]]:
    return [batch.ids for batch in batches(source, vlm, size, CTX_LEN, **options)]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranks_together_see_the_global_batches(
    source: SampleSource, vlm: LoadedModel, world: int
) -> None:
    order = [sample.id for sample in source]
    parts = [ids(source, vlm, 2, rank=rank, world=world) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    together = [list(chain(*of_ranks)) for of_ranks in zip(*parts, strict=True)]
    step = 2 * world
    assert together == [order[i : i + step] for i in range(0, N, step)]
    assert all(len(batch) == 2 for part in parts for batch in part[:-1])


def test_a_late_start_continues_where_it_was(source: SampleSource, vlm: LoadedModel) -> None:
    everything = ids(source, vlm, 4, rank=1, world=2)
    for start in range(len(everything) + 1):
        assert ids(source, vlm, 4, start=start, rank=1, world=2) == everything[start:]


@pytest.fixture
def damaged(vlm: LoadedModel, pictures: Path) -> Path:
    """Ten rows, the third without its image, the fourth with half of it."""
    (pictures / "p2.png").unlink()
    data = (pictures / "p3.png").read_bytes()
    (pictures / "p3.png").write_bytes(data[: len(data) // 2])
    rows = [{"image": f"p{i}.png", "question": "what colour?", "answer": "red"} for i in range(10)]
    (pictures / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return pictures / "rows.jsonl"


def opened(vlm: LoadedModel, path: Path, **flags: Any) -> SampleSource:
    return open_samples(DataConfig(dataset=str(path), shuffle_seed=-1, **flags), vlm)


def rows_of(found: list[list[str]]) -> list[list[int]]:
    return [[int(id.split("#")[1]) for id in batch] for batch in found]


def test_a_bad_image_stops_and_is_named(vlm: LoadedModel, damaged: Path) -> None:
    with pytest.raises(BadSample, match=r"^rows\.jsonl#2: image p2\.png is missing"):
        ids(opened(vlm, damaged), vlm, 4)


@pytest.mark.parametrize("streamed", [False, True])
def test_skipped_images_shift_nothing(vlm: LoadedModel, damaged: Path, streamed: bool) -> None:
    if streamed:
        from datasets import Dataset

        rows = [json.loads(line) for line in damaged.read_text().splitlines()]
        for row in rows:
            row["image"] = f"pictures/{row['image']}"
        parquet = damaged.parent.parent / "rows.parquet"
        Dataset.from_list(rows).to_parquet(parquet)
        damaged = parquet
    source = opened(vlm, damaged, skip_bad=True, streaming=streamed)
    assert rows_of(ids(source, vlm, 4)) == [[0, 1], [4, 5, 6, 7], [8, 9]]
    assert len(source.bad) == 2
    assert "p2.png is missing" in source.bad[0]
    assert "p3.png" in source.bad[1]
    assert rows_of(ids(source, vlm, 4, start=1)) == [[4, 5, 6, 7], [8, 9]]
    assert len(source.bad) == 2


def test_a_rank_without_samples_still_counts_the_batch(vlm: LoadedModel, damaged: Path) -> None:
    source = opened(vlm, damaged, skip_bad=True)
    first, second = (rows_of(ids(source, vlm, 2, rank=r, world=2)) for r in range(2))
    assert first == [[0, 1], [4, 5], [8]]
    assert second == [[], [6, 7], [9]]
    (empty, *_) = batches(source, vlm, 2, CTX_LEN, rank=1, world=2)
    assert len(empty) == 0
    assert empty.inputs == {}


def test_samples_too_long_are_skipped_too(vlm: LoadedModel, pictures: Path) -> None:
    questions = ["what colour?", "what colour? " * 30, "what shape?"]
    rows = [{"image": f"p{i}.png", "question": q} for i, q in enumerate(questions)]
    (pictures / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = opened(vlm, pictures / "rows.jsonl", skip_bad=True)
    assert rows_of(ids(source, vlm, 3, with_answer=False)) == [[0, 2]]
    assert "raise --ctx_len" in source.bad[0]


def test_the_limit_on_pixels_reaches_the_decoder(vlm: LoadedModel, pictures: Path) -> None:
    source = opened(vlm, pictures, skip_bad=True, max_image_pixels=48 * 48 - 1)
    assert ids(source, vlm, 5) == [[], []]
    assert len(source.bad) == 10


def test_prefetching_changes_nothing(source: SampleSource, vlm: LoadedModel) -> None:
    ahead = [batch.ids for batch in prefetched(batches(source, vlm, 4, CTX_LEN))]
    assert ahead == ids(source, vlm, 4)


def test_prefetching_runs_ahead_and_ends_when_closed() -> None:
    made: list[int] = []
    closed: list[bool] = []

    def items() -> Iterator[int]:
        try:
            for i in range(100):
                made.append(i)
                yield i
        finally:
            closed.append(True)

    ahead = prefetched(items(), depth=3)
    assert list(islice(ahead, 2)) == [0, 1]
    deadline = time.monotonic() + 5
    while len(made) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(made) == 6  # two taken, three waiting, one in hand
    ahead.close()
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())
    assert len(made) == 6
    assert closed


def test_prefetching_raises_at_its_place() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise BadSample("x", "broken")

    ahead = prefetched(items())
    assert next(ahead) == 1
    with pytest.raises(BadSample, match="x: broken"):
        next(ahead)
