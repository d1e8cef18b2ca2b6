"""The path in plain PyTorch: library kernels that skip inactive latents.

`embedding_bag` sums gathered rows, `sampled_addmm` takes the products at the active entries only.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as functional
from torch import Tensor

from sparsify_vlm.coders.kernels.entries import Entries, Selection

# Torch announces once per process that CSR tensors are in beta; only `sampled_addmm` is used here,
# and the tests compare it with dense products.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 1], [0], [1.0], (1, 1), check_invariants=False)

GROUPS = 8
"""Latents per group in the two-stage selection on a CPU."""


def top(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and indices [T, k] of the k largest of each row of `pre` [T, F], in no order."""
    if pre.is_cuda or pre.shape[1] % GROUPS or pre.shape[1] < 2 * k * GROUPS:
        values, indices = pre.topk(k, dim=-1, sorted=False)
        return values, indices
    return _two_stage_top(pre, k)


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


def decode(out: Tensor, entries: Entries, W: Tensor) -> None:
    """out[t] += Σ values · W[col] over the entries of token t."""
    selection = entries.selection
    out += functional.embedding_bag(
        selection.col,
        W,
        selection.crow,
        per_sample_weights=entries.values,
        mode="sum",
        include_last_offset=True,
    )


def dots(G: Tensor, entries: Entries, W: Tensor) -> Tensor:
    """[E]: ⟨G[row], W[col]⟩."""
    return _sampled(G, entries.selection, W)


def _sampled(G: Tensor, selection: Selection, W: Tensor) -> Tensor:
    pattern = torch.sparse_csr_tensor(
        selection.crow,
        selection.col,
        G.new_zeros(len(selection.col)),
        (len(G), selection.num_latents),
        check_invariants=False,
    )
    return torch.sparse.sampled_addmm(pattern, G, W.T, beta=0.0).values()


def outer(G: Tensor, entries: Entries) -> Tensor:
    """[F, d]: Σ values · G[row] over the entries of each latent."""
    selection = entries.selection
    return functional.embedding_bag(
        selection.token,
        G,
        selection.start,
        per_sample_weights=entries.by_latent,
        mode="sum",
        include_last_offset=True,
    )


def rescore(x: Tensor, W: Tensor, b: Tensor, candidates: Tensor) -> Tensor:
    """[T, C]: ⟨x, W[c]⟩ + b[c] for each candidate c [T, C], distinct within a token."""
    tokens, width = candidates.shape
    crow = torch.arange(0, tokens * width + 1, width, device=x.device)
    selection = Selection(crow, candidates.flatten(), len(W), width)
    return _sampled(x, selection, W).view_as(candidates) + b[candidates]
