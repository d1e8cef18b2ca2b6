"""Attention with frozen patterns as three matrix products per layer, for many gradients at once.

Given patterns and scales, attention of one layer adds to the stream at q

    Σ_h Σ_k P_h[q, k] r_q s_k · W_h V_h stream_k

V [values, d] takes the stream to the values, with the norm's weight but without its scale s_k; W
[d, heads · width] takes the heads' outputs back, a norm behind it included but for its scale r_q.
Nothing here knows where a family keeps these matrices. They are read off the layer's own graph:

1. One backward pass of the same random vector at every position shows s (or r): all the gradients
   must be parallel, else the layer has no such form.
2. Unit vectors, a different one at every position, give S rows of V (or W) in a pass.
3. The product is compared with autograd on random gradients.

Where 1 or 3 fails, and where there are too few targets to pay for it, autograd itself is used
(`LocalModel.cross`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify_vlm.replacement.local import LocalModel, Segment


def tolerance(dtype: torch.dtype) -> float:
    """Largest difference from autograd in this dtype, relative to the largest gradient."""
    return max(1e-3, 5 * torch.finfo(dtype).eps)


@dataclass
class AttentionMap:
    """One layer. V [values, d]; W [d, heads · width]; pattern [kv heads, group, S, S] with the
    scales r and s in it."""

    V: Tensor
    W: Tensor
    pattern: Tensor

    @property
    def n_bytes(self) -> int:
        """Size of all three."""
        return sum(x.numel() * x.element_size() for x in (self.V, self.W, self.pattern))

    def cross(self, gradients: Tensor) -> Tensor:
        """Take gradients [T, P, d] at the stream after attention to before it, in place.

        P must reach as far as any of the targets' queries look. Nothing is copied: with the
        positions last, heads and values are what the next product reads.
        """
        T, P, d = gradients.shape
        kv, group = self.pattern.shape[:2]
        flat = gradients.view(T * P, d)
        heads = (self.W.T @ flat.T).view(kv, group, -1, P)
        values = torch.bmm(heads[:, 0], self.pattern[:, 0, :P, :P])
        for i in range(1, group):
            values.baddbmm_(heads[:, i], self.pattern[:, i, :P, :P])
        flat.addmm_(values.view(-1, T * P).T, self.V)
        return gradients

    def cross_single(self, gradients: Tensor, positions: Tensor, out: Tensor) -> None:
        """The same for gradients [T, d] that are each at one position, into out [T, P, d]."""
        T, P, _ = out.shape
        written = self.through(gradients)
        patterns = self.pattern.flatten(0, 1)[:, positions, :P]
        torch.bmm(patterns.permute(1, 2, 0), written, out=out)
        out[torch.arange(T, device=out.device), positions] += gradients

    def through(self, gradients: Tensor) -> Tensor:
        """Gradients [T, d] through each head alone, its pattern left out: [T, heads, d]."""
        kv, group = self.pattern.shape[:2]
        heads = (gradients @ self.W).view(len(gradients), kv, group, -1)
        V = self.V.view(kv, 1, -1, self.V.shape[1])
        return (heads.permute(1, 2, 0, 3) @ V).flatten(0, 1).transpose(0, 1)

    def moved(self, stream: Tensor) -> Tensor:
        """What each token's vector in stream [S, d] becomes at each position: [tokens, S, d]."""
        kv, group, S = self.pattern.shape[:3]
        values = (stream @ self.V.T).view(S, kv, 1, -1).permute(1, 2, 0, 3)
        W = self.W.T.view(kv, group, -1, self.W.shape[0])
        written = (values @ W).flatten(0, 1).transpose(0, 1)
        made = torch.bmm(self.pattern.flatten(0, 1).permute(2, 1, 0), written)
        here = torch.arange(S, device=made.device)
        made[here, here] += stream
        return made


def attention_map(
    local: LocalModel, layer: int, dtype: torch.dtype = torch.float32
) -> AttentionMap | None:
    """The layer's matrices, for gradients of `dtype`; None if it has not this form."""
    segment = local.segments[layer]
    call = segment.attention
    _, S, heads, _ = call.made.shape
    kv = call.value.shape[1]
    values = _read_off(call.value, segment.start, kv * call.value.shape[-1], _as_values)
    out = _read_off(segment.mid, call.made, segment.mid.shape[-1], lambda g, like: g[None])
    if values is None or out is None:
        return None
    (V, s), (W, r) = values, out
    pattern = call.pattern.view(kv, heads // kv, S, S)
    pattern = pattern.to(dtype) * r.to(dtype)[:, None] * s.to(dtype)
    found = AttentionMap(V.to(dtype), W.to(dtype), pattern)
    return found if _agrees(local, layer, segment, found) else None


def _as_values(gradient: Tensor, like: Tensor) -> Tensor:
    """Gradients [S, kv · width] in the shape of the values [1, kv, S, width]."""
    _, kv, S, width = like.shape
    return gradient.view(S, kv, width).transpose(0, 1)[None]


def _read_off(
    made: Tensor, leaf: Tensor, n_out: int, shaped: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor] | None:
    """The matrix [n_out, inputs] of a map that is the same at every position but for a factor,
    and the factors [S] relative to the first position's."""
    S, precise = leaf.shape[1], torch.promote_types(leaf.dtype, torch.float32)

    def backward(given: Tensor) -> Tensor:
        """Gradients [S, inputs] for `given` [S, n_out]."""
        (found,) = torch.autograd.grad(
            made, leaf, shaped(given.to(made.dtype), made), retain_graph=True
        )
        return found[0].reshape(S, -1).to(precise)

    generator = torch.Generator().manual_seed(0)
    same = torch.randn(n_out, generator=generator).to(made.device).expand(S, -1)
    probed = backward(same.contiguous())
    factors = probed @ probed[0] / probed[0].square().sum()
    if not bool(factors.isfinite().all()) or bool((factors == 0).any()):
        return None
    if (probed - factors[:, None] * probed[0]).abs().max() > tolerance(
        made.dtype
    ) * probed.abs().max():
        return None
    rows = probed.new_zeros(n_out, probed.shape[1])
    for first in range(0, n_out, S):
        count = min(S, n_out - first)
        unit = torch.zeros(S, n_out, device=made.device)
        unit[torch.arange(count), first + torch.arange(count)] = 1
        rows[first : first + count] = backward(unit)[:count] / factors[:count, None]
    return rows, factors


def _agrees(local: LocalModel, layer: int, segment: Segment, found: AttentionMap) -> bool:
    generator = torch.Generator().manual_seed(1)
    shape = (1, local.n_positions, segment.mid.shape[-1])
    given = torch.randn(shape, generator=generator).to(segment.mid.device)
    given = given.to(found.V)
    expected = local.cross(layer, given.transpose(0, 1)).to(found.V).transpose(0, 1)
    allowed = tolerance(segment.mid.dtype) * expected.abs().max()
    return bool((found.cross(given) - expected).abs().max() <= allowed)
