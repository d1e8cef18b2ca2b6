"""The loops that select the largest of each row, to be compiled.

The k largest of a row lie in the k groups with the largest maxima, where element i belongs to
group i mod `groups`, so that the maxima are taken across contiguous runs. A bound that at least k
maxima reach is found by bisection; the few elements that reach it are sorted out one by one.
NaN counts as infinity, as it is the largest for torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sparsify_vlm.coders.kernels.compiled_jit import SUMS, loops

Array = Any

HALVINGS = 24
"""Steps of the bisection at most. What is left then is still exact, only longer."""


@loops()
def _group_maxima(row: Array, maxima: Array) -> None:
    groups = len(maxima)
    infinity = row.dtype.type(np.inf)
    maxima[:] = -infinity
    for first in range(0, len(row), groups):
        part = row[first : first + groups]
        for j in range(len(part)):
            x = part[j]
            x = infinity if x != x else x
            maxima[j] = x if x > maxima[j] else maxima[j]


@loops()
def _reach(maxima: Array, bound: Any) -> int:
    count = 0
    for j in range(len(maxima)):
        count += maxima[j] >= bound
    return count


@loops()
def _bound(maxima: Array, k: int) -> Any:
    """A bound that at least k of `maxima` reach, and not many more."""
    low, high = maxima[0], maxima[0]
    for j in range(len(maxima)):
        low = maxima[j] if maxima[j] < low else low
        high = maxima[j] if maxima[j] > high else high
    enough = k + k // 8
    half = maxima.dtype.type(0.5)
    for _ in range(HALVINGS):
        middle = half * low + half * high
        count = _reach(maxima, middle)
        if count < k:
            high = middle
        else:
            low = middle
            if count <= enough:
                break
    return low


@loops()
def _collect(row: Array, maxima: Array, bound: Any, values: Array, places: Array) -> int:
    """The elements that reach `bound`; returns their number."""
    groups, infinity = len(maxima), row.dtype.type(np.inf)
    count = 0
    for g in range(groups):
        if maxima[g] >= bound:
            for i in range(g, len(row), groups):
                x = row[i]
                x = infinity if x != x else x
                values[count], places[count] = x, i
                count += x >= bound
    return count


@loops()
def _largest_first(values: Array, places: Array, count: int, k: int) -> None:
    """Reorder until the k largest of the first `count` come first (Hoare's selection)."""
    lo, hi = 0, count - 1
    while lo < hi:
        pivot = values[(lo + hi) // 2]
        i, j = lo, hi
        while i <= j:
            while values[i] > pivot:
                i += 1
            while values[j] < pivot:
                j -= 1
            if i <= j:
                values[i], values[j] = values[j], values[i]
                places[i], places[j] = places[j], places[i]
                i += 1
                j -= 1
        if k - 1 <= j:
            hi = j
        elif k - 1 >= i:
            lo = i
        else:
            break


@loops()
def top(pre: Array, values: Array, indices: Array, groups: int, lo: int, hi: int) -> None:
    """The values.shape[1] largest of each of the rows lo:hi of `pre`, in no order."""
    width, k = pre.shape[1], values.shape[1]
    maxima = np.empty(groups, pre.dtype)
    found, places = np.empty(width + 1, pre.dtype), np.empty(width + 1, np.int64)
    for t in range(lo, hi):
        row = pre[t]
        _group_maxima(row, maxima)
        count = _collect(row, maxima, _bound(maxima, k), found, places)
        _largest_first(found, places, count, k)
        for j in range(k):
            indices[t, j] = places[j]
            values[t, j] = row[places[j]]


@loops(SUMS)
def rescore(out: Array, x: Array, W: Array, b: Array, candidates: Array, lo: int, hi: int) -> None:
    """out[t, c] = ⟨x[t], W[candidates[t, c]]⟩ + b[…] for tokens lo:hi."""
    d, count = W.shape[1], candidates.shape[1]
    zero = W.dtype.type(0)
    for t in range(lo, hi):
        y = x[t]
        chosen = candidates[t]
        row = out[t]
        c = 0
        while c + 4 <= count:
            w0 = W[chosen[c]]
            w1 = W[chosen[c + 1]]
            w2 = W[chosen[c + 2]]
            w3 = W[chosen[c + 3]]
            sum0, sum1, sum2, sum3 = zero, zero, zero, zero
            for j in range(d):
                sum0 += y[j] * w0[j]
                sum1 += y[j] * w1[j]
                sum2 += y[j] * w2[j]
                sum3 += y[j] * w3[j]
            row[c], row[c + 1], row[c + 2], row[c + 3] = sum0, sum1, sum2, sum3
            c += 4
        while c < count:
            w = W[chosen[c]]
            sum0 = zero
            for j in range(d):
                sum0 += y[j] * w[j]
            row[c] = sum0
            c += 1
        for c in range(count):
            row[c] += b[chosen[c]]
