"""Intervals from resampling clusters: samples, source layers or seeds.

Tokens of one sample, or latents of one layer, are not independent; what is drawn again, with
replacement, is therefore the whole cluster. Every statistic here is a function of sums over
clusters (ratios of sums, differences of such ratios, means of ratios over layers, fits to mean
curves), so a resample is one row of counts, and all resamples together are one matrix product:

    counts [R, C] @ sums [C, …] -> the sums of every resample [R, …] -> the statistic of each [R, …]

Calls with the same seed and number of clusters draw the same counts, and within one call all
statistics share them: a difference of two arms is paired.

The interval is the expanded percentile interval of Hesterberg (2015, "What Teachers Should Know
About the Bootstrap", The American Statistician 69, section 5.3): percentiles Φ(−√(n/(n−1)) t) and
its complement, with t the 97.5 % point of Student's t at n − 1 degrees of freedom, instead of 2.5 %
and 97.5 %. Plain percentiles are too narrow by √((n−1)/n) and ignore that the spread itself is
estimated; with 6 clusters 85 % of such intervals hold the mean of a normal distribution, of the
expanded ones 94 % do (tests/analysis/test_bootstrap.py). With many clusters the two are the same.
Even so: below about 8 clusters, or with one cluster far from the rest, intervals are rough.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np

from sparsify_vlm.analysis.tables import Estimate

RESAMPLES = 2000
FEW_CLUSTERS = 30
"""Below it the percentiles lie far out, and ten times as many resamples are drawn."""
COUNTS_AT_ONCE = 1 << 22
KEPT_COUNTS = 1 << 20
"""Counts of the last few kinds of resamples are kept if they are not more: 8 MiB each."""
ALONE, LEAST_ROWS = 1 << 18, 32
"""Multiplications up to which OpenBLAS uses one thread; rows below which that is too few."""
MANY_DEGREES = 500
DEFINED = 0.95
"""The least share of resamples that a statistic must be defined in to have an interval."""

Array = np.ndarray
Statistic = Callable[..., Array]


@dataclass(frozen=True)
class Intervals:
    """A statistic of any shape with its 95 % interval. NaN where it is undefined."""

    value: Array
    low: Array
    high: Array
    n: int
    """Clusters."""
    over: str
    """What the clusters are: "samples", "source layers", "seeds"."""

    def estimate(self, *place: int) -> Estimate:
        """The estimate at a place of the statistic's shape; no place for a scalar one."""
        return Estimate.of(
            float(self.value[place]),
            float(self.low[place]),
            float(self.high[place]),
            n=self.n,
            over=self.over,
        )


def intervals(
    statistic: Statistic,
    *sums: Any,
    n: int | None = None,
    seed: int = 0,
    over: str = "samples",
    expanded: bool = True,
) -> Intervals:
    """A statistic of sums over clusters, with the interval of each of its entries.

    Args:
        statistic: takes one array per entry of `sums`, each [R, …] with the sums of R resamples,
            and gives [R, …]. It must work row by row; the first row is of the clusters as they are.
        sums: arrays or tensors [C, …], the sums within each of the C clusters. All share C.
        n: resamples; None for RESAMPLES, ten times as many below FEW_CLUSTERS clusters.
        over: what the clusters are.
        expanded: False for plain percentiles.

    Returns:
        Intervals of the shape of the statistic. No interval (NaN) with a single cluster, or where
        the statistic is undefined in more than 5 % of the resamples; the others are left out.
    """
    arrays = [np.asarray(part, dtype=np.float64) for part in sums]
    clusters = len(arrays[0])
    if any(len(part) != clusters for part in arrays):
        raise ValueError(f"clusters differ in number: {[len(part) for part in arrays]}")
    drawn = n or RESAMPLES * (10 if clusters < FEW_CLUSTERS else 1)
    with np.errstate(all="ignore"):
        resampled = _resampled(arrays, drawn if clusters > 1 else 0, seed)
        found = np.asarray(statistic(*resampled), dtype=np.float64)
    value, found = found[0], found[1:]
    if clusters < 2:
        return Intervals(value, value * math.nan, value * math.nan, clusters, over)
    low, high = _percentiles(found, tail(clusters) if expanded else 0.025)
    return Intervals(value, low, high, clusters, over)


def bootstrap(statistic: Statistic, *sums: Any, **options: Any) -> Estimate:
    """`intervals` of a statistic that is a single number: `statistic` gives [R]."""
    return intervals(statistic, *sums, **options).estimate()


def ratio_interval(numerators: Any, denominators: Any, **options: Any) -> Intervals:
    """Σ numerators / Σ denominators over clusters, both [C, …]; of the shape of their rows."""
    return intervals(np.divide, numerators, denominators, **options)


def ratio_difference(
    numerators: Any, denominators: Any, other: Any, other_denominators: Any, **options: Any
) -> Intervals:
    """The first ratio of sums less the second, both of the same clusters and resamples."""
    return intervals(
        lambda a, b, c, d: a / b - c / d,
        numerators,
        denominators,
        other,
        other_denominators,
        **options,
    )


def mean_interval(values: Any, **options: Any) -> Intervals:
    """The mean over clusters of values [C, …], each cluster counted alike; NaN entries are left
    out, with their cluster, of the mean they would be part of."""
    array = np.asarray(values, dtype=np.float64)
    known = np.isfinite(array)
    return ratio_interval(np.where(known, array, 0.0), known, **options)


def unpaired_difference(a: Intervals, b: Intervals) -> Intervals:
    """a − b of independent statistics: each side of the interval from the two widths in quadrature
    (Newcombe 1998, "Interval estimation for the difference between independent proportions")."""
    value = a.value - b.value
    below = np.hypot(a.value - a.low, b.high - b.value)
    above = np.hypot(a.high - a.value, b.value - b.low)
    return Intervals(value, value - below, value + above, min(a.n, b.n), a.over)


def tail(clusters: int) -> float:
    """The share of resamples below an expanded percentile interval of that many clusters."""
    expansion = math.sqrt(clusters / (clusters - 1)) * student_point(clusters - 1)
    return NormalDist().cdf(-expansion)


def _resampled(arrays: list[Array], resamples: int, seed: int) -> list[Array]:
    """The sums over all clusters and over those of each resample: [1 + R, …] of each array
    [C, …]."""
    clusters = len(arrays[0])
    parts: list[list[Array]] = [[] for _ in arrays]
    for counts in _counts(clusters, resamples, seed):
        for part, array in zip(parts, arrays, strict=True):
            sums = product(counts, array.reshape(clusters, -1))
            part.append(sums.reshape(len(counts), *array.shape[1:]))
    return [part[0] if len(part) == 1 else np.concatenate(part) for part in parts]


def product(a: Array, b: Array) -> Array:
    """a @ b of a [R, C] with many rows and a small b [C, K], in the calling thread.

    BLAS would share it out over threads that wait by spinning, which takes longer than the product,
    and keeps other threads from theirs.
    """
    if b.shape[1] == 1:
        return np.einsum("rc,ck->rk", a, b)
    rows = ALONE // max(b.size, 1)
    if len(a) <= rows or rows < LEAST_ROWS:
        return a @ b
    found = np.empty((len(a), b.shape[1]))
    for start in range(0, len(a), rows):
        block = slice(start, start + rows)
        np.matmul(a[block], b, out=found[block])
    return found


def _counts(clusters: int, resamples: int, seed: int) -> Iterable[Array]:
    """How often each resample has each cluster, after a row of ones: [1 + R, C], in pieces."""
    if clusters * resamples <= KEPT_COUNTS:
        return [_few_counts(clusters, resamples, seed)]
    return itertools.chain([np.ones((1, clusters))], _drawn(clusters, resamples, seed))


@lru_cache(maxsize=8)
def _few_counts(clusters: int, resamples: int, seed: int) -> Array:
    return np.concatenate([np.ones((1, clusters)), *_drawn(clusters, resamples, seed)])


def _drawn(clusters: int, resamples: int, seed: int) -> Iterator[Array]:
    generator = np.random.default_rng(seed)
    at_once = max(1, COUNTS_AT_ONCE // clusters)
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        drawn = generator.integers(0, clusters, (rows, clusters))
        drawn += np.arange(rows)[:, None] * clusters
        counts = np.bincount(drawn.ravel(), minlength=rows * clusters)
        yield counts.reshape(rows, clusters).astype(np.float64)


def _percentiles(found: Array, share: float) -> tuple[Array, Array]:
    """Percentiles over the first axis of what is finite; NaN where too little is."""
    columns = found.reshape(len(found), -1)
    finite = np.isfinite(columns)
    ends = np.full((2, columns.shape[1]), math.nan)
    whole = finite.all(0)
    ends[:, whole] = np.quantile(columns[:, whole], [share, 1 - share], axis=0)
    for place in np.flatnonzero(~whole & (finite.mean(0) >= DEFINED)):
        ends[:, place] = np.quantile(columns[finite[:, place], place], [share, 1 - share])
    low, high = ends.reshape(2, *found.shape[1:])
    return low, high


@cache
def student_point(freedom: int, level: float = 0.95) -> float:
    """t with P(|T| ≤ t) = `level` at whole degrees of freedom, to 6 digits.

    By bisection; of many degrees, by the expansion around the normal distribution's z
    (Abramowitz and Stegun 26.7.5).
    """
    if freedom > MANY_DEGREES:
        z = NormalDist().inv_cdf((1 + level) / 2)
        return z + (z**3 + z) / (4 * freedom)
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_within(middle, freedom) < level else (low, middle)
    return (low + high) / 2


def _student_within(t: float, freedom: int) -> float:
    """P(|T| ≤ t) of Student's t (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, term, total = math.cos(angle), 1.0, 0.0
    odd = freedom % 2
    if odd:
        term = cosine
    for i in range(freedom // 2):
        if i:
            term *= cosine**2 * (2 * i - 1 + odd) / (2 * i + odd)
        total += term
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total
