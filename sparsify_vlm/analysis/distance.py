"""How what a latent writes changes with the distance to its target.

Curves and panels are those of `curves`, the fitted forms those of `fits`. A fit is to the mean
curve of a panel. Forms are compared on held-out latents: fitted to the curve of one half of the
latents, measured on that of the other, both brought to the same size (both ways; error = root of
Σ deviation² / Σ norm²).
Intervals are over source layers, errors' differences on the same resamples.

One half-life is a summary only if it is the same wherever it is measured. So exponentials are also
fitted to parts of the range (from the nearest later layer on to several ends, from several starts
to the last), and where those disagree by more than `DISAGREE` a note says that one half-life is not
identifiable.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsify_vlm.analysis.bootstrap import intervals, ratio_interval
from sparsify_vlm.analysis.curves import PANELS, Curves, Kind, Panel, read_curves
from sparsify_vlm.analysis.decay import (
    FIT_COLUMNS,
    disagreement,
    fits_of_means,
    fits_of_panel,
)
from sparsify_vlm.analysis.decoders import Coder, one_thread
from sparsify_vlm.analysis.tables import Estimate, Experiment, Table
from sparsify_vlm.analysis.writes import ALL, SOURCES, Numbers, all_writes, defined

if TYPE_CHECKING:
    from sparsify_vlm.analysis.activity import Activity

Array = np.ndarray
FACTORS = (1, 5)
"""Distances at which the mean norm is compared with that at distance 0."""
SIDE_BY_SIDE = 2
"""Kinds of curves worked on at a time."""
DECAY_COLUMNS = (
    "distance",
    "variant",
    "weighting",
    "role",
    "panel",
    "mean",
    "low",
    "high",
    "sources",
)


@one_thread()
def distance(
    coder: Coder,
    sigma: Numbers | None = None,
    activity: Activity | None = None,
    seed: int = 0,
    resamples: int | None = None,
) -> Experiment:
    """The experiment on distance; arguments as of `weights`."""
    writes = all_writes(coder, sigma, activity)
    curves = read_curves(writes, seed)
    options = {"n": resamples, "seed": seed}
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:  # numpy holds no lock while it works
        found = list(pool.map(lambda one: _of_kind(one, options), curves))
    notes = writes.notes()
    decay = [row for one in found for row in one.decay]
    fits = [row for one in found for row in one.fits]
    estimates = {name: value for one in found for name, value in one.estimates.items()}
    notes += [note for one in found for note in one.notes]
    return Experiment(
        "distance",
        estimates,
        {
            "distance_decay": Table.from_rows(decay, DECAY_COLUMNS),
            "per_layer_patterns": _by_source(curves, relative=True),
            "detailed_heatmap": _by_source(curves, relative=False),
            "fits": Table.from_rows(fits, ("variant", "weighting", "role", "panel", *FIT_COLUMNS)),
        },
        notes,
    )


@dataclass
class _Found:
    """Of one kind of curve."""

    estimates: dict[str, Estimate]
    decay: list[dict[str, Any]] = field(default_factory=list)
    fits: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def _of_kind(curves: Curves, options: dict[str, Any]) -> _Found:
    kind = curves.kind
    found = _Found(_factors(curves, options))
    for name in PANELS:
        panel = curves.panel(name)
        found.decay += _decay_rows(kind, name, panel, options)
        if len(panel.distances) < 2:
            continue
        place = {**kind._asdict(), "panel": name}
        fits = [place | row for row in _fitted(kind, panel, options)]
        found.fits += fits
        found.estimates |= _half_life(kind, name, fits)
        if kind.weighting == "latents" and kind.role == ALL:
            said = f"{kind.variant} norms, {name} sources"
            found.notes += [f"{said}: {text}" for text in disagreement(fits)]
    return found


def distance_from_means(distances: Sequence[float], means: Sequence[float]) -> Experiment:
    """The same from mean norms alone, as a publication gives them.

    Args:
        distances: two or more, ascending, in layers.
        means: the mean norm at each of them.

    Intervals are from the scatter around the curves, as there are no source layers to draw from.
    Raises `ValueError` if the lists differ in length, or distances do not ascend.
    """
    x, y = np.asarray(distances, dtype=float), np.asarray(means, dtype=float)
    if len(x) != len(y) or len(x) < 2 or (np.diff(x) <= 0).any():
        raise ValueError("give two or more ascending distances, and a mean for each")
    at = dict(zip(x.tolist(), y.tolist(), strict=True))
    estimates = {
        f"decay_factor_0_{d}": Estimate.of(at.get(d, math.nan) / at.get(0, math.nan))
        for d in FACTORS
    }
    kind = Kind("plain", "latents", ALL)
    place = {**kind._asdict(), "panel": "all"}
    found = [{**place, **row} for row in fits_of_means(x, y)]
    decay = [
        {"distance": a, **place, "mean": b, "low": None, "high": None, "sources": None}
        for a, b in at.items()
    ]
    return Experiment(
        "distance",
        estimates | _half_life(kind, "all", found),
        {
            "distance_decay": Table.from_rows(decay, DECAY_COLUMNS),
            "fits": Table.from_rows(found, ("variant", "weighting", "role", "panel", *FIT_COLUMNS)),
        },
        disagreement(found),
    )


def _suffix(kind: Kind, panel: str = "all") -> str:
    """Of an estimate's name: nothing for the published quantity, else what differs from it."""
    parts = [kind.variant if kind.variant != "plain" or kind.weighting == "energy" else ""]
    parts += [kind.weighting if kind.weighting == "energy" else ""]
    parts += [kind.role if kind.role != ALL else "", panel if panel != "all" else ""]
    return "".join(f".{part}" for part in parts if part)


def _factors(curves: Curves, options: dict[str, Any]) -> dict[str, Estimate]:
    """Mean norm at a distance over that at 0: of all sources, and of those that have both."""
    found: dict[str, Estimate] = {}
    for d in FACTORS:
        both = [np.flatnonzero(curves.distances == at) for at in (0, d)]
        name = f"decay_factor_0_{d}"
        if any(not len(place) for place in both):
            found |= {name + _suffix(curves.kind, panel): Estimate(None) for panel in PANELS}
            continue
        near, far = (curves.means[:, place[0]] for place in both)
        there = [np.isfinite(near), np.isfinite(far)]
        found[name + _suffix(curves.kind)] = intervals(
            lambda far, n_far, near, n_near: (far / n_far) / (near / n_near),
            np.where(there[1], far, 0),
            there[1],
            np.where(there[0], near, 0),
            there[0],
            over=SOURCES,
            **options,
        ).estimate()
        rows = there[0] & there[1]
        found[name + _suffix(curves.kind, "balanced")] = (
            ratio_interval(far[rows], near[rows], over=SOURCES, **options).estimate()
            if rows.any()
            else Estimate(None)
        )
    return found


def _half_life(kind: Kind, panel: str, rows: Sequence[dict[str, Any]]) -> dict[str, Estimate]:
    """Of the exponential over the whole range, the first of the rows."""
    first = rows[0]
    bounds = (first["half_life"], first["half_life_low"], first["half_life_high"])
    name = f"half_life{_suffix(kind, panel)}"
    return {name: Estimate(*bounds, n=first["sources"], over=SOURCES if first["sources"] else "")}


def _fitted(kind: Kind, panel: Panel, options: dict[str, Any]) -> list[dict[str, Any]]:
    every = kind.role == ALL
    return fits_of_panel(panel, every, every and kind.weighting == "latents", **options)


def _decay_rows(
    kind: Kind, name: str, panel: Panel, options: dict[str, Any]
) -> list[dict[str, Any]]:
    found = panel.intervals(**options)
    return [
        {
            "distance": int(d),
            **kind._asdict(),
            "panel": name,
            "mean": defined(float(found.value[i])),
            "low": defined(float(found.low[i])),
            "high": defined(float(found.high[i])),
            "sources": panel.counts()[i],
        }
        for i, d in enumerate(panel.distances)
    ]


def _by_source(curves: Sequence[Curves], relative: bool) -> Table:
    """Mean norm of each source at each distance; `relative`: over that at its first target."""
    rows = []
    for one in curves:
        if one.kind.weighting != "latents" or one.kind.role != ALL:
            continue
        with np.errstate(invalid="ignore"):  # a source that writes nothing
            values = one.means / one.means[:, :1] if relative else one.means
        for s, source in enumerate(one.sources):
            rows += [
                {
                    "source": source,
                    "distance": int(one.distances[k]),
                    "variant": one.kind.variant,
                    "mean": float(values[s, k]),
                }
                for k in np.flatnonzero(np.isfinite(values[s]))
            ]
    return Table.from_rows(rows, ("source", "distance", "variant", "mean"))
