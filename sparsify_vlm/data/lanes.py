"""Batches that run side by side on the cores of a CPU.

A small model leaves cores idle: the threads of an operation wait for its slowest, and all wait
while Python goes from one operation to the next. So the cores are divided into lanes, each with a
batch of its own and fewer threads per operation. A lane has its own module objects, since hooks and
what they hold are no matter of two threads; the weights are the same tensors.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from sparsify_vlm.models import LoadedModel

T = TypeVar("T")
R = TypeVar("R")
MOST = 4
"""Lanes at most: what a forward pass does in Python is done by one lane at a time."""


def lanes(loaded: LoadedModel, most: int = MOST) -> list[LoadedModel]:
    """The model once per lane: on a CPU as many as torch has threads, at most `most`; else once."""
    whole = loaded.device.type == "cpu" and not hasattr(loaded.model, "hf_device_map")
    n = max(1, min(torch.get_num_threads(), MOST, most)) if whole else 1
    return [loaded, *(_twin(loaded) for _ in range(n - 1))]


def _twin(loaded: LoadedModel) -> LoadedModel:
    """The same weights and processor under other module objects."""
    model = loaded.model
    shared = [*model.parameters(), *model.buffers(), loaded.processor, model.config]
    return copy.deepcopy(loaded, {id(thing): thing for thing in shared})


@contextmanager
def threads_divided(n_lanes: int) -> Iterator[None]:
    """Context in which torch's operations have the n-th part of their threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // n_lanes))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_order(items: Iterator[T], workers: Sequence[Callable[[T], R]]) -> Generator[R, None, None]:
    """What the workers make of the items, in the items' order; every worker in a thread of its own.

    One worker works in the calling thread. Of several, each has an item and one more item waits. An
    exception, of the items or of a worker, is raised here; closing ends the threads.
    """
    if len(workers) == 1:
        yield from map(workers[0], items)
        return
    free: SimpleQueue[Callable[[T], R]] = SimpleQueue()
    for worker in workers:
        free.put(worker)

    def work(item: T) -> R:
        worker = free.get()
        try:
            return worker(item)
        finally:
            free.put(worker)

    pool = ThreadPoolExecutor(len(workers), "lane")
    running: deque[Future[R]] = deque()
    try:
        for item in items:
            running.append(pool.submit(work, item))
            if len(running) > len(workers):
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
