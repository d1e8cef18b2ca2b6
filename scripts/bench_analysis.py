"""Time the analysis of weights against a plain read of the same files.

    python scripts/bench_analysis.py              # 26 layers, d = 1152, 1024 latents: 3.3 GB
    python scripts/bench_analysis.py --latents 256 --rounds 3 --threads 1

Makes a coder of random numbers in Gemma Scope 2's layout in a temporary folder and goes through its
files in turn, once after they were dropped from the system's file cache and once from it:

    plain read        every byte of every file, in order, into one buffer that is used again
    decoders read     one pass over the coder: norms and products of all decoders
    analysis          that, and everything the experiments weights, features and distance report

`rate` is all the files' bytes over the seconds, `× plain` that rate over the plain read's in the
same state of the cache: medians of the ratios of the rounds. `core` is the smallest processor time.
What the statistics take beyond the pass depends on the number of layers and resamples, not on that
of latents, and vanishes beside real sizes. Peak memory is what the pass adds to a process of its
own that has gone through a small coder before, as a multiple of one layer's stored decoder.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench import memory
from bench.tables import MIB, Table, figure
from safetensors.torch import save_file

from sparsify_vlm.analysis.decoders import read_decoders
from sparsify_vlm.analysis.distance import distance
from sparsify_vlm.analysis.features import features
from sparsify_vlm.analysis.weights import weights
from sparsify_vlm.coders.formats import open_clt

BUFFER = 1 << 20
"""Bytes of the plain read's buffer. Of 0.25, 1, 4, 32 MiB the quickest here (docs/log.md)."""
SMALL = (4, 64, 64)
"""Layers, d_model and latents of the coder that warms up what is not asked for."""
STATES = ("cold", "warm")


def main() -> None:
    """Measure and print the table."""
    args = _arguments()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(json.dumps({"peak": peak_of(Path(args.memory_of))}))
        return
    folder = Path(tempfile.mkdtemp(prefix="bench_analysis_", dir=args.folder))
    try:
        make(folder / "small", *SMALL)
        make(folder / "coder", args.layers, args.d_model, args.latents)
        times = measure(folder / "coder", args.rounds)
        peak = memory_of(folder, args.threads)
    finally:
        shutil.rmtree(folder)
    size = args.layers * _layer_bytes(args.layers, args.d_model, args.latents)
    table(times, size, args).show()
    decoder = 4 * args.latents * args.layers * args.d_model
    print(
        f"peak of decoders read: {peak / MIB:,.0f} MiB, {peak / decoder:.2f} × one layer's decoder "
        f"({decoder / MIB:,.0f} MiB)"
    )


def make(folder: Path, layers: int, d_model: int, latents: int) -> None:
    """A coder of random numbers; slots of earlier layers are zeros."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(layers):
        w_dec = torch.randn(latents, layers, d_model, generator=generator)
        w_dec[:, :i] = 0
        tensors = {
            "w_enc": torch.randn(d_model, latents, generator=generator),
            "w_dec": w_dec,
            "b_enc": torch.zeros(latents),
            "threshold": torch.full((latents,), 0.1),
            "b_dec": torch.zeros(d_model),
        }
        path = folder / f"params_layer_{i}.safetensors"
        save_file(tensors, path)
        with path.open("rb+") as file:  # dirty pages cannot be dropped from the cache
            os.fsync(file.fileno())


def measure(folder: Path, rounds: int) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """By state of the cache and system: wall and processor seconds of each round."""
    systems: dict[str, Callable[[Path], object]] = {
        "plain read": plain_read,
        "decoders read": lambda path: read_decoders(open_clt(path)),
        "analysis": analysis,
    }
    times: dict[str, dict[str, list[tuple[float, float]]]] = {
        state: {name: [] for name in systems} for state in STATES
    }
    analysis(folder)  # compiles, and fills the cache
    for _ in range(rounds):
        for state in STATES:
            if state == "warm":
                plain_read(folder)  # the analysis has left the slots that it skips on the disk
            for name, system in systems.items():
                if state == "cold":
                    drop(folder)
                wall, core = time.perf_counter(), time.process_time()
                system(folder)
                ends = time.perf_counter() - wall, time.process_time() - core
                times[state][name].append(ends)
    return times


def plain_read(folder: Path, size: int = BUFFER) -> int:
    """Read every file in order; returns the number of bytes."""
    buffer, total = memoryview(bytearray(size)), 0
    for path in sorted(folder.iterdir()):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total


def analysis(folder: Path) -> None:
    """The three experiments on weights, from one pass."""
    decoders = read_decoders(open_clt(folder))
    for experiment in (weights, features, distance):
        experiment(decoders)


def drop(folder: Path) -> None:
    """Have the system forget the files' contents."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory_of(folder: Path, threads: int) -> int:
    """Bytes that a pass over the coder adds to the peak of a process of its own."""
    command = [sys.executable, __file__, "--memory_of", str(folder), "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout.splitlines()[-1])["peak"])


def peak_of(folder: Path) -> int:
    """What `memory_of` asks of the new process."""
    read_decoders(open_clt(folder / "small"))
    before = memory.peak()
    read_decoders(open_clt(folder / "coder"))
    return memory.peak() - before


def _layer_bytes(layers: int, d_model: int, latents: int) -> int:
    return 4 * (latents * d_model * (layers + 1) + 2 * latents + d_model)


def table(
    times: dict[str, dict[str, list[tuple[float, float]]]], size: int, args: argparse.Namespace
) -> Table:
    """Medians of every system in each state of the cache."""
    rows = []
    for state in STATES:
        plain = [wall for wall, _ in times[state]["plain read"]]
        for name, values in times[state].items():
            walls = [wall for wall, _ in values]
            ratios = [base / wall for base, wall in zip(plain, walls, strict=True)]
            rows.append(
                [
                    f"{name}, {state}",
                    figure(statistics.median(walls)),
                    figure(min(walls)),
                    figure(min(core for _, core in values)),
                    figure(size / statistics.median(walls) / 1e9),
                    f"{statistics.median(ratios):.2f}",
                    f"{min(plain) / min(walls):.2f}",
                ]
            )
    title = (
        f"{args.layers} layers, d = {args.d_model}, {args.latents} latents: {size / 1e9:.2f} GB; "
        f"{args.threads} threads, {args.rounds} rounds"
    )
    headings = ["system", "wall s", "min s", "core s", "rate GB/s", "× plain", "× plain (min)"]
    return Table(title, headings, rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=26)
    parser.add_argument("--d_model", type=int, default=1152)
    parser.add_argument("--latents", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", help="where the coder is written; default: a temporary folder")
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
