"""Rows of the table of fits: forms of decay compared, and half-lives of parts of the range."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from sparsify_vlm.analysis.bootstrap import Intervals, intervals
from sparsify_vlm.analysis.curves import Panel
from sparsify_vlm.analysis.fits import CURVES, EXPONENTIAL, Curve, Fit, fit, theta_interval
from sparsify_vlm.analysis.writes import SOURCES, defined

Array = np.ndarray
FIT_RESAMPLES = 2000
DISAGREE = 1.25
"""Ratio of half-lives of parts of the range from which on they are said to disagree."""
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


def compared_fits(panel: Panel, n: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """One row for each form, the exponential first, over the whole range of the panel."""
    x, count = panel.distances, len(panel.means)
    options: dict[str, Any] = {"n": n or FIT_RESAMPLES, "seed": seed, "over": SOURCES}
    there = np.isfinite(panel.means)
    found = []
    for curve in CURVES:
        if len(x) < curve.n_parameters:
            continue
        spread = intervals(
            lambda total, number, curve=curve: _values(fit(curve, x, total / number), x),
            np.where(there, panel.means, 0),
            there,
            **options,
        )
        found.append(_row(curve, x, WHOLE, count, spread, panel.intervals(n=100).value))
    _compare(panel, found, options)
    return found


def range_fits(panel: Panel, n: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """One row of an exponential for each part of the range of later layers."""
    options: dict[str, Any] = {"n": n or FIT_RESAMPLES, "seed": seed, "over": SOURCES}
    found = []
    for columns in _parts(panel.distances):
        x, means = panel.distances[columns], panel.means[:, columns]
        there = np.isfinite(means)
        spread = intervals(
            lambda total, number, x=x: _values(fit(EXPONENTIAL, x, total / number), x),
            np.where(there, means, 0),
            there,
            **options,
        )
        mean = np.where(there, means, 0).sum(0) / there.sum(0)
        found.append(_row(EXPONENTIAL, x, PART, len(means), spread, mean))
    return found


def fits_of_means(x: Array, y: Array) -> list[dict[str, Any]]:
    """All those rows from mean norms y [D] at distances x [D] alone."""
    ranges = [(curve, slice(None), WHOLE) for curve in CURVES]
    ranges += [(EXPONENTIAL, columns, PART) for columns in _parts(x)]
    found = []
    for curve, columns, scope in ranges:
        at, points = x[columns], y[columns]
        if len(at) < curve.n_parameters:
            continue
        values = fit(curve, at, points[None])
        low, high = _values(values, at)[0] * math.nan, _values(values, at)[0] * math.nan
        if np.isfinite(values.identified(at)[0]):
            low[0], high[0] = theta_interval(values, at, points)
        spread = Intervals(_values(values, at)[0], low, high, len(at), "")
        found.append(_row(curve, at, scope, None, spread, points))
    return found


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
                + ("; on some parts the norm does not fall" if flat else "")
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
    best = min(rows, key=lambda row: row["held_out_error"])
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
    """[R, 3]: θ, amplitude, floor."""
    return np.stack([found.identified(x), found.amplitude, found.floor], 1)


def _row(
    curve: Curve, x: Array, scope: str, sources: int | None, spread: Intervals, points: Array
) -> dict[str, Any]:
    found = fit(curve, x, points[None])
    row: dict[str, Any] = dict.fromkeys(FIT_COLUMNS)
    row |= {"model": curve.name, "scope": scope, "points": len(x), "sources": sources}
    row |= {"range_from": float(x[0]), "range_to": float(x[-1])}
    names = [curve.parameter, "amplitude", *(["floor"] if curve.floor else [])]
    for place, name in enumerate(names):
        row[name] = defined(float(spread.value[place]))
        row[f"{name}_low"] = defined(float(spread.low[place]))
        row[f"{name}_high"] = defined(float(spread.high[place]))
    row["error"] = defined(float(_relative(found.at(x), points[None])[0]))
    return row


def _relative(fitted: Array, points: Array) -> Array:
    """Root of Σ deviation² / Σ norm² over the last axis, of what is there."""
    with np.errstate(invalid="ignore", divide="ignore"):
        apart = np.nansum((fitted - points) ** 2, -1) / np.nansum(points**2, -1)
    return np.sqrt(apart)


def _held_out(halves: Array, x: Array, curves: Sequence[Curve]) -> Array:
    """Errors [R, curves] on each half [R, 2, D] of what was fitted to the other."""
    errors = []
    for curve in curves:
        pair = [_relative(fit(curve, x, halves[:, i]).at(x), halves[:, 1 - i]) ** 2 for i in (0, 1)]
        errors.append(np.sqrt((pair[0] + pair[1]) / 2))
    return np.stack(errors, 1)


def _compare(panel: Panel, rows: list[dict[str, Any]], options: dict[str, Any]) -> None:
    """Fill in the errors on held-out latents, and how far each form is behind the best."""
    curves = [curve for curve in CURVES if curve.name in {row["model"] for row in rows}]
    halves = panel.halves.transpose(1, 0, 2)
    there = np.isfinite(halves)
    if not rows or not there.any(0).all():
        return
    sums = (np.where(there, halves, 0), there)
    errors = intervals(lambda a, n: _held_out(a / n, panel.distances, curves), *sums, **options)
    best = int(errors.value.argmin())

    def behind(a: Array, n: Array) -> Array:
        found = _held_out(a / n, panel.distances, curves)
        return found - found[:, best : best + 1]

    apart = intervals(behind, *sums, **options)
    for place, row in enumerate(rows):
        row["held_out_error"] = defined(float(errors.value[place]))
        row["behind_best"] = defined(float(apart.value[place]))
        row["behind_best_low"] = defined(float(apart.low[place]))
        row["behind_best_high"] = defined(float(apart.high[place]))
