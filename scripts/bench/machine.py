"""What the machine is, and how fast it is at the four things a step consists of."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import astuple, dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor

from bench.clock import timer


@dataclass(frozen=True)
class Rates:
    """Per second, on all threads of a run."""

    fp32: float
    """Floating-point operations in float32 matrix products."""

    bf16: float
    """The same in bfloat16."""

    copy: float
    """Bytes read and written in copying memory."""

    gather: float
    """Bytes read in adding up rows of a table that lies in the second-level cache."""

    gather_large: float
    """The same for a table of the third level's size."""

    def or_better(self, other: Rates) -> Rates:
        """The higher of each."""
        return Rates(*map(max, astuple(self), astuple(other)))


MATRIX = {"cpu": 1024, "cuda": 8192}
COPIED = {"cpu": 128 << 20, "cuda": 1 << 30}
"""Bytes."""
TABLES = {"cpu": (512 << 10, 16 << 20), "cuda": (8 << 20, 32 << 20)}
"""Bytes of the table in the second level and in the third; on CUDA in half of the second level of
small devices and of large ones."""
ROW = 256
"""Width of the gathered rows."""


def measure(device: str = "cpu") -> Rates:
    """The rates here, each from the quickest of several runs; about 3 seconds on a CPU."""
    kind = torch.device(device).type
    small, large = TABLES[kind]
    return Rates(
        fp32=_product(device, MATRIX[kind], torch.float32),
        bf16=_product(device, MATRIX[kind], torch.bfloat16),
        copy=_copy(device, COPIED[kind]),
        gather=_gather(device, small),
        gather_large=_gather(device, large),
    )


def _quickest(action: Callable[[], object], device: str, runs: int = 15) -> float:
    read, seconds = timer(device), []
    for _ in range(runs + 1):
        start = read()
        action()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()
        seconds.append(read() - start)
    return min(seconds[1:])


def _product(device: str, n: int, dtype: torch.dtype) -> float:
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    out = torch.empty_like(a)
    return 2 * n**3 / _quickest(lambda: torch.mm(a, b, out=out), device)


def _copy(device: str, size: int) -> float:
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / _quickest(lambda: target.copy_(source), device)


def _gather(device: str, size: int) -> float:
    table = torch.randn(size // (4 * ROW), ROW, device=device)
    tokens, k = 2048, 32
    indices = torch.randint(len(table), (tokens, k), device=device)
    values = torch.rand(tokens, k, device=device)

    def run() -> Tensor:
        return torch.nn.functional.embedding_bag(
            indices, table, per_sample_weights=values, mode="sum"
        )

    return tokens * k * ROW * 4 / _quickest(run, device)


def describe(device: str = "cpu") -> dict[str, str | int | float]:
    """The machine in words, and the date."""
    found: dict[str, str | int | float] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "processor": _processor(),
        "cores": os.cpu_count() or 0,
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "device": device,
    }
    if torch.device(device).type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return (
                    line.partition(":")[2].strip() + f" ({torch.backends.cpu.get_cpu_capability()})"
                )
    return platform.processor() or platform.machine()
