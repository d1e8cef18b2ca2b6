"""Activation functions of the coders, differentiable in plain torch.

    topk        relu of the k largest of each token               (sparse_ops.select_top)
    relu        all positive ones                                 (sparse_ops.select_positive)
    batchtopk   the k·T largest of the [T, F] pre-activations, as far as they are positive;
                when used: those above one learned threshold      (Bussmann et al. 2024)
    groupmax    relu of the largest of each of k groups of F/k neighbouring latents
    jumprelu    pre · [pre > θ], θ >= 0 per latent                    (Rajamanoharan et al. 2024)

JumpReLU's threshold is trained through a straight-through estimate with a rectangular kernel of
width ε: d a/d θ = −(θ/ε) · [|pre − θ| < ε/2], and d [pre > θ]/d θ = −(1/ε) · [|pre − θ| < ε/2].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsify_vlm.coders.sparse_ops import Latents
from sparsify_vlm.errors import UserError


def batch_top(pre: Tensor, k: int) -> Latents:
    """The k·T largest of `pre` [T, F], negative ones left out; any number per token."""
    wanted = min(k * len(pre), pre.numel())
    chosen = torch.zeros(pre.numel(), dtype=torch.bool, device=pre.device)
    chosen[pre.detach().flatten().topk(wanted, sorted=False).indices] = True
    active = chosen.view_as(pre) & (pre > 0)
    return _packed(pre * active, active)


def group_max(pre: Tensor, k: int) -> Latents:
    """The largest of each of `k` groups of neighbours in `pre` [T, F], negative ones set to 0."""
    tokens, width = pre.shape
    if width % k:
        raise UserError(f"groupmax: {k} groups do not divide {width} latents; choose a divisor")
    values, places = pre.view(tokens, k, width // k).max(dim=-1)
    return Latents(values.relu(), places + torch.arange(0, width, width // k, device=pre.device))


def jump(pre: Tensor, threshold: Tensor, bandwidth: float) -> Latents:
    """JumpReLU of `pre` [T, F] with `threshold` [F], differentiable in both.

    Holds the active latents and, with value 0, those within half a bandwidth of their threshold,
    through which the threshold gets its gradient.
    """
    values = _JumpReLU.apply(pre, threshold, bandwidth)
    with torch.no_grad():
        held = (values > 0) | _near(pre, threshold, bandwidth)
    return _packed(values, held)


def step_above(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """[pre > threshold] as numbers, for counts of active latents. Differentiable in the threshold
    alone, by the straight-through estimate above."""
    result: Tensor = _Step.apply(pre, threshold, bandwidth)
    return result


def survivors(written: Sequence[Tensor], k: int, positive: bool) -> list[Tensor]:
    """Which of all sources' written values u_s [T, K_s] are among their k largest per token.

    Returns a bool mask like each u_s. Unused places (value 0) take part as they are stored;
    `positive` leaves out everything not above 0, for activations whose number of unused places
    depends on the batch.
    """
    values = torch.cat([u.detach() for u in written], dim=1)
    places = values.topk(min(k, values.shape[1]), dim=1, sorted=False).indices
    kept = torch.zeros_like(values, dtype=torch.bool).scatter(1, places, True)
    if positive:
        kept &= values > 0
    return list(kept.split([u.shape[1] for u in written], dim=1))


def _packed(values: Tensor, held: Tensor) -> Latents:
    """Per token the entries of `values` [T, F] that are `held`, filled up with others (0)."""
    most = max(1, int(held.sum(1).max()) if len(held) else 0)
    indices = held.to(values.dtype).topk(most, dim=-1, sorted=False).indices
    return Latents(values.gather(1, indices), indices)


def _near(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    return (pre - threshold).abs() < bandwidth / 2


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre.relu() * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        near = _near(pre, threshold, ctx.bandwidth)
        by_threshold = -threshold / ctx.bandwidth * near * grads[0]
        active = (pre > threshold) & (pre > 0)
        return grads[0] * active, by_threshold.sum_to_size(threshold.shape), None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        by_threshold = -grads[0] / ctx.bandwidth * _near(pre, threshold, ctx.bandwidth)
        return None, by_threshold.sum_to_size(threshold.shape), None
