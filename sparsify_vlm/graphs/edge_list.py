"""Edges while a graph is made: rows come in any order, and leave by target, then source.

A row's edges are held with 8 bytes each. When all are there the graph's own tensors are made and
every row is written to its place; nothing is sorted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify_vlm.graphs.influence import Edges


class EdgeList:
    """Rows of a graph of `n` nodes."""

    def __init__(self, n: int) -> None:
        self.counts = torch.zeros(n, dtype=torch.int64)
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, targets: Tensor, rows: Tensor, sources: Tensor | None = None) -> None:
        """Non-zero entries of rows [T, columns], each target once; sources [columns], ascending:
        the columns' nodes where they are not the first ones."""
        row, column = rows.nonzero(as_tuple=True)
        weight = rows[row, column].float()
        self.counts[targets] = row.bincount(minlength=len(targets))
        source = column if sources is None else sources[column]
        self._parts.append((targets, source.int(), weight))

    def joined(self) -> Edges:
        """All edges; the rows are let go."""
        n, first = len(self.counts), self.counts.cumsum(0) - self.counts
        source = torch.empty(int(self.counts.sum()), dtype=torch.int64)
        weight = torch.empty(len(source))
        while self._parts:
            targets, its_source, its_weight = self._parts.pop()
            counts = self.counts[targets]
            shift = first[targets] - (counts.cumsum(0) - counts)
            places = torch.arange(len(its_source)) + shift.repeat_interleave(counts)
            source[places], weight[places] = its_source.long(), its_weight
        return Edges(torch.arange(n).repeat_interleave(self.counts), source, weight, n)
