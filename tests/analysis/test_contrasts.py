"""Differences of estimates against other ways to the same numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sparsify_vlm.analysis.contrasts import (
    complement,
    minus,
    over_seeds,
    paired_difference,
    seeds_difference,
)
from sparsify_vlm.analysis.tables import Estimate


def test_interval_of_a_difference_is_that_of_a_bootstrap_of_both() -> None:
    """Means of skewed samples: the quadrature of the two intervals against resampling both."""
    rng = np.random.default_rng(0)
    sides = [rng.gamma(2.0, 1.0, 300), rng.gamma(3.0, 1.0, 200)]
    means = [s[rng.integers(0, len(s), (20_000, len(s)))].mean(1) for s in sides]
    ends = [np.quantile(m, [0.025, 0.975]) for m in means]
    parts = [Estimate(float(s.mean()), *map(float, e)) for s, e in zip(sides, ends, strict=True)]
    found = minus(*parts)
    low, high = np.quantile(means[0] - means[1], [0.025, 0.975])
    assert found.value == pytest.approx(sides[0].mean() - sides[1].mean())
    assert found.low == pytest.approx(low, abs=0.01)
    assert found.high == pytest.approx(high, abs=0.01)


def test_what_is_missing_stays_missing() -> None:
    assert minus(Estimate(1.0), Estimate(0.4, 0.3, 0.5)) == Estimate(0.6)
    assert minus(Estimate(None), Estimate(1.0)).value is None
    assert minus(None, Estimate(1.0)).value is None
    assert complement(Estimate(0.2, 0.1, 0.4)) == Estimate(0.8, 0.6, 0.9)
    assert complement(None).value is None
    assert over_seeds([Estimate(1.0), Estimate(None)]).value is None
    assert seeds_difference([Estimate(1.0), None], [Estimate(1.0)] * 2).value is None


def test_mean_over_seeds_is_students() -> None:
    """Three values 1, 2, 3: t(2, 97.5 %) = 4.302653 (tables), standard error 1/sqrt(3)."""
    found = over_seeds([Estimate(v) for v in (1.0, 2.0, 3.0)])
    half = 4.302653 / math.sqrt(3)
    assert (found.value, found.n, found.over) == (2.0, 3, "seeds")
    assert found.low == pytest.approx(2 - half, abs=1e-4)
    assert found.high == pytest.approx(2 + half, abs=1e-4)
    one = Estimate(0.5, 0.4, 0.6, 100, "samples")
    assert over_seeds([one]) is one


def test_seeds_that_share_their_samples_share_their_error() -> None:
    """Coders with scatter 0.1 measured on the same samples, whose error is 0.5: the mean is off by
    sqrt(0.1²/3 + 0.5²), and the interval must hold the truth nearly always."""
    rng = np.random.default_rng(2)
    inside = alone = 0
    for _ in range(500):
        shared = rng.normal(0.0, 0.5)
        values = (shared + rng.normal(0.0, 0.1, 3)).tolist()
        seeds = [Estimate(v, v - 0.98, v + 0.98, 100, "samples") for v in values]
        found, bare = over_seeds(seeds), over_seeds([Estimate(v) for v in values])
        assert found.low is not None
        assert found.high is not None
        assert bare.low is not None
        assert bare.high is not None
        inside += found.low <= 0 <= found.high
        alone += bare.low <= 0 <= bare.high
    assert alone / 500 < 0.6  # the spread of seeds alone says too little
    assert 0.94 <= inside / 500 <= 0.99
    assert found.over == "seeds, and over samples"


def test_samples_widen_a_difference_of_groups() -> None:
    """No scatter between seeds: what is left are the two sides' samples, here 0.3 and 0.4."""
    a = [Estimate(5.0, 4.7, 5.3, 50, "samples")] * 3
    b = [Estimate(2.0, 1.6, 2.4, 50, "samples and draws")] * 3
    found = seeds_difference(a, b)
    assert (found.low, found.high) == (pytest.approx(2.5), pytest.approx(3.5))
    layers = [Estimate(5.0, 4.7, 5.3, 8, "source layers")] * 3
    assert over_seeds(layers).low == 5.0
    assert over_seeds(layers).over == "seeds"


def test_difference_over_seeds_is_welchs() -> None:
    """Variances 1 and 4 of three values each: Satterthwaite's degrees of freedom are
    (1/3 + 4/3)² / ((1/3)²/2 + (4/3)²/2) = 2.94, taken as 2."""
    a = [Estimate(v) for v in (4.0, 5.0, 6.0)]
    b = [Estimate(v) for v in (0.0, 2.0, 4.0)]
    found = seeds_difference(a, b)
    half = 4.302653 * math.sqrt(5 / 3)
    assert found.value == pytest.approx(3.0)
    assert found.low == pytest.approx(3 - half, abs=1e-4)
    assert found.high == pytest.approx(3 + half, abs=1e-4)
    same = [Estimate(1.0)] * 3
    assert seeds_difference(same, same).low == 0.0


def test_welch_intervals_hold_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(400):
        a = [Estimate(float(v)) for v in rng.normal(1.0, 1.0, 3)]
        b = [Estimate(float(v)) for v in rng.normal(0.0, 2.0, 3)]
        found = seeds_difference(a, b)
        assert found.low is not None
        assert found.high is not None
        inside += found.low <= 1.0 <= found.high
    assert 0.93 <= inside / 400 <= 1.0


def test_one_seed_against_several_takes_both_intervals() -> None:
    several = [Estimate(v) for v in (1.0, 2.0, 3.0)]
    one = [Estimate(5.0, 4.0, 6.0, 10, "samples")]
    mean = over_seeds(several)
    assert seeds_difference(one, several) == minus(one[0], mean)


def test_pairs_of_the_same_coder_leave_the_seed_out() -> None:
    """Seeds far apart, the same difference in each."""
    image = [Estimate(v) for v in (0.1, 0.5, 0.9)]
    text = [Estimate(v + 0.05) for v in (0.1, 0.5, 0.9)]
    found = paired_difference(image, text)
    assert found.high is not None
    assert found.high < 0
    unpaired = seeds_difference(image, text)
    assert unpaired.high is not None
    assert unpaired.high > 0
