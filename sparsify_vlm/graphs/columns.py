"""The nodes that edges start from, as columns of the rows, and what each adds to the stream.

Columns: active features by (layer, position, index), then errors by (layer, position), then tokens
by position. With the gradient G[l] at the output of layer l, a feature s at position p counts

    Σ_{l written to by s} ⟨G[l][p], u_{s→l} W_{s→l}⟩

so that for each layer l all that its sources write there is one table of vectors, [S, slots, d], a
slot per active latent. Only the decoder rows of active latents are ever read. Tables that all fit
into memory are made once; else a few sources at a time, whenever they are needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify_vlm.replacement.local import LocalModel, Written


@dataclass
class Slots:
    """Where the latents of one layer stand. order [S, K]: a position's latents by index; active
    bool [S, K] in that order; first: the layer's first slot."""

    order: Tensor
    active: Tensor
    first: int

    @property
    def width(self) -> int:
        """K, slots per position."""
        return self.order.shape[1]


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
        self.slots: dict[int, Slots] = {}
        features, values, first = [], [], 0
        for layer, latents in sorted(local.latents.items()):
            order = latents.indices.masked_fill(latents.values <= 0, 1 << 60).argsort(dim=1)
            active = latents.values.gather(1, order) > 0
            self.slots[layer] = Slots(order, active, first)
            first += order.shape[1]
            position = active.nonzero()[:, 0]
            index = latents.indices.gather(1, order)[active]
            features.append(torch.stack([torch.full_like(index, layer), position, index], 1))
            values.append(latents.values.gather(1, order)[active])
        self.n_slots = first
        self.features = torch.cat(features)
        self.activations = torch.cat(values)
        self.n_errors = local.n_layers * self.S
        self._max_bytes, self._kept = max_bytes, self._bytes() <= max_bytes
        self._tables: dict[int, list[tuple[slice, Tensor]]] = {}

    @property
    def n_features(self) -> int:
        """n."""
        return len(self.features)

    @property
    def n(self) -> int:
        """Number of columns."""
        return self.n_features + self.n_errors + self.S

    def _bytes(self, layer: int | None = None) -> int:
        """Size of the tables of one layer or all."""
        layers = self.local.writes.values() if layer is None else [self.local.writes[layer]]
        slots = sum(w.u.shape[1] for written in layers for w in written)
        return slots * self.S * self.local.stack.d_model * self.local.errors.element_size()

    def tables(self, layer: int) -> Iterable[tuple[slice, Tensor]]:
        """What sources write to `layer`: their slots with the vectors [S, slots, d]."""
        if not self._kept:
            return self._made(layer)
        if layer not in self._tables:
            self._tables[layer] = list(self._made(layer))
        return self._tables[layer]

    def _made(self, layer: int) -> Iterator[tuple[slice, Tensor]]:
        """Tables of several sources together, as far as they fit; their slots have no gaps."""
        written = self.local.writes[layer]
        pieces = max(1, -(-2 * self._bytes(layer) // self._max_bytes))
        together = -(-len(written) // pieces)
        for first in range(0, len(written), max(1, together)):
            sources = written[first : first + together]
            table = torch.cat([self._vectors(layer, w) for w in sources], dim=1)
            start = self.slots[sources[0].source].first
            yield slice(start, start + table.shape[1]), table

    @torch.no_grad()
    def _vectors(self, layer: int, written: Written) -> Tensor:
        """u W [S, K, d] of one source."""
        clt, slots = self.local.clt, self.slots[written.source]
        s, t = self.local.coder_layer(written.source), self.local.coder_layer(layer)
        indices = self.local.latents[written.source].indices.gather(1, slots.order)
        first, *others = clt.tables(s, written.place)
        rows = first[indices]
        for W in others:
            rows = rows + W[indices]
        factor = clt.write_factor(s, t) * clt.out_scale(t)
        return rows * (written.u.gather(1, slots.order) * slots.active * factor)[..., None]

    def gathered(self, slots: Tensor, errors: Tensor, tokens: Tensor) -> Tensor:
        """Rows [T, columns] from sums by place: slots [S, T, n_slots], errors [L, S, T],
        tokens [S, T]."""
        T = tokens.shape[1]
        parts = [
            slots[:, :, place.first : place.first + place.width].transpose(1, 2)[place.active]
            for place in self.slots.values()
        ]
        parts += [errors.reshape(-1, T), tokens]
        return torch.cat(parts).T
