"""How a mean norm falls with distance: three curves, fitted by least squares to the norms.

    exponential          y = A · 2^(−x/h)            h: half-life in layers
    exponential+floor    y = A · 2^(−x/h) + c        c ≥ 0
    power                y = A · (1 + x)^(−b)        b: exponent

All are A · e^(−rz) + c, with z = x and r = ln 2 / h, or z = ln(1 + x) and r = b. Given the rate r
the rest is linear and drops out (variable projection: Golub and Pereyra 1973, "The differentiation
of pseudo-inverses and nonlinear least squares problems whose variables separate", SIAM J. Numer.
Anal. 10). With g = e^(−rz), and ⟨,⟩ the inner product over the points (with a floor: of deviations
from the mean), the least squares at r are

    ‖y‖² − p²/s        p = ⟨y, g⟩ > 0, s = ⟨g, g⟩

so that log(p²/s) is made as large as can be: at the nodes of a grid, then by Newton's method
between the best node's neighbours, halving the interval where a step would leave it. Where the
floor comes out below zero it is zero, since at any r the squares are convex in A and c (Lawson and
Hanson 1974, "Solving Least Squares Problems", chapter 23); so a curve with a floor is fitted with
and without it, and the better of those allowed is kept. All resamples of a bootstrap are fitted at
once. A parameter at the end of its grid, or of a curve that does not fall, is not known from these
points, and NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce

import numpy as np

from sparsify_vlm.analysis.bootstrap import product, student_point

Array = np.ndarray
GRID = 80
AT_ONCE = 400
"""Sets of points of which all nodes are tried at once: what is worked on stays in the cache."""
STEPS = 60
"""Of Newton's method; some four are needed, more only where the squares are flat."""
CLOSE = 1e-9
"""A relative step of the rate after which the next one would be lost in rounding."""
SAME = 1e-12
"""Of ‖g‖²: a shape that deviates less from its mean is not told from a floor."""


@dataclass(frozen=True)
class Curve:
    """One of the curves, y = A · exp(−rate(θ) · coordinate(x)) + c."""

    name: str
    parameter: str
    """What θ is called: "half_life" or "exponent"."""
    coordinate: Callable[[Array], Array]
    rate: Callable[[Array], Array]
    """From θ to r, and from r to θ."""
    floor: bool
    bounds: Callable[[Array], tuple[float, float]]
    """From the distances, the ends of the grid of θ, both positive."""

    @property
    def n_parameters(self) -> int:
        return 2 + self.floor

    def grid(self, x: Array) -> Array:
        """Rates [GRID], ascending in equal ratios, that are tried first."""
        return np.sort(self.rate(np.geomspace(*self.bounds(x), GRID)))


def _halving(rate_or_half_life: Array) -> Array:
    return math.log(2) / rate_or_half_life


def _half_lives(x: Array) -> tuple[float, float]:
    return 0.1 * float(np.diff(x).min()), 100 * float(np.ptp(x))


EXPONENTIAL = Curve("exponential", "half_life", np.asarray, _halving, False, _half_lives)
CURVES = (
    EXPONENTIAL,
    Curve("exponential+floor", "half_life", np.asarray, _halving, True, _half_lives),
    Curve("power", "exponent", np.log1p, np.asarray, False, lambda x: (1e-3, 50.0)),
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
    size: Array
    """Sum of the squares of the points."""
    points: Array
    """How many points there are."""

    @property
    def error(self) -> Array:
        """[R]: root of Σ deviation² / Σ point²."""
        with np.errstate(all="ignore"):
            return np.sqrt(self.squares / self.size)

    def at(self, x: Array) -> Array:
        """The curves at distances x [D]: [R, D]."""
        shapes = np.exp(np.multiply.outer(-self.curve.rate(self.theta), self.curve.coordinate(x)))
        return self.amplitude[:, None] * shapes + self.floor[:, None]

    @property
    def enough(self) -> Array:
        """[R]: whether there are as many points as parameters."""
        return self.points >= self.curve.n_parameters

    def identified(self, x: Array) -> Array:
        """[R]: θ, NaN where it is at the end of what was tried, the curve does not fall, or there
        are fewer points than parameters."""
        low, high = self.curve.bounds(x)
        inside = (self.theta > low * 1.01) & (self.theta < high / 1.01)
        return np.where(inside & self.enough & (self.amplitude > 0), self.theta, math.nan)


def fit(curve: Curve, x: Array, y: Array) -> Fit:
    """Fit `curve` to y [R, D] at distances x [D], NaN where a point is missing."""
    grid, ways = curve.grid(x), _ways(curve, x, y)
    with np.errstate(all="ignore"):
        rate, squares, amplitude, floor = _best(_solved(way, _best_rate(way, grid)) for way in ways)
    size, points = _inner(ways[0].y, ways[0].y), np.isfinite(y).sum(1)
    return Fit(curve, curve.rate(rate), amplitude, floor, squares, size, points)


def theta_interval(found: Fit, x: Array, y: Array) -> tuple[float, float]:
    """95 % interval of θ from the scatter of the points y [D] themselves; NaN without enough.

    Those θ with which the squares stay below (1 + t² / (D − p)) of the least: the profile
    likelihood with normal errors of one unknown size (Bates and Watts 1988, section 6.1). An end
    beyond the grid is NaN.
    """
    curve = found.curve
    freedom = len(x) - curve.n_parameters
    if freedom < 1:
        return math.nan, math.nan
    limit = float(found.squares[0]) * (1 + student_point(freedom) ** 2 / freedom)
    grid = np.unique(np.append(np.geomspace(*curve.bounds(x), 4000), found.theta[0]))
    with np.errstate(all="ignore"):
        squares = _best(_solved(way, curve.rate(grid)) for way in _ways(curve, x, y[None]))[1]
    first, last = np.flatnonzero(squares <= limit + 1e-30)[[0, -1]]
    low = math.nan if first == 0 else float(grid[first])
    return low, math.nan if last == len(grid) - 1 else float(grid[last])


@dataclass(frozen=True)
class _Points:
    """What is fitted, with a floor of any sign or without one."""

    z: Array
    """[D]: coordinates."""
    there: Array | None
    """[R, D]: 1 for a point that is there, 0 for one that is missing; None if none is."""
    mean: Array | None
    """[R, 1]: of y; None without a floor."""
    y: Array
    """[R, D]: deviations from the mean or, without a floor, y itself; 0 of a missing point."""

    def rows(self, kept: Array | slice) -> _Points:
        """Some of the sets of points."""
        there, mean = (None if a is None else a[kept] for a in (self.there, self.mean))
        return _Points(self.z, there, mean, self.y[kept])

    def shapes(self, rate: Array) -> Array:
        """g [R, D] at the rates [R]."""
        return self.known(np.exp(np.multiply.outer(-rate, self.z)))

    def known(self, values: Array) -> Array:
        """values [R, D], 0 where a point is missing."""
        return values if self.there is None else values * self.there

    def average(self, values: Array) -> Array:
        """Means [R, 1] of values [R, D] that are 0 where a point is missing."""
        n = len(self.z) if self.there is None else self.there.sum(1, keepdims=True)
        return values.sum(1, keepdims=True) / n

    def centred(self, values: Array) -> Array:
        """With a floor, deviations of values [R, D] from their mean; else the values."""
        return values if self.mean is None else self.known(values - self.average(values))


def _ways(curve: Curve, x: Array, y: Array) -> list[_Points]:
    """The points without a floor and, if the curve has one, with one of any sign."""
    known = np.isfinite(y)
    there = None if known.all() else known.astype(np.float64)
    points = _Points(
        curve.coordinate(x), there, None, y if there is None else np.where(known, y, 0)
    )
    if not curve.floor:
        return [points]
    with np.errstate(invalid="ignore"):
        mean = points.average(points.y)
    return [points, _Points(points.z, there, mean, points.known(points.y - mean))]


def _best_rate(points: _Points, grid: Array) -> Array:
    """The rate [R] at which p²/s is largest, between the first and the last of the grid."""
    node = _best_node(points, grid)
    found, low, high = (
        grid[node],
        grid[np.maximum(node - 1, 0)],
        grid[np.minimum(node + 1, GRID - 1)],
    )
    todo = np.arange(len(found))
    for _ in range(STEPS):
        rate = found[todo]
        slope, bend = _derivatives(points, rate)
        low, high = np.where(slope > 0, rate, low), np.where(slope > 0, high, rate)
        step = rate - slope / bend
        inside = (low <= step) & (step <= high)
        found[todo] = np.where(inside, step, (low + high) / 2)
        moving = np.isfinite(slope) & (np.abs(found[todo] - rate) > CLOSE * rate)
        if not moving.any():
            break
        if not moving.all():
            todo, low, high, points = todo[moving], low[moving], high[moving], points.rows(moving)
    return found


def _best_node(points: _Points, grid: Array) -> Array:
    """Index [R] into the grid of the largest p/√s with a floor that is not below zero."""
    if len(points.y) > AT_ONCE:
        blocks = [slice(i, i + AT_ONCE) for i in range(0, len(points.y), AT_ONCE)]
        return np.concatenate([_best_node(points.rows(block), grid) for block in blocks])
    shapes = np.exp(np.multiply.outer(grid, -points.z))
    there = np.ones((1, len(points.z))) if points.there is None else points.there
    p, s = product(points.y, shapes.T), product(there, (shapes**2).T)
    if points.mean is None:
        p /= np.sqrt(s)
        return p.argmax(1)
    mean = product(there, shapes.T) / there.sum(1, keepdims=True)
    s = np.maximum(s - mean**2 * there.sum(1, keepdims=True), SAME * s)
    allowed = p * (mean / s) <= points.mean
    p /= np.sqrt(s)
    p *= allowed
    return p.argmax(1)


def _derivatives(points: _Points, rate: Array) -> tuple[Array, Array]:
    """First and second derivative [R] of log(p²/s) / 2 by the rate, at rates [R]; NaN where the
    points do not fall with g."""
    g = points.shapes(rate)
    zg = points.z * g
    first, second, third = points.centred(g), points.centred(zg), points.z * zg
    p, s = _inner(points.y, first), _inner(first, first)
    p = np.where(p > 0, p, math.nan)
    p1, p2 = _inner(points.y, second) / p, _inner(points.y, third) / p
    s1 = _inner(first, second) / s
    s2 = (_inner(second, second) + _inner(first, third)) / s
    return s1 - p1, p2 - p1**2 - s2 + 2 * s1**2


def _solved(points: _Points, rate: Array) -> Array:
    """[4, R]: the rates, and squares, amplitude and floor of the best linear part; squares are
    infinite where the floor is below zero or not known."""
    g = points.shapes(rate)
    shape = points.centred(g)
    s = _inner(shape, shape)
    amplitude = np.maximum(_inner(points.y, shape), 0) / np.where(s > 0, s, math.inf)
    apart = points.y - amplitude[:, None] * shape
    squares = _inner(apart, apart)
    if points.mean is None:
        return np.stack([rate, squares, amplitude, np.zeros_like(rate)])
    floor = (points.mean - amplitude[:, None] * points.average(g))[:, 0]
    allowed = (floor >= 0) & (s > SAME * _inner(g, g))
    return np.stack([rate, np.where(allowed, squares, math.inf), amplitude, floor])


def _best(found: Iterable[Array]) -> Array:
    """Row by row the one with the smaller squares, of what `_solved` gives; the first of equals."""
    return reduce(lambda a, b: np.where(b[1] < a[1], b, a), found)


def _inner(a: Array, b: Array) -> Array:
    """Row by row the inner product of a and b [R, D]: [R]."""
    return np.einsum("rd,rd->r", a, b)
