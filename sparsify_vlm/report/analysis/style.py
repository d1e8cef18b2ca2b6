"""What the figures of the analyses share: colours, names, axes, PNG."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from sparsify_vlm.report.figures import ROLE_COLOURS, new_figure, plain_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sparsify_vlm.analysis.tables import Table

DPI = 130

COLOURS_OF_ROLES = ROLE_COLOURS | {"text_only": "#cc79a7"}
ROLE_NAMES = {
    "all": "all tokens",
    "image": "image tokens",
    "text": "text after an image",
    "text_only": "text without image",
}
VARIANTS = {
    "plain": "plain: raw norms",
    "scaled": "norms / σ of the target",
    "corrected": "corrected: gauge-free",
}
COLOURS_OF_VARIANTS = {"plain": "#0072b2", "scaled": "#56b4e9", "corrected": "#009e73"}
NULL: dict[str, Any] = {"color": "#222222", "ls": "--", "lw": 1.0}
"""How a uniform null is drawn."""

ARMS = {
    "full": "full CLT",
    "same_only": "cross writes zeroed",
    "cross_mean": "cross writes at their mean",
    "refit": "same-layer decoders refitted",
    "cross_only": "cross writes only",
    "random_deletion": "random deletion, equal energy",
    "no_skip": "without skip connection",
    "plt": "per-layer transcoder",
    "random_init": "random encoders, fitted",
    "mean": "every write its mean",
    "zero": "no write",
}
COLOURS_OF_ARMS = {
    "full": "#000000",
    "same_only": "#d55e00",
    "cross_mean": "#e69f00",
    "refit": "#009e73",
    "cross_only": "#cc79a7",
    "random_deletion": "#56b4e9",
    "plt": "#0072b2",
}


def arm_name(arm: str) -> str:
    """What an arm of the ablation is called in figures and tables."""
    if arm.startswith("reach_"):
        return f"reach ≤ {arm.removeprefix('reach_')}"
    return ARMS.get(arm, arm.replace("_", " "))


def arm_order(arms: Iterable[str]) -> list[str]:
    """Arms as reports list them, the limited reaches by their number."""
    known = list(ARMS)

    def place(arm: str) -> tuple[float, float, str]:
        if arm.startswith("reach_"):
            return known.index("cross_only"), float(arm.removeprefix("reach_")), arm
        return (known.index(arm) if arm in known else len(known)), -1.0, arm

    return sorted(dict.fromkeys(arms), key=place)


def arm_colour(arm: str) -> str:
    """An arm's colour, the same in every figure; grey for the less important."""
    return COLOURS_OF_ARMS.get(arm, "#999999")


def to_png(figure: Figure) -> bytes:
    """The figure as PNG bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def panels(n: int, **more: Any) -> tuple[Figure, list[Any]]:
    """A figure of n equal panels, at most two of them side by side unless there are three."""
    columns = n if n <= 3 else 2
    rows = math.ceil(n / columns)
    figure = new_figure(max(4.6 * columns, 6.4), 3.6 * rows + (0.6 if n > 1 else 0))
    axes = list(figure.subplots(rows, columns, squeeze=False, **more).flat)
    for unused in axes[n:]:
        unused.set_visible(False)
    return figure, axes[:n]


def kinds(table: Table, column: str, order: Iterable[str]) -> list[str]:
    """The values of `order` that a column has."""
    there = set(table[column])
    return [value for value in order if value in there]


def nan(value: float | None) -> float:
    """The number, NaN for None."""
    return math.nan if value is None else float(value)


def layer_ticks(axis: Any, layers: Sequence[int]) -> None:
    """Whole numbers only, at most about a dozen of them."""
    step = max(1, math.ceil(len(layers) / 12))
    axis.set_ticks(list(layers)[::step])


def whiskers(axes: Any, x: Sequence[float], rows: Sequence[Any], mean: str, **style: Any) -> None:
    """Points at rows[mean] with lines from rows["low"] to rows["high"], where these are known."""
    y = [nan(row[mean]) for row in rows]
    below = [v - nan(row["low"]) for v, row in zip(y, rows, strict=True)]
    above = [nan(row["high"]) - v for v, row in zip(y, rows, strict=True)]
    ends = [[0.0 if math.isnan(v) else max(v, 0.0) for v in side] for side in (below, above)]
    axes.errorbar(x, y, yerr=ends, elinewidth=1.0, capsize=0, **style)


def band(axes: Any, x: Sequence[float], rows: Sequence[Any], colour: str) -> None:
    """The region between `low` and `high`."""
    low, high = ([nan(row[end]) for row in rows] for end in ("low", "high"))
    axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)


def finish(axes: Any, title: str, x: str, y: str) -> None:
    """Title, labels and grid."""
    axes.set_title(title, fontsize=10.5)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    plain_axes(axes)


def grid_of(rows: Iterable[Any], x: str, y: str, value: str, shape: tuple[int, int]) -> Any:
    """[y][x] of the rows' values, NaN where there is none."""
    grid = [[math.nan] * shape[1] for _ in range(shape[0])]
    for row in rows:
        grid[row[y]][row[x]] = nan(row[value])
    return grid


def heatmap(axes: Any, grid: list[list[float]], label: str, *, percent: bool = False) -> None:
    """A matrix with its colour bar; every cell has its number if there are few."""
    image = axes.imshow(grid, cmap="viridis", vmin=0.0, aspect="auto")
    known = [v for row in grid for v in row if not math.isnan(v)]
    top = max(known, default=1.0)
    if max(len(grid), len(grid[0])) <= 10:
        for i, row in enumerate(grid):
            for j, value in enumerate(row):
                if not math.isnan(value):
                    text = f"{100 * value:.0f}" if percent else f"{value:.2g}"
                    shade = "white" if value < 0.6 * top else "black"
                    axes.text(j, i, text, ha="center", va="center", color=shade, size=7)
    layer_ticks(axes.xaxis, range(len(grid[0])))
    layer_ticks(axes.yaxis, range(len(grid)))
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.85)
    bar.set_label(label, fontsize=8.5)
    if percent:
        from matplotlib.ticker import PercentFormatter

        bar.formatter = PercentFormatter(1.0, decimals=0)
        bar.update_ticks()


def column_strips(axes: Any, rows: Sequence[Any], layers: Sequence[int]) -> None:
    """One shaded column per source layer: the histogram of its latents, darkest at its peak, with
    a line at the median. Rows have `source`, `bin` (left edge, bins of equal width) and `count`."""
    width = bin_width(sorted({row["bin"] for row in rows}))
    for layer in layers:
        own = sorted((r["bin"], r["count"]) for r in rows if r["source"] == layer)
        top = max((count for _, count in own), default=0)
        for left, count in own:
            if count:
                shade = 0.1 + 0.8 * count / top
                axes.bar(layer, width, 0.8, left, color="#0072b2", alpha=shade, lw=0)
        if top:
            axes.hlines(_median(own, width), layer - 0.4, layer + 0.4, color="#d55e00", lw=2)
    axes.set_xlim(min(layers) - 0.6, max(layers) + 0.6)
    layer_ticks(axes.xaxis, layers)


def bin_width(edges: Sequence[float]) -> float:
    """The width of bins with these left edges, all equal; empty bins may be missing."""
    return min((b - a for a, b in pairwise(edges)), default=1.0)


def _median(bins: Sequence[tuple[float, float]], width: float) -> float:
    half, seen = sum(count for _, count in bins) / 2, 0.0
    for left, count in bins:
        if count and seen + count >= half:
            return left + width * (half - seen) / count
        seen += count
    return math.nan
