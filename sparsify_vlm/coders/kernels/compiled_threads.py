"""Ranges of rows over threads.

The compiled loops hold no Python lock, so ordinary threads run them side by side. Unlike numba's
own threads they may be called from several Python threads at once, and they wait without spinning.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import torch

RANGES_PER_THREAD = 4
"""So that a thread that was held up does not hold up the others."""


class _Crew:
    """The helping threads of this process, as many as were ever asked for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._size = 0

    def pool(self, size: int) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None or self._size < size:
                # A smaller one ends by itself once nobody holds it.
                self._pool, self._size = ThreadPoolExecutor(size, "compiled-kernels"), size
            return self._pool


_crew = _Crew()


def _forget() -> None:
    """A forked process has none of its parent's threads."""
    global _crew
    _crew = _Crew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def over_rows(run: Callable[[int, int], None], cumulative: np.ndarray) -> None:
    """run(lo, hi) over all rows, in ranges of about equal cost, by as many threads as torch uses.

    `cumulative` [rows + 1] is the cost of all rows before each; it must not fall.
    """
    rows, threads = len(cumulative) - 1, min(torch.get_num_threads(), len(cumulative) - 1)
    if threads <= 1:
        run(0, rows)
        return
    ranges = deque(itertools.pairwise(_bounds(cumulative, threads * RANGES_PER_THREAD)))

    def work() -> None:
        while True:
            try:
                lo, hi = ranges.popleft()
            except IndexError:
                return
            run(lo, hi)

    pool = _crew.pool(threads - 1)
    helpers = [pool.submit(work) for _ in range(threads - 1)]
    try:
        work()
    finally:
        ranges.clear()
        wait([helper for helper in helpers if not helper.cancel()])
    for helper in helpers:
        if not helper.cancelled():
            helper.result()


def _bounds(cumulative: np.ndarray, count: int) -> list[int]:
    """Bounds of at most `count` ranges that together are all rows, none of them empty."""
    shares = np.linspace(cumulative[0], cumulative[-1], count + 1)[1:-1]
    inner = np.searchsorted(cumulative, shares)
    bounds: list[int] = np.unique(np.concatenate([[0], inner, [len(cumulative) - 1]])).tolist()
    return bounds
