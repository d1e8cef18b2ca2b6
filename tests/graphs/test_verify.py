"""`verify`: right graphs pass, wrong ones do not, and damaged folders are named."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reference_graphs import inputs, model

from sparsify_vlm import AttributionGraph, Intervention
from sparsify_vlm.cli import main
from sparsify_vlm.graphs import Difference, attribute
from sparsify_vlm.graphs.config import VerifyConfig
from sparsify_vlm.graphs.effects import changes_without, total_effects
from sparsify_vlm.graphs.verify import Agreement, verify_graph
from sparsify_vlm.models import load_model
from sparsify_vlm.replacement import LocalModel

CASE = "llama_relu"


@pytest.fixture(scope="module")
def graph() -> AttributionGraph:
    made = attribute(model(CASE), inputs(CASE), targets=[7, 9, Difference(7, 9)])
    made.info["difference"] = [7, 9]
    return made


def check(graph: AttributionGraph, **options) -> object:
    cfg = VerifyConfig(graph="", **{"samples": 12, "top": [1, 4], "draws": 3} | options)
    return verify_graph(model(CASE), graph, inputs(CASE), cfg)


def test_constrained_edges_are_exact(graph):
    found = check(graph)
    assert found.constrained.exact
    assert found.constrained.n == 12 * (graph.n_features + 3)
    assert found.constrained.correlation == pytest.approx(1, abs=1e-6)
    assert found.constrained.slope == pytest.approx(1, abs=1e-5)
    assert found.constrained.largest > 0.5
    assert found.free_targets.n == 12 * 3


@pytest.mark.parametrize("wrong", ["scaled", "sign", "missing"])
def test_a_wrong_edge_is_found(graph, wrong):
    """One edge of the most influential feature."""
    feature = int(graph.node_influence()[: graph.n_features].argmax())
    edges = graph.edges
    place = int(((edges.source == feature) * edges.weight.abs()).argmax())
    weight = edges.weight.clone()
    weight[place] *= {"scaled": 1.01, "sign": -1.0, "missing": 0.0}[wrong]
    changed = replace(graph, edges=replace(edges, weight=weight))
    found = check(changed, samples=graph.n_features)
    assert not found.constrained.exact
    expected = abs(float(weight[place] - edges.weight[place]))
    assert found.constrained.worst == pytest.approx(expected, rel=0.01, abs=1e-5)


def test_changes_without_one_feature_are_its_total_effects(graph):
    """Downwards from the target and upwards from the feature the sums are the same."""
    effects = total_effects(graph)[:, : graph.n_features]
    sets = [torch.tensor([i]) for i in range(graph.n_features)]
    changes = changes_without(graph, sets)[:, graph.target_nodes]
    torch.testing.assert_close(changes.T, -effects, rtol=1e-9, atol=1e-9)


def test_changes_without_several_are_those_of_the_linear_model_run_by_hand(graph):
    held = torch.tensor([3, 40, 120, 200])
    A, n = graph.adjacency.double(), graph.n_features
    a = graph.activation_values.double()
    change = torch.zeros(n, dtype=torch.float64)
    for t in range(n):
        change[t] = -a[t] if t in held else sum(A[t, s] * change[s] / a[s] for s in range(t))
    found = changes_without(graph, [held])[0]
    torch.testing.assert_close(found[:n], change, rtol=1e-9, atol=1e-9)
    assert not bool(found[graph.errors].any() or found[graph.token_nodes].any())


def test_features_together_are_set_to_0_in_the_model(graph):
    found = check(graph).together
    order = total_effects(graph)[0, : graph.n_features].argsort(descending=True)[:4]
    changes = [Intervention(*f, 0.0) for f in graph.features[order].tolist()]
    local = LocalModel(model(CASE), inputs(CASE))
    read = [
        model(CASE).intervene(local, these, "free").unembedded[-1].double()
        for these in ([], changes)
    ]
    expected = float((read[1][7] - read[1].mean()) - (read[0][7] - read[0].mean()))
    assert [one.n for one in found] == [1, 4]
    assert found[1].measured == pytest.approx(expected, abs=1e-5)


def test_agreement_of_known_numbers():
    predicted, measured = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 6.5])
    found = Agreement.of(predicted, measured)
    assert found.slope == pytest.approx((2 + 8 + 19.5) / 14)
    together = torch.corrcoef(torch.stack([predicted, measured]))[0, 1]
    assert found.correlation == pytest.approx(float(together), abs=1e-6)
    assert (found.worst, found.largest, found.exact) == (3.5, 3.0, False)
    empty = Agreement.of(torch.zeros(0), torch.zeros(0))
    assert (empty.n, empty.correlation, empty.exact) == (0, None, True)
    assert Agreement.of(torch.zeros(2), torch.zeros(2)).slope is None


# ---- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A graph of tiny-llava and a random coder, as `trace` wrote it."""
    from test_trace import save_random_clt

    root = tmp_path_factory.mktemp("verify")
    loaded = load_model("tiny-llava")
    width = loaded.stack.d_model
    clt = save_random_clt("tiny-llava", loaded.stack.hookpoints, width, root / "clt")
    assert main(["trace", clt, "--scene", "2", "--output_dir", str(root / "graph")]) == 0
    return root


def test_the_command_writes_its_figures(folder, capsys):
    argv = ["verify", str(folder / "graph"), "--samples", "6", "--top", "1", "3", "--draws", "2"]
    assert main(argv) == 0
    assert "The constrained prediction is exact." in capsys.readouterr().out
    written = json.loads((folder / "graph" / "verify.json").read_text())
    assert (written["format"], written["version"]) == ("sparsify-vlm verification", 1)
    assert written["exact"] is True
    assert written["constrained"]["worst"] < 1e-4
    assert [one["n"] for one in written["together"]] == [1, 3]


def test_another_coder_is_refused(folder, tmp_path, capsys):
    from test_trace import save_random_clt

    loaded = load_model("tiny-llava")
    other = save_random_clt(
        "tiny-llava",
        loaded.stack.hookpoints,
        loaded.stack.d_model,
        tmp_path / "o",
        activation="relu",
    )
    assert main(["verify", str(folder / "graph"), "--clt", other]) == 1
    assert "other features are active than in the graph" in capsys.readouterr().err


DAMAGES = {
    "graph.json": "no such file",
    "graph.safetensors": "not complete",
    "inputs.safetensors": "`sparsify-vlm trace` writes it",
}


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("how", ["missing", "cut"])
def test_a_damaged_folder_is_named(folder, tmp_path, capsys, name, how):
    damaged = shutil.copytree(folder / "graph", tmp_path / "graph")
    if how == "missing":
        (damaged / name).unlink()
    else:
        whole = (damaged / name).read_bytes()
        (damaged / name).write_bytes(whole[: len(whole) // 2])
    assert main(["verify", str(damaged)]) == 1
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert str(damaged / name) in error
    assert (DAMAGES[name] if how == "missing" else "is damaged") in error


def test_no_folder(tmp_path, capsys):
    assert main(["verify", str(tmp_path / "nothing")]) == 1
    assert "no such file; a graph is a folder" in capsys.readouterr().err
