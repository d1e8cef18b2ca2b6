"""The nodes that edges start from, as columns of the rows, and what each adds to the stream.

Columns: active features by (layer, position, index), then errors by (layer, position), then tokens
by position. With the gradient G[l] at the output of layer l, a feature s at position p counts

    Σ_{l written to by s} ⟨G[l][p], u_{s→l} W_{s→l}⟩

so that for each layer l all that is written there is one table of vectors, [S, slots, d]: a slot
per active latent of each source and one for the error. Only the decoder rows of active latents are
ever read.
"""

from __future__ import annotations

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

    def __init__(self, local: LocalModel, keep_bytes: int) -> None:
        """`keep_bytes`: tables are kept for the next batch of targets if they all fit."""
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
        self._tables: dict[int, Tensor] | None = {} if self._bytes() <= keep_bytes else None

    @property
    def n_features(self) -> int:
        """n."""
        return len(self.features)

    @property
    def n(self) -> int:
        """Number of columns."""
        return self.n_features + self.n_errors + self.S

    def _bytes(self) -> int:
        slots = sum(1 + sum(w.u.shape[1] for w in ws) for ws in self.local.writes.values())
        return slots * self.S * self.local.stack.d_model * self.local.errors.element_size()

    def table(self, layer: int) -> Tensor:
        """[S, 1 + slots of its sources, d]: the error at `layer`, then what its sources write."""
        if self._tables is not None and layer in self._tables:
            return self._tables[layer]
        with torch.no_grad():
            parts = [self.local.errors[layer][:, None]]
            parts += [self._written(layer, w.source, w.place, w.u) for w in self.sources(layer)]
            table = torch.cat(parts, dim=1)
        if self._tables is not None:
            self._tables[layer] = table
        return table

    def sources(self, layer: int) -> list[Written]:
        """What is written to `layer`, by source; sources follow each other without a gap."""
        return self.local.writes[layer]

    def span(self, layer: int) -> slice:
        """The slots of those sources, in the order of `table`."""
        written = self.sources(layer)
        if not written:
            return slice(0, 0)
        last = self.slots[written[-1].source]
        return slice(self.slots[written[0].source].first, last.first + last.width)

    def _written(self, layer: int, source: int, place: int, u: Tensor) -> Tensor:
        clt, order = self.local.clt, self.slots[source].order
        s = self.local.coder_layer(source)
        indices = self.local.latents[source].indices.gather(1, order)
        first, *others = clt.tables(s, place)
        rows = first[indices]
        for W in others:
            rows = rows + W[indices]
        t = self.local.coder_layer(layer)
        active = self.slots[source].active
        factor = clt.write_factor(s, t) * clt.out_scale(t)
        return rows * (u.gather(1, order) * active * factor)[..., None]

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
