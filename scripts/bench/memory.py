"""Peak memory of one system, measured in a process of its own.

Within one process the systems could not be told apart: what one has freed, the next takes.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import torch

from sparsify_vlm.errors import UserError

SCRIPT = Path(__file__).parents[1] / "bench_step.py"
STEPS = 3


def peak(device: str = "cpu") -> int:
    """Bytes: the most that this process has held so far; on CUDA, the most of torch's tensors."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would also count the parent's peak before it became this
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def of_system(name: str, arguments: list[str]) -> int:
    """Bytes by which the peak grows over coder, tokens and STEPS steps of the system `name`, with
    the benchmark's other `arguments`."""
    command = [sys.executable, str(SCRIPT), *arguments, "--memory_of", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise UserError(f"the memory of '{name}' could not be measured: {said}")
    return int(json.loads(done.stdout.splitlines()[-1])["peak"])
