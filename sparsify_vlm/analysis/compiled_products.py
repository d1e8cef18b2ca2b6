"""The products of `decoders`, compiled. Importing this module imports numba."""

from __future__ import annotations

from typing import Any

from sparsify_vlm.coders.kernels.compiled_jit import SUMS, loops

Array = Any
"""A numpy array; numba has its own types for them."""


@loops(SUMS)
def row_products(
    flat: Array, of_row: int, of_target: int, d: int, squared: Array, with_first: Array
) -> None:
    """squared[i, k] = ‖W[i, k]‖², with_first[i, k] = ⟨W[i, k], W[i, 0]⟩.

    W[i, k] is flat[i · of_row + k · of_target :][:d]: of an array whose rows are known to lie
    without gaps, vectors can be loaded.
    """
    rows, targets = squared.shape
    for i in range(rows):
        start = i * of_row
        first = flat[start : start + d]
        for k in range(targets):
            w = flat[start + k * of_target : start + k * of_target + d]
            square = w[0] * w[0]
            product = w[0] * first[0]
            for j in range(1, d):
                square += w[j] * w[j]
                product += w[j] * first[j]
            squared[i, k] = square
            with_first[i, k] = product
