"""The joint loss over all layers and its gradient.

    loss = Σ_t FVU_t,   FVU_t = Σ‖y_t − ŷ_t‖² / V_t,   V_t = Σ‖y_t − ȳ_t‖²   (sums over tokens)

`joint_loss` is the loss in plain differentiable torch. `forward_backward` computes the same loss
and its gradient without autograd: with e_t = y_t − ŷ_t and G_t = −2 e_t / V_t the gradient of ŷ_t,

    b_dec[t]        Σ_tokens G_t
    W_dec[s][k]     u_{s,k}ᵀ G_t                     (rows of active latents only)
    u_{s,k}         g = ⟨G_t, W_dec[s][k] rows⟩      (at active latents only)
    post_scale      Σ_tokens (a + post_enc [a>0]) g
    post_enc        Σ_tokens post_scale g [a>0]
    a_s             Σ_k post_scale[s][k] g
    W_skip[s][k]    G_tᵀ x_s
    W_enc[s], b_enc[s]   through [a_s > 0], summed over the active latents' tokens

Every source is encoded once and its indices are sorted once, however many targets it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsify_vlm.coders.clt import Clt
from sparsify_vlm.coders.config import TRAINABLE_ACTIVATIONS
from sparsify_vlm.coders.sparse_ops import Latents, Prepared, Support, support_of
from sparsify_vlm.errors import UserError

Layers = Sequence[Tensor] | Tensor


@dataclass
class JointStats:
    """What a step reports. NaN stands at layers no coder writes to, or without a coder (`l0`)."""

    loss: Tensor
    """Σ_t sse_t / variance_t, float64 scalar; parts of one batch add up to the batch's loss."""

    sse: Tensor
    """[L] float64: Σ‖y_t − ŷ_t‖² over these tokens."""

    variance: Tensor
    """[L] float64: the V_t that was used."""

    fvu: Tensor
    """[L] float64: sse / variance."""

    l0: Tensor
    """[L] float64: mean count of active latents per token."""

    active: Tensor
    """[S, T] int64: active latents per token of each of the S layers with a coder."""

    fired: list[Tensor]
    """Per layer with a coder: bool [F], which latents were active at any of these tokens."""

    errors: Tensor
    """[L, T]: ‖y_t − ŷ_t‖² per token, in the coder's dtype."""


@dataclass
class _Source:
    """One layer's coder during a step."""

    x: Tensor
    latents: Latents
    support: Support
    activations: Prepared
    grad: Tensor  # of the loss by latents.values


def target_variance(
    y: Layers, mean_y: Layers | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """[L] float64: Σ‖y_t − mean_y[t]‖² over tokens; without `mean_y` about these tokens' mean.

    Differences are taken in `dtype`, one layer at a time.
    """
    rows = []
    for t in range(len(y)):
        y_t = y[t].to(dtype)
        mean = y_t.mean(0) if mean_y is None else mean_y[t].to(y_t)
        rows.append((y_t - mean).square().sum(dtype=torch.float64))
    return torch.stack(rows)


def _variance(clt: Clt, y: Layers, mean_y: Layers | None, variance: Tensor | None) -> Tensor:
    if variance is None:
        variance = target_variance(y, mean_y, torch.promote_types(clt.dtype, torch.float32))
    written = variance[clt.cfg.target_offset :]
    if not bool((written > 0).all()):
        layer = clt.cfg.target_offset + int((~(written > 0)).nonzero()[0])
        if variance[layer].isnan():
            raise UserError(f"the outputs of {clt.cfg.hookpoints[layer]} hold NaN")
        raise UserError(
            f"the outputs of {clt.cfg.hookpoints[layer]} have no variance over this batch's "
            f"{y[layer].shape[0]} tokens; FVU is undefined, take larger batches"
        )
    return variance.double()


def joint_loss(
    clt: Clt,
    x: Layers,
    y: Layers,
    *,
    mean_y: Layers | None = None,
    variance: Tensor | None = None,
    k: int | None = None,
) -> Tensor:
    """The loss of x, y [L, T, d] as a scalar that autograd can differentiate."""
    variance = _variance(clt, y, mean_y, variance)
    outputs = clt.decode(clt.encode(x, k), x)
    terms = [
        (y[t].to(clt.dtype) - y_hat).square().sum() / variance[t].to(clt.dtype)
        for t, y_hat in enumerate(outputs)
        if y_hat is not None
    ]
    return torch.stack(terms).sum()


@torch.no_grad()
def forward_backward(
    clt: Clt,
    x: Layers,
    y: Layers,
    *,
    mean_y: Layers | None = None,
    variance: Tensor | None = None,
    weight: float = 1.0,
    k: int | None = None,
) -> JointStats:
    """Add the gradient of `weight * loss` to the parameters' `.grad` and report the loss.

    x, y [L, T, d] hold counted tokens only (no padding). `variance` [L] is given where these
    tokens are a part of the batch (a micro-batch, or one rank's share): the parts' gradients then
    sum to the whole batch's. Otherwise it is taken from y, about `mean_y` [L, d] if given.
    `k` overrides the config's number of active latents.

    Raises `UserError` for an activation that is not trained here and for targets of no variance.
    """
    if clt.cfg.activation not in TRAINABLE_ACTIVATIONS:
        raise UserError(f"coders with activation '{clt.cfg.activation}' cannot be trained here")
    variance = _variance(clt, y, mean_y, variance)
    sources = [_encode(clt, s, x[s], k) for s in clt.cfg.source_layers()]
    errors = sources[0].x.new_full((clt.cfg.n_layers, len(sources[0].x)), torch.nan)
    for t in clt.cfg.target_layers():
        error = y[t].to(clt.dtype) - _decode(clt, t, sources)
        errors[t] = error.square().sum(1)
        _backward_target(clt, t, sources, error.mul_(-2 * weight / variance[t].to(clt.dtype)))
    for s, source in enumerate(sources):
        _backward_encoder(clt, s, source)
    return _stats(clt, sources, errors, variance)


def _encode(clt: Clt, s: int, x_s: Tensor, k: int | None) -> _Source:
    x_s = x_s.to(clt.dtype)
    latents = clt.encode_layer(s, x_s, k)
    support = support_of(latents.indices, clt.W_enc[s])
    activations = support.prepare(latents.values)
    return _Source(x_s, latents, support, activations, torch.zeros_like(latents.values))


def _written(clt: Clt, s: int, k: int, source: _Source) -> Prepared:
    """u_{s,k}. The post-encoder's are made anew where needed: keeping each would cost memory."""
    if clt.post_enc is None and clt.post_scale is None:
        return source.activations
    return source.support.prepare(clt.written_values(s, k, source.latents))


def _decode(clt: Clt, t: int, sources: list[_Source]) -> Tensor:
    out = clt.b_dec[t].expand(len(sources[0].x), -1).clone()
    for s, k in clt.cfg.sources(t):
        source = sources[s]
        out += source.support.decode(_written(clt, s, k, source), clt.W_dec[s][k])
        if clt.W_skip is not None:
            out.addmm_(source.x, clt.W_skip[s][k].T)
    return out


def _add_grad(parameter: nn.Parameter, grad: Tensor) -> None:
    if not parameter.requires_grad:
        return
    if parameter.grad is None:
        parameter.grad = grad
    else:
        parameter.grad += grad


def _backward_target(clt: Clt, t: int, sources: list[_Source], G: Tensor) -> None:
    """Gradients of everything that writes to layer t, given G [T, d] = d loss / d ŷ_t."""
    _add_grad(clt.b_dec[t], G.sum(0))
    for s, k in clt.cfg.sources(t):
        source = sources[s]
        _add_grad(clt.W_dec[s][k], source.support.outer(_written(clt, s, k, source), G))
        if clt.W_skip is not None:
            _add_grad(clt.W_skip[s][k], G.T @ source.x)
        _backward_values(clt, s, k, source, source.support.dots(G, clt.W_dec[s][k]))


def _backward_values(clt: Clt, s: int, k: int, source: _Source, grad: Tensor) -> None:
    """From the gradient of u_{s,k} [T, K] to those of the post-encoder and of the activations."""
    latents, support = source.latents, source.support
    active = latents.values > 0
    grad = grad * active
    if clt.post_scale is not None:
        before = latents.values
        if clt.post_enc is not None:
            before = before + clt.post_enc[s][k][latents.indices] * active
        _add_grad(clt.post_scale[s][k], support.totals(support.prepare(before * grad)))
        grad = grad * clt.post_scale[s][k][latents.indices]
    if clt.post_enc is not None:
        _add_grad(clt.post_enc[s][k], support.totals(support.prepare(grad)))
    source.grad += grad


def _backward_encoder(clt: Clt, s: int, source: _Source) -> None:
    grad = source.support.prepare(source.grad)  # 0 where the latent is inactive
    x = source.x if clt.cfg.transcode else source.x - clt.b_dec[s]
    bias_grad = source.support.totals(grad)
    _add_grad(clt.W_enc[s], source.support.outer(grad, x))
    _add_grad(clt.b_enc[s], bias_grad)
    if not clt.cfg.transcode:
        _add_grad(clt.b_dec[s], -(bias_grad @ clt.W_enc[s]))


def _stats(clt: Clt, sources: list[_Source], errors: Tensor, variance: Tensor) -> JointStats:
    sse = errors.sum(1, dtype=torch.float64)
    l0 = torch.full_like(sse, torch.nan)
    on = [source.latents.values > 0 for source in sources]
    counts = torch.stack([active.sum(1) for active in on])
    l0[: len(sources)] = counts.double().mean(1)
    fired = []
    for source, active in zip(sources, on, strict=True):
        hit = torch.zeros(clt.cfg.num_latents, dtype=torch.bool, device=sse.device)
        hit[source.latents.indices[active]] = True
        fired.append(hit)
    fvu = sse / variance
    loss = fvu[clt.cfg.target_offset :].sum()
    return JointStats(loss, sse, variance, fvu, l0, counts, fired, errors)
