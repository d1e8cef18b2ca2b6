"""The nodes that edges start from, as columns of the rows, and what each adds to the stream.

Columns: active features by (layer, position, index), then errors by (layer, position), then tokens
by position. With the gradient G[l] at the output of layer l, a feature s at position p counts

    Σ_{l written to by s} ⟨G[l][p], u_{s→l} W_{s→l}⟩

so that for each layer l the vectors that its sources write there stand in tables by position. Only
the decoder rows of active latents are ever read. Positions have different numbers of features: one
table has a place for as many as there are on average, at every position, and others, each twice as
wide, hold what is left of the positions with more. Tables that all fit into memory are made once;
else those of a few sources at a time, whenever they are needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify_vlm.replacement.local import LocalModel, Written


@dataclass
class Table:
    """Vectors [positions, width, d] of features at some positions, ascending; None: at all."""

    positions: Tensor | None
    vectors: Tensor

    def products(self, G: Tensor) -> Tensor:
        """⟨G, vectors⟩ [at most positions, width, T] for G [T, P, d] at the first P positions."""
        P, here = G.shape[1], self.positions
        if here is None:
            at, vectors = G, self.vectors[:P]
        else:
            count = int((here < P).sum())
            at, vectors = G.index_select(1, here[:count]), self.vectors[:count]
        return torch.bmm(vectors.to(G.dtype), at.permute(1, 2, 0))


@dataclass
class Tables:
    """What the features of consecutive columns write to one layer. slots [columns]: where each is
    among the places of all the tables in turn."""

    columns: slice
    slots: Tensor
    tables: list[Table]

    def products(self, G: Tensor) -> Tensor:
        """⟨G, vectors⟩ [columns, T]. Columns at positions beyond G's are undefined."""
        size = sum(table.vectors[..., 0].numel() for table in self.tables)
        found, first = G.new_empty(size, len(G)), 0
        for table in self.tables:
            made = table.products(G)
            found[first : first + made[..., 0].numel()] = made.flatten(0, 1)
            first += table.vectors[..., 0].numel()
        return found.index_select(0, self.slots)


class Columns:
    """Columns of a prompt's rows.

    Attributes:
        features: [n, 3] layer, position, index of every active feature.
        activations: [n].
        n_errors: L·S.
    """

    def __init__(self, local: LocalModel, max_bytes: int) -> None:
        """`max_bytes`: the most that tables may take; kept if they all fit."""
        self.local = local
        self.S = local.n_positions
        self._order: dict[int, Tensor] = {}
        self._of: dict[int, slice] = {}
        features, values, first = [], [], 0
        for layer, latents in sorted(local.latents.items()):
            order = latents.indices.masked_fill(latents.values <= 0, 1 << 60).argsort(dim=1)
            active = latents.values.gather(1, order) > 0
            position = active.nonzero()[:, 0]
            self._order[layer] = position * order.shape[1] + order[active]
            index = latents.indices.take(self._order[layer])
            self._of[layer] = slice(first, first + len(index))
            first += len(index)
            features.append(torch.stack([torch.full_like(index, layer), position, index], 1))
            values.append(latents.values.take(self._order[layer]))
        self.features = torch.cat(features)
        self.activations = torch.cat(values)
        self.n_errors = local.n_layers * self.S
        self._max_bytes, self._kept = max_bytes, self._bytes() <= max_bytes
        self._tables: dict[int, list[Tables]] = {}

    @property
    def n_features(self) -> int:
        """n."""
        return len(self.features)

    @property
    def n(self) -> int:
        """Number of columns."""
        return self.n_features + self.n_errors + self.S

    def _bytes(self, layer: int | None = None) -> int:
        """Size of the tables of one layer or all, about half of their places unused."""
        layers = self.local.writes.values() if layer is None else [self.local.writes[layer]]
        written = sum(_length(self._of[w.source]) for sources in layers for w in sources)
        return 2 * written * self.local.stack.d_model * self.local.errors.element_size()

    def tables(self, layer: int) -> Iterable[Tables]:
        """What sources write to `layer`."""
        if not self._kept:
            return self._made(layer)
        if layer not in self._tables:
            self._tables[layer] = list(self._made(layer))
        return self._tables[layer]

    def forget(self) -> None:
        """Let go of the tables."""
        self._tables = {}

    def _made(self, layer: int) -> Iterator[Tables]:
        """Tables of several sources together, as far as they fit; their columns have no gaps."""
        written = self.local.writes[layer]
        pieces = max(1, -(-self._bytes(layer) // self._max_bytes))
        together = max(1, -(-len(written) // pieces))
        for first in range(0, len(written), together):
            sources = written[first : first + together]
            columns = slice(self._of[sources[0].source].start, self._of[sources[-1].source].stop)
            if _length(columns):
                yield self._tabulated(columns, [self._vectors(layer, w) for w in sources])

    def _tabulated(self, columns: slice, parts: list[Tensor]) -> Tables:
        """Vectors [columns, d] in tables by position and by rank among the position's."""
        vectors = torch.cat(parts)
        position = self.features[columns, 1]
        counts = position.bincount(minlength=self.S)
        order = position.argsort(stable=True)
        rank = torch.empty_like(order)
        starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
        rank[order] = torch.arange(len(order), device=order.device) - starts
        tables, slots = [], torch.empty_like(rank)
        first, start, width = 0, 0, -(-len(order) // self.S)
        while start < (most := int(counts.max())):
            width = min(width, most - start)
            positions = (counts > start).nonzero()[:, 0] if start else None
            at = torch.zeros_like(counts)
            here = torch.arange(self.S, device=at.device) if positions is None else positions
            at[here] = torch.arange(len(here), device=at.device)
            inside = (rank >= start) & (rank < start + width)
            places = at[position[inside]] * width + rank[inside] - start
            table = vectors.new_zeros(len(here) * width, vectors.shape[1])
            table[places] = vectors[inside]
            slots[inside] = first + places
            tables.append(Table(positions, table.view(len(here), width, -1)))
            first, start, width = first + len(table), start + width, 2 * width
        return Tables(columns, slots, tables)

    @torch.no_grad()
    def _vectors(self, layer: int, written: Written) -> Tensor:
        """u W [columns, d] of one source."""
        clt, order = self.local.clt, self._order[written.source]
        s, t = self.local.coder_layer(written.source), self.local.coder_layer(layer)
        indices = self.features[self._of[written.source], 2]
        first, *others = clt.tables(s, written.place)
        rows = first[indices]
        for W in others:
            rows = rows + W[indices]
        factor = clt.write_factor(s, t) * clt.out_scale(t)
        return rows * (written.u.take(order) * factor)[:, None]


def _length(columns: slice) -> int:
    return int(columns.stop - columns.start)
