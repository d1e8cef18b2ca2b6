"""Stored figures as tables: headings and rows of text, the first column text, the others numbers.

{"format": FORMAT, "version": 1, "kind": "step" or "capture", "command": …, "machine": {…}, …}
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from bench.clock import PHASES
from bench.systems import DENSE, SPARSE
from sparsify_vlm.errors import UserError

FORMAT, VERSION = "sparsify-vlm-benchmark", 1
MIB = 2**20


@dataclass(frozen=True)
class Table:
    """A title, headings and rows of as many cells."""

    title: str
    headings: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """As a table of GitHub's Markdown."""
        lines = [self.headings, ["---"] + ["---:"] * (len(self.headings) - 1), *self.rows]
        return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)

    def show(self) -> None:
        """Print it."""
        drawn = RichTable(title=self.title, title_justify="left")
        for i, heading in enumerate(self.headings):
            drawn.add_column(heading, justify="right" if i else "left", no_wrap=not i)
        for cells in self.rows:
            drawn.add_row(*cells)
        Console(width=max(Console().width, 160)).print(drawn)


def write(path: str | Path, kind: str, found: dict[str, Any]) -> None:
    """Store figures."""
    stored = {"format": FORMAT, "version": VERSION, "kind": kind, **found}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")


def read(path: str | Path) -> dict[str, Any]:
    """What `write` has stored. Raises `UserError` for any other file."""
    try:
        stored = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{path} is no JSON file") from None
    if not isinstance(stored, dict) or stored.get("format") != FORMAT:
        raise UserError(f"{path} was not written by a benchmark's --json")
    if stored.get("version") != VERSION or stored.get("kind") not in ("step", "capture"):
        raise UserError(
            f"{path} is of version {stored.get('version')}, kind {stored.get('kind')}, which this "
            "program does not know: measure again"
        )
    return stored


def figure(value: float) -> str:
    """Three significant digits, or three decimals below 1."""
    if value == 0:
        return "0"
    digits = max(0, 2 - len(f"{abs(value):.0f}") + 1) if abs(value) >= 1 else 3
    return f"{value:,.{digits}f}"


def step_table(measured: dict[str, Any]) -> Table:
    """The systems at one size."""
    core = {row["system"]: row["core"] for row in measured["systems"]}
    rows = []
    for row in measured["systems"]:
        kernels = row.get("kernels")
        name = row["system"] if not kernels else f"{row['system']} ({kernels})"
        rows.append(
            [
                name,
                *(figure(row["phases"][phase]) for phase in PHASES),
                figure(row["wall_median"]),
                figure(row["core"]),
                f"{row['tokens_per_second']:,.0f}",
                f"{row['peak'] / MIB:,.0f}" if row.get("peak") is not None else "",
                f"{row['times_least']:.2f}",
                *(
                    f"{core[base] / row['core']:.2f}" if base in core else ""
                    for base in (SPARSE, DENSE)
                ),
            ]
        )
    for select, bound in _bounds(measured).items():
        seconds = [figure(bound[phase]) if phase in bound else "" for phase in PHASES]
        total = sum(bound.values())
        rows.append(
            [
                f"roofline, {select} selection", *seconds, figure(total), "",
                f"{measured['tokens'] / total:,.0f}", "", "1.00", "", "",
            ]
        )  # fmt: skip
    headings = [
        "system", *(f"{phase} s" for phase in PHASES), "wall s", "core s", "tokens/s", "peak MiB",
        "× roofline", "sparse ÷", "dense ÷",
    ]  # fmt: skip
    title = f"{measured['name']}: {measured['text']}; data {measured['data']}, {measured['rounds']}"
    return Table(title + " rounds", headings, rows)


def _bounds(measured: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {row["select"]: row["least"] for row in measured["systems"]}


def rates_table(rates: dict[str, float]) -> Table:
    """What the machine reached in the same run."""
    rows = [
        ["float32 matrix product", f"{rates['fp32'] / 1e9:,.0f} GFLOP/s"],
        ["bfloat16 matrix product", f"{rates['bf16'] / 1e9:,.0f} GFLOP/s"],
        ["memory copied (read + written)", f"{rates['copy'] / 1e9:,.1f} GB/s"],
        ["rows gathered, table in the second-level cache", f"{rates['gather'] / 1e9:,.1f} GB/s"],
        ["rows gathered, a larger table", f"{rates['gather_large'] / 1e9:,.1f} GB/s"],
    ]
    return Table("Roofline of this machine", ["measured", "rate"], rows)


def capture_table(found: dict[str, Any]) -> Table:
    """The systems of the capture benchmark."""
    systems = {row["system"]: row for row in found["systems"]}
    ready, encoded = systems["forward"], systems["data + forward"]
    rows = [
        [
            name,
            f"{row['wall']:.2f}",
            f"{row['wall'] / ready['wall']:.2f}",
            f"{row['wall'] / encoded['wall']:.2f}",
            f"{row['least']:.2f}",
            f"{row['least'] / ready['least']:.2f}",
            f"{row['least'] / encoded['least']:.2f}",
            f"{row['core']:.2f}",
            f"{found['tokens'] / row['wall']:,.0f}",
            f"{found['megabytes'] / row['wall']:.0f}" if name == "capture" else "",
        ]
        for name, row in systems.items()
    ]
    headings = [
        "system", "wall s", "× forward", "× data + fwd", "min s", "× forward", "× data + fwd",
        "core s", "tokens/s", "MB/s",
    ]  # fmt: skip
    title = (
        f"{found['samples']} samples, {found['tokens']} tokens, {found['megabytes']:.0f} MB, "
        f"batches of {found['batch_size']}, {found['machine']['threads']} threads, "
        f"{found['rounds']} rounds"
    )
    return Table(title, headings, rows)
