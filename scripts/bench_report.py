"""Write docs/benchmarks.md from what the benchmarks have stored with --json.

    python scripts/bench_report.py runs/bench/*.json --output docs/benchmarks.md

No figure of that page is typed by hand.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from bench.tables import Table, capture_table, rates_table, read, step_table

from sparsify_vlm.errors import UserError

HEAD = """# Benchmarks

Written by `make bench` (scripts/bench_report.py) from measurements; do not edit. Figures that were
looked into by hand, and what did not work, are in [log.md](log.md).
"""

STEP = """## Training step

Forward, backward and Adam of a full cross-layer transcoder, in float32. The systems take turns in
one process. *dense autograd*: activations as [T, F] matrices, every source-target pair a dense
product, as most other projects do. *sparse autograd*: EleutherAI's encoder and eager decoder with
`Adam(fused=True)`. *ours*: the step that `train` makes, with the kernels named in brackets.

`wall` is the median of the rounds and `core` the smallest processor time over all threads. The
phases are those of the quickest round, in processor seconds with one thread and in wall seconds
with several (a path that updates weights in the pass that makes their gradients has that part of
the update in its backward). `× roofline` is their sum over the least time that the rates measured
in the same run allow for the step, by the model in scripts/bench/roofline.py. `sparse ÷` and
`dense ÷` say how many times as many core seconds the two baselines take. Peak memory is what coder,
tokens and three steps add to a process of their own.
"""

CAPTURE = """## Capture

Storing a model's activations, against the same model's bare forward passes (*forward*) and against
preparing the batches as well (*data + forward*), in turn in one process.
"""


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+")
    parser.add_argument("--output", default="docs/benchmarks.md")
    args = parser.parse_args()
    try:
        text = page([read(file) for file in args.files])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    Path(args.output).write_text(text, encoding="utf-8")


def page(stored: list[dict[str, Any]]) -> str:
    """The page for the figures of several runs."""
    parts = [HEAD]
    for kind, text, section in (("step", STEP, _step), ("capture", CAPTURE, _capture)):
        runs = [run for run in stored if run["kind"] == kind]
        if runs:
            parts += [text, *(section(run) for run in runs)]
    return "\n".join(parts)


def _step(run: dict[str, Any]) -> str:
    parts = [_about(run)]
    for measured in run["sizes"]:
        parts.append(_titled(step_table(measured)))
        parts += [f"{check['text']}.\n" for check in measured["checks"]]
    parts.append(_titled(rates_table(run["rates"])))
    return "\n".join(parts)


def _capture(run: dict[str, Any]) -> str:
    return _about(run) + "\n" + _titled(capture_table(run))


def _about(run: dict[str, Any]) -> str:
    machine = run["machine"]
    on = "" if machine["device"] == "cpu" else f", {machine['device']}"
    return (
        f"### `{run['command']}`\n\n"
        f"{machine['date']}, {machine['processor']}, {machine['cores']} cores{on}, "
        f"torch {machine['torch']}, Python {machine['python']}, {machine['threads']} threads, "
        f"load average {machine['load']} at the end.\n"
    )


def _titled(table: Table) -> str:
    return f"**{table.title}**\n\n{table.markdown()}\n"


if __name__ == "__main__":
    main()
