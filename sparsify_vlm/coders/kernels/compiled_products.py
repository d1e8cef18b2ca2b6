"""The loops over the active latents of a range of tokens or latents, to be compiled.

Each function does the rows lo:hi of its result, each row in one way whatever the range, so that
the number of threads does not change a bit. Entries are taken four at a time: that many rows are
fetched at once, and the result's row is gone through once for four. Rows are named one by one:
numba counts references to arrays that go through a tuple, which took a quarter of the time.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from sparsify_vlm.coders.kernels.compiled_jit import SUMS, loops, part, prefetch

Array = Any
"""A numpy array; numba has its own types for them."""

Numbers = tuple[float, ...]

AHEAD = 2
"""Rows of a table between the one that is asked for and the one worked on. The gathers in between
would have the processor forget that the table is read in order."""

LINE = 16
"""Float32 per cache line. A constant, for a step known only when run costs a tenth of the time;
of float64 every other line is asked for."""


@loops(SUMS)
def decode(out: Array, crow: Array, col: Array, values: Array, W: Array, lo: int, hi: int) -> None:
    """out[t] += Σ values · W[col] for tokens lo:hi."""
    d = W.shape[1]
    for t in range(lo, hi):
        row = out[t]
        e, end = crow[t], crow[t + 1]
        while e + 4 <= end:
            v0, v1, v2, v3 = values[e], values[e + 1], values[e + 2], values[e + 3]
            w0 = W[col[e]]
            w1 = W[col[e + 1]]
            w2 = W[col[e + 2]]
            w3 = W[col[e + 3]]
            for j in range(d):
                row[j] += (v0 * w0[j] + v1 * w1[j]) + (v2 * w2[j] + v3 * w3[j])
            e += 4
        while e < end:
            v = values[e]
            w = W[col[e]]
            for j in range(d):
                row[j] += v * w[j]
            e += 1


@part
def _gradient(
    g: Array, G: Array, order: Array, token: Array, values: Array, s: int, end: int
) -> None:
    """g[:] = Σ values · G[token] over the entries order[s:end] of one latent."""
    d = len(g)
    g[:] = 0
    while s + 4 <= end:
        v0, v1 = values[order[s]], values[order[s + 1]]
        v2, v3 = values[order[s + 2]], values[order[s + 3]]
        x0 = G[token[s]]
        x1 = G[token[s + 1]]
        x2 = G[token[s + 2]]
        x3 = G[token[s + 3]]
        for j in range(d):
            g[j] += (v0 * x0[j] + v1 * x1[j]) + (v2 * x2[j] + v3 * x3[j])
        s += 4
    while s < end:
        v = values[order[s]]
        x = G[token[s]]
        for j in range(d):
            g[j] += v * x[j]
        s += 1


@part
def _gradient_and_dots(
    g: Array,
    dots: Array,
    G: Array,
    order: Array,
    token: Array,
    values: Array,
    w: Array,
    s: int,
    end: int,
) -> None:
    """Like `_gradient`, and dots[e] = ⟨G[token], w⟩ for the same entries."""
    d = len(g)
    zero = g.dtype.type(0)
    g[:] = 0
    while s + 4 <= end:
        e0, e1, e2, e3 = order[s], order[s + 1], order[s + 2], order[s + 3]
        v0, v1, v2, v3 = values[e0], values[e1], values[e2], values[e3]
        x0 = G[token[s]]
        x1 = G[token[s + 1]]
        x2 = G[token[s + 2]]
        x3 = G[token[s + 3]]
        sum0, sum1, sum2, sum3 = zero, zero, zero, zero
        for j in range(d):
            y = w[j]
            sum0 += x0[j] * y
            sum1 += x1[j] * y
            sum2 += x2[j] * y
            sum3 += x3[j] * y
            g[j] += (v0 * x0[j] + v1 * x1[j]) + (v2 * x2[j] + v3 * x3[j])
        dots[e0], dots[e1], dots[e2], dots[e3] = sum0, sum1, sum2, sum3
        s += 4
    while s < end:
        e = order[s]
        v = values[e]
        x = G[token[s]]
        sum0 = zero
        for j in range(d):
            sum0 += x[j] * w[j]
            g[j] += v * x[j]
        dots[e] = sum0
        s += 1


@part
def _ask_for_rows(W: Array, m: Array, v: Array, i: int) -> None:
    """Line by line of the three together, which is faster than one row after the other."""
    if i < len(W):
        for j in range(0, W.shape[1], LINE):
            prefetch(W, i, j)
            prefetch(m, i, j)
            prefetch(v, i, j)


@loops(SUMS)
def backward(
    grad: Array,
    dots: Array | None,
    G: Array,
    order: Array,
    start: Array,
    token: Array,
    values: Array,
    W: Array,
    lo: int,
    hi: int,
) -> None:
    """grad[i] = Σ values · G[token], and the dots if not None, for latents lo:hi."""
    for i in range(lo, hi):
        if dots is None:
            _gradient(grad[i], G, order, token, values, start[i], start[i + 1])
        else:
            if i + AHEAD < len(W):
                for j in range(0, W.shape[1], LINE):
                    prefetch(W, i + AHEAD, j)
            _gradient_and_dots(grad[i], dots, G, order, token, values, W[i], start[i], start[i + 1])


@part
def _adam(w: Array, g: Array, m: Array, v: Array, hyper: Numbers) -> None:
    """One row's update; `hyper` as `compiled.backward_adam` makes it."""
    one_less_beta1, beta2, one_less_beta2, rate, correction, eps = hyper
    for j in range(len(w)):
        first = m[j] + one_less_beta1 * (g[j] - m[j])
        second = beta2 * v[j] + one_less_beta2 * g[j] * g[j]
        m[j], v[j] = first, second
        w[j] -= rate * first / (math.sqrt(second) * correction + eps)


@part
def _adam_bfloat16(
    w: Array,
    g: Array,
    m: Array,
    v: Array,
    hyper: Numbers,
    row_key: Any,
    column_keys: Array,
    multiplier: Any,
) -> None:
    """Like `_adam`, with moments kept as the upper halves of float32 (as uint16), the second
    rounded as `rounding` says."""
    one_less_beta1, beta2, one_less_beta2, rate, correction, eps = hyper
    for j in range(len(w)):
        old = np.uint32(np.uint32(m[j]) << np.uint32(16)).view(np.float32)
        first = np.float32(old + one_less_beta1 * (g[j] - old))
        old = np.uint32(np.uint32(v[j]) << np.uint32(16)).view(np.float32)
        second = np.float32(beta2 * old + one_less_beta2 * g[j] * g[j])
        random = np.uint32((row_key ^ column_keys[j]) * multiplier) >> np.uint32(16)
        m[j], v[j] = _nearest(first), _upper_half(second, np.uint32(random))
        w[j] -= rate * first / (math.sqrt(second) * correction + eps)


@part
def _nearest(x: Any) -> Any:
    """The upper half rounded to the nearest, ties to even."""
    bits = np.float32(x).view(np.uint32)
    return _upper_half(x, np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))


@part
def _upper_half(x: Any, added: Any) -> Any:
    """The upper half of a float32 to whose bits something below 2¹⁶ is added."""
    bits = np.float32(x).view(np.uint32)
    return np.uint16((bits + added) >> np.uint32(16)) if x == x else np.uint16(0x7FC0)


@part
def _add(g: Array, factor: float, w: Array) -> None:
    for j in range(len(g)):
        g[j] += factor * w[j]


@loops(SUMS)
def backward_adam(
    dots: Array | None,
    decay: Array | None,
    G: Array,
    order: Array,
    start: Array,
    token: Array,
    values: Array,
    W: Array,
    m: Array,
    v: Array,
    row_keys: Array | None,
    column_keys: Array | None,
    multiplier: Any,
    hyper: Numbers,
    lo: int,
    hi: int,
) -> None:
    """Gradient and update of latents lo:hi. What is None is left out when this is compiled.

    With the keys, which `rounding` takes as uint32, the moments are bfloat16, as uint16. Its
    multiplier is given: numba would keep an old one until this file changes.
    """
    g = np.empty(W.shape[1], W.dtype)
    for i in range(lo, hi):
        _ask_for_rows(W, m, v, i + AHEAD)
        if dots is None:
            _gradient(g, G, order, token, values, start[i], start[i + 1])
        else:
            _gradient_and_dots(g, dots, G, order, token, values, W[i], start[i], start[i + 1])
        if decay is not None:
            _add(g, decay[i], W[i])
        if row_keys is None:
            _adam(W[i], g, m[i], v[i], hyper)
        else:
            _adam_bfloat16(W[i], g, m[i], v[i], hyper, row_keys[i], column_keys, multiplier)


@loops()
def sort(order: Array, start: Array, token: Array, crow: Array, col: Array) -> None:
    """A counting sort of the entries by latent."""
    start[:] = 0
    for e in range(len(col)):
        start[col[e] + 1] += 1
    for i in range(len(start) - 1):
        start[i + 1] += start[i]
    place = start.copy()
    for t in range(len(crow) - 1):
        for e in range(crow[t], crow[t + 1]):
            s = place[col[e]]
            place[col[e]] += 1
            order[s], token[s] = e, t
