"""The figures of `estimate` for the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

_PARTS = (
    ("coders' weights", "weights"),
    ("gradients kept until a step's end", "gradients"),
    ("optimizer's state", "optimizer"),
    ("model", "model"),
    ("x and y, and what is prepared ahead", "tokens"),
    ("model's forward pass", "forward"),
    ("means and variances of a batch", "moments"),
    ("active latents", "selected"),
    ("active latents, arranged", "latents"),
    ("pre-activations of one coder", "encoding"),
    ("coders' forward and backward pass", "step"),
    ("update of one decoder", "update"),
    ("averaged weights, while saving", "saving"),
)


def human_bytes(n: float) -> str:
    """`n` bytes with three digits: 1.23 GiB."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while n >= 1000 and len(units) > 1:
        n /= 1024
        units.pop(0)
    unit = units[0]
    return f"{n:.0f} {unit}" if unit == "B" else f"{n:.3g} {unit}"


def _rounded(rate: float) -> str:
    return f"{rate:.2g}" if rate < 100 else f"{rate:,.0f}"


def print_estimate(figures: dict[str, Any], console: Console | None = None) -> None:
    """Print `figures`, the content of an estimate's JSON."""
    console = console or Console()
    count = figures["parameters"]
    console.print(
        f"{figures['coders']} coders of {figures['num_latents']:,} latents, "
        f"{figures['decoders']} decoders of {figures['num_latents']:,} × {figures['d_model']:,}: "
        f"{count['total']:,} parameters, for {figures['model']} with {count['model']:,}",
        highlight=False,
    )
    console.print(_memory(figures))
    _say_whether_it_fits(figures, console)
    if (seconds := figures["seconds_per_step"]) is not None:
        parts = ", ".join(
            f"{name} {seconds[name]:.3g}" for name in ("model", "coders", "optimizer")
        )
        rate, tokens = _rounded(figures["tokens_per_s"]), figures["tokens_per_step"]
        console.print(
            f"About {rate} tokens/s: {tokens:,} tokens a step in {seconds['total']:.3g} s "
            f"({parts}). Inferred from a small step measured on {figures['device']}; expect it to "
            "be right within a factor of two.",
            highlight=False,
        )


def _memory(figures: dict[str, Any]) -> Table:
    table = Table(title=f"Memory on {figures['device']}")
    table.add_column("")
    table.add_column("bytes", justify="right")
    for label, key in _PARTS:
        if figures["bytes"][key]:
            table.add_row(label, human_bytes(figures["bytes"][key]))
    table.add_section()
    table.add_row("peak (not all is held at once)", human_bytes(figures["bytes"]["peak"]))
    table.add_row("a checkpoint on disk", human_bytes(figures["checkpoint_bytes"]))
    return table


def _say_whether_it_fits(figures: dict[str, Any], console: Console) -> None:
    memory = figures["device_bytes"]
    if memory is None:
        console.print(f"How much memory {figures['device']} has is not known.")
    elif figures["fits"]:
        console.print(f"Fits: {figures['device']} has {human_bytes(memory)}.", highlight=False)
    else:
        console.print(
            f"Does not fit: {figures['device']} has {human_bytes(memory)}. What each option would "
            "bring:",
            highlight=False,
        )
        for way in figures["options"]:
            verdict = "fits" if way["fits"] else "not enough alone"
            console.print(
                f"  {way['flags']}: {human_bytes(way['peak'])}, {verdict}",
                highlight=False,
                markup=False,
            )
