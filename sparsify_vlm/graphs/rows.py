"""Rows of the adjacency matrix: from targets backwards to everything that feeds them.

A batch of targets goes down the layers once. At layer l, from the top:

1. G [targets, positions, d] is the gradient at the layer's output: its products with what is
   written there (`Columns.tables`) are added to the rows.
2. Through skip connections of the coder at l, gradients of the layers it writes to reach x_l.
3. Targets that are read at l join, each with a gradient at its own position.
4. Attention with its frozen pattern takes G to the layer's start, that is the output of layer l-1.

At the bottom, ⟨G, embeddings⟩ is the tokens' column; or, where there is room for it, one product
with what the first layer's attention makes of every token at every position takes the place of its
step 4. Positions that no target of the batch can look at are left out: targets are sorted by
position, and the patterns say how far each one looks.
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
        self._reach = [_reach(segment.attention.pattern) for segment in local.segments]
        self._bottom: Tensor | None = None

    def map(self, layer: int) -> AttentionMap | None:
        """The layer's matrices; None where autograd is to be used."""
        if not self.fast or layer in self._maps:
            return self._maps.get(layer)
        found = attention_map(self.local, layer, self.dtype)
        if found is None or found.n_bytes * self.local.n_layers <= self._max_bytes:
            self._maps[layer] = found
        return found

    def bottom(self, map: AttentionMap | None) -> Tensor | None:
        """Every token at every position [tokens, S, d] after the first layer's attention; None
        where it does not fit or there is no map of that layer."""
        size = self.local.embeddings.numel() * self.local.n_positions * self.dtype.itemsize
        if self._bottom is None and map is not None and size <= self._max_bytes // 2:
            self._bottom = map.moved(self.local.embeddings.to(self.dtype))
        return self._bottom

    def n_positions(self, positions: Tensor) -> int:
        """How many positions targets at `positions` can look at through all layers."""
        last = int(positions.max())
        for reach in reversed(self._reach):
            last = int(reach[last])
        return last + 1

    @torch.no_grad()
    def rows(self, reads: Reads) -> Tensor:
        """[T, columns] for one batch."""
        return _Descent(self, reads).rows()


def _reach(pattern: Tensor) -> Tensor:
    """[S]: the furthest position that any query up to here looks at. pattern [heads, S, S]."""
    here = torch.arange(pattern.shape[1], device=pattern.device)
    furthest = torch.where((pattern != 0).any(0), here, 0).amax(1)
    return torch.maximum(furthest, here).cummax(0).values.cpu()


class _Descent:
    """One batch on its way down. Targets are kept in the order they join, by layer, descending:
    the first `joined` rows of G are in use."""

    def __init__(self, maker: RowMaker, reads: Reads) -> None:
        self.maker, self.local, self.columns = maker, maker.local, maker.columns
        self.order = reads.layer.argsort(descending=True, stable=True)
        self.reads = reads.at(self.order)
        T, P = len(reads), maker.n_positions(reads.position)
        L, d = self.local.n_layers, self.local.stack.d_model
        self.P, self.joined = P, 0
        self.gradients = torch.zeros(T, P, d, device=maker.device, dtype=maker.dtype)
        self.found = self.gradients.new_zeros(self.columns.n, T)
        n, S = self.columns.n_features, self.local.n_positions
        self.features, errors, self.tokens = self.found.split([n, L * S, S])
        self.errors = errors.view(L, S, T)
        self.kept: dict[int, Tensor] = {}
        """Gradients at the layers' outputs, for coders with skip connections."""

    @property
    def G(self) -> Tensor:
        """Gradients [joined targets, P, d]."""
        return self.gradients[: self.joined]

    def rows(self) -> Tensor:
        local, L = self.local, self.local.n_layers
        if fresh := self._fresh(L):
            vectors, positions = self.reads.vectors[fresh], self.reads.position[fresh]
            self._join(local.final_gradient(positions, vectors), positions)
        for layer in reversed(range(L)):
            if self.joined:
                self._written(layer)
                self._skipped(layer)
            self._attended(layer)
        self.features[self.columns.features[:, 1] >= self.P] = 0
        return self.found.index_select(1, self.order.argsort()).T

    def _fresh(self, layer: int) -> slice | None:
        """The targets that are read at a layer."""
        count = int((self.reads.layer == layer).sum())
        return slice(self.joined, self.joined + count) if count else None

    def _products(self, vectors: Tensor) -> Tensor:
        """⟨G, vectors⟩ [P, joined] for vectors [S, d]."""
        return torch.einsum("tpd,pd->pt", self.G, vectors[: self.P].to(self.gradients))

    def _join(self, gradients: Tensor, positions: Tensor) -> None:
        """Targets with gradients [T, d], each at one position, come in."""
        places = self.joined + torch.arange(len(positions), device=positions.device)
        self.gradients[places, positions] = gradients.to(self.gradients)
        self.joined += len(positions)

    def _written(self, layer: int) -> None:
        P, T = self.P, self.joined
        for tables in self.columns.tables(layer):
            self.features[tables.columns, :T] += tables.products(self.G)
        self.errors[layer, :P, :T] = self._products(self.local.errors[layer])
        if layer in self.local.injected:
            self.tokens[:P, :T] += self._products(self.local.injected[layer])

    def _skipped(self, layer: int) -> None:
        if self.local.clt.W_skip is None:
            return
        self.kept[layer] = self.G.clone()
        read = torch.zeros_like(self.G)
        for target, M in self.local.skips(layer):
            if target in self.kept:
                above = self.kept[target]
                read[: len(above)] += above @ M.T.to(above)
        reached = self.local.read_gradients(layer, read.transpose(0, 1))[: self.P]
        self.G.add_(reached.transpose(0, 1))

    def _attended(self, layer: int) -> None:
        fresh, map = self._fresh(layer), self.maker.map(layer)
        bottom = self.maker.bottom(map) if layer == 0 else None
        whole = map is None or bottom is not None
        if map is not None and not whole and self.joined:
            map.cross(self.G)
        if fresh:
            positions, vectors = self.reads.position[fresh], self.reads.vectors[fresh]
            gradients = self.local.read_gradient(layer, positions, vectors)
            if map is None or whole:
                self._join(gradients, positions)
            else:
                map.cross_single(gradients.to(self.gradients), positions, self.gradients[fresh])
                self.joined = fresh.stop
        if map is None and self.joined:
            crossed = self.local.cross(layer, self.G.transpose(0, 1))[: self.P]
            self.G.copy_(crossed.transpose(0, 1))
        if layer == 0:
            self._tokens(bottom)

    def _tokens(self, bottom: Tensor | None) -> None:
        """What tokens add, by their embeddings or by what the first attention made of them."""
        P, T = self.P, self.joined
        if bottom is None:
            self.tokens[:P, :T] += self._products(self.local.embeddings)
        else:
            self.tokens[:P, :T] += bottom[:P, :P].flatten(1) @ self.G.flatten(1).T
