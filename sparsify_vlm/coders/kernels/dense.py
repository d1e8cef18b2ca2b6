"""The path through [T, F] matrices: the fastest where few latents are inactive, on devices with
fast dense products, and for 16-bit floats, for which torch has no sparse products."""

from __future__ import annotations

from torch import Tensor

from sparsify_vlm.coders.kernels.entries import Entries


def decode(out: Tensor, entries: Entries, W: Tensor) -> None:
    """out[t] += Σ values · W[col] over the entries of token t."""
    out.addmm_(entries.dense, W)


def dots(G: Tensor, entries: Entries, W: Tensor) -> Tensor:
    """[E]: ⟨G[row], W[col]⟩."""
    selection = entries.selection
    products = G @ W.T
    if selection.width:
        return products.gather(1, selection.col.view(-1, selection.width)).flatten()
    return products[selection.row, selection.col]


def outer(G: Tensor, entries: Entries) -> Tensor:
    """[F, d]: Σ values · G[row] over the entries of each latent."""
    return entries.dense.T @ G
