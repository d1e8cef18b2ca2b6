"""The figures of `analyze`, named as in the study whose questions they answer.

Each takes the results and gives a matplotlib figure, or None where its numbers are not there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from sparsify_vlm.analysis.tables import Table
from sparsify_vlm.report.analysis import style
from sparsify_vlm.report.analysis.style import VARIANTS, finish, kinds, layer_ticks, nan
from sparsify_vlm.report.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sparsify_vlm.analysis.results import Results


def weight_heatmap(results: Results) -> Figure | None:
    """Source layer × target layer: mean norms, plain and corrected, and with data block shares."""
    table = results.table("weight_heatmap")
    if table is None:
        return None
    names = kinds(table, "variant", ("plain", "corrected"))
    panels = [(v, "mean_norm", "mean decoder norm") for v in names]
    if "block_share" in table.columns and any(v is not None for v in table["block_share"]):
        panels.append((names[-1], "block_share", "share of what is written to the target"))
    n = max(table["target"]) + 1
    figure = new_figure(4.6 * len(panels), 4.0)
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (variant, column, label) in zip(all_axes, panels, strict=True):
        rows = table.where(variant=variant).rows()
        grid = style.grid_of(rows, "target", "source", column, (n, n))
        style.heatmap(axes, grid, label, percent=column == "block_share")
        axes.set_xlabel("target layer")
        axes.set_ylabel("source layer")
        title = "exact block share, %" if column == "block_share" else VARIANTS[variant]
        axes.set_title(title, fontsize=10.5)
    return figure


def weight_distribution(results: Results) -> Figure | None:
    """Per source layer, the distribution over latents of the own layer's share."""
    table = results.table("weight_distribution")
    if table is None:
        return None
    names = kinds(table, "variant", VARIANTS)
    figure = new_figure(4.8 * len(names), 3.8)
    for axes, variant in zip(
        figure.subplots(1, len(names), squeeze=False, sharey=True)[0], names, strict=True
    ):
        rows = table.where(variant=variant).rows()
        layers = sorted({row["source"] for row in rows})
        style.column_strips(axes, rows, layers)
        _null_per_layer(axes, results, layers, lambda targets: 1 / targets)
        finish(axes, VARIANTS[variant], "source layer", "share of a latent's squared norm")
        axes.set_ylim(-0.02, 1.02)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def _null_per_layer(
    axes: Any, results: Results, layers: list[int], of: Callable[[int], float]
) -> None:
    """A dashed line at what writing alike to all targets would give each source layer."""
    targets = results.provenance.get("coder", {}).get("targets", [])
    values = [of(targets[s]) if s < len(targets) and targets[s] else nan(None) for s in layers]
    if values:
        low = [layer - 0.45 for layer in layers]
        high = [layer + 0.45 for layer in layers]
        axes.hlines(values, low, high, colors="#222222", ls="--", lw=1.2, label="uniform null")


def fvu_comparison(results: Results) -> Figure | None:
    """FVU of each target layer under each arm, one panel per token role."""
    table = results.table("fvu_comparison")
    if table is None:
        return None
    known = Table.from_rows(
        [row for row in table.rows() if row["fvu"] is not None], list(table.columns)
    )
    roles = kinds(known, "role", style.ROLE_NAMES)
    if not roles:
        return None
    arms = [arm for arm in style.arm_order(table["arm"]) if arm in style.COLOURS_OF_ARMS]
    figure, panels = style.panels(len(roles), sharey=True)
    for axes, role in zip(panels, roles, strict=True):
        for i, arm in enumerate(arms):
            rows = table.where(role=role, arm=arm).rows()
            shift = 0.6 * (i / max(len(arms) - 1, 1) - 0.5)
            mark = "s" if arm == "full" else "o"
            places = [row["layer"] + shift for row in rows]
            how = {"fmt": mark, "ms": 3.5, "color": style.arm_colour(arm)}
            style.whiskers(axes, places, rows, "fvu", label=style.arm_name(arm), **how)
        finish(axes, style.ROLE_NAMES[role], "target layer", "")
        layer_ticks(axes.xaxis, sorted(set(table["layer"])))
    figure.supylabel("FVU (0: exact, 1: no better than the mean)", fontsize=10)
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    _logarithmic(panels, [v for v in table.where(role="all")["fvu"] if v is not None])
    return figure


def _logarithmic(panels: Any, values: list[float]) -> None:
    """A logarithmic axis where the values span more than a factor of 8 and none is below 0."""
    if values and min(values) > 0 and max(values) / min(values) > 8:
        for axes in panels:
            axes.set_yscale("log")
            for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                axis(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "125" else "")


def delta_loss(results: Results) -> Figure | None:
    """Loss added by splicing the coder in: all layers at once by arm, and one layer at a time."""
    table = results.table("delta_loss")
    if table is None:
        return None
    figure = new_figure(11.0, 4.2)
    left, right = figure.subplots(1, 2)
    whole = table.where(scope="all_layers")
    arms = style.arm_order(whole["arm"])
    for place, arm in enumerate(reversed(arms)):
        row = whole.where(arm=arm).rows()[0]
        _bar(left, place, row, style.arm_colour(arm))
    left.set_yticks(range(len(arms)), [style.arm_name(arm) for arm in reversed(arms)])
    finish(left, "all layers replaced at once", "added cross-entropy, nats a token", "")
    left.grid(axis="x", color="#dddddd", linewidth=0.6)
    left.grid(axis="y", visible=False)
    values = [abs(row["delta_ce"]) for row in whole.rows() if row["delta_ce"] is not None]
    if values and max(values) > 30 * min(values) > 0:
        left.set_xscale("symlog", linthresh=max(values) / 30)
    single = table.where(scope="one_layer")
    arms = [arm for arm in style.arm_order(single["arm"]) if arm in style.COLOURS_OF_ARMS]
    for i, arm in enumerate(arms):
        rows = single.where(arm=arm).rows()
        places = [row["layer"] + 0.4 * (i / max(len(arms) - 1, 1) - 0.5) for row in rows]
        how = {"fmt": "o-", "ms": 3.5, "lw": 1.0, "color": style.arm_colour(arm)}
        style.whiskers(right, places, rows, "delta_ce", label=style.arm_name(arm), **how)
    finish(right, "one layer replaced", "layer", "added cross-entropy, nats a token")
    right.axhline(0.0, color="#222222", lw=0.8)
    if len(single):
        layer_ticks(right.xaxis, sorted(set(single["layer"])))
        handles = right.get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8.5)
    return figure


def _bar(axes: Any, place: int, row: Mapping[str, Any], colour: str) -> None:
    value = nan(row["delta_ce"])
    axes.barh(place, value, color=colour, alpha=0.85, height=0.65)
    if row["low"] is not None and row["high"] is not None:
        axes.hlines(place, row["low"], row["high"], color="#222222", lw=1.2)


def score_distribution(results: Results) -> Figure | None:
    """The cross-layer score 1 − p(own): over all live latents, and per source layer."""
    table = results.table("score_distribution")
    if table is None:
        return None
    figure = new_figure(9.6, 3.8)
    left, right = figure.subplots(1, 2)
    rows = table.rows()
    edges = sorted(set(table["bin"]))
    width = style.bin_width(edges)
    targets = results.provenance.get("coder", {}).get("targets", [])
    across = [r for r in rows if r["source"] >= len(targets) or targets[r["source"]] > 1]
    counts = [sum(r["count"] for r in across if r["bin"] == edge) for edge in edges]
    left.bar(edges, counts, width, align="edge", color="#0072b2", edgecolor="white", lw=0.4)
    left.set_xlim(0, 1)
    finish(left, "all source layers with several targets", "cross-layer score", "live latents")
    layers = sorted(set(table["source"]))
    style.column_strips(right, rows, layers)
    _null_per_layer(right, results, layers, lambda targets: 1 - 1 / targets)
    finish(right, "by source layer (orange: median)", "source layer", "cross-layer score")
    right.set_ylim(-0.02, 1.02)
    right.legend(frameon=False, fontsize=8)
    return figure


def top_features(results: Results) -> Figure | None:
    """The latents with the largest scores of each source layer; with data, their causal effect."""
    table = results.table("top_features")
    if table is None:
        return None
    rows = table.rows()
    tested = results.table("causal")
    causal = [] if tested is None else [r for r in tested.rows() if r["ratio"] is not None]
    figure = new_figure(10.4 if causal else 6.4, 4.0)
    panels = figure.subplots(1, 2 if causal else 1, squeeze=False)[0]
    layers = sorted({row["source"] for row in rows})
    for layer in layers:
        own = sorted((r for r in rows if r["source"] == layer), key=lambda r: -r["score"])
        places = [layer + 0.5 * ((i + 1) / (len(own) + 1) - 0.5) for i in range(len(own))]
        panels[0].plot(places, [r["score"] for r in own], "o", color="#0072b2", ms=4.5)
        if len(layers) <= 12:
            first = f"#{own[0]['latent']}", (places[0], own[0]["score"]), (0, 5)
            panels[0].annotate(*first, textcoords="offset points", ha="center", fontsize=7.5)
    _null_per_layer(panels[0], results, layers, lambda targets: 1 - 1 / targets)
    finish(panels[0], "top latents of each layer", "source layer", "cross-layer score")
    panels[0].set_ylim(-0.02, 1.08)
    layer_ticks(panels[0].xaxis, layers)
    panels[0].legend(frameon=False, fontsize=8, loc="lower left")
    if causal:
        _causal(panels[1], causal)
    return figure


def _causal(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Causal share against score, one point per latent."""
    for chosen, mark, colour in (("random", "s", "#888888"), ("top", "o", "#d55e00")):
        own = [row for row in rows if row["chosen"] == chosen]
        scores = [row["score"] for row in own]
        how = {"fmt": mark, "ms": 4.5, "color": colour, "label": f"{chosen} latents"}
        style.whiskers(axes, scores, own, "ratio", **how)
    top = [row for row in rows if row["chosen"] == "top"]
    for row in sorted(top, key=lambda row: -row["ratio"])[:4]:
        name, place = f"{row['source']}/{row['latent']}", (row["score"], row["ratio"])
        axes.annotate(name, place, (4, 3), textcoords="offset points", fontsize=7.5)
    what = "KL without cross writes / KL without any"
    finish(axes, "what the model loses (layer/latent)", "cross-layer score", what)
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.15 * max(1.0, *(row["ratio"] for row in rows)))  # intervals may leave
    axes.legend(frameon=False, fontsize=8, loc="upper left")


FIGURES: dict[str, Callable[[Results], Figure | None]] = {
    "weight_heatmap": weight_heatmap,
    "weight_distribution": weight_distribution,
    "fvu_comparison": fvu_comparison,
    "delta_loss": delta_loss,
    "score_distribution": score_distribution,
    "top_features": top_features,
}
