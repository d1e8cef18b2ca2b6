"""The figures of `compare`: both models on one axis, every seed as a small dot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sparsify_vlm.analysis.tables import Estimate
from sparsify_vlm.report.analysis import style
from sparsify_vlm.report.analysis.style import finish, layer_ticks, nan
from sparsify_vlm.report.figures import new_figure, plain_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sparsify_vlm.analysis.compare import Comparison

SIDES = {"text": "text model", "vlm": "vision-language model"}
COLOURS = {"text": "#333333", "vlm": "#0072b2"}
MARKS = {"text": "o", "vlm": "s"}

SHARES = {
    "same_layer_share_mean_norm": "norms, plain",
    "same_layer_share_squared_norm": "squared norms, plain",
    "same_layer_share_squared_norm.corrected": "squared norms, gauge-free",
    "same_layer_share_per_latent.corrected": "per latent",
    "energy_share_same": "contribution energy",
    "block_share_same": "exact block share",
}
NULLS = {
    **dict.fromkeys(list(SHARES)[:3], "uniform_null"),
    "same_layer_share_per_latent.corrected": "uniform_null.per_latent",
    "energy_share_same": "uniform_null",
    "block_share_same": "uniform_null.block",
}
"""The estimate that has a share's value for latents that write alike to all their targets."""
USES = {
    "mean_cross_score": "cross-layer score",
    "mean_effective_targets": "effective targets",
    "mean_effective_targets.energy": "effective targets, by activity",
    "mean_reach": "reach, layers",
    "mean_reach.energy": "reach, by activity, layers",
}
BY_ROLE = {
    "block_share_same": "own layer's block share",
    "energy_share_same": "own layer's share of energy",
    "mean_effective_targets": "effective targets",
    "mean_reach": "reach, layers",
    "fvu_difference.same_only": "FVU added by cutting\ncross writes",
    "fvu_difference.refit": "the same, decoders refitted",
    "error_difference.same_only": "error added by cutting them,\nover the variance of all tokens",
    "error_difference.refit": "the same, decoders refitted",
}


def decay_curves(comparison: Comparison) -> Figure | None:
    """Norms against distance, over those at the nearest distance."""
    table = comparison.tables["curves"]
    panels = _panels(comparison)
    if not panels:
        return None
    figure, all_axes = style.panels(len(panels), sharey=True)
    for axes, (title, x, kinds) in zip(all_axes, panels, strict=True):
        for side, role, colour, where in kinds:
            rows = sorted(table.where(side=side, **where).rows(), key=lambda row: row[x])
            places = [row[x] for row in rows]
            name = SIDES[side] if role == "all" else f"{SIDES[side]}, {style.ROLE_NAMES[role]}"
            y = [nan(row["relative_mean"]) for row in rows]
            axes.plot(places, y, color=colour, marker=MARKS[side], ms=4, lw=1.3, label=name)
            style.band(axes, places, rows, colour)
        label = "distance, layers" if x == "distance" else "distance / (L − 1)"
        finish(axes, title, label, "")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=8)
        if x == "distance":
            layer_ticks(axes.xaxis, sorted(set(table["distance"])))
    figure.supylabel("mean decoder norm, relative to the nearest target", fontsize=10)
    return figure


def _panels(comparison: Comparison) -> list[tuple[str, str, list[Any]]]:
    """(title, column of x, [(side, role, colour, rows wanted)]) of each panel with numbers."""
    table = comparison.tables["curves"]
    there = {(r["side"], r["variant"], r["weighting"], r["role"]) for r in table.rows()}

    def wanted(variant: str, weighting: str, roles: Mapping[str, Sequence[str]]) -> list[Any]:
        found = []
        for side, names in roles.items():
            for role in names:
                if (side, variant, weighting, role) in there:
                    colour = COLOURS[side] if role == "all" else style.COLOURS_OF_ROLES[role]
                    where = {"variant": variant, "weighting": weighting, "role": role}
                    found.append((side, role, colour, where))
        return found

    both: dict[str, list[str]] = {"text": ["all"], "vlm": ["all"]}
    split = {"text": ["all"], "vlm": ["image", "text", "text_only"]}
    panels = [
        ("plain norms", "distance", wanted("plain", "latents", both)),
        ("gauge-free norms", "distance", wanted("corrected", "latents", both)),
        ("written on tokens, by role", "distance", wanted("corrected", "energy", split)),
    ]
    if comparison.layers("text") != comparison.layers("vlm"):
        deep = wanted("corrected", "latents", both)
        panels.insert(2, ("gauge-free norms, relative depth", "relative_distance", deep))
    return [panel for panel in panels if panel[2]]


def shares(comparison: Comparison) -> Figure | None:
    """The own layer's share, by every measure of it."""
    names = [name for name in SHARES if name in comparison.contrasts]
    if not names:
        return None
    figure = new_figure(7.4, 0.55 * len(names) + 1.5)
    axes = figure.subplots()
    _forest(axes, comparison, names, SHARES)
    _nulls(axes, comparison, names)
    axes.set_xlim(0, 1)
    axes.set_xlabel("the own layer's share")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)
    return figure


def _nulls(axes: Any, comparison: Comparison, names: Sequence[str]) -> None:
    """In every line, a short bar at what writing alike to all targets would give each side."""
    label: str | None = "writing alike to all targets"
    for place, name in enumerate(reversed(names)):
        null = comparison.contrasts.get(NULLS.get(name, ""))
        for side, shift in (("text", 0.15), ("vlm", -0.15)):
            value = getattr(null, side).value if null is not None else None
            if value is not None:
                ends = place + shift - 0.14, place + shift + 0.14
                axes.vlines(value, *ends, color=COLOURS[side], lw=1.6, label=label)
                label = None


def _forest(
    axes: Any, comparison: Comparison, names: Sequence[str], labels: Mapping[str, str]
) -> None:
    """A line per quantity: both sides with their intervals, seeds as small dots."""
    for place, name in enumerate(reversed(names)):
        contrast = comparison.contrasts[name]
        for side, shift in (("text", 0.15), ("vlm", -0.15)):
            label = SIDES[side] if place == 0 else None
            _across(axes, place + shift, getattr(contrast, side), side, label)
            values = [one.estimate(name) for one in comparison.side(side)]
            dots = [e.value for e in values if e is not None and e.value is not None]
            if len(dots) > 1:
                axes.plot(dots, [place + shift] * len(dots), ".", color=COLOURS[side], alpha=0.45)
    axes.set_yticks(range(len(names)), [labels[name] for name in reversed(names)])
    plain_axes(axes)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.grid(axis="y", visible=False)


def _across(axes: Any, y: float, e: Estimate, side: str, label: str | None) -> None:
    if e.value is None:
        return
    if e.low is not None and e.high is not None:
        axes.hlines(y, e.low, e.high, color=COLOURS[side], lw=1.4)
    axes.plot(e.value, y, MARKS[side], color=COLOURS[side], ms=5.5, ls="", label=label)


def use(comparison: Comparison) -> Figure | None:
    """How many layers latents write to, and how far."""
    names = [name for name in USES if name in comparison.contrasts]
    if not names:
        return None
    figure = new_figure(7.4, 0.55 * len(names) + 1.3)
    axes = figure.subplots()
    _forest(axes, comparison, names, USES)
    axes.set_xlim(left=0)
    axes.set_xlabel("mean over live latents")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8.5)
    return figure


def ablation_cost(comparison: Comparison) -> Figure | None:
    """FVU and cross-entropy that each arm adds to the full CLT's."""
    panels = []
    for what, title in (("fvu", "added FVU"), ("delta_ce", "added cross-entropy, nats a token")):
        start = f"{what}_difference."
        found = {n: n.removeprefix(start) for n in comparison.contrasts if n.startswith(start)}
        known = {n: arm for n, arm in found.items() if "." not in arm and arm not in FAR}
        order = style.arm_order(known.values())
        names = sorted(known, key=lambda n: order.index(known[n]))
        if names:
            panels.append((title, {n: style.arm_name(known[n]) for n in names}))
    if not panels:
        return None
    height = 0.42 * max(len(labels) for _, labels in panels) + 1.5
    figure = new_figure(6.4 * len(panels), height)
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, labels) in zip(all_axes, panels, strict=True):
        _forest(axes, comparison, list(labels), labels)
        axes.axvline(0, color="#222222", lw=0.8)
        axes.set_xlabel(f"{title}, beside the full CLT")
    handles = all_axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, frameon=False, fontsize=8.5)
    return figure


FAR = ("mean", "zero", "random_init", "cross_only")
"""Arms so far from the others that these could not be told apart beside them."""


def roles(comparison: Comparison) -> Figure | None:
    """Within the vision-language model by token role, beside the text model."""
    names = [name for name in BY_ROLE if name in comparison.roles]
    if not names:
        return None
    figure, panels = style.panels(len(names))
    if len(names) > 4:
        figure, panels = _grid(len(names))
    for axes, name in zip(panels, names, strict=True):
        found = [r for r in ("image", "text", "text_only") if r in comparison.roles[name]]
        for place, role in enumerate(found):
            e = comparison.roles[name][role]
            row = {"value": e.value, "low": e.low, "high": e.high}
            colour = style.COLOURS_OF_ROLES[role]
            style.whiskers(axes, [place], [row], "value", fmt="s", ms=6, color=colour)
        # Roles weigh latents by what they write, so beside them the text model's are as well.
        alike = f"{name}.energy" if name.startswith("mean_") else name
        alike = alike.replace("error_", "fvu_")  # of all tokens the two are one
        text = comparison.contrasts.get(alike)
        if text is not None and text.text.value is not None:
            axes.axhline(text.text.value, color=COLOURS["text"], ls=":", lw=1.4, label="text model")
            axes.legend(frameon=False, fontsize=8)
        short = {
            "image": "image",
            "text": "text after\nan image",
            "text_only": "text without\nimage",
        }
        axes.set_xticks(range(len(found)), [short[role] for role in found])
        axes.set_xlim(-0.6, len(found) - 0.4)
        axes.margins(y=0.2)
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        finish(axes, BY_ROLE[name], "", "")
    return figure


def _grid(n: int) -> tuple[Any, list[Any]]:
    rows = (n + 2) // 3
    figure = new_figure(11.4, 3.1 * rows)
    axes = list(figure.subplots(rows, 3, squeeze=False).flat)
    for unused in axes[n:]:
        unused.set_visible(False)
    return figure, axes[:n]


FIGURES: dict[str, Callable[[Comparison], Figure | None]] = {
    "decay_curves": decay_curves,
    "shares": shares,
    "use": use,
    "ablation_cost": ablation_cost,
    "roles": roles,
}
