"""Differences of estimates that were made apart from each other.

Of two independent estimates each side of the difference's interval is made of the two widths in
quadrature (Newcombe 1998, "Interval estimation for the difference between independent
proportions"; Zou and Donner 2008 for any pair of intervals). Over several training seeds the spread
is between seeds: Student's t for a mean, Welch's t for a difference of two means.

Coders of several seeds are measured on the same samples, and the spread between seeds does not
show how other samples would have come out. What each estimate's own interval says of samples is
therefore added, in quadrature, as one error that all seeds share. Intervals over layers are not:
the layers of a coder are no draw from a population of layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, variance

from sparsify_vlm.analysis.bootstrap import student_point
from sparsify_vlm.analysis.tables import Estimate

SEEDS, SEEDS_AND_SAMPLES = "seeds", "seeds, and over samples"
"""What intervals over several training seeds are over."""


def minus(a: Estimate | None, b: Estimate | None) -> Estimate:
    """a − b of independent estimates; without an interval where one of them has none."""
    if a is None or b is None or a.value is None or b.value is None:
        return Estimate(None)
    value = a.value - b.value
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return Estimate(value)
    below = math.hypot(a.value - a.low, b.high - b.value)
    above = math.hypot(a.high - a.value, b.value - b.low)
    n = min((one.n for one in (a, b) if one.n is not None), default=None)
    return Estimate(value, value - below, value + above, n, a.over if a.over == b.over else "")


def complement(share: Estimate | None) -> Estimate:
    """1 − share."""
    if share is None or share.value is None:
        return Estimate(None)
    low, high = (None if v is None else 1 - v for v in (share.high, share.low))
    return Estimate(1 - share.value, low, high, share.n, share.over)


def over_seeds(estimates: Sequence[Estimate | None]) -> Estimate:
    """The mean over training seeds; a single one is passed on with its own interval."""
    if len(estimates) == 1:
        return estimates[0] or Estimate(None)
    values = [one.value for one in estimates if one is not None and one.value is not None]
    if len(values) < len(estimates):
        return Estimate(None)
    half = student_point(len(values) - 1) * math.sqrt(variance(values) / len(values))
    below, above = _of_samples(estimates)
    return _around(fmean(values), half, below, above, len(values))


def _of_samples(estimates: Sequence[Estimate | None]) -> tuple[float, float]:
    """How far the interval over samples reaches below and above, the mean over `estimates`; 0 where
    they have none."""
    sides = []
    for one in estimates:
        if one is None or one.value is None or one.low is None or one.high is None:
            return 0.0, 0.0
        if "samples" not in one.over:
            return 0.0, 0.0
        sides.append((one.value - one.low, one.high - one.value))
    return fmean(below for below, _ in sides), fmean(above for _, above in sides)


def _around(value: float, half: float, below: float, above: float, n: int) -> Estimate:
    """`value` ± `half` over seeds, and what samples add to either side."""
    over = SEEDS_AND_SAMPLES if below or above else SEEDS
    low, high = value - math.hypot(half, below), value + math.hypot(half, above)
    return Estimate(value, low, high, n, over)


def seeds_difference(a: Sequence[Estimate | None], b: Sequence[Estimate | None]) -> Estimate:
    """Mean of a less mean of b; each holds one estimate per training seed.

    Both with several seeds: Welch's t, its degrees of freedom rounded down, and the samples of both
    sides as if they were others. Otherwise from the intervals of the two sides.
    """
    if len(a) < 2 or len(b) < 2:
        return minus(over_seeds(a), over_seeds(b))
    known = [[e.value for e in side if e is not None and e.value is not None] for side in (a, b)]
    if len(known[0]) < len(a) or len(known[1]) < len(b):
        return Estimate(None)
    parts = [variance(side) / len(side) for side in known]
    total, value = sum(parts), fmean(known[0]) - fmean(known[1])
    n = min(len(a), len(b))
    (below_a, above_a), (below_b, above_b) = _of_samples(a), _of_samples(b)
    below, above = math.hypot(below_a, above_b), math.hypot(above_a, below_b)
    if total == 0:
        return _around(value, 0.0, below, above, n)
    freedom = total**2 / sum(p**2 / (len(s) - 1) for p, s in zip(parts, known, strict=True))
    half = student_point(max(1, math.floor(freedom + 1e-9))) * math.sqrt(total)
    return _around(value, half, below, above, n)


def paired_difference(a: Sequence[Estimate | None], b: Sequence[Estimate | None]) -> Estimate:
    """Mean over seeds of a − b, where entries of the same place belong to the same coder."""
    differences = [minus(x, y) for x, y in zip(a, b, strict=True)]
    return over_seeds(differences)
