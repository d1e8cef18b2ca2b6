"""The training step as other projects make it, on our parameters and for the same loss.

`dense` is the method of openCLT, crosslayer-coding and their like: activations as [T, F] matrices
in which a mask keeps the top k, every source-target pair a dense product. `sparse` is EleutherAI's:
its encoder and its eager decoder, here called from the sparsify package, once per source and once
per pair. Loss by autograd, Adam(fused=True), gradients dropped after the update, for both.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.clock import Clock
from sparsify_vlm.coders import Clt
from sparsify_vlm.training.upstream import imported

eager_decode = imported("utils").eager_decode
fused_encoder = imported("fused_encoder").fused_encoder


def dense_loss(clt: Clt, x: Tensor, y: Tensor, clock: Clock) -> Tensor:
    """The sum of the targets' FVU for x, y [L, T, d]."""
    with clock.phase("encode"):
        activations = [_masked(clt, s, x[s]) for s in range(len(x))]
    return _loss(clt, y, lambda s, k: activations[s] @ clt.W_dec[s][k], clock)


def _masked(clt: Clt, s: int, x_s: Tensor) -> Tensor:
    pre = torch.nn.functional.linear(x_s, clt.W_enc[s], clt.b_enc[s]).relu()
    top = pre.topk(clt.cfg.k, dim=-1, sorted=False).indices
    return pre * torch.zeros_like(pre).scatter_(1, top, 1.0)


def sparse_loss(clt: Clt, x: Tensor, y: Tensor, clock: Clock) -> Tensor:
    """The same from the active latents alone."""
    with clock.phase("encode"):
        active = [
            fused_encoder(x_s, W, b, clt.cfg.k, "topk")
            for x_s, W, b in zip(x, clt.W_enc, clt.b_enc, strict=True)
        ]
    return _of_active(clt, y, [(each.top_acts, each.top_indices) for each in active], clock)


def loss_of_chosen(clt: Clt, x: Tensor, y: Tensor, chosen: list[Tensor]) -> Tensor:
    """`sparse_loss` with the active latents [T, k] of each layer given, the encoder by autograd."""
    active = []
    for s, indices in enumerate(chosen):
        pre = torch.nn.functional.linear(x[s], clt.W_enc[s], clt.b_enc[s])
        active.append((pre.gather(1, indices).relu(), indices))
    return _of_active(clt, y, active, Clock())


def _of_active(clt: Clt, y: Tensor, active: list[tuple[Tensor, Tensor]], clock: Clock) -> Tensor:
    def written(s: int, k: int) -> Tensor:
        activations, indices = active[s]
        out: Tensor = eager_decode(indices, activations, clt.W_dec[s][k].mT)
        return out

    return _loss(clt, y, written, clock)


def _loss(clt: Clt, y: Tensor, written: Callable[[int, int], Tensor], clock: Clock) -> Tensor:
    """From what each source writes to its k-th target [T, d]."""
    total = y.new_zeros(())
    with clock.phase("decode"):
        for t in clt.cfg.target_layers():
            out: Tensor = clt.b_dec[t]
            for s, k in clt.cfg.sources(t):
                out = out + written(s, k)
            variance = (y[t] - y[t].mean(0)).square().sum()
            total = total + (y[t] - out).square().sum() / variance
    return total
