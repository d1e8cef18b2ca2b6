"""The ground-truth script: its geometry, its statistics, and two scenes from end to end."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsify_vlm.coders import Clt, CltConfig, save_clt
from sparsify_vlm.data.shapes import GRID, cell_patches
from sparsify_vlm.models import load_model

_SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def script() -> Any:
    sys.path.insert(0, str(_SCRIPTS))
    try:
        yield importlib.import_module("trace_ground_truth")
    finally:
        sys.path.remove(str(_SCRIPTS))


def test_cells_are_those_of_the_scenes(script):
    cells = script.cell_of_patch()
    for cell in range(GRID * GRID):
        assert [tuple(place) for place in (cells == cell).nonzero().tolist()] == list(
            cell_patches(cell)
        )


@pytest.mark.parametrize(
    ("hits", "n", "interval"), [(0, 100, (0, 0.0370)), (9, 10, (0.5958, 0.9821))]
)
def test_wilsons_interval(script, hits, n, interval):
    """The values of R's prop.test without continuity correction."""
    assert script.wilson(hits, n) == pytest.approx(interval, abs=1e-4)


def test_two_scenes(script, tmp_path, monkeypatch, capsys):
    loaded = load_model("tiny-llava")
    cfg = CltConfig(loaded.stack.d_model, loaded.stack.hookpoints, n_targets=8, num_latents=32, k=4)
    clt = Clt(cfg)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in clt.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    save_clt(clt, tmp_path / "clt")
    monkeypatch.setattr(script, "MEANS", 2)
    argv = ["--clt", tmp_path / "clt", "--output_dir", tmp_path, "--scenes", 2, "--swaps", 1]
    monkeypatch.setattr(sys, "argv", ["trace_ground_truth.py", *map(str, argv)])
    script.main()
    first, second = json.loads((tmp_path / "scenes.json").read_text())
    for one in (first, second):
        assert set(one["values"]) == set(script.WHERE)
        assert all(len(values) == 9 for values in one["values"].values())
        # the model itself looks at the asked object
        assert one["values"]["ablation"].index(max(one["values"]["ablation"])) == one["cell"]
    assert first["swaps"]["from"] != first["swaps"]["to"]
    assert "swaps" not in second
    printed = capsys.readouterr().out
    assert "| ablating a cell's image tokens (causal ceiling) | 100.0 %" in printed
    assert "| 5 random active ones of each scene | 0.0 %" in printed
