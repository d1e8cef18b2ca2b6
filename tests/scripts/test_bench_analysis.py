"""The analysis benchmark: the coder it makes, what it measures."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsify_vlm.analysis.decoders import read_decoders
from sparsify_vlm.coders.formats import open_clt

_SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def bench() -> Any:
    sys.path.insert(0, str(_SCRIPTS))
    try:
        yield importlib.import_module("bench_analysis")
    finally:
        sys.path.remove(str(_SCRIPTS))


def test_the_coder_is_read_as_it_was_made(bench: Any, tmp_path: Path) -> None:
    bench.make(tmp_path / "coder", 12, 128, 20)
    stored = open_clt(tmp_path / "coder")
    found = read_decoders(stored)
    assert not found.warnings
    clt = stored.load()
    for one in found.sources:
        for k in range(len(one.targets)):
            norms = clt.W_dec[one.source][k].detach().norm(dim=1)
            assert torch.allclose(one.squared[:, k].sqrt(), norms, rtol=1e-5)
        norms = clt.W_enc[one.source].detach().norm(dim=1)
        assert torch.allclose(one.encoder_norm, norms, rtol=1e-5)
    assert bench.plain_read(tmp_path / "coder") == sum(
        path.stat().st_size for path in (tmp_path / "coder").iterdir()
    )


def test_every_system_is_timed_in_every_state(bench: Any, tmp_path: Path) -> None:
    bench.make(tmp_path / "coder", 4, 32, 20)
    times = bench.measure(tmp_path / "coder", 2)
    assert list(times) == ["cold", "warm"]
    for state in times.values():
        assert list(state) == ["plain read", "decoders read", "analysis"]
        assert all(len(rounds) == 2 for rounds in state.values())
        assert min(wall for wall, _ in state["analysis"]) > min(
            wall for wall, _ in state["plain read"]
        )


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads /proc")
def test_memory_is_that_of_a_block_not_of_a_layer(bench: Any, tmp_path: Path) -> None:
    """One layer's decoder is 43 MB; blocks are of 4 MB."""
    for name, size in (("small", bench.SMALL), ("coder", (8, 1024, 1300))):
        bench.make(tmp_path / name, *size)
    command = [sys.executable, bench.__file__, "--memory_of", str(tmp_path), "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak = json.loads(done.stdout)["peak"]
    assert 4e6 < peak < 42e6
