"""The microbenchmark runs: with the kernels interpreted its errors are worth reading."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_kernels.py"
SIZE = [
    "--sources=2", "--num_latents=48", "--d_model=33", "--k=3", "--tokens=7", "--repeats=1",
]  # fmt: skip


@pytest.mark.skipif(platform.system() != "Linux", reason="Triton is published for Linux alone")
def test_all_kernels_agree_with_the_torch_path() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *SIZE],
        env={**os.environ, "TRITON_INTERPRET": "1", "COLUMNS": "160"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("│")] for line in done.stdout.splitlines()]
    errors = {
        row[1]: float(row[7]) for row in rows if len(row) > 8 and row[2] == "triton" if row[7]
    }
    assert len(errors) == 8
    for name, error in errors.items():
        # 2^-7: bfloat16 is cut off by the interpreter and rounded by torch.
        assert error < (2**-7 if "encoder" in name or "largest" in name else 1e-6), name


def test_says_what_it_does_not_measure() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *SIZE],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "the torch path alone is timed" in done.stdout
    assert "triton" not in done.stdout
