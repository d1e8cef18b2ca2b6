"""What every kernel path offers; the module's own class does it with a path's functions."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from sparsify_vlm.coders.kernels.entries import AdamState, Entries, Selection


class Kernels:
    """The products and the selection of one path. Subclasses replace what they do better."""

    name: str
    fuses_adam = False
    """Whether `backward_adam` is there."""

    fuses_adam_without_dots = False
    """Whether it is also the fastest where the gradient of the values is not wanted."""

    def top(self, pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Values and indices [T, k] of the k largest of each row of `pre` [T, F], in no order."""
        raise NotImplementedError

    def rescore(self, x: Tensor, W: Tensor, b: Tensor, candidates: Tensor) -> Tensor:
        """[T, C]: ⟨x, W[c]⟩ + b[c] for each candidate c [T, C], distinct within a token."""
        raise NotImplementedError

    def selection(
        self, crow: Tensor, col: Tensor, num_latents: int, width: int | None = None
    ) -> Selection:
        """A selection as this path sorts it; `width` entries at every token, or any number."""
        return Selection(crow, col, num_latents, width)

    def uniform(self, indices: Tensor, num_latents: int) -> Selection:
        """A selection with the same number of entries at every token; indices [T, K]."""
        tokens, k = indices.shape
        crow = torch.arange(0, tokens * k + 1, max(k, 1), device=indices.device)[: tokens + 1]
        return self.selection(crow, indices.flatten(), num_latents, k)

    def ragged(self, crow: Tensor, col: Tensor, num_latents: int) -> Selection:
        """A selection with any number of entries at each token."""
        return self.selection(crow, col, num_latents)

    def decode(self, out: Tensor, parts: Sequence[tuple[Entries, Tensor]]) -> None:
        """out[t] += Σ values · W[col] over the entries of token t of each (entries, W)."""
        raise NotImplementedError

    def backward(
        self, G: Tensor, entries: Entries, W: Tensor, *, dots: bool = True
    ) -> tuple[Tensor, Tensor]:
        """The gradient of W [F, d] and, with `dots`, that of the values [E] (otherwise empty),
        given the gradient G [T, d] of what was decoded."""
        raise NotImplementedError

    def backward_adam(
        self,
        G: Tensor,
        entries: Entries,
        W: Tensor,
        state: AdamState,
        decay: Tensor | None = None,
        *,
        dots: bool = True,
    ) -> Tensor:
        """Like `backward` with gradient + decay[:, None] · W, which updates W, in one pass."""
        raise NotImplementedError


class Functions(Kernels):
    """A path made of modules of functions like `eager`."""

    def __init__(self, name: str, products: ModuleType, selecting: ModuleType) -> None:
        self.name = name
        self._products, self._selecting = products, selecting

    def top(self, pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Values and indices [T, k] of the k largest of each row of `pre` [T, F], in no order."""
        values, indices = self._selecting.top(pre, k)
        return values, indices

    def rescore(self, x: Tensor, W: Tensor, b: Tensor, candidates: Tensor) -> Tensor:
        """[T, C]: ⟨x, W[c]⟩ + b[c] for each candidate c [T, C], distinct within a token."""
        scores: Tensor = self._selecting.rescore(x, W, b, candidates)
        return scores

    def decode(self, out: Tensor, parts: Sequence[tuple[Entries, Tensor]]) -> None:
        """out[t] += Σ values · W[col] over the entries of token t of each (entries, W)."""
        for entries, W in parts:
            self._products.decode(out, entries, W)

    def backward(
        self, G: Tensor, entries: Entries, W: Tensor, *, dots: bool = True
    ) -> tuple[Tensor, Tensor]:
        """The gradient of W [F, d] and, with `dots`, that of the values [E] (otherwise empty)."""
        products = self._products.dots(G, entries, W) if dots else G.new_empty(0)
        return self._products.outer(G, entries), products
