"""How a mean norm falls with distance: three curves, fitted by least squares to the norms.

    exponential          y = A · 2^(−x/h)            h: half-life in layers
    exponential+floor    y = A · 2^(−x/h) + c        c ≥ 0
    power                y = A · (1 + x)^(−b)        b: exponent

Given h or b the rest is linear, so a fit is a search along one number: over a grid, then by golden
sections, then by parabolas. All resamples of a bootstrap are fitted at once. A parameter at the end
of its grid, or of a curve that does not fall, is not known from these points, and NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sparsify_vlm.analysis.bootstrap import student_point

Array = np.ndarray
GRID = 80
SECTIONS, SECTIONS_WITH_FLOOR = 14, 40
"""A floor that becomes 0 makes an edge, where parabolas do not help."""
PARABOLAS = 3
NARROW = 1e-4
"""Half the width of a parabola through three points, in units of log θ."""
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Curve:
    """One of the curves, y = A · shape(x, θ) + c."""

    name: str
    parameter: str
    """What θ is called: "half_life" or "exponent"."""
    shape: Callable[[Array, Array], Array]
    floor: bool
    bounds: Callable[[Array], tuple[float, float]]
    """From the distances, the ends of the grid of θ, both positive."""

    @property
    def n_parameters(self) -> int:
        return 2 + self.floor

    def grid(self, x: Array) -> Array:
        """Values of θ [GRID] that are tried first, in equal ratios."""
        return np.geomspace(*self.bounds(x), GRID)


def _halving(x: Array, half_life: Array) -> Array:
    return np.exp2(-x / half_life)


def _power(x: Array, exponent: Array) -> Array:
    return (1 + x) ** -exponent


def _half_lives(x: Array) -> tuple[float, float]:
    return 0.1 * float(np.diff(x).min()), 100 * float(np.ptp(x))


EXPONENTIAL = Curve("exponential", "half_life", _halving, False, _half_lives)
CURVES = (
    EXPONENTIAL,
    Curve("exponential+floor", "half_life", _halving, True, _half_lives),
    Curve("power", "exponent", _power, False, lambda x: (1e-3, 50.0)),
)


@dataclass(frozen=True)
class Fit:
    """A curve fitted to R sets of points, each entry [R]."""

    curve: Curve
    theta: Array
    amplitude: Array
    floor: Array
    squares: Array
    """Sum of the squared deviations."""

    def at(self, x: Array) -> Array:
        """The curves at distances x [D]: [R, D]."""
        shapes = self.curve.shape(x[None], self.theta[:, None])
        return self.amplitude[:, None] * shapes + self.floor[:, None]

    def identified(self, x: Array) -> Array:
        """[R]: θ, NaN where it is at the end of what was tried or the curve does not fall."""
        low, high = self.curve.bounds(x)
        inside = (self.theta > low * 1.01) & (self.theta < high / 1.01)
        return np.where(inside & (self.amplitude > 0), self.theta, math.nan)


def fit(curve: Curve, x: Array, y: Array) -> Fit:
    """Fit `curve` to y [R, D] at distances x [D], NaN where a point is missing."""
    known = np.isfinite(y)
    points = np.where(known, y, 0.0)
    weights = np.ones((1, len(x))) if known.all() else known.astype(np.float64)
    grid = curve.grid(x)
    shapes = curve.shape(x[None], grid[:, None]).T
    sums = _Sums(
        points @ shapes,
        weights @ shapes**2,
        weights @ shapes,
        points.sum(1)[:, None],
        weights.sum(1)[:, None],
        (points**2).sum(1)[:, None],
    )
    best = _squares(curve, sums)[0].argmin(1)
    low = np.log(grid[np.maximum(best - 1, 0)])
    high = np.log(grid[np.minimum(best + 1, GRID - 1)])
    theta = _narrowed(
        lambda log: _at(curve, x, points, weights, np.exp(log))[0],
        low,
        high,
        SECTIONS_WITH_FLOOR if curve.floor else SECTIONS,
    )
    squares, amplitude, floor = _at(curve, x, points, weights, theta)
    return Fit(curve, theta, amplitude, floor, squares)


@dataclass(frozen=True)
class _Sums:
    """Sums over distances of y·g, g², g, y, 1 and y², with g the shape."""

    yg: Array
    gg: Array
    g: Array
    y: Array
    n: Array
    yy: Array


def _at(
    curve: Curve, x: Array, points: Array, weights: Array, theta: Array
) -> tuple[Array, Array, Array]:
    """Squares, amplitude and floor [R] with θ [R], the squares from the deviations themselves."""
    shapes = curve.shape(x[None], theta[:, None])
    whole = len(weights) < len(points)  # one row of ones for all
    known = shapes if whole else weights * shapes
    ones = np.ones(len(x))
    sums = _Sums(
        _products(points, shapes),
        _products(known, shapes),
        known @ ones,
        points @ ones,
        weights @ ones,
        _products(points, points),
    )
    _, amplitude, floor = _squares(curve, sums)
    shapes *= -amplitude[:, None]
    shapes += points
    if curve.floor:
        shapes -= floor[:, None]
    apart = shapes if whole else weights * shapes
    return _products(apart, shapes), amplitude, floor


def _products(a: Array, b: Array) -> Array:
    """Row by row the inner product of a and b [R, D]: [R]."""
    return np.einsum("rd,rd->r", a, b)


def _squares(curve: Curve, s: _Sums) -> tuple[Array, Array, Array]:
    """Squares, amplitude and floor of the best linear part, neither of them negative."""
    with np.errstate(all="ignore"):
        alone = np.maximum(s.yg, 0.0) / np.where(s.gg > 0, s.gg, math.inf)
        squares = s.yy - alone * (2 * s.yg - alone * s.gg)
        if not curve.floor:
            return squares, alone, np.zeros_like(alone)
        determinant = s.gg * s.n - s.g**2
        amplitude = np.maximum((s.yg * s.n - s.g * s.y) / determinant, 0.0)
        floor = (s.y - amplitude * s.g) / s.n
        usable = (determinant > 1e-12 * s.gg * s.n) & (floor > 0)
        with_floor = (
            s.yy
            - amplitude * (2 * s.yg - amplitude * s.gg - 2 * floor * s.g)
            - floor * (2 * s.y - floor * s.n)
        )
    return (
        np.where(usable, with_floor, squares),
        np.where(usable, amplitude, alone),
        np.where(usable, floor, 0.0),
    )


def _narrowed(squares: Callable[[Array], Array], low: Array, high: Array, sections: int) -> Array:
    """θ [R] between exp(low) and exp(high) at which `squares` of log θ is least."""
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    at_left, at_right = squares(left), squares(right)
    for _ in range(sections):
        down = at_left < at_right
        low, high = np.where(down, low, left), np.where(down, right, high)
        new = np.where(down, high - GOLDEN * (high - low), low + GOLDEN * (high - low))
        value = squares(new)
        left, right = np.where(down, new, right), np.where(down, left, new)
        at_left, at_right = np.where(down, value, at_right), np.where(down, at_left, value)
    middle = (low + high) / 2
    for _ in range(PARABOLAS):
        below, here, above = (squares(middle + step) for step in (-NARROW, 0.0, NARROW))
        bend = below - 2 * here + above
        with np.errstate(all="ignore"):
            move = np.where(bend > 0, NARROW * (below - above) / (2 * bend), 0.0)
        middle = np.clip(middle + move, low, high)
    return np.exp(middle)


def theta_interval(found: Fit, x: Array, y: Array) -> tuple[float, float]:
    """95 % interval of θ from the scatter of the points y [D] themselves; NaN without enough.

    Those θ with which the squares stay below (1 + t² / (D − p)) of the least: the profile
    likelihood with normal errors of one unknown size (Bates and Watts 1988, section 6.1). An end
    beyond the grid is NaN.
    """
    freedom = len(x) - found.curve.n_parameters
    if freedom < 1:
        return math.nan, math.nan
    limit = float(found.squares[0]) * (1 + student_point(freedom) ** 2 / freedom)
    grid = np.unique(np.append(np.geomspace(*found.curve.bounds(x), 4000), found.theta[0]))
    many = np.broadcast_to(y, (len(grid), len(y)))
    inside = _at(found.curve, x, many, np.ones_like(many), grid)[0] <= limit + 1e-30
    first, last = np.flatnonzero(inside)[[0, -1]]
    low = math.nan if first == 0 else float(grid[first])
    return low, math.nan if last == len(grid) - 1 else float(grid[last])
