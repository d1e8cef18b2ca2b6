"""The figures of the distance experiment."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sparsify_vlm.report.analysis import style
from sparsify_vlm.report.analysis.style import VARIANTS, finish, kinds, layer_ticks, nan
from sparsify_vlm.report.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sparsify_vlm.analysis.results import Results
    from sparsify_vlm.analysis.tables import Table

PANELS = {
    "all": {"ls": "-", "marker": "o", "label": "all source layers"},
    "balanced": {"ls": ":", "marker": "s", "label": "balanced panel"},
}


def distance_decay(results: Results) -> Figure | None:
    """Mean decoder norm against distance: per variant, and with data by token role."""
    table = results.table("distance_decay")
    if table is None:
        return None
    names = kinds(table, "variant", VARIANTS)
    by_role = _roles(table)
    figure, panels = style.panels(len(names) + bool(by_role))
    distances = sorted(set(table["distance"]))
    for axes, variant in zip(panels, names, strict=False):
        for panel, how in PANELS.items():
            found = table.where(variant=variant, panel=panel, role="all", weighting="latents")
            _curve(axes, found.rows(), style.COLOURS_OF_VARIANTS[variant], how)
        finish(axes, VARIANTS[variant], "distance, layers", "mean decoder norm")
        axes.legend(frameon=False, fontsize=8)
    for role, rows in by_role.items():
        how = {"ls": "-", "marker": "o", "label": style.ROLE_NAMES[role]}
        _curve(panels[-1], rows, style.COLOURS_OF_ROLES[role], how)
    if by_role:
        finish(panels[-1], "what is written on tokens", "distance, layers", "norm of writes / σ")
        panels[-1].legend(frameon=False, fontsize=8)
    for axes in panels:
        axes.set_ylim(bottom=0)
        layer_ticks(axes.xaxis, distances)
    return figure


def _roles(table: Table) -> dict[str, list[dict[str, Any]]]:
    """Rows weighted by energy, by role."""
    found = {
        role: table.where(variant="corrected", panel="all", role=role, weighting="energy").rows()
        for role in style.ROLE_NAMES
    }
    return {role: rows for role, rows in found.items() if rows}


def _curve(axes: Any, rows: list[dict[str, Any]], colour: str, how: dict[str, Any]) -> None:
    rows = sorted(rows, key=lambda row: row["distance"])
    if not rows:
        return
    x = [row["distance"] for row in rows]
    axes.plot(x, [nan(row["mean"]) for row in rows], color=colour, ms=4, lw=1.3, **how)
    style.band(axes, x, rows, colour)


def per_layer_patterns(results: Results) -> Figure | None:
    """Mean decoder norm over that at the nearest target, a line per source layer."""
    table = results.table("per_layer_patterns")
    if table is None:
        return None
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    names = kinds(table, "variant", ("plain", "corrected"))
    layers = sorted(set(table["source"]))
    figure = new_figure(4.8 * len(names) + 0.6, 3.8)
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    scale, colours = Normalize(0, max(max(layers), 1)), colormaps["viridis"]
    for axes, variant in zip(panels, names, strict=True):
        for layer in layers:
            rows = table.where(variant=variant, source=layer).rows()
            rows = sorted(rows, key=lambda row: row["distance"])
            x, y = [r["distance"] for r in rows], [nan(r["mean"]) for r in rows]
            axes.plot(x, y, "o-", color=colours(scale(layer)), ms=3, lw=1.2)
        what = "norm, relative to the nearest target"
        finish(axes, VARIANTS[variant], "distance, layers", what)
        axes.set_ylim(bottom=0)
        layer_ticks(axes.xaxis, sorted(set(table["distance"])))
    bar = figure.colorbar(ScalarMappable(scale, colours), ax=list(panels), label="source layer")
    layer_ticks(bar, layers)
    return figure


def detailed_heatmap(results: Results) -> Figure | None:
    """Source layer × distance: mean decoder norm."""
    table = results.table("detailed_heatmap")
    if table is None:
        return None
    names = kinds(table, "variant", ("plain", "corrected"))
    shape = (max(table["source"]) + 1, max(table["distance"]) + 1)
    figure = new_figure(4.8 * len(names), 4.0)
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, variant in zip(panels, names, strict=True):
        rows = table.where(variant=variant).rows()
        grid = style.grid_of(rows, "distance", "source", "mean", shape)
        style.heatmap(axes, grid, "mean decoder norm")
        axes.set_title(VARIANTS[variant], fontsize=10.5)
        axes.set_xlabel("distance, layers")
        axes.set_ylabel("source layer")
    return figure


FIGURES: dict[str, Callable[[Results], Figure | None]] = {
    "distance_decay": distance_decay,
    "per_layer_patterns": per_layer_patterns,
    "detailed_heatmap": detailed_heatmap,
}
