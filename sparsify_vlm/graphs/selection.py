"""Which features become nodes when not all can: the most influential first, in rounds.

Rows made so far are held over all columns. Normalised by the sum of their absolute values they give
each feature's influence over the targets through features that already have a row; the best ones
without a row come next. Where rows times columns outgrow `max_values`, the columns of the least
influential features are let go: these can no longer be chosen, but stay in the rows' sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 1e-8
PIECE = 64
"""Rows whose absolute values are held at a time."""


class HeldRows:
    """Rows of targets (first) and features (as they are chosen) over the columns that are held."""

    def __init__(self, n_features: int, n_columns: int, max_values: int) -> None:
        self.n_features, self.max_values = n_features, max_values
        self.held = torch.arange(n_columns)
        self.rows = torch.zeros(0, n_columns)
        self.sums = torch.zeros(0)
        self.nodes = torch.zeros(0, dtype=torch.int64)
        """Feature of each row; -1 for targets."""

    def add(self, nodes: Tensor, rows: Tensor) -> None:
        """Rows [T, all columns] of features, or of targets with nodes -1."""
        rows = rows.float().cpu()
        self.sums = torch.cat([self.sums, rows.abs().sum(1)])
        if len(self.held) < rows.shape[1]:
            rows = rows[:, self.held]
        self.rows = torch.cat([self.rows, rows])
        self.nodes = torch.cat([self.nodes, nodes.cpu()])

    def influence(self, weights: Tensor) -> Tensor:
        """[held]: what reaches the held columns from the targets with `weights` [targets]."""
        chosen = (self.nodes >= 0).nonzero()[:, 0]
        columns = torch.searchsorted(self.held, self.nodes[chosen])
        scale = 1 / self.sums.clamp(min=FLOOR)
        between = self.rows[:, columns].abs() * scale[:, None]
        flow = torch.zeros(len(self.nodes))
        flow[: len(weights)] = weights
        now = flow.clone()
        while bool(now.any()):
            reached = now @ between
            now = torch.zeros_like(now)
            now[chosen] = reached
            flow += now
        parts = zip((flow * scale).split(PIECE), self.rows.split(PIECE), strict=True)
        return sum((share @ rows.abs() for share, rows in parts), torch.zeros(len(self.held)))

    def next(self, weights: Tensor, count: int, wanted: int) -> Tensor:
        """The `count` most influential features without a row, best first; and let go of columns
        if the rows to come would be too many values, but for the best `wanted`."""
        reached = self.influence(weights)
        free = (self.held < self.n_features) & ~torch.isin(self.held, self.nodes)
        room = max(self.max_values // (len(self.nodes) + count), int((~free).sum()) + wanted)
        if room < len(self.held):
            kept = reached.masked_fill(~free, torch.inf).topk(room).indices.sort().values
            self.held, self.rows = self.held[kept], self.rows[:, kept]
            reached, free = reached[kept], free[kept]
        order = reached.masked_fill(~free, -1).argsort(descending=True, stable=True)
        return self.held[order[: min(count, int(free.sum()))]]
