"""The ground-truth script: geometry, statistics, predictions, figures, and two scenes from end to
end."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from sparsify_vlm import VLMReplacementModel, attribute
from sparsify_vlm.coders import Clt, CltConfig, save_clt
from sparsify_vlm.data.shapes import GRID, cell_patches
from sparsify_vlm.graphs import Difference
from sparsify_vlm.graphs.effects import changes_without
from sparsify_vlm.models import load_model

_SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def script() -> Any:
    names = ("scenes", "where", "swaps", "tables", "figures")
    sys.path.insert(0, str(_SCRIPTS))
    try:
        parts = {name: importlib.import_module(f"ground_truth.{name}") for name in names}
        yield SimpleNamespace(main=importlib.import_module("trace_ground_truth").main, **parts)
    finally:
        sys.path.remove(str(_SCRIPTS))


@pytest.fixture(scope="module")
def coder(tmp_path_factory) -> Path:
    """A random coder of tiny-llava."""
    loaded = load_model("tiny-llava")
    cfg = CltConfig(loaded.stack.d_model, loaded.stack.hookpoints, n_targets=8, num_latents=32, k=4)
    clt = Clt(cfg)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in clt.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    folder = tmp_path_factory.mktemp("coder") / "clt"
    save_clt(clt, folder)
    return folder


@pytest.fixture(scope="module")
def scenes(script, coder) -> Any:
    return script.scenes.Scenes(VLMReplacementModel.from_pretrained("tiny-llava", coder), 0)


@pytest.fixture(scope="module")
def pair(script, scenes) -> Any:
    """The first scene and its recoloured one, with their graphs."""
    case = next(scenes.cases())
    other = scenes.recoloured(case)
    wanted = [Difference(scenes.tokens[other.colour], scenes.tokens[case.colour])]
    graphs = (
        attribute(scenes.model, one.inputs, targets=wanted, max_feature_nodes=1500)
        for one in (case, other)
    )
    return script.swaps.Pair(case, other, *graphs)


def test_cells_are_those_of_the_scenes(script):
    cells = script.where.cell_of_patch()
    for cell in range(GRID * GRID):
        assert [tuple(place) for place in (cells == cell).nonzero().tolist()] == list(
            cell_patches(cell)
        )


@pytest.mark.parametrize(
    ("hits", "n", "interval"), [(0, 100, (0, 0.0370)), (9, 10, (0.5958, 0.9821))]
)
def test_wilsons_interval(script, hits, n, interval):
    """The values of R's prop.test without continuity correction."""
    assert script.tables.wilson(hits, n) == pytest.approx(interval, abs=1e-4)


def test_interval_of_a_mean(script):
    """Standard deviation of 1, 2, 3, 4: √(5/3)."""
    half = 1.959964 * (5 / 3) ** 0.5 / 2
    found = script.tables.mean_interval([1.0, 2.0, 3.0, 4.0])
    assert found == pytest.approx((2.5, 2.5 - half, 2.5 + half))


def test_only_the_asked_object_is_recoloured(pair):
    changed = [
        i
        for i, (a, b) in enumerate(
            zip(pair.case.scene.objects, pair.other.scene.objects, strict=True)
        )
        if a != b
    ]
    assert changed == [pair.case.asked]
    assert pair.other.colour not in {o.colour for o in pair.case.scene.objects}


def test_features_set_to_zero_together(script, pair):
    """As the package's own solver, which works on the sparse edges, predicts it."""
    graph = pair.here
    picked = [list(range(0, graph.n_features, step)) for step in (3, 50, 400)]
    features = [tuple(f) for f in graph.features.tolist()]
    sets = [[features[i] for i in one] for one in picked]
    found = script.swaps.changed_together(graph, pair.before, {}, sets)
    wanted = changes_without(graph, [torch.tensor(one) for one in picked])
    assert found == pytest.approx(wanted[:, graph.target_nodes.start], rel=1e-6, abs=1e-9)
    assert found.abs().min() > 1e-4


def test_one_feature_is_predicted_by_its_total_effect(script, pair):
    (own,) = script.swaps.largest(pair.own, 1)
    (second,) = script.swaps.largest({f: v for f, v in pair.others.items() if f not in pair.own}, 1)
    wanted = [pair.own[own], pair.others[second]]
    assert pair.together([[own], [second]]) == pytest.approx(wanted, rel=1e-6)
    assert pair.together([[own, second]]) == pytest.approx([sum(wanted)], rel=1e-6)


def test_features_of_the_arms(script, scenes, pair):
    arms = script.swaps._arms(scenes, pair)
    active = pair.before.keys() | pair.after.keys()
    assert all(len(set(one)) == len(one) and active.issuperset(one) for one in arms.values())
    for n in (1, 5, 10):
        assert len(arms[f"own-{n}"]) == len(arms[f"either-{n}"]) == n
        assert min(pair.own[f] for f in arms[f"own-{n}"]) >= max(
            v for f, v in pair.own.items() if f not in arms[f"own-{n}"]
        )
        assert n <= len(arms[f"each-{n}"]) <= 2 * n
        assert set(arms[f"each-{n}"]) >= set(arms[f"own-{n}"])
    beside, chosen = arms["each-beside-1"], arms["each-1"]
    assert len(beside) == len(chosen)
    assert not set(beside) & set(chosen)
    assert {f[:2] for f in beside} <= {f[:2] for f in chosen}
    (place,) = {f[:2] for f in arms["place"]}
    assert set(arms["place"]) == {f for f in active if f[:2] == place}


def test_curves_show_the_shares_and_the_gaps(script):
    def scene(turns: bool) -> dict[str, Any]:
        names = [f"{arm}-{n}" for arm in script.figures.CURVES for n in script.swaps.SWAPPED]
        arms = {name: {"says": "red", "moved": 1.0} for name in names}
        arms["each-5"] = {"says": "blue" if turns else "red", "moved": 9.0 if turns else 3.0}
        del arms["each-beside-50"]
        return {"to": "blue", "before": -10.0, "on_second": 10.0, "arms": arms}

    figure = script.figures.against_number([scene(True)] + 3 * [scene(False)])
    turned, gap = figure.axes
    number = script.swaps.SWAPPED.index(5)
    lines = {line.get_label(): line for line in turned.get_lines()}
    each = lines[script.figures.CURVES["each"][0]]
    assert each.get_ydata().tolist() == [25.0 if i == number else 0.0 for i in range(7)]
    assert gap.get_lines()[0].get_ydata()[number] == pytest.approx(-10 + (9 + 3 * 3) / 4)
    assert len(lines[script.figures.CURVES["each-beside"][0]].get_xdata()) == 6


def test_two_scenes(script, coder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script.where, "MEANS", 2)
    argv = ["--clt", coder, "--output_dir", tmp_path, "--scenes", 2, "--swaps", 1]
    argv += ["--figures", tmp_path / "figures"]
    monkeypatch.setattr(sys, "argv", ["trace_ground_truth.py", *map(str, argv)])
    script.main()
    first, second = json.loads((tmp_path / "scenes.json").read_text())
    for one in (first, second):
        assert set(one["values"]) == set(script.where.WHERE)
        assert all(len(values) == 9 for values in one["values"].values())
        # the model itself looks at the asked object
        assert one["values"]["ablation"].index(max(one["values"]["ablation"])) == one["cell"]
    swaps = first["swaps"]
    assert swaps["from"] != swaps["to"]
    assert swaps["before"] < 0 < swaps["on_second"]
    assert "swaps" not in second
    printed = capsys.readouterr().out
    assert "| ablating a cell's image tokens (causal ceiling) | 100.0 %" in printed
    assert "| 5 random active ones of each scene | 0.0 %" in printed
    figures = sorted((tmp_path / "figures").iterdir())
    assert [path.name for path in figures] == ["ground-truth-scenes.png", "ground-truth-swaps.png"]
    for path in figures:
        assert path.stat().st_size < 200_000
        assert len(Image.open(path).convert("RGB").getcolors(1 << 16)) > 20
