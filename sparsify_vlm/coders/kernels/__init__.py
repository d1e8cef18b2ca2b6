"""The products of a training step over active latents, in several implementations.

For entries e of a selection (token row[e], latent col[e], a value each) and a decoder W [F, d]:

    decode      out[t]  += Σ_{e of t} values[e] · W[col[e]]
    dots        out[e]   = ⟨G[row[e]], W[col[e]]⟩
    outer       out[i]   = Σ_{e of i} values[e] · G[row[e]]

`kernels_for` chooses by the tensors' device, type and density:

    eager       the definitions, one operation after another; any precision
    torch       PyTorch's own sparse kernels
    compiled    loops over the entries compiled by numba, for CPUs; gradient and Adam in one pass
    triton      the same on CUDA
    dense       matrix products, where few latents are inactive (not with `eager`)

The environment variable SPARSIFY_VLM_KERNELS forces one of the first four. All of them are held to
`eager` in float64 by tests/coders/test_kernels.py, which a new path must pass.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from sparsify_vlm.coders.kernels import dense, eager, portable
from sparsify_vlm.coders.kernels.entries import AdamState, Entries, Selection
from sparsify_vlm.errors import UserError

__all__ = [
    "AdamState",
    "Entries",
    "Kernels",
    "Selection",
    "kernels_for",
    "path",
    "prefers_dense",
    "usable",
]

VARIABLE = "SPARSIFY_VLM_KERNELS"
PATHS = ("eager", "torch", "compiled", "triton")

DENSE_BELOW = {"cpu": 3.0, "cuda": 50.0}
"""F / K below which the dense products are taken: measured for CPUs (docs/log.md), an estimate for
CUDA. Other devices have no sparse products in torch."""


def prefers_dense(k: float, W: Tensor) -> bool:
    """Whether products of `k` active latents with W [F, d] should go through dense matrices."""
    if W.dtype not in (torch.float32, torch.float64):
        return True
    return W.shape[0] < DENSE_BELOW.get(W.device.type, math.inf) * k


class Kernels:
    """One implementation. `products` and `selecting` are modules like `eager`."""

    fuses_adam = False
    """Whether `backward_adam` is there."""

    def __init__(self, name: str, products: ModuleType, selecting: ModuleType) -> None:
        self.name = name
        self._products, self._selecting = products, selecting

    def __repr__(self) -> str:
        return f"Kernels({self.name})"

    def top(self, pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Values and indices [T, k] of the k largest of each row of `pre` [T, F], in no order."""
        values, indices = self._selecting.top(pre, k)
        return values, indices

    def rescore(self, x: Tensor, W: Tensor, b: Tensor, candidates: Tensor) -> Tensor:
        """[T, C]: ⟨x, W[c]⟩ + b[c] for each candidate c [T, C], distinct within a token."""
        scores: Tensor = self._selecting.rescore(x, W, b, candidates)
        return scores

    def uniform(self, indices: Tensor, num_latents: int) -> Selection:
        """A selection with the same number of entries at every token; indices [T, K]."""
        return Selection.uniform(indices, num_latents)

    def ragged(self, crow: Tensor, col: Tensor, num_latents: int) -> Selection:
        """A selection with any number of entries at each token."""
        return Selection(crow, col, num_latents)

    def decode(self, out: Tensor, parts: Sequence[tuple[Entries, Tensor]]) -> None:
        """out[t] += Σ values · W[col] over the entries of token t of each (entries, W)."""
        for entries, W in parts:
            self._products.decode(out, entries, W)

    def backward(
        self, G: Tensor, entries: Entries, W: Tensor, *, dots: bool = True
    ) -> tuple[Tensor, Tensor]:
        """The gradient of W [F, d] and, with `dots`, that of the values [E] (otherwise empty),
        given the gradient G [T, d] of what was decoded."""
        products = self._products.dots(G, entries, W) if dots else G.new_empty(0)
        return self._products.outer(G, entries), products

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


EAGER = Kernels("eager", eager, eager)
TORCH = Kernels("torch", portable, portable)


@cache
def path(name: str) -> Kernels:
    """The path of this name, or `dense`."""
    if name == "dense":
        return Kernels("dense", dense, portable)
    return {"eager": EAGER, "torch": TORCH}[name]


def usable(device: str) -> list[str]:
    """Those of `PATHS` that work here on tensors of `device`, the slowest first."""
    return ["eager", "torch"]


def _chosen(W: Tensor) -> Kernels:
    here = usable(W.device.type)
    forced = os.environ.get(VARIABLE)
    if forced is None:
        return path(here[-1])
    if forced not in PATHS:
        raise UserError(f"{VARIABLE}={forced}: choose one of {', '.join(PATHS)}, or unset it")
    if forced not in here:
        raise UserError(
            f"{VARIABLE}={forced} cannot be used for {W.device.type} tensors here; choose one of "
            f"{', '.join(here)}, or unset it"
        )
    return path(forced)


def kernels_for(W: Tensor, k: float) -> Kernels:
    """The implementation for about `k` active latents per token and tables like W [F, d].

    Raises `UserError` if the one that SPARSIFY_VLM_KERNELS names cannot be used.
    """
    chosen = _chosen(W)
    if chosen is not EAGER and prefers_dense(k, W):
        return path("dense")
    return chosen
