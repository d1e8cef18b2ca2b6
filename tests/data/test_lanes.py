"""Batches side by side: order, errors, shared weights, and the same activations as one by one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from stores import contents

from sparsify_vlm.data import capture as capturing
from sparsify_vlm.data.capture import CaptureConfig, capture
from sparsify_vlm.data.lanes import in_order, lanes, threads_divided
from sparsify_vlm.models import LoadedModel


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("slow", [0, 1, 4])
def test_results_come_in_order(n: int, slow: int) -> None:
    """Whichever item takes longest."""

    def work(item: int) -> int:
        time.sleep(0.02 if item == slow else 0.001)
        return item * item

    assert list(in_order(iter(range(8)), [work] * n)) == [i * i for i in range(8)]


def test_every_worker_has_one_item_at_a_time() -> None:
    busy = [threading.Lock() for _ in range(3)]

    def worker(own: threading.Lock) -> object:
        def work(item: int) -> int:
            assert own.acquire(blocking=False)
            time.sleep(0.002)
            own.release()
            return item

        return work

    assert list(in_order(iter(range(20)), [worker(own) for own in busy])) == list(range(20))


@pytest.mark.parametrize("n", [1, 2])
def test_errors_are_raised_after_the_results_before_them(n: int) -> None:
    def work(item: int) -> int:
        if item == 3:
            raise ValueError("three")
        return item

    results = in_order(iter(range(9)), [work] * n)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)
    assert not [t for t in threading.enumerate() if t.name.startswith("lane")]


def test_lanes_share_weights_and_nothing_else(vlm: LoadedModel) -> None:
    with threads(2):
        first, second = lanes(vlm)
        assert len(lanes(vlm, most=1)) == 1
    assert first is vlm
    assert second.processor is vlm.processor
    for (name, ours), (other, theirs) in zip(
        vlm.model.named_parameters(), second.model.named_parameters(), strict=True
    ):
        assert name == other
        assert ours is theirs
    assert not {id(m) for m in vlm.model.modules()} & {id(m) for m in second.model.modules()}
    own = {id(m) for m in second.model.modules()}
    assert all(id(block.mlp) in own for block in second.stack._blocks)


def test_threads_are_divided_and_given_back() -> None:
    with threads(2):
        with threads_divided(2):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2


def test_store_is_the_same_with_several_lanes(
    vlm: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one torch thread there is one lane; two threads make two, of one thread each."""
    used = []
    real = capturing._token_rows

    def noted(cfg: object, loaded: LoadedModel, *rest: object) -> object:
        used.append(id(loaded))
        time.sleep(0.02)  # so that one lane cannot do it all
        return real(cfg, loaded, *rest)

    monkeypatch.setattr(capturing, "_token_rows", noted)
    stores = []
    for n in (1, 2):
        cfg = CaptureConfig(
            model="tiny-llava",
            output_dir=str(tmp_path / str(n)),
            dataset="shapes",
            max_examples=26,
            batch_size=4,
            shard_tokens=400,
            quiet=True,
        )
        used.clear()
        with threads(n):
            stores.append(contents(capture(cfg, vlm)))
        assert len(set(used)) == n
    assert stores[0] == stores[1]
