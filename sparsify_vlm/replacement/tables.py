"""An evaluation's figures as tables for the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from sparsify_vlm.replacement.measures import GROUPS

_ROWS = (
    ("cross-entropy", "cross_entropy", "{:.4f}"),
    ("KL to the model", "kl", "{:.4f}"),
    ("top-1 match", "top1_match", "{:.1%}"),
    ("CE recovered, against zeros", "ce_recovered_zero", "{:.1%}"),
    ("CE recovered, against means", "ce_recovered_mean", "{:.1%}"),
)


def print_evaluation(figures: dict[str, Any], console: Console | None = None) -> None:
    """Print the tables of `figures`, the content of an evaluation's JSON."""
    console = console or Console()
    tokens = ", ".join(f"{n:,} {role}" for role, n in figures["tokens"].items() if n)
    console.print(
        f"{figures['clt']} on {figures['model']}, {figures['dataset']} ({figures['split']}): "
        f"{figures['n_samples']} samples, {tokens} tokens",
        highlight=False,
    )
    groups = [g for g in GROUPS if figures["mean_fvu"][g] is not None]
    console.print(_layers(figures, groups))
    console.print(_predictions(figures))
    if figures["baseline"]["exact_match"]:
        console.print(_answers(figures))
    if figures["skipped"]:
        console.print(f"{len(figures['skipped'])} samples were skipped:")
        for line in figures["skipped"]:
            console.print(f"  {line}", markup=False)


def _shown(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _layers(figures: dict[str, Any], groups: list[str]) -> Table:
    table = Table(title="Reconstruction on clean inputs")
    table.add_column("layer")
    for group in groups:
        table.add_column(f"FVU {group}", justify="right")
    table.add_column("same layer only", justify="right")
    table.add_column("L0", justify="right")
    table.add_column("dead", justify="right")
    for row in figures["layers"]:
        table.add_row(
            row["hookpoint"].removeprefix("language_model.model."),
            *(_shown(row["fvu"][g], "{:.4f}") for g in groups),
            _shown(row["fvu_same_layer_only"]["all"], "{:.4f}"),
            _shown(row["l0"]["all"], "{:.1f}"),
            _shown(row["dead"]["all"], "{:.1%}"),
        )
    table.add_section()
    means = (_shown(figures["mean_fvu"][g], "{:.4f}") for g in groups)
    table.add_row("mean", *means, _shown(figures["mean_fvu_same_layer_only"]["all"], "{:.4f}"))
    return table


def _predictions(figures: dict[str, Any]) -> Table:
    base, arms = figures["baseline"], figures["replacement"]
    table = Table(title=f"All MLPs replaced at once: {figures['scored_tokens']:,} scored tokens")
    table.add_column("")
    for name in ("model", "replaced", "same layer only", "zeros", "means"):
        table.add_column(name, justify="right")
    for label, key, form in _ROWS:
        spliced = [_shown(arms[arm][key], form) for arm in ("full", "same_layer_only")]
        if key == "cross_entropy":
            others = (base["zero_ablated_cross_entropy"], base["mean_ablated_cross_entropy"])
            table.add_row(
                label, _shown(base[key], form), *spliced, *(_shown(v, form) for v in others)
            )
        else:
            table.add_row(label, "", *spliced)
    return table


def _answers(figures: dict[str, Any]) -> Table:
    base, arms = figures["baseline"], figures["replacement"]
    full, same = arms["full"], arms["same_layer_only"]
    table = Table(title="Generated answers: exact match, and share of the model's right ones lost")
    for name in ("question", "model", "replaced", "same layer only"):
        table.add_column(name, justify="left" if name == "question" else "right")
    table.add_column("lost by replaced", justify="right")
    table.add_column("lost by same layer only", justify="right")
    for group, share in base["exact_match"].items():
        table.add_row(
            group,
            _shown(share, "{:.1%}"),
            _shown(full["exact_match"][group], "{:.1%}"),
            _shown(same["exact_match"][group], "{:.1%}"),
            _shown(full["changed_of_correct"][group], "{:.1%}"),
            _shown(same["changed_of_correct"][group], "{:.1%}"),
        )
    return table
