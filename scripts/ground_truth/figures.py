"""The swaps as PNG figures: against the number of features, and on a few scenes in full.

Colours are Okabe and Ito's; every curve has its own mark and line style as well.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ground_truth.swaps import SWAPPED
from ground_truth.tables import mean_interval, wilson
from sparsify_vlm.report.figures import new_figure, plain_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXAMPLES = 3
"""Scenes that are shown in full."""
DPI = 90
CURVES = {
    "each": ("n of each scene's graph (up to 2n in all)", "#0072b2", "-", "o"),
    "either": ("n largest of both graphs", "#009e73", "-", "s"),
    "own": ("n of this scene's graph", "#d55e00", "-", "^"),
    "each-beside": ("as many random others, same layers and positions", "#cc79a7", "--", "D"),
    "each-random": ("n random active ones of each scene", "#444444", ":", "x"),
}
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#888888"
FEATURES = 50
"""Features whose places are shown."""


def draw(swaps: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Write both figures; `swaps` as `swaps.swaps` gives them, at least one with its example."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {
        "ground-truth-swaps.png": against_number(swaps),
        "ground-truth-scenes.png": in_full([one for one in swaps if "example" in one]),
    }
    for name, figure in made.items():
        _save(figure, folder / name)
    return [folder / name for name in made]


def _save(figure: Figure, path: Path) -> None:
    """A PNG without transparency, which keeps it small."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    Image.open(buffer).convert("RGB").save(path, optimize=True)


def against_number(swaps: list[dict[str, Any]]) -> Figure:
    """Share of scenes that turn, and the difference of logits, against the number of features."""
    figure = new_figure(11.5, 5.0)
    turned, gap = figure.subplots(1, 2)
    for arm, (label, colour, line, mark) in CURVES.items():
        sizes = [n for n in SWAPPED if all(f"{arm}-{n}" in one["arms"] for one in swaps)]
        for axes, of_arm, scale in ((turned, _turned, 100.0), (gap, _gap, 1.0)):
            points = [of_arm(swaps, f"{arm}-{n}") for n in sizes]
            y, low, high = ([scale * v for v in column] for column in zip(*points, strict=True))
            axes.plot(sizes, y, line, color=colour, marker=mark, ms=5, lw=1.6, label=label)
            axes.fill_between(sizes, low, high, color=colour, alpha=0.18, lw=0)
    second = mean_interval([one["on_second"] for one in swaps])[0]
    gap.axhline(0, color="black", lw=0.9)
    gap.annotate("above 0: second colour ahead", (1, 0.4), size=8.5)
    gap.axhline(second, color=GREY, lw=0.9, ls="--")
    gap.annotate("what the model says of the second picture", (1, second + 0.4), size=8.5)
    for axes in (turned, gap):
        axes.set_xscale("log")
        axes.set_xticks(SWAPPED, [str(n) for n in SWAPPED])
        axes.minorticks_off()
        axes.set_xlabel("n: features that take on their values on the second picture")
        plain_axes(axes)
    turned.set_ylabel("scenes (%)")
    turned.set_title("The answer becomes the second colour", fontsize=11)
    gap.set_ylabel("logits")
    gap.set_title("Second colour's logit minus first's", fontsize=11)
    handles, labels = turned.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=3, frameon=False, fontsize=9)
    figure.suptitle(f"{len(swaps)} scenes; bands: 95 % (Wilson; normal for the mean)", fontsize=9.5)
    return figure


def _turned(swaps: list[dict[str, Any]], name: str) -> tuple[float, float, float]:
    hits = sum(one["arms"][name]["says"] == one["to"] for one in swaps)
    return hits / len(swaps), *wilson(hits, len(swaps))


def _gap(swaps: list[dict[str, Any]], name: str) -> tuple[float, float, float]:
    return mean_interval([one["before"] + one["arms"][name]["moved"] for one in swaps])


def in_full(scenes: list[dict[str, Any]]) -> Figure:
    """Per scene: both pictures, each patch's effect, where the features are, why five are few."""
    figure = new_figure(13.5, 2.6 * len(scenes) + 0.5)
    rows = figure.subplots(len(scenes), 5, squeeze=False, width_ratios=[1, 1, 1.25, 2.2, 1.9])
    for one, (first, second, heat, places, ranks) in zip(scenes, rows, strict=True):
        for axes, picture, colour in zip(
            (first, second), one["example"]["pictures"], (one["from"], one["to"]), strict=True
        ):
            axes.imshow(picture, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_xlabel(f"answer: {colour}")
        first.set_title(one["example"]["question"], fontsize=9, loc="left")
        _heat(heat, one)
        _places(places, one)
        _ranks(ranks, one)
    _, _, heat, places, ranks = rows[0]
    heat.set_title("each patch's effect on\nfirst minus second colour", fontsize=9)
    places.set_title(f"where the {FEATURES} features of largest predicted change are", fontsize=9)
    ranks.set_title("the n largest, swapped together", fontsize=9)
    _key(places)
    ranks.legend(frameon=False, fontsize=7.5, loc="upper left")
    return figure


def _heat(axes: Any, one: dict[str, Any]) -> None:
    effects = one["example"]["effects"]
    top = max(abs(v) for row in effects for v in row)
    image = axes.imshow(effects, cmap="PuOr_r", vmin=-top, vmax=top)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.figure.colorbar(image, ax=axes, shrink=0.75, label="logits")


def _places(axes: Any, one: dict[str, Any]) -> None:
    """Layer against token, features of a place side by side, area for the predicted change."""
    tokens, features = one["example"]["tokens"], one["ranks"]["features"][:FEATURES]
    starts = {"image": 0.0, "words": 5.0, "last": 10.0}
    seen: dict[tuple[int, str], int] = {}
    for rank, (layer, position, _, value, first) in enumerate(features):
        words = "words" if position < one["last"] else "last"
        lane = "image" if tokens[position] is None else words
        n = seen[layer, lane] = seen.get((layer, lane), -1) + 1
        axes.scatter(
            starts[lane] + n,
            layer,
            s=6 + 44 * value / features[0][3],
            color=ORANGE if first else BLUE,
            edgecolors="black" if rank < 5 else "none",
            lw=1.3,
            zorder=3,
        )
    longest = max((n for (_, lane), n in seen.items() if lane == "last"), default=0)
    labels = ["image", "other words", f"the last token, {tokens[one['last']].strip()}"]
    axes.set_xticks([1.5, 6.5, 10 + longest / 2], labels, size=8)
    axes.tick_params(axis="x", length=0)
    for start in (4.0, 9.0):
        axes.axvline(start, color="#dddddd", lw=0.6)
    axes.set_xlim(-1, 11 + longest)
    axes.set_ylim(-0.6, 7.6)
    axes.set_yticks(range(8))
    axes.set_ylabel("layer")
    plain_axes(axes)


def _key(axes: Any) -> None:
    for colour, label in ((ORANGE, "active on the first picture"), (BLUE, "only on the second")):
        axes.scatter([], [], color=colour, s=25, label=label)
    axes.scatter([], [], color="none", edgecolors="black", s=25, label="the five largest")
    axes.legend(frameon=False, fontsize=7.5, loc="upper right")


def _ranks(axes: Any, one: dict[str, Any]) -> None:
    """Predicted and measured share of the logits by which the first colour is ahead."""
    ahead = -one["before"]
    for arm, label in (("either", "both graphs"), ("own", "this scene's graph")):
        _, colour, _, mark = CURVES[arm]
        shares = [100 * v / ahead for v in one["ranks"][arm]]
        axes.plot(
            range(1, len(shares) + 1), shares, color=colour, lw=1.5, label=f"{label}: predicted"
        )
        moved = [100 * one["arms"][f"{arm}-{n}"]["moved"] / ahead for n in SWAPPED]
        axes.plot(SWAPPED, moved, mark, color=colour, ms=5, mfc="white", label="measured")
    axes.axhline(100, color="black", lw=0.9)
    axes.axvline(5, color=GREY, lw=0.9, ls="--", zorder=0)
    axes.annotate(f"first colour {ahead:.1f} logits ahead", (59, 88), size=7.5, ha="right")
    axes.set_ylim(0, 260)
    axes.set_yticks(range(0, 201, 50))
    axes.set_xticks([1, 5, 10, 25, 50])
    axes.set_ylabel("lead made up (%)")
    axes.set_xlabel("n")
    plain_axes(axes)
