"""Intervals hold what they say, and paired ones are narrower."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sparsify_vlm.analysis.bootstrap import (
    bootstrap,
    intervals,
    mean_interval,
    product,
    ratio_difference,
    ratio_interval,
    student_point,
    tail,
    unpaired_difference,
)


def coverage(clusters: int, repeats: int, **options) -> float:
    """How often the interval of a mean of normal numbers holds the true mean, 3."""
    draws = np.random.default_rng(1).normal(3, 2, (clusters, repeats))
    found = mean_interval(draws, **options)
    return float(((found.low <= 3) & (found.high >= 3)).mean())


def test_interval_of_a_normal_mean():
    draws = np.random.default_rng(0).normal(3, 2, 400)
    found = mean_interval(draws, n=20_000).estimate()
    half = 1.96 * draws.std() / math.sqrt(400)
    assert found.value == pytest.approx(draws.mean())
    assert found.low == pytest.approx(draws.mean() - half, abs=0.03 * half)
    assert found.high == pytest.approx(draws.mean() + half, abs=0.03 * half)
    assert (found.n, found.over) == (400, "samples")


def test_coverage_with_many_clusters():
    assert coverage(50, 2000) == pytest.approx(0.95, abs=0.015)


def test_coverage_with_few_clusters():
    """Normal theory: plain percentiles hold the mean with P(|t_5| < 1.96 √(5/6)) = 0.866."""
    plain, expanded = coverage(6, 2000, n=4000, expanded=False), coverage(6, 2000, n=4000)
    assert plain == pytest.approx(0.866, abs=0.025)
    assert 0.92 < expanded < 0.96


def test_expanded_percentiles():
    """t_5 = 2.5706: Φ(−√(6/5) · 2.5706) = 0.00243; with many clusters the usual 2.5 %."""
    assert tail(6) == pytest.approx(0.00243, abs=1e-5)
    assert tail(100_000) == pytest.approx(0.025, abs=1e-5)


def test_points_of_student():
    """Of the tables of t, two-sided 95 %."""
    table = {1: 12.7062, 2: 4.3027, 7: 2.3646, 30: 2.0423, 100: 1.9840, 500: 1.9647, 501: 1.9647}
    for freedom, point in table.items():
        assert student_point(freedom) == pytest.approx(point, abs=1e-4)


def test_ratio_of_sums_against_the_delta_method():
    generator = np.random.default_rng(2)
    below = generator.uniform(50, 100, 500)
    above = 0.3 * below + generator.normal(0, 3, 500)
    found = ratio_interval(above, below, n=20_000).estimate()
    ratio = above.sum() / below.sum()
    error = (above - ratio * below).std() / below.mean() / math.sqrt(500)
    assert found.value == pytest.approx(ratio)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.04)


def test_paired_difference_is_that_of_the_differences():
    """Two arms that share the samples' noise: the interval is that of the difference alone."""
    generator = np.random.default_rng(3)
    shared = generator.normal(10, 5, 300)
    apart = generator.normal(1, 0.5, 300)
    ones = np.ones(300)
    paired = ratio_difference(shared + apart, ones, shared, ones, n=20_000)
    half = 1.96 * apart.std() / math.sqrt(300)
    assert paired.value == pytest.approx(apart.mean())
    assert paired.high - paired.low == pytest.approx(2 * half, rel=0.04)
    alone = unpaired_difference(mean_interval(shared + apart), mean_interval(shared))
    assert alone.value == pytest.approx(apart.mean())
    assert alone.high - alone.low > 8 * (paired.high - paired.low)


def test_independent_difference():
    generator = np.random.default_rng(4)
    a, b = generator.normal(2, 3, 400), generator.normal(1, 4, 900)
    found = unpaired_difference(mean_interval(a, n=20_000), mean_interval(b, n=20_000))
    half = 1.96 * math.sqrt(a.var() / 400 + b.var() / 900)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.04)


def test_same_resamples_for_every_entry_and_call():
    values = torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    together = mean_interval(values, seed=5)
    for column in range(3):
        alone = mean_interval(values[:, column], seed=5)
        assert (alone.low, alone.high) == pytest.approx(
            (together.low[column], together.high[column]), abs=1e-12
        )
    assert abs(together.low[0] - mean_interval(values[:, 0], seed=6).low) > 1e-6


def test_a_statistic_of_several_sums():
    """The mean of two layers' ratios, each of sums over samples."""
    error = np.array([[1.0, 2.0], [3.0, 2.0], [2.0, 2.0]])
    power = np.array([[4.0, 8.0], [4.0, 8.0], [4.0, 8.0]])
    found = bootstrap(lambda e, p: (e / p).mean(-1), error, power, over="samples")
    assert found.value == pytest.approx((0.5 + 0.25) / 2)
    assert found.low < found.value < found.high
    assert found.low >= 0.125 + 0.125 - 1e-12  # no resample is below the lowest sample
    assert found.high <= 0.375 + 0.125 + 1e-12


def test_no_interval_from_one_cluster():
    found = mean_interval([4.0]).estimate()
    assert (found.value, found.low, found.high, found.n) == (4.0, None, None, 1)


def test_missing_values_are_left_out():
    values = np.array([[1.0, math.nan], [2.0, math.nan], [6.0, math.nan], [math.nan, 5.0]])
    found = mean_interval(values)
    assert found.value.tolist() == [3.0, 5.0]
    assert found.estimate(0).low is not None
    assert found.estimate(1).low is None  # absent from (3/4)^4 of the resamples


def test_undefined_is_none():
    assert ratio_interval([0.0, 0.0], [0.0, 0.0]).estimate().value is None


def test_clusters_must_match():
    with pytest.raises(ValueError, match="clusters differ"):
        intervals(np.divide, [1.0, 2.0], [1.0])


def test_percentiles_of_what_is_finite():
    """Columns of which some resamples are undefined have the percentiles of the others."""
    values, seen = np.random.default_rng(5).normal(size=(40, 3)), []

    def statistic(total):
        seen.append(np.where(total > [-20, -math.inf, 0], total, math.nan))
        return seen[-1]

    found = intervals(statistic, values, n=4000, expanded=False)
    assert found.value == pytest.approx(seen[-1][0], nan_ok=True)
    resamples = seen[-1][1:]
    assert 0.95 < np.isfinite(resamples[:, 0]).mean() < 1
    expected = np.nanquantile(resamples, [0.025, 0.975], axis=0)
    assert found.low[:2] == pytest.approx(expected[0, :2], rel=1e-12)
    assert found.high[:2] == pytest.approx(expected[1, :2], rel=1e-12)
    assert math.isnan(found.low[2])  # about half are undefined


@pytest.mark.parametrize("shape", [(5000, 26, 26), (5000, 26, 1), (3, 4, 5), (100, 300, 400)])
def test_product_in_blocks(shape):
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=shape[:2]), generator.normal(size=shape[1:])
    assert product(a, b) == pytest.approx(np.dot(a, b), abs=1e-12)
