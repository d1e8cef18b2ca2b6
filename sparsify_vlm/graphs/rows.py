"""Rows of the adjacency matrix: from targets backwards to everything that feeds them.

A batch of targets goes down the layers once. At layer l, from the top:

1. G [positions, targets, d] is the gradient at the layer's output: its products with what is
   written there (`Columns.tables`) are added to the rows.
2. Through skip connections of the coder at l, gradients of the layers it writes to reach x_l.
3. Targets that are read at l join, each with a gradient at its own position.
4. Attention with its frozen pattern takes G to the layer's start, that is the output of layer l-1.

At the bottom, ⟨G, embeddings⟩ is the tokens' column. Positions that no target of the batch can look
at are left out: targets are sorted by position, and the patterns say how far each one looks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify_vlm.graphs.columns import Columns
from sparsify_vlm.graphs.maps import AttentionMap, attention_map
from sparsify_vlm.replacement.local import LocalModel

PAYS = 2
"""Matrices are read off where targets · positions exceed this many times the stream's width."""


@dataclass
class Reads:
    """Targets: what they read where. layer [T] (L: after the final norm), position [T], vectors
    [T, d] at x, for layer L after the final norm."""

    layer: Tensor
    position: Tensor
    vectors: Tensor

    def __len__(self) -> int:
        return len(self.layer)

    def at(self, places: Tensor) -> Reads:
        """Some of the targets."""
        return Reads(self.layer[places], self.position[places], self.vectors[places])


class RowMaker:
    """Makes rows [T, columns] of one prompt."""

    def __init__(
        self,
        local: LocalModel,
        columns: Columns,
        expected_targets: int,
        max_bytes: int,
        fast: bool | None = None,
    ) -> None:
        """`fast` None: matrices are read off if it pays for `expected_targets`; they are kept if
        those of all layers fit into `max_bytes`, else made anew for every batch."""
        self.local, self.columns = local, columns
        if fast is None:
            fast = expected_targets * local.n_positions > PAYS * local.stack.d_model
        self.fast, self._max_bytes = fast, max_bytes
        self._maps: dict[int, AttentionMap | None] = {}
        self.device = local.errors.device
        self.dtype = torch.promote_types(local.errors.dtype, torch.float32)

    def map(self, layer: int) -> AttentionMap | None:
        """The layer's matrices; None where autograd is to be used."""
        if not self.fast or layer in self._maps:
            return self._maps.get(layer)
        found = attention_map(self.local, layer, self.dtype)
        if found is None or found.n_bytes * self.local.n_layers <= self._max_bytes:
            self._maps[layer] = found
        return found

    @torch.no_grad()
    def rows(self, reads: Reads) -> Tensor:
        """[T, columns] for one batch."""
        return _Descent(self, reads).rows()


class _Descent:
    """One batch on its way down. Targets are kept in the order they join: by layer, descending."""

    def __init__(self, maker: RowMaker, reads: Reads) -> None:
        self.maker, self.local, self.columns = maker, maker.local, maker.columns
        self.order = reads.layer.argsort(descending=True, stable=True)
        self.reads = reads.at(self.order)
        T, S, d = len(reads), self.local.n_positions, self.local.stack.d_model
        self.G = torch.zeros(0, 0, d, device=maker.device, dtype=maker.dtype)
        self.slots = self.G.new_zeros(S, T, self.columns.n_slots)
        self.errors = self.G.new_zeros(self.local.n_layers, S, T)
        self.tokens = self.G.new_zeros(S, T)
        self.kept: dict[int, Tensor] = {}
        """Gradients at the layers' outputs, for coders with skip connections."""

    def rows(self) -> Tensor:
        local, L = self.local, self.local.n_layers
        top = (self.reads.layer == L).nonzero()[:, 0]
        if len(top):
            vectors, positions = self.reads.vectors[top], self.reads.position[top]
            self._join(local.final_gradient(positions, vectors), positions)
        for layer in reversed(range(L)):
            self._written(layer)
            self._skipped(layer)
            self._attended(layer)
        P, T = self.G.shape[:2]
        self.tokens[:P, :T] += self._products(self.local.embeddings[:P])
        rows = self.columns.gathered(self.slots, self.errors, self.tokens)
        return rows[self.order.argsort()]

    def _products(self, vectors: Tensor) -> Tensor:
        """⟨G, vectors⟩ [P, T] for vectors [P, d]."""
        return torch.einsum("ptd,pd->pt", self.G, vectors.to(self.G))

    def _join(self, gradients: Tensor, positions: Tensor) -> None:
        """Add targets with gradients [T, d], each at one position."""
        spread = self.G.new_zeros(int(positions.max()) + 1, len(positions), self.G.shape[2])
        spread[positions, torch.arange(len(positions), device=positions.device)] = gradients.to(
            self.G
        )
        self._append(spread)

    def _append(self, more: Tensor) -> None:
        P = max(len(self.G), len(more))
        self.G = torch.cat([_extended(self.G, P), _extended(more, P)], dim=1)

    def _written(self, layer: int) -> None:
        P, T = self.G.shape[:2]
        if not T:
            return
        for slots, table in self.columns.tables(layer):
            vectors = table[:P].to(self.G.dtype).transpose(1, 2)
            self.slots[:P, :T, slots] += torch.bmm(self.G, vectors)
        self.errors[layer, :P, :T] = self._products(self.local.errors[layer, :P])
        if layer in self.local.injected:
            self.tokens[:P, :T] += self._products(self.local.injected[layer][:P])

    def _skipped(self, layer: int) -> None:
        if self.local.clt.W_skip is None or not self.G.shape[1]:
            return
        self.kept[layer] = self.G
        P = len(self.G)
        read = self.G.new_zeros(self.G.shape)
        for target, M in self.local.skips(layer):
            if target in self.kept:
                above = self.kept[target]
                read[: len(above), : above.shape[1]] += above @ M.T.to(above)
        self.G = self.G + self.local.read_gradients(layer, read)[:P].to(self.G)

    def _attended(self, layer: int) -> None:
        fresh = (self.reads.layer == layer).nonzero()[:, 0]
        map = self.maker.map(layer)
        joining = None
        if len(fresh):
            positions = self.reads.position[fresh]
            vectors = self.reads.vectors[fresh]
            joining = self.local.read_gradient(layer, positions, vectors).to(self.G)
            if map is None:
                self._join(joining, positions)
        if map is None:
            if self.G.shape[1]:
                self.G = self.local.cross(layer, self.G).to(self.G)
            return
        if self.G.shape[1]:
            self.G = map.cross(self.G)
        if joining is not None:
            self._append(map.cross_single(joining, positions))


def _extended(G: Tensor, positions: int) -> Tensor:
    """G [P, T, d] with zeros up to `positions`."""
    if len(G) == positions:
        return G
    return torch.cat([G, G.new_zeros(positions - len(G), *G.shape[1:])])
