"""Rows of the table of fits: forms of decay compared, and half-lives of parts of the range."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from sparsify_vlm.analysis.bootstrap import intervals
from sparsify_vlm.analysis.curves import Panel
from sparsify_vlm.analysis.fits import CURVES, EXPONENTIAL, Curve, Fit, fit, theta_interval
from sparsify_vlm.analysis.writes import SOURCES, defined

Array = np.ndarray
FIT_RESAMPLES = 1000
DISAGREE = 1.25
"""Ratio of half-lives of parts of the range from which on they are said to disagree."""
SAME_ERROR = 1e-6
MOST_CUTS = 5
VALUES = ("half_life", "exponent", "amplitude", "floor")
FIT_COLUMNS = (
    "model",
    "scope",
    "range_from",
    "range_to",
    "points",
    "sources",
    *(f"{name}{end}" for name in VALUES for end in ("", "_low", "_high")),
    "error",
    "held_out_error",
    "behind_best",
    "behind_best_low",
    "behind_best_high",
)
WHOLE, PART = "whole", "part"


class _Part(NamedTuple):
    """A curve fitted to some of the distances."""

    curve: Curve
    columns: slice
    scope: str


def fits_of_panel(
    panel: Panel, compared: bool, parts: bool, n: int | None = None, seed: int = 0
) -> list[dict[str, Any]]:
    """An exponential over the whole range of the panel; if `compared`, the other forms too, with
    their errors on held-out latents; if `parts`, an exponential for each part of the range of
    later layers."""
    options: dict[str, Any] = {"n": n or FIT_RESAMPLES, "seed": seed, "over": SOURCES}
    x = panel.distances
    curves = [c for c in CURVES[: None if compared else 1] if len(x) >= c.n_parameters]
    fitted = [_Part(curve, slice(None), WHOLE) for curve in curves]
    fitted += [_Part(EXPONENTIAL, columns, PART) for columns in _parts(x)] if parts else []

    def values(total: Array, n: Array) -> Array:
        means = total / n
        return np.stack([_values(fit(c, x[at], means[:, at]), x[at]) for c, at, _ in fitted], 1)

    there = np.isfinite(panel.means)
    spread = intervals(values, np.where(there, panel.means, 0), there, **options)
    rows = [
        _row(part, x, len(panel.means), *bounds)
        for part, *bounds in zip(fitted, spread.value, spread.low, spread.high, strict=True)
    ]
    if compared:
        _compare(panel, curves, rows[: len(curves)], options)
    return rows


def fits_of_means(x: Array, y: Array) -> list[dict[str, Any]]:
    """All those rows from mean norms y [D] at distances x [D] alone."""
    fitted = [_Part(curve, slice(None), WHOLE) for curve in CURVES]
    fitted += [_Part(EXPONENTIAL, columns, PART) for columns in _parts(x)]
    rows = []
    for part in fitted:
        at, points = x[part.columns], y[part.columns]
        if len(at) < part.curve.n_parameters:
            continue
        found = fit(part.curve, at, points[None])
        value = _values(found, at)[0]
        low, high = value * math.nan, value * math.nan
        if np.isfinite(value[0]):
            low[0], high[0] = theta_interval(found, at, points)
        rows.append(_row(part, x, None, value, low, high))
    return rows


def disagreement(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What must be said about half-lives on several ranges, and about the forms compared."""
    notes = []
    parts = [r for r in rows if r["scope"] == PART and r["points"] > 1 and r["half_life"]]
    flat = [r for r in rows if r["scope"] == PART and r["half_life"] is None]
    if parts:
        low, high = (pick(parts, key=lambda r: r["half_life"]) for pick in (min, max))
        if high["half_life"] > DISAGREE * low["half_life"] or flat:
            notes.append(
                f"one half-life is not identifiable: exponentials fitted to parts of the range of "
                f"later layers give {_said(low)} to {_said(high)}"
                + ("; on some parts none fits" if flat else "")
                + "."
            )
    elif flat:
        notes.append("no half-life: the norm does not fall over later layers.")
    tested = [r for r in rows if r["held_out_error"] is not None]
    if tested:
        notes.append(_best(tested))
    return notes


def _said(row: dict[str, Any]) -> str:
    span = f"distances {row['range_from']:g} to {row['range_to']:g}"
    return f"{row['half_life']:.1f} layers ({span})"


def _best(rows: Sequence[dict[str, Any]]) -> str:
    best = next(row for row in rows if row["behind_best"] == 0)
    text = f"of the fitted forms {best['model']} is closest on held-out latents"
    close = [
        row["model"]
        for row in rows
        if row is not best and not (row["behind_best_low"] and row["behind_best_low"] > 0)
    ]
    error = f" (error {best['held_out_error']:.1%} of the norm)"
    if close:
        return f"{text}{error}, but not reliably closer than {' or '.join(close)}."
    return f"{text}{error}."


def _parts(x: Array) -> list[slice]:
    """From the nearest later layer to several ends, and from several starts to the last."""
    first = int(np.searchsorted(x, 1))
    last = len(x) - 1
    cuts = np.unique(np.linspace(first, last, min(MOST_CUTS, last - first + 1)).round().astype(int))
    ends = [slice(first, int(end) + 1) for end in cuts[1:]]
    return ends + [slice(int(start), last + 1) for start in cuts[1:-1]]


def _values(found: Fit, x: Array) -> Array:
    """[R, 4]: θ, amplitude, floor, and the root of Σ deviation² / Σ norm²; NaN where there are
    fewer points than parameters."""
    values = np.stack([found.identified(x), found.amplitude, found.floor, found.error], 1)
    return np.where(found.enough[:, None], values, math.nan)


def _row(
    part: _Part, x: Array, sources: int | None, value: Array, low: Array, high: Array
) -> dict[str, Any]:
    """The row of a fit from its `_values` and their bounds, each [4]."""
    curve, at = part.curve, x[part.columns]
    row: dict[str, Any] = dict.fromkeys(FIT_COLUMNS)
    row |= {"model": curve.name, "scope": part.scope, "points": len(at), "sources": sources}
    row |= {"range_from": float(at[0]), "range_to": float(at[-1])}
    names = [curve.parameter, "amplitude", *(["floor"] if curve.floor else [])]
    for place, name in enumerate(names):
        row[name] = defined(float(value[place]))
        row[f"{name}_low"] = defined(float(low[place]))
        row[f"{name}_high"] = defined(float(high[place]))
    row["error"] = defined(float(value[3]))
    return row


def _held_out(halves: Array, x: Array, curves: Sequence[Curve]) -> Array:
    """Errors [R, curves] on each half [R, 2, D] of what was fitted to the other.

    Halves are brought to the same size before: how large their latents are is not asked for.
    """
    there = np.isfinite(halves)
    size = np.sqrt((np.where(there, halves, 0) ** 2).sum(-1, keepdims=True))
    halves = halves / size
    train, test = np.concatenate([halves[:, 0], halves[:, 1]]), halves[:, ::-1]
    errors = []
    for curve in curves:
        fitted = fit(curve, x, train).at(x).reshape(2, len(halves), -1).transpose(1, 0, 2)
        squares = np.where(there[:, ::-1], fitted - test, 0) ** 2
        errors.append(np.sqrt(squares.sum(-1).mean(1)))
    return np.stack(errors, 1)


def _compare(
    panel: Panel, curves: Sequence[Curve], rows: list[dict[str, Any]], options: dict[str, Any]
) -> None:
    """Fill in the errors on held-out latents, and how far each form is behind the best."""
    halves = panel.halves.transpose(1, 0, 2)
    there = np.isfinite(halves)
    if not there.any(0).all():
        return
    sums = np.where(there, halves, 0)
    whole = (sums.sum(0) / there.sum(0))[None]
    if not whole.any(2).all():
        return
    errors = _held_out(whole, panel.distances, curves)[0]
    best = int(np.flatnonzero(errors <= errors.min() + SAME_ERROR)[0])  # the simplest of equals

    def behind(a: Array, n: Array) -> Array:
        found = _held_out(a / n, panel.distances, curves)
        return np.stack([found, found - found[:, best : best + 1]], 2)

    apart = intervals(behind, sums, there, **options)
    for place, row in enumerate(rows):
        row["held_out_error"] = defined(float(apart.value[place, 0]))
        row["behind_best"] = defined(float(apart.value[place, 1]))
        row["behind_best_low"] = defined(float(apart.low[place, 1]))
        row["behind_best_high"] = defined(float(apart.high[place, 1]))
