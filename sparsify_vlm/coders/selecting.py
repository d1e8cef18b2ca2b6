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
from sparsify_vlm.coders.sharing import ALONE, Sharing

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

    threshold: Tensor | None = None
    """`jumprelu`: the threshold of each latent that entries may have."""


def select(
    clt: Clt,
    s: int,
    x: Tensor,
    k: int,
    kernels: Kernels,
    bf16: bool = False,
    sharing: Sharing = ALONE,
) -> Selected:
    """The latents of layer `s` for x [T, d], as the encoder reads it, in training.

    `k` is the number of active latents where the activation has one; `bf16` finds candidates of
    `topk` in bfloat16 (float32 coders only).
    """
    activation = clt.cfg.activation
    if activation in ("topk", "groupmax"):
        return _fixed_number(clt, s, x, k, kernels, bf16, sharing)
    if activation == "batchtopk":
        return _batch_top(clt, s, x, k, kernels, sharing)
    lowest = torch.zeros_like(clt.b_enc[s])
    if activation == "jumprelu":
        lowest = clt.threshold[s] - clt.cfg.jumprelu_bandwidth / 2
    selection, pre = _above(clt, s, x, lowest, kernels, sharing)
    if activation == "jumprelu":
        threshold = sharing.all_latents(clt.threshold[s].detach())
        values = pre * (pre > threshold[selection.col])
        return Selected(selection, pre, values, threshold=threshold)
    return Selected(selection, pre, pre)


Pick = Callable[[Tensor], tuple[Tensor, Tensor]]


def _parts(clt: Clt, s: int, x: Tensor) -> Iterator[Tensor]:
    limit = PRE_ACTIVATIONS_AT_ONCE.get(x.device.type, PRE_ACTIVATIONS_AT_ONCE["cpu"])
    yield from x.split(max(1, limit // len(clt.b_enc[s])))


def _pre(clt: Clt, s: int, x: Tensor) -> Tensor:
    return torch.addmm(clt.b_enc[s], x, clt.W_enc[s].T)


def _fixed_number(
    clt: Clt, s: int, x: Tensor, k: int, kernels: Kernels, bf16: bool, sharing: Sharing
) -> Selected:
    F, rows = clt.cfg.num_latents, len(clt.b_enc[s])
    top = clt.cfg.activation == "topk"
    pick = _top(clt, s, min(k, rows), kernels, bf16) if top else _group_maxima(clt, s, F // k)
    picked = [pick(part) for part in _parts(clt, s, x)]
    pre, latents = (torch.cat(found) for found in zip(*picked, strict=True))
    crow, col, pre = sharing.global_top(pre, latents, k, F)
    width = None if sharing.decodes_partly else k
    selection = kernels.selection(crow, col, sharing.latents_here(F), width)
    return Selected(selection, pre, pre.relu())


def _top(clt: Clt, s: int, k: int, kernels: Kernels, bf16: bool) -> Pick:
    if not bf16 or clt.dtype != torch.float32 or len(clt.b_enc[s]) <= k + MARGIN:
        return lambda x: kernels.top(_pre(clt, s, x), k)
    W, b = clt.W_enc[s], clt.b_enc[s]
    W_rough, b_rough = W.bfloat16(), b.bfloat16()

    def pick(x: Tensor) -> tuple[Tensor, Tensor]:
        rough = torch.addmm(b_rough, x.bfloat16(), W_rough.T)
        candidates = kernels.top(rough, k + MARGIN)[1]
        pre, places = kernels.rescore(x, W, b, candidates).topk(k, dim=1, sorted=False)
        return pre, candidates.gather(1, places)

    return pick


def _group_maxima(clt: Clt, s: int, size: int) -> Pick:
    """Of the groups of `size` that are here."""
    first = torch.arange(0, len(clt.b_enc[s]), size, device=clt.device)

    def pick(x: Tensor) -> tuple[Tensor, Tensor]:
        pre, places = _pre(clt, s, x).unflatten(1, (-1, size)).max(2)
        return pre, places + first

    return pick


def _above(
    clt: Clt, s: int, x: Tensor, lowest: Tensor, kernels: Kernels, sharing: Sharing
) -> tuple[Selection, Tensor]:
    """Entries with a pre-activation above `lowest` (a number or [F]), in the order of tokens."""
    counts, columns, values = [], [], []
    for part in _parts(clt, s, x):
        pre = _pre(clt, s, part)
        mask = pre > lowest
        counts.append(mask.sum(1))
        columns.append(mask.nonzero()[:, 1])
        values.append(pre[mask])
    crow = torch.cat([x.new_zeros(1, dtype=torch.int64), *counts]).cumsum(0)
    F = clt.cfg.num_latents
    crow, col, pre = sharing.all_entries(crow, torch.cat(columns), torch.cat(values), F)
    return kernels.ragged(crow, col, sharing.latents_here(F)), pre


def _batch_top(clt: Clt, s: int, x: Tensor, k: int, kernels: Kernels, sharing: Sharing) -> Selected:
    """The k·T largest positive pre-activations of all tokens together.

    The search starts from what lies above the learned threshold, or near it; where that is too
    little, from all positive ones.
    """
    wanted = k * len(x)
    guess = (GUESS * clt.threshold[s].detach()).nan_to_num(0.0).clamp(min=0)
    selection, pre = _above(clt, s, x, guess, kernels, sharing)
    found = sharing.total(len(pre))
    if found < wanted and bool(guess > 0):
        selection, pre = _above(clt, s, x, torch.zeros_like(guess), kernels, sharing)
        found = sharing.total(len(pre))
    if found > wanted:
        kept = sharing.largest(pre, wanted)
        row, col, pre = selection.row[kept], selection.col[kept], pre[kept]
        counts = torch.bincount(row, minlength=len(x))
        crow = torch.cat([counts.new_zeros(1), counts]).cumsum(0)
        selection = kernels.ragged(crow, col, selection.num_latents)
    return Selected(selection, pre, pre, sharing.lowest(pre))
