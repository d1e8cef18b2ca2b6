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


def many_points() -> np.ndarray:
    """[120, 12]: steep and flat decays, with a floor, without one (so that half of the best floors
    would be negative), rising ones and noise alone; of a third of them some points are missing."""
    generator = np.random.default_rng(7)
    half_life = generator.uniform(0.4, 15, (120, 1))
    floor = np.repeat([0.3, 0.0, 0.0, 0.1], 30)[:, None]
    noise = np.tile([0.002, 0.02, 0.2], 40)[:, None]
    y = 2 ** (-X / half_life) + floor + noise * generator.normal(size=(120, 12))
    y[100:110] = 1 + 0.001 * generator.normal(size=(10, 12))
    y[110:] = y[110:, ::-1]
    missing = generator.random((120, 12)) < 0.2
    missing[np.arange(120) % 3 > 0] = False
    return np.where(missing, math.nan, y)


def exhaustive(curve, x: np.ndarray, y: np.ndarray) -> float:
    """The least squares of parameters that are not negative, by orthogonal decomposition at 2000
    values of θ in the curve's range and 500 around the best; with 0 for each linear parameter."""

    def squares(thetas: np.ndarray) -> np.ndarray:
        shapes = (1 + x) ** -thetas[:, None] if curve is POWER else 2 ** (-x / thetas[:, None])
        ones = np.ones_like(shapes)
        designs = [shapes[..., None]]
        designs += [np.stack([shapes, ones], 2), ones[..., None]] if curve.floor else []
        least = np.full(len(thetas), math.inf)
        for design in designs:
            Q, upper = np.linalg.qr(design)
            found = Q.transpose(0, 2, 1) @ y
            solved = np.linalg.solve(upper, found[..., None])[..., 0]
            apart = ((y - (Q @ found[..., None])[..., 0]) ** 2).sum(1)
            least = np.minimum(least, np.where((solved >= 0).all(1), apart, math.inf))
        return least

    tried = np.geomspace(*curve.bounds(X), 2000)
    found = squares(tried)
    best = int(found.argmin())
    finer = np.geomspace(tried[max(best - 1, 0)], tried[min(best + 1, 1999)], 500)
    return float(min(found[best], squares(finer).min()))


@pytest.mark.parametrize("curve", CURVES, ids=lambda c: c.name)
def test_many_sets_of_points_against_an_exhaustive_search(curve):
    """None is fitted worse, all are to the least there is, and that is what the squares say."""
    points = many_points()
    found = fit(curve, X, points)
    for i, y in enumerate(points):
        known = np.isfinite(y)
        least = exhaustive(curve, X[known], y[known])
        squares = np.nansum((found.at(X)[i] - y) ** 2)
        assert found.squares[i] == pytest.approx(squares, rel=1e-9)
        assert squares <= least * (1 + 1e-10)
        assert squares == pytest.approx(least, rel=1e-5)
    assert (found.amplitude >= 0).all()
    assert (found.floor >= 0).all()
    if curve.floor:
        assert 20 < (found.floor == 0).sum() < 60  # both sides of the edge are met


def test_sets_of_points_do_not_meddle_with_each_other():
    """Fitted together, in blocks and with missing points elsewhere, as each alone."""
    points = np.tile(many_points(), (9, 1))
    for curve in CURVES:
        together, alone = fit(curve, X, points), fit(curve, X, points[1:2])
        places = np.arange(1, len(points), 120)
        assert together.theta[places] == pytest.approx(alone.theta[0], rel=1e-9)
        assert together.floor[places] == pytest.approx(alone.floor[0], rel=1e-9)


def test_fewer_points_than_parameters_identify_nothing():
    y = np.full((2, 12), math.nan)
    y[0, 3] = 0.5
    y[1, [3, 6]] = 1.0, 0.5
    assert np.isnan(fit(EXP, X, y).identified(X)[0])
    assert fit(EXP, X, y).identified(X)[1] == pytest.approx(3)
    assert np.isnan(fit(FLOOR, X, y).identified(X)).all()


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
