"""Time one training step of a cross-layer transcoder: ours, and as other projects make it.

    python scripts/bench_step.py                                   # sizes tiny and A
    python scripts/bench_step.py --config B --rounds 3 --check
    python scripts/bench_step.py --config A --kernels eager torch --select fp32 bf16
    python scripts/bench_step.py --config A --json runs/bench/step.json
    python scripts/bench_step.py --device cuda         # and one layer of LLaVA's size

A step is forward, backward and Adam in float32. The systems take turns in one process, so that a
busy machine slows all of them alike:

    dense autograd     [T, F] activations, every source-target pair a dense product
    sparse autograd    EleutherAI's method: its encoder and its eager decoder, active latents only
    ours               the trainer's step

`wall` is the median of the rounds, `core` the smallest processor time over all threads. Phases are
those of the quickest round, in processor seconds with one thread and in wall seconds with several;
`× roofline` is their sum over the least time that the rates measured in the same run allow
(bench/roofline.py). `sparse ÷` and `dense ÷` are the baselines' core seconds over the row's. Peak
memory is what coder, tokens and three steps add to a process of their own. `gpt2` has as many
latents as let all systems run in 24 GiB.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import bench_kernels
import torch
from bench import machine, memory
from bench.measure import CHECKED_STEPS, Comparison, compare, in_turn, peak_of, results
from bench.sizes import DATA, MACHINE, SIZES
from bench.systems import OURS, SELECT, System, systems, taken
from bench.tables import rates_table, step_table, write

from sparsify_vlm.coders.kernels import PATHS
from sparsify_vlm.errors import UserError

TOLERANCE = 1e-5
"""How far weights may be from those of autograd with Adam after ten steps."""

TIE = 1e-5
"""Pre-activations (of about 1) so near to each other count as equal in a float32 selection."""


def main() -> None:
    """Measure, print, store; exit status 1 if `--check` finds a difference."""
    args = _arguments()
    torch.set_num_threads(args.threads)
    try:
        if args.memory_of:
            _print_memory(args)
            return
        equal = _benchmark(args)
        if torch.device(args.device).type == "cuda":  # one layer of LLaVA's size
            bench_kernels.main(["--device", args.device])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0 if equal else 1)


def _benchmark(args: argparse.Namespace) -> bool:
    chosen = _chosen(args)
    if args.device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"--device {args.device}: there is no CUDA device here")
    if args.check and any(2 * 16 * SIZES[name].weights > MACHINE for name in args.config):
        raise UserError("--check trains two coders side by side, for which gpt2 is too large")
    found, equal = [], True
    rates = machine.measure(args.device)
    for name in args.config:
        measured, rates = _measure(name, chosen, rates, args)
        step_table(measured).show()
        for check in measured["checks"]:
            equal &= check["good"]
            print(f"{name}: {check['text']}")
        found.append(measured)
    rates_table(vars(rates)).show()
    if args.json:
        command = " ".join(["python scripts/bench_step.py", *sys.argv[1:]])
        about = {"command": command, "machine": machine.describe(args.device)}
        write(args.json, "step", {**about, "rates": vars(rates), "sizes": found})
    return equal


def _measure(
    name: str, chosen: list[System], rates: machine.Rates, args: argparse.Namespace
) -> tuple[dict[str, Any], machine.Rates]:
    """The figures of one size, and the best rates seen before and after."""
    size = SIZES[name]
    probe = torch.empty(size.num_latents, 1, device=args.device)
    used = [
        taken(system.path, probe, size.k) if system.name.startswith(OURS) else ""
        for system in chosen
    ]
    peaks = [_peak(name, system, args) for system in chosen]
    timings = in_turn(size, chosen, args.rounds, args.data, args.device)
    rates = rates.or_better(machine.measure(args.device))
    rows = results(size, chosen, timings, rates)
    for row, system, peak, path in zip(rows, chosen, peaks, used, strict=True):
        row |= {
            "peak": peak,
            "select": system.select,
            "kernels": "" if path == system.path else path,
        }
    checks = []
    for system in chosen:
        if args.check and system.name.startswith(OURS):
            found = compare(size, system, args.data, args.device)
            good = found.apart <= TOLERANCE and (system.select != "fp32" or found.gap <= TIE)
            text = _verdict(system, found, good)
            checks.append({"system": system.name, "good": good, "text": text, **vars(found)})
    about = {"name": name, "text": str(size), "tokens": size.tokens, "data": args.data}
    return {**about, "rounds": args.rounds, "systems": rows, "checks": checks}, rates


def _verdict(system: System, found: Comparison, good: bool) -> str:
    return (
        f"{'equal' if good else 'NOT EQUAL'}: after {CHECKED_STEPS} steps of '{system.name}' all "
        f"weights are within {found.apart:.1e} of autograd + Adam with the same latents; they "
        f"moved by up to {found.moved:.1e}. {found.other:,} of {found.entries:,} latents taken are "
        f"not in the reference's own top k, by {found.gap:.1e} at most"
    )


def _peak(name: str, system: System, args: argparse.Namespace) -> int | None:
    if args.no_memory:
        return None
    arguments = [
        "--config", name, "--threads", str(args.threads), "--device", args.device,
        "--data", args.data, "--select", *args.select,
    ]  # fmt: skip
    if args.kernels != [None]:
        arguments += ["--kernels", *args.kernels]
    return memory.of_system(system.name, arguments)


def _print_memory(args: argparse.Namespace) -> None:
    """What a process that measures one system's memory prints."""
    (size,) = (SIZES[name] for name in args.config)
    (system,) = (each for each in systems(args.kernels, args.select) if each.name == args.memory_of)
    print(json.dumps({"peak": peak_of(size, system, args.data, args.device)}))


def _chosen(args: argparse.Namespace) -> list[System]:
    known = systems(args.kernels, args.select)
    return [each for each in known if each.name.split()[0] in args.systems]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", choices=SIZES, nargs="+", default=["tiny", "A"])
    parser.add_argument(
        "--systems", choices=("dense", "sparse", "ours"), nargs="+",
        default=["dense", "sparse", "ours"],
    )  # fmt: skip
    parser.add_argument(
        "--kernels", choices=PATHS, nargs="+", help="ours with each of these, not the default ones"
    )
    parser.add_argument("--select", choices=SELECT, nargs="+", default=["fp32"])
    parser.add_argument("--data", choices=DATA, default="random", help="bench/sizes.py says more")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", help="cuda was never tried")
    parser.add_argument(
        "--check", action="store_true",
        help=f"fail unless ten steps of ours end within {TOLERANCE} of autograd with Adam",
    )  # fmt: skip
    parser.add_argument("--no_memory", action="store_true", help="leave out the peaks")
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.kernels = args.kernels or [None]
    return args


if __name__ == "__main__":
    main()
