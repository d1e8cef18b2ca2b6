"""Which latents are active in training, as entries of a sparse pattern and without autograd.

The pre-activations of a few thousand tokens are made at a time and dropped again: no [T, F] matrix
is ever held. For `topk` they can be made in bfloat16: the k + 8 largest are then candidates whose
exact pre-activations decide, which is nearly twice as fast and finds the same latents for all but a
few tokens in a thousand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify_vlm.coders.clt import PRE_ACTIVATIONS_AT_ONCE, Clt
from sparsify_vlm.coders.kernels import Kernels, Selection

MARGIN = 8
"""Candidates beyond k in a bfloat16 selection."""

GUESS = 0.8
"""Where the search for batch top-k's threshold starts, relative to the learned threshold."""


@dataclass
class Selected:
    """The active latents of one source."""

    selection: Selection
    """Entries that are active, and inactive ones that have a gradient (`jumprelu`) or fill a fixed
    number per token."""

    pre: Tensor
    """[E]: pre-activations."""

    values: Tensor
    """[E]: activations, 0 where inactive."""

    lowest: Tensor | None = None
    """`batchtopk`: the smallest activation of the batch."""


def select(clt: Clt, s: int, x: Tensor, k: int, kernels: Kernels, bf16: bool = False) -> Selected:
    """The latents of layer `s` for x [T, d], as the encoder reads it, in training.

    `k` is the number of active latents where the activation has one; `bf16` finds candidates of
    `topk` in bfloat16 (float32 coders only).
    """
    activation = clt.cfg.activation
    if activation == "topk":
        return _uniform(clt, s, x, kernels, _top(clt, s, k, kernels, bf16))
    if activation == "groupmax":
        return _uniform(clt, s, x, kernels, _group_maxima(clt, s, k))
    if activation == "batchtopk":
        return _batch_top(clt, s, x, k, kernels)
    lowest = torch.zeros_like(clt.b_enc[s])
    if activation == "jumprelu":
        lowest = clt.threshold[s] - clt.cfg.jumprelu_bandwidth / 2
    selection, pre = _above(clt, s, x, lowest, kernels)
    if activation == "jumprelu":
        return Selected(selection, pre, pre * (pre > clt.threshold[s][selection.col]))
    return Selected(selection, pre, pre)


Pick = Callable[[Tensor], tuple[Tensor, Tensor]]


def _parts(clt: Clt, x: Tensor) -> Iterator[Tensor]:
    limit = PRE_ACTIVATIONS_AT_ONCE.get(x.device.type, PRE_ACTIVATIONS_AT_ONCE["cpu"])
    yield from x.split(max(1, limit // clt.cfg.num_latents))


def _pre(clt: Clt, s: int, x: Tensor) -> Tensor:
    return torch.addmm(clt.b_enc[s], x, clt.W_enc[s].T)


def _uniform(clt: Clt, s: int, x: Tensor, kernels: Kernels, pick: Pick) -> Selected:
    picked = [pick(part) for part in _parts(clt, x)]
    pre = torch.cat([values for values, _ in picked])
    indices = torch.cat([indices for _, indices in picked])
    selection = kernels.uniform(indices, clt.cfg.num_latents)
    return Selected(selection, pre.flatten(), pre.flatten().relu())


def _top(clt: Clt, s: int, k: int, kernels: Kernels, bf16: bool) -> Pick:
    if not bf16 or clt.dtype != torch.float32 or clt.cfg.num_latents <= k + MARGIN:
        return lambda x: kernels.top(_pre(clt, s, x), k)
    W, b = clt.W_enc[s], clt.b_enc[s]
    W_rough, b_rough = W.bfloat16(), b.bfloat16()

    def pick(x: Tensor) -> tuple[Tensor, Tensor]:
        rough = torch.addmm(b_rough, x.bfloat16(), W_rough.T)
        candidates = kernels.top(rough, k + MARGIN)[1]
        pre, places = kernels.rescore(x, W, b, candidates).topk(k, dim=1, sorted=False)
        return pre, candidates.gather(1, places)

    return pick


def _group_maxima(clt: Clt, s: int, k: int) -> Pick:
    size = clt.cfg.num_latents // k
    first = torch.arange(0, clt.cfg.num_latents, size, device=clt.device)

    def pick(x: Tensor) -> tuple[Tensor, Tensor]:
        pre, places = _pre(clt, s, x).unflatten(1, (k, size)).max(2)
        return pre, places + first

    return pick


def _above(
    clt: Clt, s: int, x: Tensor, lowest: Tensor, kernels: Kernels
) -> tuple[Selection, Tensor]:
    """Entries with a pre-activation above `lowest` (a number or [F]), in the order of tokens."""
    counts, columns, values = [], [], []
    for part in _parts(clt, x):
        pre = _pre(clt, s, part)
        mask = pre > lowest
        counts.append(mask.sum(1))
        columns.append(mask.nonzero()[:, 1])
        values.append(pre[mask])
    crow = torch.cat([x.new_zeros(1, dtype=torch.int64), *counts]).cumsum(0)
    return kernels.ragged(crow, torch.cat(columns), clt.cfg.num_latents), torch.cat(values)


def _batch_top(clt: Clt, s: int, x: Tensor, k: int, kernels: Kernels) -> Selected:
    """The k·T largest positive pre-activations of all tokens together.

    The search starts from what lies above the learned threshold, or near it; where that is too
    little, from all positive ones.
    """
    wanted = k * len(x)
    guess = (GUESS * clt.threshold[s].detach()).nan_to_num(0.0).clamp(min=0)
    selection, pre = _above(clt, s, x, guess, kernels)
    if len(pre) < wanted and bool(guess > 0):
        selection, pre = _above(clt, s, x, torch.zeros_like(guess), kernels)
    if len(pre) > wanted:
        kept = pre.topk(wanted, sorted=False).indices.sort().values
        row, col, pre = selection.row[kept], selection.col[kept], pre[kept]
        counts = torch.bincount(row, minlength=len(x))
        crow = torch.cat([counts.new_zeros(1), counts]).cumsum(0)
        selection = kernels.ragged(crow, col, clt.cfg.num_latents)
    return Selected(selection, pre, pre, pre.min() if len(pre) else None)
