"""Time and memory of a call. Imports nothing of this project: other environments run it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def resident(name: str = "VmRSS") -> int:
    """Bytes of this process in memory now, or at most so far ("VmHWM"). Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def timed(call: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
    """The call's result, and its figures:

    `wall`, `core`: seconds, `core` of all threads together; `loaded`: bytes before it; `peak`: the
    most bytes during it; `process_peak`: the most there ever were.
    """
    gc.collect()
    before, loaded = resident("VmHWM"), resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    wall, core = time.perf_counter(), time.process_time()
    result = call()
    figures = {
        "wall": time.perf_counter() - wall,
        "core": time.process_time() - core,
        "loaded": loaded,
        "peak": resident("VmHWM"),
    }
    return result, {**figures, "process_peak": max(before, figures["peak"])}
