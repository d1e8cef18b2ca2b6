"""Time attribution graphs: ours, and circuit-tracer's on the same model, coder and prompt.

    python scripts/bench_attribution.py                                # ours alone
    python scripts/bench_attribution.py --peer_venv DIR --rounds 2     # beside circuit-tracer
    python scripts/bench_attribution.py --size llava --memory 2        # 600 positions

DIR is an environment with circuit-tracer and without this project:

    python -m venv DIR
    DIR/bin/pip install torch==2.13.0 circuit-tracer==0.5.0 transformers==4.57.3

Model, coder and prompt are random, from `--seed`, and written as folders that both read. Every
figure is of a process of its own, which loads (not counted), calls `attribute` once and ends; the
systems take turns. `wall` and `core` (all threads together) are the smallest of the rounds, `peak`
is the largest: the most resident memory of the process, libraries, model and coder included, and
`grown by` what of it the call added. The graphs are compared: the same active features and targets,
and the largest difference of two edges. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bench import machine
from bench.attribution_case import CASES, Case, write
from bench.tables import Table, figure
from bench.tables import write as store
from safetensors.torch import load_file

from sparsify_vlm.errors import UserError

TOLERANCE = 5e-5
"""How far two edges may be apart."""

OWN, PEER = (Path(__file__).parent / "bench" / f"{who}_attribution.py" for who in ("own", "peer"))


@dataclass(frozen=True)
class System:
    """A script, the Python that runs it, and the arguments of its `attribute`."""

    name: str
    python: str
    script: Path
    arguments: dict[str, Any] = field(default_factory=dict)


def main() -> None:
    """Measure, print, store; exit status 1 if the graphs differ."""
    args = _arguments()
    try:
        equal = _benchmark(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0 if equal else 1)


def _benchmark(args: argparse.Namespace) -> bool:
    case = CASES[args.size]
    chosen = _systems(case, args)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(case, folder, args.seed)
        runs: dict[str, list[dict[str, Any]]] = {system.name: [] for system in chosen}
        for _ in range(args.rounds):
            for i, system in enumerate(chosen):
                runs[system.name].append(_run(system, folder, folder / str(i), args.threads))
        checks = [] if case.k else _compared(chosen, folder)
    about = machine.describe()
    table(f"{args.size}: {case}; {args.threads} thread(s), {args.rounds} round(s)", runs).show()
    print(f"{about['processor']}, torch {about['torch']}, load {about['load']}")
    for check in checks:
        print(check["text"])
    if not args.peer_venv:
        print("ours alone: circuit-tracer was not measured (--peer_venv)")
    if args.json:
        command = " ".join(["python scripts/bench_attribution.py", *sys.argv[1:]])
        found = {"command": command, "machine": about, "runs": runs, "checks": checks}
        store(args.json, "attribution", found)
    return all(check["equal"] for check in checks)


def _systems(case: Case, args: argparse.Namespace) -> list[System]:
    if not Path("/proc/self/clear_refs").exists():
        raise UserError("peak memory is read from /proc, which this system does not have")
    memory = {"memory": int(args.memory * 2**30)}
    if case.k:
        if args.peer_venv:
            raise UserError(
                f"--peer_venv: circuit-tracer has no top-k coder for --size {args.size}"
            )
        arguments = {**memory, "max_feature_nodes": case.max_feature_nodes}
        return [System("ours", sys.executable, OWN, arguments)]
    chosen = [
        System("ours", sys.executable, OWN, {**memory, "fast": True}),
        System("ours, fast=False", sys.executable, OWN, {**memory, "fast": False}),
    ]
    if args.peer_venv:
        python = args.peer_venv / "bin" / "python"
        if not python.exists():
            raise UserError(f"--peer_venv {args.peer_venv}: there is no {python}")
        chosen += [
            System(f"circuit-tracer, batch_size={size}", str(python), PEER, {"batch_size": size})
            for size in args.peer_batch_size
        ]
    return chosen


def _run(system: System, folder: Path, output: Path, threads: int) -> dict[str, Any]:
    """The figures of one process; raises `UserError` with what it said last if it fails."""
    compared = "max_feature_nodes" not in system.arguments
    options = {"threads": threads, "arguments": system.arguments, "dense": compared}
    command = [system.python, str(system.script), str(folder), str(output), json.dumps(options)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    if system.script == PEER:
        environment.pop("PYTHONPATH", None)  # it would lead into this environment
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        said = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise UserError(f"'{system.name}' could not be measured: {said}")
    figures: dict[str, Any] = json.loads(output.with_suffix(".json").read_text())
    return figures


def _compared(chosen: list[System], folder: Path) -> list[dict[str, Any]]:
    """Every graph against the last system's."""
    *others, (last, reference) = [
        (system.name, load_file(folder / f"{i}.safetensors")) for i, system in enumerate(chosen)
    ]
    found = []
    for name, graph in others:
        check = compare(graph, reference)
        found.append({**check, "text": f"'{name}' and '{last}': {check['text']}"})
    return found


def compare(graph: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """`equal`, `apart` (largest difference of two edges; None if the nodes differ), `text`."""
    for name in ("active_features", "selected_features", "logit_token_ids"):
        if not torch.equal(graph[name], reference[name]):
            return {"equal": False, "apart": None, "text": f"NOT EQUAL: {name} differ"}
    apart = float((graph["adjacency"] - reference["adjacency"]).abs().max())
    equal = apart <= TOLERANCE
    largest = float(reference["adjacency"].abs().max())
    text = (
        f"{'equal' if equal else 'NOT EQUAL'}: the same {len(graph['active_features']):,} active "
        f"features and {len(graph['logit_token_ids'])} targets; edges, of up to {largest:.2f}, are "
        f"within {apart:.1e}"
    )
    return {"equal": equal, "apart": apart, "text": text}


def table(title: str, runs: dict[str, list[dict[str, Any]]]) -> Table:
    """A row for each system."""
    first = min(run["core"] for run in next(iter(runs.values())))
    rows = []
    for name, found in runs.items():
        core = min(run["core"] for run in found)
        peak = max(run["process_peak"] for run in found)
        grown = max(run["peak"] - run["loaded"] for run in found)
        rows.append(
            [
                name, figure(min(run["wall"] for run in found)), figure(core),
                f"{core / first:.1f}", f"{peak / 2**20:,.0f}", f"{grown / 2**20:,.0f}",
                f"{found[0]['active']:,}", f"{found[0]['nodes']:,}", f"{found[0]['edges']:,}",
            ]
        )  # fmt: skip
    headings = [
        "system", "wall s", "core s", "× core", "peak MiB", "grown by MiB", "active", "nodes",
        "edges",
    ]  # fmt: skip
    return Table(title, headings, rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=CASES, default="text")
    parser.add_argument("--peer_venv", type=Path, help="environment with circuit-tracer")
    parser.add_argument(
        "--peer_batch_size", type=int, nargs="+", default=[512, 16],
        help="512 is circuit-tracer's default, 16 about the quickest on a CPU",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", type=float, default=4, help="GiB that `attribute` may take")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="file for the figures")
    return parser.parse_args()


if __name__ == "__main__":
    main()
