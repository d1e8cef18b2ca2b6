"""Intervals of the figures of arms: of samples, and of the draws of arms that are drawn at random.

The figure of a random arm is the mean of its draws. Its interval is that of resampled samples, with
Student's interval of the mean over the draws added in quadrature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from sparsify_vlm.analysis.bootstrap import Intervals, intervals, student_point
from sparsify_vlm.analysis.reconstruction import ReconstructionSums
from sparsify_vlm.analysis.spliced import SplicedSums
from sparsify_vlm.analysis.tokens import ROLES

Array = np.ndarray
Figures = Callable[[Array, Array, Array], Array]
"""Of sums error [R, A, roles, T], total [R, roles, T] and tokens [R, roles]: [R, …]."""
WITH_DRAWS = "samples and draws"
"""What intervals of arms that are drawn at random are over."""


def mean_over(values: Array, axis: int) -> Array:
    """The mean of what is not NaN; NaN where nothing is."""
    known = np.isfinite(values)
    count = known.sum(axis)
    total = np.where(known, values, 0.0).sum(axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def fvu_of(error: Array, total: Array) -> Array:
    """Mean over layers of the FVU, [R, A, roles], of sums error [R, A, roles, T], total
    [R, roles, T]."""
    return mean_over(error / total[:, None], -1)


def added_error(error: Array, total: Array, tokens: Array, full: int) -> Array:
    """What an arm adds to the error of the arm `full` per token of a role, over the variance of all
    tokens: mean over layers, [R, A, roles].

    FVU is relative to the role's own variance; this measures all roles with one ruler.
    """
    every = ROLES.index("all")
    variance = total[:, every] / tokens[:, every, None]
    more = (error - error[:, full, None]) / tokens[:, None, :, None]
    return mean_over(more / variance[:, None, None], -1)


def of_error(figures: Figures, sums: ReconstructionSums, axis: int, seed: int = 0) -> Intervals:
    """Intervals of `figures`, whose `axis` (counted without R) is that of the arms."""
    found = intervals(figures, sums.error, sums.total, sums.tokens, seed=seed)

    def touched(arm: str) -> Array:
        mask = np.zeros(found.value.shape, dtype=bool)
        np.moveaxis(mask, axis, 0)[sums.arms.index(arm)] = True
        return mask

    return with_draws(found, figures, sums, {arm: touched(arm) for arm in sums.draws})


def with_draws(
    found: Intervals, figures: Figures, sums: ReconstructionSums, touched: Mapping[str, Array]
) -> Intervals:
    """`found` with the draws of each random arm in it, at the places that the arm has touched."""
    for arm, places in touched.items():
        each = sums.draws[arm]
        error, total, tokens = (
            np.repeat(part.sum(0)[None], len(each), 0)
            for part in (sums.error, sums.total, sums.tokens)
        )
        error[:, sums.arms.index(arm)] = each
        with np.errstate(all="ignore"):
            found = _widened(found, figures(error, total, tokens), places)
    return found


def of_losses(figures: Callable[[Array, Array], Array], sums: SplicedSums, seed: int) -> Intervals:
    """Intervals of `figures` [R, kinds, A] of sums model [R, 4] and all_layers [R, A, 4]."""
    found = intervals(figures, sums.model, sums.all_layers, seed=seed)
    for arm, each in sums.draws.items():
        touched = np.zeros(found.value.shape, dtype=bool)
        touched[:, sums.arms.index(arm)] = True
        every = np.repeat(sums.all_layers.sum(0)[None], len(each), 0)
        every[:, sums.arms.index(arm)] = each
        own = np.repeat(sums.model.sum(0)[None], len(each), 0)
        found = _widened(found, figures(own, every), touched)
    return found


def _widened(found: Intervals, draws: Array, touched: Array) -> Intervals:
    """`found` with Student's interval of the mean over `draws` [draws, …] added in quadrature, at
    the places that are `touched`."""
    n = len(draws)
    half = student_point(n - 1) * draws.std(0, ddof=1) / math.sqrt(n)
    half = np.where(touched, half, 0.0)
    low = found.value - np.hypot(found.value - found.low, half)
    return replace(found, low=low, high=found.value + np.hypot(found.high - found.value, half))


def place(found: Intervals, *at: int, over: str | None = None) -> Intervals:
    """One entry, as scalars; `over` is what its interval is over, if not what all are."""
    value, low, high = (np.asarray(v[at]) for v in (found.value, found.low, found.high))
    return Intervals(value, low, high, found.n, over or found.over)
