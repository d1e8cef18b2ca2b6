"""A shuffled order of a store's token rows that reads the disk in runs and can start anywhere.

    shards                     in random order, taken in windows of `WINDOW_SHARDS`
    blocks of `BLOCK_ROWS`     consecutive rows of a shard; those of a window in random order
    rows                       consecutive blocks fill buffers of `BUFFER_ROWS`, shuffled within

A batch so draws rows from all shards of a window and from hundreds of samples, while what it
touches on disk are runs of `BLOCK_ROWS` rows, all read within one buffer's time. Everything depends
on the seed and the shards' lengths alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

BLOCK_ROWS = 32
BUFFER_ROWS = 16_384
WINDOW_SHARDS = 16

Rows = NDArray[np.int64]


class RowOrder:
    """The order; rows are numbered through all shards.

    Memory: 8 bytes per row of one window.
    """

    def __init__(self, lengths: Sequence[int], seed: int) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.seed = seed % 2**63  # numpy's generators take no negative seeds
        self._starts = np.concatenate([[0], np.cumsum(self.lengths)])
        shuffled = self._generator(0).permutation(len(self.lengths))
        self._windows = [
            shuffled[i : i + WINDOW_SHARDS] for i in range(0, len(shuffled), WINDOW_SHARDS)
        ]
        sizes = [int(self.lengths[window].sum()) for window in self._windows]
        self._window_starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self._cached: tuple[int, Rows] | None = None

    def __len__(self) -> int:
        return int(self._starts[-1])

    def slice(self, start: int, stop: int) -> Rows:
        """The rows at places `start` to `stop` of the order."""
        parts = [np.empty(0, dtype=np.int64)]
        stop = min(stop, len(self))
        while start < stop:
            window = int(np.searchsorted(self._window_starts, start, side="right")) - 1
            first = int(self._window_starts[window])
            part = self._window(window)[start - first : stop - first]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts)

    def _generator(self, *stage: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *stage])

    def _window(self, window: int) -> Rows:
        if self._cached is None or self._cached[0] != window:
            self._cached = (window, self._shuffle(window))
        return self._cached[1]

    def _shuffle(self, window: int) -> Rows:
        generator = self._generator(1, window)
        starts = [
            np.arange(self._starts[s], self._starts[s + 1], BLOCK_ROWS)
            for s in self._windows[window]
        ]
        ends = [self._starts[s + 1] for s in self._windows[window]]
        first = np.concatenate(starts)
        last = np.repeat(ends, [len(part) for part in starts])
        order = generator.permutation(len(first))
        rows = _ranges(first[order], np.minimum(first + BLOCK_ROWS, last)[order])
        for begin in range(0, len(rows), BUFFER_ROWS):
            rows[begin : begin + BUFFER_ROWS] = generator.permutation(
                rows[begin : begin + BUFFER_ROWS]
            )
        return rows


def _ranges(starts: Rows, stops: Rows) -> Rows:
    """arange(start, stop) of every pair, one after the other."""
    lengths = stops - starts
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(lengths.sum())
