"""Curves are found again from their own points, and by a slow search from noisy ones."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sparsify_vlm.analysis.fits import CURVES, EXPONENTIAL, fit, theta_interval

EXP, FLOOR, POWER = CURVES
X = np.arange(12.0)


def test_planted_exponentials():
    half_lives = np.array([0.5, 3.0, 40.0])
    y = 0.7 * 2 ** (-X / half_lives[:, None])
    found = fit(EXP, X, y)
    assert found.theta == pytest.approx(half_lives, rel=1e-6)
    assert found.amplitude == pytest.approx(0.7, rel=1e-6)
    assert found.at(X) == pytest.approx(y, rel=1e-6)


def test_planted_floor():
    y = np.stack([0.5 * 2 ** (-X / 2) + 0.1, 2 * 2 ** (-X / 5) + 0.3])
    found = fit(FLOOR, X, y)
    assert found.theta == pytest.approx([2, 5], rel=1e-5)
    assert found.floor == pytest.approx([0.1, 0.3], rel=1e-5)
    assert found.amplitude == pytest.approx([0.5, 2], rel=1e-5)


def test_planted_power():
    found = fit(POWER, X, 0.4 * (1 + X)[None] ** -0.6)
    assert found.theta[0] == pytest.approx(0.6, rel=1e-6)


def test_no_floor_below_zero():
    """Points that would ask for a negative floor: the floor is 0 and the rest as without it."""
    y = (1 - X / 11)[None]
    free, plain = fit(FLOOR, X, y), fit(EXP, X, y)
    assert free.floor[0] == 0
    assert free.theta == pytest.approx(plain.theta, rel=1e-6)


@pytest.mark.parametrize("curve", CURVES, ids=lambda c: c.name)
def test_noisy_points_against_an_exhaustive_search(curve):
    y = np.array([1.0, 0.62, 0.55, 0.37, 0.33, 0.31, 0.22, 0.25, 0.2, 0.17, 0.19, 0.15])
    found = fit(curve, X, y[None])
    least = math.inf
    for theta in np.geomspace(0.05, 100, 4000):
        shape = (1 + X) ** -theta if curve is POWER else 2 ** (-X / theta)
        columns = [shape, np.ones_like(X)] if curve.floor else [shape]
        design = np.stack(columns, 1)
        solved = np.linalg.lstsq(design, y, rcond=None)[0]
        least = min(least, float(((design @ solved - y) ** 2).sum()))
    assert float(found.squares[0]) == pytest.approx(least, rel=1e-4)
    assert float(found.squares[0]) <= least * (1 + 1e-9)


def test_missing_points_are_left_out():
    y = 2 ** (-X / 3)
    holed = y.copy()
    holed[[2, 7]] = math.nan
    assert fit(EXP, X, holed[None]).theta[0] == pytest.approx(3, rel=1e-6)


def test_a_curve_that_does_not_fall_has_no_half_life():
    found = fit(EXP, X, np.stack([np.ones(12), 1 + X]))
    assert np.isnan(found.identified(X)).all()


def test_interval_of_a_half_life_covers_it():
    """Normal noise of unknown size: the profile interval holds the truth in about 95 of 100."""
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        y = 2 ** (-X / 4) + generator.normal(0, 0.03, 12)
        low, high = theta_interval(fit(EXPONENTIAL, X, y[None]), X, y)
        held += low <= 4 <= high
    assert 0.91 <= held / 200 <= 0.99


def test_two_points_have_no_interval():
    x, y = np.array([1.0, 5.0]), np.array([0.196, 0.13])
    found = fit(EXPONENTIAL, x, y[None])
    assert found.theta[0] == pytest.approx(4 * math.log(2) / math.log(0.196 / 0.13), rel=1e-6)
    assert np.isnan(theta_interval(found, x, y)).all()
