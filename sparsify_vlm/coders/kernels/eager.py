"""The reference path: one operation after another, as the definitions read, in any precision."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify_vlm.coders.kernels.entries import Entries


def top(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and indices [T, k] of the k largest of each row of `pre` [T, F]."""
    values, indices = pre.sort(dim=1, descending=True)
    return values[:, :k], indices[:, :k]


def decode(out: Tensor, entries: Entries, W: Tensor) -> None:
    """out[t] += Σ values · W[col] over the entries of token t."""
    selection = entries.selection
    out.index_add_(0, selection.row, entries.values[:, None] * W[selection.col])


def dots(G: Tensor, entries: Entries, W: Tensor) -> Tensor:
    """[E]: ⟨G[row], W[col]⟩."""
    selection = entries.selection
    return (G[selection.row] * W[selection.col]).sum(1)


def outer(G: Tensor, entries: Entries) -> Tensor:
    """[F, d]: Σ values · G[row] over the entries of each latent."""
    selection = entries.selection
    out = G.new_zeros(selection.num_latents, G.shape[1])
    return out.index_add_(0, selection.col, entries.values[:, None] * G[selection.row])


def rescore(x: Tensor, W: Tensor, b: Tensor, candidates: Tensor) -> Tensor:
    """[T, C]: ⟨x, W[c]⟩ + b[c] for each candidate c [T, C]."""
    return torch.einsum("td,tcd->tc", x, W[candidates]) + b[candidates]
