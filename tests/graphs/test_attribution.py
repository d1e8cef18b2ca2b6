"""Targets, choosing nodes, memory, graphs on disk, and the embedded model."""

from __future__ import annotations

import json
import re

import pytest
import torch
from families import N_LAYERS, load, shared
from prompts import F, one_prompt, random_coder
from reference_graphs import inputs, model

import sparsify_vlm
from sparsify_vlm.coders import Clt, CltConfig
from sparsify_vlm.data.shapes import ShapesDataset
from sparsify_vlm.errors import UserError
from sparsify_vlm.graphs import AttributionGraph, Difference, Feature, attribute
from sparsify_vlm.graphs import attribution as attribution_module
from sparsify_vlm.models import Role, load_model
from sparsify_vlm.replacement import Intervention, LocalModel, VLMReplacementModel
from sparsify_vlm.replacement.local_size import expected_bytes, held_bytes


@pytest.fixture(scope="module")
def whole() -> AttributionGraph:
    return attribute(model("llama_relu"), inputs("llama_relu"))


@pytest.fixture(scope="module")
def local() -> LocalModel:
    return LocalModel(model("llama_relu"), inputs("llama_relu"))


# ---- targets


def test_given_targets(whole):
    replaced, prompt = model("llama_relu"), inputs("llama_relu")
    a, b = whole.logit_token_ids[:2].tolist()
    weight = replaced.loaded.model.get_output_embeddings().weight.detach()
    layer, position, index = whole.features[200].tolist()
    text = whole.target_labels[1]
    targets = [b, text, Difference(a, text), weight[a] - weight.mean(0)]
    graph = attribute(replaced, prompt, targets=[*targets, Feature(layer, position, index)])
    rows, wanted = graph.adjacency[graph.target_nodes], whole.adjacency
    first = whole.target_nodes.start
    n = graph.target_nodes.start
    expected = [wanted[first + 1], wanted[first + 1], wanted[first] - wanted[first + 1]]
    expected += [wanted[first], wanted[200]]
    for row, other in zip(rows, expected, strict=True):
        torch.testing.assert_close(row[:n], other[:n], rtol=0, atol=2e-5)
    assert graph.logit_token_ids.tolist() == [b, b, -1, -1, -1]
    torch.testing.assert_close(graph.logit_probabilities[0], whole.logit_probabilities[1])
    assert graph.logit_probabilities[2:].tolist() == [1, 1, 1]
    assert graph.target_labels[4] == f"feature {layer}/{index} at {position}"


@pytest.mark.parametrize(("count", "probability"), [(2, 0.95), (10, 0.2), (1, 0.0)])
def test_as_many_logits_as_reach_the_probability(whole, count, probability):
    graph = attribute(
        model("llama_relu"),
        inputs("llama_relu"),
        max_n_logits=count,
        desired_logit_prob=probability,
    )
    found = graph.logit_probabilities.double()
    assert len(found) <= count
    assert float(found[:-1].sum()) < probability or len(found) == 1
    assert len(found) == count or float(found.sum()) >= probability
    assert torch.equal(graph.logit_token_ids, whole.logit_token_ids[: len(found)])


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["w81 w82"], "'w81 w82' is 2 tokens of this model"),
        ([9999], "target token 9999: this model has the ids 0 to 127"),
        ([Feature(7, 3, 1)], "layer 7 has no coder"),
        ([Feature(1, 3, 192)], "192 latents per layer"),
        ([Feature(1, 12, 1)], "position 12: the prompt has 12"),
        (["nowhere"], "'nowhere' is not in this model's vocabulary"),
        ([torch.ones(9)], "has 9 numbers, the model's stream has 64"),
        ([torch.full((64,), torch.nan)], "not finite"),
        ("w81", r"given as a list: \['w81'\]"),
        ([], "no target to explain"),
    ],
)
def test_targets_that_cannot_be_used(targets, message):
    with pytest.raises(UserError, match=message):
        attribute(model("llama_relu"), inputs("llama_relu"), targets=targets)


# ---- inputs


def test_prompts_that_cannot_be_used():
    replaced = model("llama_relu")
    ids = inputs("llama_relu")["input_ids"]
    cases = [
        ({"input_ids": ids.repeat(2, 1)}, "one prompt is traced at a time"),
        ({"inputs_embeds": torch.zeros(1, 12, 64)}, "needs input_ids"),
        ({"input_ids": ids, "attention_mask": ids * 0}, "no padding"),
        ({"input_ids": ids, "inputs_embeds": torch.zeros(1, 3, 64)}, "do not fit input_ids"),
    ]
    for prompt, message in cases:
        with pytest.raises(UserError, match=message):
            attribute(replaced, prompt)


def test_nothing_active_and_coders_that_cannot_be_traced():
    loaded = shared("llama")
    prompt = one_prompt(loaded)
    silent = random_coder(loaded, activation="relu")
    for b in silent.b_enc:
        b.fill_(-1e4)
    with pytest.raises(UserError, match="no feature of the coder is active"):
        attribute(VLMReplacementModel(loaded, silent), prompt)
    auto = random_coder(loaded, transcode=False, n_targets=1, input_site="mlp_out")
    with pytest.raises(UserError, match="mlp_out"):
        attribute(VLMReplacementModel(loaded, auto), prompt)


def test_the_model_is_as_it_was_after_an_error(whole):
    replaced = model("llama_relu")
    before = replaced.loaded.config._attn_implementation
    with pytest.raises(UserError, match="9999"):
        attribute(replaced, inputs("llama_relu"), targets=[9999])
    assert replaced.loaded.config._attn_implementation == before
    assert all("forward" not in module.__dict__ for module in replaced.loaded.model.modules())
    assert not any(
        m._forward_hooks or m._forward_pre_hooks for m in replaced.loaded.model.modules()
    )


# ---- choosing nodes


def partial_influence(rows, node_of_row, weights, n_columns):
    """By the definition: sums over all paths through nodes that have a row."""
    share = rows.double().abs()
    share = share / share.sum(1, keepdim=True)
    total = torch.zeros(n_columns, dtype=torch.float64)
    flow = torch.where(node_of_row < 0, weights, 0.0).double()
    for _ in range(50):
        reached = flow @ share
        total += reached
        flow = torch.where(node_of_row >= 0, reached[node_of_row.clamp(min=0)], 0.0)
    return total


@pytest.mark.parametrize("memory", [None, 700_000])
def test_the_most_influential_features_become_nodes(whole, memory, local, monkeypatch):
    """`memory`: beside the prompt's own model."""
    monkeypatch.setattr(attribution_module, "ROUND", 40)
    memory = memory and memory + held_bytes(local)
    graph = attribute(
        model("llama_relu"), inputs("llama_relu"), max_feature_nodes=100, memory=memory
    )
    n, columns = whole.n_features, whole.target_nodes.start
    chosen = torch.zeros(0, dtype=torch.int64)
    targets = torch.arange(columns, whole.n_nodes)
    weights = whole.logit_probabilities
    while len(chosen) < 100:
        nodes = torch.cat([torch.full_like(targets, -1), chosen])
        rows = whole.adjacency[torch.cat([targets, chosen])][:, :columns]
        padded = torch.cat([weights, torch.zeros(len(chosen))])
        reached = partial_influence(rows, nodes, padded, columns)[:n]
        reached[chosen] = -1
        more = min(40, 100 - len(chosen))
        chosen = torch.cat([chosen, reached.argsort(descending=True)[:more]])
    if memory is None:
        assert torch.equal(graph.selected_features, chosen.sort().values)
    else:  # columns were let go early: nearly the same, and exact edges
        assert len(set(graph.selected_features.tolist()) & set(chosen.tolist())) >= 90
    kept = torch.cat([graph.selected_features, torch.arange(n, whole.n_nodes)])
    expected = whole.adjacency[kept][:, kept]
    torch.testing.assert_close(graph.adjacency, expected, rtol=0, atol=2e-5)
    assert torch.equal(graph.active_features, whole.active_features)


@pytest.mark.parametrize("options", [{"memory": 900_000}, {"batch_size": 7}, {"fast": False}])
def test_how_it_is_computed_does_not_matter(whole, local, options):
    if "memory" in options:
        options = {"memory": options["memory"] + held_bytes(local)}
    graph = attribute(model("llama_relu"), inputs("llama_relu"), max_feature_nodes=266, **options)
    kept = torch.cat([graph.selected_features, torch.arange(whole.n_features, whole.n_nodes)])
    expected = whole.adjacency[kept][:, kept]
    torch.testing.assert_close(graph.adjacency, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("dtype", "allowed"), [("float64", 1e-5), ("bfloat16", 0.1)])
def test_models_of_other_dtypes(dtype, allowed, tmp_path):
    """Read off or not, in the model's own dtype; and in float64 the graph of float32."""
    loaded, known = load("gemma2", tmp_path, dtype=dtype), shared("gemma2")
    local = LocalModel(VLMReplacementModel(loaded, random_coder(loaded)), one_prompt(loaded))
    graphs = [attribute(local.model, local, fast=fast) for fast in (True, False)]
    reference = attribute(VLMReplacementModel(known, random_coder(known)), one_prompt(known))
    for graph in graphs:
        assert torch.equal(graph.active_features, reference.active_features)
        targets = min(len(graph.logit_token_ids), len(reference.logit_token_ids)) - 1
        n = graph.target_nodes.start + targets
        expected = reference.adjacency[:n, :n]
        torch.testing.assert_close(graph.adjacency[:n, :n], expected, rtol=0, atol=allowed)


def test_numbers_of_nodes_that_cannot_be():
    with pytest.raises(UserError, match="max_feature_nodes -3: must be at least 0"):
        attribute(model("llama_relu"), inputs("llama_relu"), max_feature_nodes=-3)


def test_what_does_not_fit_into_the_memory(whole, local):
    replaced, prompt = model("llama_relu"), inputs("llama_relu")
    alone = expected_bytes(replaced, local.n_positions)
    with pytest.raises(UserError, match=r"a prompt of 12 positions takes .* before anything"):
        attribute(replaced, prompt, memory=alone - 1)
    with pytest.raises(UserError, match=r"the prompt's own model .* more --memory") as caught:
        attribute(replaced, prompt, memory=held_bytes(local) + 200_000)
    fitting = int(re.search(r"--max_feature_nodes (\d+) or fewer", str(caught.value))[1])
    assert 50 < fitting < whole.n_features
    memory = held_bytes(local) + 200_000
    assert attribute(replaced, local, memory=memory, max_feature_nodes=fitting).n_features > 50
    with pytest.raises(UserError, match="or fewer"):
        attribute(replaced, local, memory=memory, max_feature_nodes=fitting + 1)


# ---- on disk


def test_saved_and_loaded(whole, tmp_path):
    whole.save(tmp_path / "graph")
    again = AttributionGraph.load(tmp_path / "graph")
    for name, value in vars(whole).items():
        other = getattr(again, name, None)
        if isinstance(value, torch.Tensor):
            assert torch.equal(other, value), name
            assert other.dtype == value.dtype, name
        elif name not in ("edges", "_influence"):
            assert other == value, name
    assert torch.equal(again.adjacency, whole.adjacency)
    assert again.scores() == whole.scores()


def _cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def _json(**changes):
    def damage(path):
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | changes))

    return damage


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("graph.json", lambda path: path.unlink(), "no such file"),
        ("graph.json", lambda path: path.write_text("{"), "not readable as JSON"),
        ("graph.json", _json(format="x"), "no attribution graph"),
        ("graph.json", _json(version=2), "has version 2, this program reads 1"),
        ("graph.json", _json(tokens=["a"]), "do not belong together"),
        ("graph.json", _json(targets=3), "'targets' is no list of texts"),
        ("graph.safetensors", lambda path: path.unlink(), "not complete"),
        ("graph.safetensors", _cut, "not readable as safetensors"),
    ],
)
def test_damaged_folders(whole, tmp_path, file, damage, message):
    folder = whole.save(tmp_path / "graph")
    damage(folder / file)
    with pytest.raises(UserError, match=message) as caught:
        AttributionGraph.load(folder)
    assert "\n" not in str(caught.value)


# ---- the embedded model


@pytest.fixture(scope="module")
def tiny() -> tuple[VLMReplacementModel, dict]:
    loaded = load_model("tiny-llava", "cpu")
    cfg = CltConfig(
        loaded.stack.d_model, loaded.stack.hookpoints, num_latents=128, k=8, n_targets=8
    )
    coder = Clt(cfg).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in coder.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    row = ShapesDataset("heldout", 1)[0]
    content = [{"type": "image"}, {"type": "text", "text": row["question"]}]
    text = loaded.processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    prompt = dict(loaded.processor(images=row["image"], text=text, return_tensors="pt"))
    return VLMReplacementModel(loaded, coder), prompt


def test_tiny_llava(tiny, tmp_path):
    replaced, prompt = tiny
    graph = sparsify_vlm.attribute(replaced, prompt, max_feature_nodes=200)
    image = graph.roles == Role.IMAGE
    assert torch.equal(prompt["input_ids"][0] == replaced.loaded.stack.image_token_id, image)
    assert (graph.patches[image] >= 0).all()
    assert (graph.images[image] == 0).all()
    columns = graph.adjacency[:, graph.token_nodes][:, image]
    assert (columns != 0).any(0).all()  # every patch reaches something
    scores = graph.scores()
    assert scores.image + scores.words == pytest.approx(scores.replacement)
    assert scores.replacement + scores.errors == pytest.approx(1)
    assert sum(scores.path_lengths) == pytest.approx(1)
    pruned = graph.prune()
    assert 0 < int(pruned.node_mask.sum()) < graph.n_nodes
    assert AttributionGraph.load(graph.save(tmp_path)).tokens == graph.tokens
    assert replaced.attribute(prompt, max_feature_nodes=200).info == graph.info


def test_generating_with_features_set(tiny):
    """The same as a whole prompt: tokens made with a cache see the changes at every position."""
    replaced, prompt = tiny
    end = replaced.loaded.tokenizer.eos_token_id
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": end}
    steps = [Intervention(2, None, 5, 30.0), Intervention(4, -2, 9, 20.0)]
    with replaced.intervening(steps):
        scored = replaced.loaded.model.generate(
            **prompt, **options, output_logits=True, return_dict_in_generate=True
        )
    plain = replaced.loaded.model.generate(**prompt, **options)
    ids, S = scored.sequences, prompt["input_ids"].shape[1]
    whole_prompt = {k: v for k, v in prompt.items() if k == "pixel_values"} | {"input_ids": ids}
    fixed = [steps[0], Intervention(4, S - 2, 9, 20.0)]
    out = replaced.intervene(whole_prompt, fixed, "free")
    made = torch.stack(scored.logits, 1)[0]
    torch.testing.assert_close(made, out.logits[S - 1 : -1], rtol=1e-3, atol=1e-3)
    assert not torch.equal(plain, ids)


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (Intervention(9, 0, 0, 1.0), "coders are at the layers 0 to 2"),
        (Intervention(0, 99, 0, 1.0), "the prompt has"),
        (Intervention(0, 0, F, 1.0), f"a coder has {F} latents"),
    ],
)
def test_interventions_that_cannot_be(one, message):
    loaded = shared("llama")
    replaced = VLMReplacementModel(loaded, random_coder(loaded))
    assert N_LAYERS == 3
    with pytest.raises(UserError, match=message):
        replaced.intervene(one_prompt(loaded), [one])
    with pytest.raises(UserError, match="mode 'frozen' is none of"):
        replaced.intervene(one_prompt(loaded), [], "frozen")
