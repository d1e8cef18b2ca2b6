"""Exported files: circuit-tracer's own for the same graphs, and what their readers require."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import jsonschema
import pytest
import torch
from families import picture, shared
from PIL import Image
from prompts import one_prompt, random_coder
from reference_graphs import CASES, ROOT, inputs, model

from sparsify_vlm import UserError
from sparsify_vlm.graphs import AttributionGraph, Difference, Feature, attribute
from sparsify_vlm.graphs.export import Story, check_slug, export_graph, node_ids, slug_of
from sparsify_vlm.replacement import VLMReplacementModel

SCHEMA = json.loads(
    (Path(__file__).parents[1] / "data" / "neuronpedia_graph.schema.json").read_text()
)
"""What Neuronpedia validates graphs with before it takes them."""

REQUIRED = {
    "metadata": {"slug": str, "scan": str, "prompt_tokens": list, "prompt": str},
    "nodes": {
        "node_id": str,
        "feature": int,
        "layer": str,
        "ctx_idx": int,
        "feature_type": str,
        "jsNodeId": str,
        "clerp": str,
    },
    "links": {"source": str, "target": str, "weight": float},
}
"""Fields without which Neuronpedia refuses a graph, with their types."""

TYPES = {"cross layer transcoder", "mlp reconstruction error", "embedding", "logit"}


@cache
def graph(case: str) -> AttributionGraph:
    return attribute(model(case), inputs(case))


def reference(case: str) -> dict:
    folder = ROOT / "cases" / case / "graph_json"
    return json.loads((folder / f"{case.replace('_', '-')}.json").read_text())


def exported(folder, case: str, **options) -> dict:
    path = export_graph(graph(case), folder, case.replace("_", "-"), scan="oracle", **options)
    return json.loads(path.read_text())


def key(node: dict) -> tuple:
    """What a node is, whatever its id."""
    kind = node["feature_type"]
    return kind, node["layer"], node["ctx_idx"], node["feature"]


@pytest.mark.parametrize("case", CASES)
def test_the_same_nodes_as_circuit_tracer(tmp_path, case):
    expected, found = reference(case), exported(tmp_path, case)
    assert [key(n) for n in found["nodes"]] == [key(n) for n in expected["nodes"]]
    for one, other in zip(found["nodes"], expected["nodes"], strict=True):
        close = ("influence", "activation", "token_prob")
        exact = set(other) - set(close)
        if one["feature_type"] == "mlp reconstruction error":
            exact -= {"node_id", "jsNodeId"}  # circuit-tracer's collide with features'
        if one["feature_type"] == "logit":
            assert one["clerp"].rsplit("(", 1)[0] == other["clerp"].rsplit("(", 1)[0]
            exact -= {"clerp"}
        assert {k: one[k] for k in exact} == {k: other[k] for k in exact}
        for name in close:
            assert one[name] == (
                None if other[name] is None else pytest.approx(other[name], abs=2e-5)
            )


@pytest.mark.parametrize("case", CASES)
def test_the_same_links_as_circuit_tracer(tmp_path, case):
    expected, found = reference(case), exported(tmp_path, case)
    ours = {n["node_id"]: key(n) for n in found["nodes"]}

    def theirs(id: str, error: bool) -> tuple:
        # ids of errors and of features may be the same: the key of either
        return next(
            key(n)
            for n in expected["nodes"]
            if n["node_id"] == id and (n["feature"] == -1) == error
        )

    assert len(found["links"]) == len(expected["links"])
    for one, other in zip(found["links"], expected["links"], strict=True):
        error = ours[one["source"]][3] == -1
        assert ours[one["source"]] == theirs(other["source"], error)
        assert ours[one["target"]] == theirs(other["target"], False)
        assert one["weight"] == pytest.approx(other["weight"], abs=5e-5)


@pytest.mark.parametrize("case", CASES)
def test_the_same_frame_as_circuit_tracer(tmp_path, case):
    expected, found = reference(case), exported(tmp_path, case)
    assert found["qParams"] == expected["qParams"]
    ours = {k: found["metadata"][k] for k in expected["metadata"] if k != "prompt"}
    assert ours == {k: v for k, v in expected["metadata"].items() if k != "prompt"}
    listed = json.loads((tmp_path / "graph-metadata.json").read_text())
    theirs = json.loads((ROOT / "cases" / case / "graph_json" / "graph-metadata.json").read_text())
    for one, other in zip(listed["graphs"], theirs["graphs"], strict=True):
        assert set(one) == set(other)


@pytest.mark.parametrize("case", CASES)
def test_what_neuronpedia_requires(tmp_path, case):
    found = exported(tmp_path, case)
    for part, fields in REQUIRED.items():
        for one in [found[part]] if part == "metadata" else found[part]:
            for name, kind in fields.items():
                assert type(one[name]) is kind, (part, name)
    ids = [n["node_id"] for n in found["nodes"]]
    assert len(ids) == len(set(ids))
    assert {n["feature_type"] for n in found["nodes"]} == TYPES
    assert {end for link in found["links"] for end in (link["source"], link["target"])} <= set(ids)


@pytest.mark.parametrize("case", CASES)
def test_neuronpedias_schema(tmp_path, case):
    jsonschema.validate(exported(tmp_path, case), SCHEMA)


def test_neuronpedias_schema_of_a_graph_with_a_picture(tmp_path):
    loaded = shared("llava")
    replaced = VLMReplacementModel(loaded, random_coder(loaded))
    made = attribute(replaced, one_prompt(loaded), targets=[5, Difference(5, 6), torch.ones(32)])
    story = Story("what colour ?", "red", "clt", [picture(40, 24, seed=1)], {"0_1": "a label"})
    path = export_graph(made, tmp_path, "t", story, node_threshold=1.0, edge_threshold=1.0)
    content = json.loads(path.read_text())
    jsonschema.validate(content, SCHEMA)
    assert any("patch" in node for node in content["nodes"])


@pytest.mark.parametrize(
    ("part", "field"),
    [(part, field) for part, fields in REQUIRED.items() for field in fields],
)
def test_the_schema_refuses_what_lacks_a_field(tmp_path, part, field):
    content = json.loads(json.dumps(reference("llama_relu")))
    jsonschema.validate(content, SCHEMA)  # circuit-tracer's own
    del (content[part] if part == "metadata" else content[part][0])[field]
    with pytest.raises(jsonschema.ValidationError, match=f"'{field}' is a required property"):
        jsonschema.validate(content, SCHEMA)


def test_ids_of_all_nodes_differ():
    ids = node_ids(graph("llama_topk"))
    assert len(ids) == len(set(ids)) == graph("llama_topk").n_nodes
    crowded = {f"{layer}_{index}_{p}" for layer, p, index in graph("llama_topk").features.tolist()}
    assert not crowded & set(ids[graph("llama_topk").errors])


def test_targets_that_are_no_tokens_have_ids_behind_the_vocabulary(tmp_path):
    layer, position, index = graph("llama_relu").features[-1].tolist()
    wanted = [5, 5, Difference(3, 4), Feature(layer, position, index), torch.ones(64)]
    made = attribute(model("llama_relu"), inputs("llama_relu"), targets=wanted)
    numbers = [int(id.split("_")[1]) for id in node_ids(made)[made.target_nodes]]
    vocabulary = len(made.logits)
    assert numbers == [5, vocabulary + 1, vocabulary + 2, vocabulary + 3, vocabulary + 4]
    path = export_graph(made, tmp_path, "t")
    nodes = json.loads(path.read_text())["nodes"]
    assert [n["clerp"].split()[0] for n in nodes[-5:]] == ["Output"] * 2 + ["Target"] * 3


def test_a_folder_lists_each_of_its_graphs_once(tmp_path):
    for slug in ("one", "two", "one"):
        export_graph(graph("llama_relu"), tmp_path, slug)
    listed = json.loads((tmp_path / "graph-metadata.json").read_text())["graphs"]
    assert [one["slug"] for one in listed] == ["two", "one"]
    (tmp_path / "graph-metadata.json").write_text("[]")
    with pytest.raises(UserError, match="damaged"):
        export_graph(graph("llama_relu"), tmp_path, "three")


def test_labels_and_examples_go_along(tmp_path):
    layer, _, index = graph("llama_relu").features[-1].tolist()
    name = f"{layer}_{index}"
    story = Story(labels={name: "a <b> label"}, examples={name: [1, 2], "9_9": [3]})
    path = export_graph(graph("llama_relu"), tmp_path, "t", story, node_threshold=1.0)
    labelled = [n for n in json.loads(path.read_text())["nodes"] if n["clerp"] == "a <b> label"]
    assert {n["jsNodeId"] for n in labelled} == {f"{name}-0"}
    assert json.loads((tmp_path / "examples.json").read_text())["features"] == {name: [1, 2]}


def test_a_picture_without_known_places_is_shown_all_the_same(tmp_path):
    story = Story(pictures=[Image.new("RGB", (4, 4))])
    path = export_graph(graph("llama_relu"), tmp_path, "t", story)
    vlm = json.loads(path.read_text())["metadata"]["vlm"]
    assert vlm["images"] == [{"file": "image-0.png", "rows": 0, "columns": 0}]
    assert {tuple(one["values"]) for one in vlm["patch_effects"]} == {()}
    assert Image.open(tmp_path / "image-0.png").size == (4, 4)


@pytest.mark.parametrize(
    ("texts", "slug"),
    [
        (("What colour is the circle?", " red"), "what-colour-is-the-circle-red"),
        (("  ", "…"), "trace"),
        (("Graph",), "graph-trace"),
        (("a" * 200,), "trace"),
        (("word " * 50,), "-".join(["word"] * 12)),
    ],
)
def test_slugs(texts, slug):
    assert slug_of(*texts) == slug
    check_slug(slug_of(*texts))


@pytest.mark.parametrize("slug", ["", "../x", "a/b", ".hidden", "a b", "x" * 101, "marks", "Graph"])
def test_slugs_that_are_no_names_of_files(slug):
    with pytest.raises(UserError, match="--slug"):
        check_slug(slug)
