"""Active latents as [T, K] tables, and their products in differentiable form."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as functional
from torch import Tensor

from sparsify_vlm.coders.kernels import portable, prefers_dense


@dataclass
class Latents:
    """Activations of one coder on T tokens.

    values [T, K], non-negative; indices [T, K] int64, distinct within a token; in no order. Unused
    places have value 0.
    """

    values: Tensor
    indices: Tensor

    def dense(self, num_latents: int) -> Tensor:
        """The activations as a [T, num_latents] matrix."""
        shape = (self.values.shape[0], num_latents)
        return self.values.new_zeros(shape).scatter(1, self.indices, self.values)


def select_top(pre: Tensor, k: int) -> Latents:
    """The `k` largest of each row of `pre` [T, F], negative ones set to 0. Differentiable."""
    values, indices = portable.top(pre, k)
    return Latents(values.relu(), indices)


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
    return functional.embedding_bag(
        latents.indices, W, per_sample_weights=latents.values, mode="sum"
    )
