"""The Triton kernels as a kernel path."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from sparsify_vlm.coders.kernels import triton_launch as launch
from sparsify_vlm.coders.kernels.base import Kernels
from sparsify_vlm.coders.kernels.entries import AdamState, Entries, Selection


class OrderedSelection(Selection):
    """A selection that keeps the order in which programs take its latents."""

    @cached_property
    def rows(self) -> Tensor:
        """[F]: see `launch.busiest_first`."""
        return launch.busiest_first(self.start)


class TritonKernels(Kernels):
    """float32 and bfloat16, on CUDA devices or in Triton's interpreter."""

    name = "triton"
    fuses_adam = fuses_adam_without_dots = True

    def top(self, pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Values and indices [T, k] of the k largest of each row of `pre` [T, F], in no order."""
        values, indices = pre.topk(k, dim=-1, sorted=False)
        return values, indices

    def rescore(self, x: Tensor, W: Tensor, b: Tensor, candidates: Tensor) -> Tensor:
        """[T, C]: ⟨x, W[c]⟩ + b[c] for each candidate c [T, C]."""
        return launch.rescore(x.contiguous(), W.detach(), b, candidates)

    def selection(
        self, crow: Tensor, col: Tensor, num_latents: int, width: int | None = None
    ) -> Selection:
        """A selection, sorted by torch."""
        return OrderedSelection(crow, col, num_latents, width)

    def decode(self, out: Tensor, parts: Sequence[tuple[Entries, Tensor]]) -> None:
        """out[t] += Σ values · W[col] over the entries of token t of each (entries, W), all of
        them in one kernel."""
        launch.decode(out, [
            (e.selection.crow, e.selection.col, e.values.detach(), W.detach()) for e, W in parts
        ])  # fmt: skip

    def backward(
        self, G: Tensor, entries: Entries, W: Tensor, *, dots: bool = True
    ) -> tuple[Tensor, Tensor]:
        """The gradient of W [F, d] and, with `dots`, that of the values [E] (otherwise empty)."""
        gradient = torch.empty_like(W, requires_grad=False)
        products = launch.backward(
            G.contiguous(), *_by_latent(entries), W.detach() if dots else None,
            out=gradient, rows=_rows(entries),
        )  # fmt: skip
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
        return launch.backward_adam(
            G.contiguous(), *_by_latent(entries), W.detach(), state, decay,
            want_dots=dots, rows=_rows(entries),
        )  # fmt: skip


def _by_latent(entries: Entries) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sel = entries.selection
    return sel.order, sel.start, sel.token, entries.values.detach()


def _rows(entries: Entries) -> Tensor | None:
    sel = entries.selection
    return sel.rows if isinstance(sel, OrderedSelection) else None
