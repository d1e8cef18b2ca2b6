"""Shares with Wilson's intervals, and the Markdown tables of what was found."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from ground_truth.swaps import ARMS, PLACE, PLACE_LABEL
from ground_truth.where import WHERE

Z = 1.959964
MOVES = ("moved", "predicted")


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95 % interval of a share."""
    part, unit = hits / n, Z * Z / n
    middle = (part + unit / 2) / (1 + unit)
    half = Z * math.sqrt(part * (1 - part) / n + unit / (4 * n)) / (1 + unit)
    return max(0.0, middle - half), min(1.0, middle + half)


def mean_interval(values: list[float]) -> tuple[float, float, float]:
    """Mean, and its 95 % interval from the normal distribution."""
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1)
    half = Z * math.sqrt(variance / len(values))
    return mean, mean - half, mean + half


def share(hits: list[bool]) -> str:
    low, high = wilson(sum(hits), len(hits))
    return (
        f"{100 * sum(hits) / len(hits):.1f} % | {100 * low:.1f} to {100 * high:.1f} % | {len(hits)}"
    )


def tables(found: list[dict[str, Any]], asked: int, right: int) -> str:
    """Markdown."""
    where = [one for one in found if "values" in one]
    swaps = [one["swaps"] for one in found if one.get("swaps")]
    lines = [f"{right} of {asked} questions answered rightly; of these {len(found)} traced."]
    lines += _where_lines(where) if where else []
    return "\n".join(lines + (_swap_lines(swaps) if swaps else []))


def _where_lines(found: list[dict[str, Any]]) -> list[str]:
    def best(one: dict[str, Any], name: str) -> int:
        values = one["values"][name]
        return values.index(max(values))

    lines = [
        "",
        "| largest on the asked object's cell | share | 95 % | scenes |",
        "|---|---|---|---|",
    ]
    for name, label in WHERE.items():
        lines.append(f"| {label} | {share([best(one, name) == one['cell'] for one in found])} |")
    lines.append("| chance, any cell | 11.1 % | | |")
    chance = sum(1 / one["n_objects"] for one in found) / len(found)
    lines.append(f"| chance, a cell with an object | {100 * chance:.1f} % | | |")
    hits = [one["best_patch_in_cell"] for one in found]
    lines.append(f"| the one patch of the largest total effect is in the cell | {share(hits)} |")
    hits = [one["ablation_flips"] for one in found]
    lines.append(f"| ablating the asked cell changes the answer | {share(hits)} |")
    return lines


def _swap_lines(swaps: list[dict[str, Any]]) -> list[str]:
    lines = [
        "",
        "| features that take on the recoloured scene's values | it says that colour | 95 % | "
        "scenes | difference of logits moves by (95 %) | predicted |",
        "|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(name for one in swaps for name in one["arms"]):
        rows = [(one["to"], one["arms"][name]) for one in swaps if name in one["arms"]]
        turned = [row["says"] == to for to, row in rows]
        moved, predicted = (mean_interval([row[key] for _, row in rows]) for key in MOVES)
        lines.append(
            f"| {_label(name)} | {share(turned)} | {moved[0]:+.2f} ({moved[1]:+.2f} to "
            f"{moved[2]:+.2f}) | {predicted[0]:+.2f} |"
        )
    return [*lines, *_place_lines(swaps)]


def _label(name: str) -> str:
    kind, _, n = name.rpartition("-")
    return PLACE_LABEL if name == PLACE else ARMS[kind].format(n=n)


def _place_lines(swaps: list[dict[str, Any]]) -> list[str]:
    """What has to be made up for, and where the features are for which most is predicted."""
    before, second = (mean_interval([s[key] for s in swaps])[0] for key in ("before", "on_second"))
    lines = [
        "",
        f"Second colour minus first: {before:+.2f} on the first picture, {second:+.2f} on the "
        "second.",
        "",
        "| of the ten features of both graphs for which most is predicted | share |",
        "|---|---|",
    ]
    tops = [(f[0], f[1] == s["last"]) for s in swaps for f in s["ranks"]["features"][:10]]
    counts = Counter((layer, "last" if last else "other") for layer, last in tops)
    for (layer, place), count in counts.most_common():
        lines.append(f"| layer {layer}, {place} position | {100 * count / len(tops):.1f} % |")
    return lines
