"""Time a capture against the model's bare forward passes over the same batches, in one process.

    python scripts/bench_capture.py                              # 2,000 shapes samples, tiny-llava
    python scripts/bench_capture.py --batch_size 32 --rounds 5 --threads 2

Three systems take turns, so that a busy machine slows all of them alike. `wall` is the median of
the rounds, `min` the quickest round, `core` the smallest processor time over all threads.

    forward            the model on batches that lie ready in memory, nothing kept
    data + forward     the batches decoded and encoded as well, in a thread, as a capture does
    capture            all of that, and x and y of every layer on the disk, flushed, with checksums
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from bench import machine
from bench.tables import capture_table, write

from sparsify_vlm.data import ActivationStore, EncodedBatch, batches, open_samples, prefetched
from sparsify_vlm.data.capture import CaptureConfig, batch_size, capture
from sparsify_vlm.models import LoadedModel, load_model

Times = tuple[float, float]
"""Wall and processor seconds."""


def main() -> None:
    """Measure and print the table."""
    args = _arguments()
    torch.set_num_threads(args.threads)
    loaded = load_model(args.model)
    folder = Path(tempfile.mkdtemp(prefix="bench_capture_", dir=args.folder))
    cfg = CaptureConfig(
        model=args.model,
        output_dir=str(folder / "store"),
        dataset=args.dataset,
        max_examples=args.samples,
        batch_size=args.batch_size,
        quiet=True,
    )
    cfg.batch_size = batch_size(cfg, loaded, list(range(loaded.stack.n_layers)))
    try:
        times = measure(cfg, loaded, args.rounds)
        found = figures(cfg, times, ActivationStore(cfg.output_dir))
    finally:
        shutil.rmtree(folder)
    capture_table(found).show()
    if args.json:
        write(args.json, "capture", found)


def measure(cfg: CaptureConfig, loaded: LoadedModel, rounds: int) -> dict[str, list[Times]]:
    """Times of every system in every round; one round before them is not counted."""
    ready = list(_encoded(cfg, loaded))
    systems: dict[str, Callable[[], object]] = {
        "forward": lambda: _forward(loaded, iter(ready)),
        "data + forward": lambda: _forward(loaded, prefetched(_encoded(cfg, loaded))),
        "capture": lambda: _capture(cfg, loaded),
    }
    times: dict[str, list[Times]] = {name: [] for name in systems}
    for number in range(rounds + 1):
        for name, system in systems.items():
            shutil.rmtree(cfg.output_dir, ignore_errors=True)
            wall, core = time.perf_counter(), time.process_time()
            system()
            if number:
                times[name].append((time.perf_counter() - wall, time.process_time() - core))
    return times


def figures(
    cfg: CaptureConfig, times: dict[str, list[Times]], store: ActivationStore
) -> dict[str, Any]:
    """Medians and smallest values of the rounds, and what was captured."""
    return {
        "command": " ".join(["python scripts/bench_capture.py", *sys.argv[1:]]),
        "machine": machine.describe(),
        "samples": store.n_samples,
        "tokens": len(store),
        "megabytes": sum(file.stat().st_size for file in store.path.iterdir()) / 1e6,
        "batch_size": cfg.batch_size,
        "rounds": len(times["capture"]),
        "systems": [
            {
                "system": name,
                "wall": statistics.median(wall for wall, _ in values),
                "least": min(wall for wall, _ in values),
                "core": min(core for _, core in values),
            }
            for name, values in times.items()
        ],
    }


def _encoded(cfg: CaptureConfig, loaded: LoadedModel) -> Iterator[EncodedBatch]:
    assert cfg.batch_size is not None
    return batches(open_samples(cfg, loaded), loaded, cfg.batch_size, cfg.ctx_len)


def _forward(loaded: LoadedModel, encoded: Iterator[EncodedBatch]) -> None:
    for batch in encoded:
        loaded.forward(batch.inputs)


def _capture(cfg: CaptureConfig, loaded: LoadedModel) -> None:
    with redirect_stdout(StringIO()):
        capture(cfg, loaded)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-llava")
    parser.add_argument("--dataset", default="shapes")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--batch_size", type=int, help="default: capture's own")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--folder", help="where the store is written; default: a temporary folder")
    return parser.parse_args()


if __name__ == "__main__":
    main()
