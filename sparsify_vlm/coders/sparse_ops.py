"""Selecting the active latents of a token and multiplying with them.

`Latents` holds the activations of one coder: K per token, where unused places have value 0 (a
ReLU coder takes K as the largest count of any token). Four products are needed in a training step,
for a batch of T tokens with the same active latents throughout:

    decode      out[t]   = Σ_j values[t, j] · W[indices[t, j]]
    dots        out[t,j] = ⟨G[t], W[indices[t, j]]⟩
    outer       out[i]   = Σ_{t,j: indices[t, j] = i} values[t, j] · G[t]
    totals      out[i]   = Σ_{t,j: indices[t, j] = i} values[t, j]

`SparseSupport` touches active latents only and sorts the indices once for all of them;
`DenseSupport` goes through a [T, F] matrix and wins where few latents are inactive, on devices
with fast dense products, and for 16-bit floats, for which torch has no sparse products.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor

# Torch announces once per process that CSR tensors are in beta; only `sampled_addmm` is used here,
# and the tests compare it with dense products.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 1], [0], [1.0], (1, 1), check_invariants=False)

GROUPS = 8
"""Latents per group in the two-stage selection on a CPU."""

DENSE_BELOW = {"cpu": 3.0, "cuda": 50.0}
"""F / K below which the dense products are taken: measured for CPUs (docs/log.md), an estimate for
CUDA. Other devices have no sparse products in torch."""


@dataclass
class Latents:
    """Activations of one coder on T tokens.

    values [T, K], non-negative; indices [T, K] int64, distinct within a token; in no order.
    """

    values: Tensor
    indices: Tensor

    def dense(self, num_latents: int) -> Tensor:
        """The activations as a [T, num_latents] matrix."""
        shape = (self.values.shape[0], num_latents)
        return self.values.new_zeros(shape).scatter(1, self.indices, self.values)


def select_top(pre: Tensor, k: int) -> Latents:
    """The `k` largest of each row of `pre` [T, F], negative ones set to 0. Differentiable."""
    if pre.is_cuda or pre.shape[1] % GROUPS or pre.shape[1] < 2 * k * GROUPS:
        values, indices = pre.topk(k, dim=-1, sorted=False)
    else:
        values, indices = _two_stage_top(pre, k)
    return Latents(values.relu(), indices)


def _two_stage_top(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Exact top-k: the k largest entries lie in the k groups with the largest maxima.

    Latent i belongs to group i mod (F / GROUPS), so that a group's maximum is taken across
    contiguous rows.
    """
    rows, width = pre.shape[0], pre.shape[1] // GROUPS
    grouped = pre.view(rows, GROUPS, width)
    groups = grouped.amax(1).topk(k, dim=-1, sorted=False).indices
    candidates = grouped.gather(2, groups.unsqueeze(1).expand(-1, GROUPS, -1))
    values, places = candidates.reshape(rows, GROUPS * k).topk(k, dim=-1, sorted=False)
    indices = groups.gather(1, places % k) + places.div(k, rounding_mode="floor") * width
    return values, indices


def select_positive(pre: Tensor, threshold: Tensor | None = None) -> Latents:
    """Entries of `pre` [T, F] above 0 and, strictly, above `threshold` [F]. Differentiable."""
    active = pre > 0 if threshold is None else (pre > 0) & (pre > threshold)
    most = max(1, int(active.sum(1).max()) if len(pre) else 0)
    values, indices = (pre * active).topk(most, dim=-1, sorted=False)
    return Latents(values, indices)


def decode(latents: Latents, W: Tensor) -> Tensor:
    """Σ_j values[:, j] · W[indices[:, j]] -> [T, d], differentiable; W [F, d]."""
    if prefers_dense(latents.indices.shape[1], W):
        return latents.dense(W.shape[0]) @ W
    return _gathered_sum(latents.indices, latents.values, W)


def _gathered_sum(indices: Tensor, values: Tensor, W: Tensor) -> Tensor:
    return functional.embedding_bag(indices, W, per_sample_weights=values, mode="sum")


def prefers_dense(k: int, W: Tensor) -> bool:
    """Whether products of `k` active latents with W [F, d] should go through dense matrices."""
    if W.dtype not in (torch.float32, torch.float64):
        return True
    return W.shape[0] < DENSE_BELOW.get(W.device.type, math.inf) * k


@dataclass
class Prepared:
    """Values of a support's active latents, arranged for repeated products."""

    values: Tensor
    """[T, K]."""

    arranged: Tensor
    """`SparseSupport`: [T·K] in the order of the latents; `DenseSupport`: the [T, F] matrix."""


class SparseSupport:
    """The products above over active latents only. `indices` [T, K]."""

    def __init__(self, indices: Tensor, num_latents: int) -> None:
        tokens, k = indices.shape
        self.indices, self.num_latents = indices, num_latents
        flat = indices.flatten()
        ordered, self._order = flat.sort(stable=True)
        self._token = self._order.div(k, rounding_mode="floor")
        latents = torch.arange(num_latents, device=flat.device)
        self._start = torch.searchsorted(ordered, latents)
        self._crow = torch.arange(0, tokens * k + 1, k, device=flat.device)

    def prepare(self, values: Tensor) -> Prepared:
        return Prepared(values, values.flatten()[self._order])

    def decode(self, prepared: Prepared, W: Tensor) -> Tensor:
        return _gathered_sum(self.indices, prepared.values, W)

    def dots(self, G: Tensor, W: Tensor) -> Tensor:
        pattern = torch.sparse_csr_tensor(
            self._crow,
            self.indices.flatten(),
            G.new_zeros(self.indices.numel()),
            (G.shape[0], self.num_latents),
            check_invariants=False,
        )
        product = torch.sparse.sampled_addmm(pattern, G, W.T, beta=0.0)
        return product.values().view_as(self.indices)

    def outer(self, prepared: Prepared, G: Tensor) -> Tensor:
        return functional.embedding_bag(
            self._token, G, self._start, per_sample_weights=prepared.arranged, mode="sum"
        )

    def totals(self, prepared: Prepared) -> Tensor:
        ones = prepared.values.new_ones(prepared.values.shape[0], 1)
        return self.outer(prepared, ones).squeeze(1)


class DenseSupport:
    """The products above through [T, F] matrices. `indices` [T, K]."""

    def __init__(self, indices: Tensor, num_latents: int) -> None:
        self.indices, self.num_latents = indices, num_latents

    def prepare(self, values: Tensor) -> Prepared:
        return Prepared(values, Latents(values, self.indices).dense(self.num_latents))

    def decode(self, prepared: Prepared, W: Tensor) -> Tensor:
        return prepared.arranged @ W

    def dots(self, G: Tensor, W: Tensor) -> Tensor:
        return (G @ W.T).gather(1, self.indices)

    def outer(self, prepared: Prepared, G: Tensor) -> Tensor:
        return prepared.arranged.T @ G

    def totals(self, prepared: Prepared) -> Tensor:
        return prepared.arranged.sum(0)


Support = SparseSupport | DenseSupport


def support_of(indices: Tensor, W: Tensor) -> Support:
    """The faster of the two for these active latents and tables of the shape and device of W."""
    kind = DenseSupport if prefers_dense(indices.shape[1], W) else SparseSupport
    return kind(indices, W.shape[0])
