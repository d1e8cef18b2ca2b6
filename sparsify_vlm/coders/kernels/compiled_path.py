"""The compiled loops as a kernel path."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsify_vlm.coders.kernels import compiled, portable
from sparsify_vlm.coders.kernels.base import Kernels
from sparsify_vlm.coders.kernels.entries import AdamState, Entries, Selection


class CompiledKernels(Kernels):
    """Loops over the entries compiled by numba; float32 and float64 on a CPU."""

    name = "compiled"
    fuses_adam = True

    def top(self, pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Values and indices [T, k] of the k largest of each row of `pre` [T, F], in no order."""
        return compiled.top(pre.float() if pre.dtype == torch.bfloat16 else pre, k)

    def rescore(self, x: Tensor, W: Tensor, b: Tensor, candidates: Tensor) -> Tensor:
        """[T, C]: ⟨x, W[c]⟩ + b[c] for each candidate c [T, C], distinct within a token."""
        return compiled.rescore(x.contiguous(), W, b, candidates)

    def selection(
        self, crow: Tensor, col: Tensor, num_latents: int, width: int | None = None
    ) -> Selection:
        """A selection; its entries are sorted by counting."""
        return Selection(crow, col, num_latents, width, compiled.sort)

    def decode(self, out: Tensor, parts: Sequence[tuple[Entries, Tensor]]) -> None:
        """out[t] += Σ values · W[col] over the entries of token t of each (entries, W)."""
        for entries, W in parts:
            selection = entries.selection
            compiled.decode_add(out, selection.crow, selection.col, entries.values, W)

    def backward(
        self, G: Tensor, entries: Entries, W: Tensor, *, dots: bool = True
    ) -> tuple[Tensor, Tensor]:
        """The gradient of W [F, d] and, with `dots`, that of the values [E] (otherwise empty)."""
        if not dots:  # PyTorch's own sum of rows is faster (docs/log.md)
            return portable.outer(G, entries), G.new_empty(0)
        sel, gradient = entries.selection, torch.empty_like(W, requires_grad=False)
        products = compiled.backward(
            G.contiguous(), sel.order, sel.start, sel.token, entries.values, W, gradient
        )
        assert products is not None
        return gradient, products

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
        sel = entries.selection
        products = compiled.backward_adam(
            G.contiguous(), sel.order, sel.start, sel.token, entries.values, W,
            state.exp_avg, state.exp_avg_sq, step=state.step, lr=state.lr,
            beta1=state.beta1, beta2=state.beta2, eps=state.eps, decay=decay, want_dots=dots,
        )  # fmt: skip
        return G.new_empty(0) if products is None else products
