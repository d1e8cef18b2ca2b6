"""The joint loss in plain differentiable torch: what `forward_backward` is held to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsify_vlm.coders.activations import step_above
from sparsify_vlm.coders.clt import Clt
from sparsify_vlm.coders.joint import Layers, checked_variance
from sparsify_vlm.coders.objective import Objective, auxk_size, decoder_norms
from sparsify_vlm.coders.sparse_ops import Latents


def joint_loss(
    clt: Clt,
    x: Layers,
    y: Layers,
    *,
    mean_y: Layers | None = None,
    variance: Tensor | None = None,
    k: int | None = None,
    objective: Objective | None = None,
    tokens: int | None = None,
    dead: Sequence[Tensor] | None = None,
) -> Tensor:
    """The loss of x, y [L, T, d] as a scalar that autograd can differentiate.

    The arguments are those of `forward_backward`.
    """
    objective = objective or Objective()
    variance = checked_variance(clt, y, mean_y, variance).to(clt.dtype)
    latents = clt.encode(x, k, training=True)
    loss = torch.zeros((), dtype=clt.dtype, device=clt.device)
    for t, y_hat in enumerate(clt.decode(latents, x, k)):
        if y_hat is None:
            continue
        error = y[t].to(clt.dtype) - y_hat
        loss = loss + error.square().sum() / variance[t]
        s, place = clt.cfg.sources(t)[-1]
        if objective.auxk_alpha and dead is not None and place == 0 and bool(dead[s].any()):
            loss = loss + _auxk(clt, s, x[s], error.detach(), objective, dead[s]) / variance[t]
    if objective.penalises:
        each = objective.coefficient / (tokens or len(x[0]))
        for s in clt.cfg.source_layers():
            loss = loss + each * _penalty(clt, s, x[s], latents[s], objective)
    return loss


def _penalty(
    clt: Clt, s: int, x_s: Tensor, latents: Latents | None, objective: Objective
) -> Tensor:
    assert latents is not None
    if objective.penalty == "l0":
        if clt.cfg.activation != "jumprelu":
            return (latents.values > 0).sum().to(clt.dtype)
        pre = clt.pre_activations(s, x_s)
        return step_above(pre, clt.threshold[s], clt.cfg.jumprelu_bandwidth).sum()
    norms = decoder_norms(clt, s, objective.penalty_norm)
    return objective.curve(norms[latents.indices] * latents.values).sum()


def _auxk(
    clt: Clt, s: int, x_s: Tensor, error: Tensor, objective: Objective, dead: Tensor
) -> Tensor:
    size, factor = auxk_size(clt, dead)
    pre = clt.pre_activations(s, x_s)
    values, indices = pre.masked_fill(~dead, -torch.inf).topk(size, dim=1)
    activations = Latents(values.relu(), indices).dense(clt.cfg.num_latents)
    guess = sum(activations @ table for table in clt.tables(s, 0)) * clt.out_scale(
        clt.cfg.targets(s)[0]
    )
    return objective.auxk_alpha * factor * (guess - error).square().sum()
