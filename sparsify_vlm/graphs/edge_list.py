"""Edges while a graph is made: rows come in any order, and leave by target, then source.

A row's edges are held with 8 bytes each, one batch behind the other in space for all there can be,
of which a system hands out only what is written to. When all are there the graph's own tensors are
made and every row is written to its place; nothing is sorted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify_vlm.graphs.influence import Edges


class EdgeList:
    """Rows of a graph of `n` nodes, with at most `capacity` entries in all."""

    def __init__(self, n: int, capacity: int) -> None:
        self.counts = torch.zeros(n, dtype=torch.int64)
        self._source = torch.empty(capacity, dtype=torch.int32)
        self._weight = torch.empty(capacity)
        self._batches: list[Tensor] = []
        self._size = 0

    def add(self, targets: Tensor, rows: Tensor, sources: Tensor | None = None) -> None:
        """Non-zero entries of rows [T, columns], each target once; sources [columns], ascending:
        the columns' nodes where they are not the first ones."""
        row, column = rows.nonzero(as_tuple=True)
        here = slice(self._size, self._size + len(row))
        self._weight[here] = rows[row, column]
        self._source[here] = column if sources is None else sources[column]
        self.counts[targets] = row.bincount(minlength=len(targets))
        self._batches.append(targets)
        self._size = here.stop

    def joined(self) -> Edges:
        """All edges; the rows are let go."""
        n, weight, source = len(self.counts), self._weight, self._source
        del self._weight, self._source
        weight = self._placed(weight, torch.float32)
        source = self._placed(source, torch.int64)
        return Edges(torch.arange(n).repeat_interleave(self.counts), source, weight, n)

    def _placed(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """The values of all batches, by target."""
        found = torch.empty(self._size, dtype=dtype)
        first, start = self.counts.cumsum(0) - self.counts, 0
        for targets in self._batches:
            counts = self.counts[targets]
            shift = first[targets] - (counts.cumsum(0) - counts)
            places = shift.repeat_interleave(counts)
            places += torch.arange(len(places))
            found[places] = values[start : start + len(places)].to(dtype)
            start += len(places)
        return found
