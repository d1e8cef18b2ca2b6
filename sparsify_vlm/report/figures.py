"""The figures of the reports, as SVG text. Everything here takes plain numbers.

Colours are Okabe and Ito's, which stay apart for colour-blind readers; roles keep theirs in every
figure (image blue, text orange), coders are told apart by line style or by group.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sparsify_vlm.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROLE_COLOURS = {"all": "#444444", "image": "#0072b2", "text": "#d55e00"}
CODER_COLOURS = ["#0072b2", "#56b4e9", "#e69f00", "#009e73"]
LINE_STYLES = ["-", "--", ":", "-."]
MARKS = ["o", "s", "^", "D"]


def need_matplotlib() -> None:
    """Raise `UserError` if figures cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(
            "figures need matplotlib, which is not installed: pip install 'sparsify-vlm[viz]'"
        ) from error


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of `width` × `height` inches, drawn without a display."""
    need_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.size": 10}):
        return Figure(figsize=(width, height), layout="constrained")


def to_svg(figure: Figure) -> str:
    """The figure as an `<svg>` element with real text, ready to stand inside HTML."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "sparsify-vlm"}):
        # The browser's letters may be wider than those the layout was made with: leave a margin.
        figure.savefig(
            buffer,
            format="svg",
            bbox_inches="tight",
            pad_inches=0.2,
            metadata={"Date": None, "Creator": None},
        )
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def plain_axes(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def training_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """FVU by role against the training step.

    Args:
        runs: name of the coder -> the lines of its metrics.jsonl (`step`, `fvu[role]`).
    """
    figure = new_figure(6.2, 3.4)
    axes = figure.subplots()
    for (name, lines), style in zip(runs.items(), LINE_STYLES, strict=False):
        for role in ("image", "text"):
            points = [(m["step"], m["fvu"][role]) for m in lines if m["fvu"].get(role)]
            if points:
                steps, values = zip(*points, strict=True)
                axes.plot(
                    steps, values, style, color=ROLE_COLOURS[role], lw=1.5, label=f"{name}, {role}"
                )
    axes.set_yscale("log")
    axes.set_xlabel("training step")
    axes.set_ylabel("FVU, mean over layers")
    plain_axes(axes)
    axes.legend(frameon=False, fontsize=8)
    return to_svg(figure)


def fvu_by_layer(coders: Mapping[str, Mapping[str, Sequence[float | None]]]) -> str:
    """FVU of each layer, one panel per role.

    Args:
        coders: name of the coder -> role ("image", "text") -> FVU per layer (None: not written).
    """
    figure = new_figure(9.6, 3.2)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, role in zip(panels, ("image", "text"), strict=True):
        for (name, by_role), colour, mark in zip(
            coders.items(), CODER_COLOURS, MARKS, strict=False
        ):
            values = [math.nan if v is None else v for v in by_role[role]]
            axes.plot(range(len(values)), values, mark, color=colour, ls=":", lw=1.0, label=name)
        axes.set_yscale("log")
        axes.set_title(f"{role} tokens", fontsize=11)
        axes.set_xlabel("target layer")
        axes.set_xticks(range(len(next(iter(coders.values()))[role])))
        plain_axes(axes)
    panels[0].set_ylabel("FVU on held-out scenes")
    panels[0].legend(frameon=False, fontsize=8)
    return to_svg(figure)


def decoder_heatmap(norms: Sequence[Sequence[float | None]]) -> str:
    """Source layer (rows) → target layer (columns) decoder norms.

    Args:
        norms: [sources][targets] mean decoder norm in units of σ_t; None where nothing is written.
    """
    figure = new_figure(4.8, 4.0)
    axes = figure.subplots()
    grid = [[math.nan if v is None else v for v in row] for row in norms]
    image = axes.imshow(grid, cmap="viridis", vmin=0.0)
    top = max((v for row in norms for v in row if v is not None), default=1.0)
    for source, row in enumerate(norms):
        for target, value in enumerate(row):
            if value is not None:
                shade = "white" if value < 0.6 * top else "black"
                axes.text(
                    target, source, f"{value:.2g}", ha="center", va="center", color=shade, size=7
                )
    axes.set_xlabel("target layer")
    axes.set_ylabel("source layer")
    figure.colorbar(image, ax=axes, label="mean decoder norm / σ of the target", shrink=0.8)
    return to_svg(figure)
