"""The demo in small: less data and fewer steps than `make demo`, the same bar for faithfulness."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sparsify_vlm.data import ShapesDataset
from sparsify_vlm.demo import LEAST_HELDOUT, DemoConfig, run_demo
from sparsify_vlm.errors import UserError
from sparsify_vlm.features.shapes import patch_truth
from sparsify_vlm.report.viewer.folder import read_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "run"
    run_demo(
        DemoConfig(
            output_dir=str(folder),
            train_scenes=1500,
            heldout_scenes=400,
            steps=130,
            batch_tokens=2048,
        )
    )
    return folder


def read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


@pytest.mark.slow
def test_the_coder_is_faithful_on_held_out_scenes(folder: Path) -> None:
    figures = read(folder / "clt.eval.json")
    assert figures["mean_fvu"]["image"] <= 0.05
    assert figures["mean_fvu"]["text"] <= 0.05
    full = figures["replacement"]["full"]
    assert set(full["n_correct"]) == {"all", "colour", "shape", "count", "existence"}
    for kind in ("colour", "shape", "count", "existence"):
        assert full["n_correct"][kind] >= 95, kind
        assert full["changed_of_correct"][kind] <= 0.03, kind
    assert figures["baseline"]["exact_match"]["all"] >= 0.95


@pytest.mark.slow
def test_the_comparisons_stand_beside_it(folder: Path) -> None:
    clt, plt = read(folder / "clt.eval.json"), read(folder / "plt.eval.json")
    # Without its cross-layer writes the coder must be worse: they carry something.
    assert clt["mean_fvu_same_layer_only"]["text"] > 2 * clt["mean_fvu"]["text"]
    assert plt["mean_fvu"] == plt["mean_fvu_same_layer_only"]
    page = (folder / "report.html").read_text("utf-8")
    assert f"{clt['mean_fvu']['image']:.3f}" in page
    assert f"{plt['mean_fvu']['image']:.3f}" in page


@pytest.mark.slow
def test_latents_of_colours_are_found_where_the_colours_are(folder: Path) -> None:
    concepts = {row["concept"]: row for row in read(folder / "concepts.json")}
    assert len(concepts) == 11
    best = max(concepts.values(), key=lambda row: row["f1"])
    assert best["f1"] > 0.7
    assert best["f1"] > 3 * best["always"]


@pytest.mark.slow
def test_an_answer_is_traced_to_the_object_that_was_asked_for(folder: Path) -> None:
    """The generator knows which patches show the object; the report opens the graph's page."""
    graph = json.loads((folder / "graph" / "answer.json").read_text())["metadata"]["vlm"]
    effects = np.array(graph["patch_effects"][0]["values"])
    rows = ShapesDataset("heldout", 400)
    picture = np.asarray(Image.open(folder / "graph" / "image-0.png"))
    row = next(r for r in rows if np.array_equal(np.asarray(r["image"]), picture))
    assert row["question"] == graph["question"]
    asked = next(o for o in row["scene"].objects if o.shape in graph["question"])
    cells = effects.reshape(3, effects.shape[0] // 3, 3, -1).sum((1, 3))
    assert cells.argmax() == asked.cell
    pixels = np.array(graph["pixel_effects"][0]["values"])
    assert pixels.reshape(3, 2, 3, 2).sum((1, 3)).argmax() == asked.cell
    page = read_folder(folder / "graph").page
    features = {f"{n['layer']}_{n['feature']}" for n in page["nodes"] if n["kind"] == "feature"}
    assert len(page["examples"]) > len(features) / 2
    assert set(page["examples"]) <= features
    assert 'href="graph.html"' in (folder / "report.html").read_text()
    assert (folder / "graph.html").stat().st_size > 50_000


def test_a_second_demo_replaces_the_first_but_nothing_else(folder: Path, tmp_path: Path) -> None:
    assert not (folder / "activations").exists()
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds files that no demo wrote"):
        run_demo(DemoConfig(output_dir=str(tmp_path)))
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    "setting", [{"steps": 0}, {"train_scenes": 0}, {"heldout_scenes": LEAST_HELDOUT - 1}]
)
def test_what_cannot_end_in_a_report_is_refused_at_once(setting: dict[str, int]) -> None:
    with pytest.raises(UserError, match=f"--{next(iter(setting))} .*: must be at least"):
        DemoConfig(**setting)  # type: ignore[arg-type]


def test_the_least_held_out_scenes_show_everything_in_both_halves() -> None:
    for enough in (LEAST_HELDOUT, LEAST_HELDOUT - 1):
        truth = patch_truth(ShapesDataset("heldout", enough))
        scenes = [patches.reshape(enough, -1).any(1) for patches in truth.values()]
        assert all(s[::2].any() and s[1::2].any() for s in scenes) == (enough == LEAST_HELDOUT)
