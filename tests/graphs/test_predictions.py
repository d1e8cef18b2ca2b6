"""Every edge is a prediction: setting a feature moves its targets by what the edge says.

The interventions run the Hugging Face model forwards with patterns and scales frozen; nothing of
the backward pass that made the edges is in them.
"""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, VLMS, shared
from prompts import one_prompt, random_coder

from sparsify_vlm.graphs import AttributionGraph, attribute
from sparsify_vlm.models import Role
from sparsify_vlm.replacement import (
    ExcludedTokens,
    Intervention,
    LocalModel,
    VLMReplacementModel,
)

TOLERANCE = 1e-4
VARIANTS = {
    "relu before the norm": {"activation": "relu", "input_site": "resid_mid"},
    "jumprelu": {"activation": "jumprelu"},
    "batchtopk": {"activation": "batchtopk"},
    "groupmax": {"activation": "groupmax", "k": 8},
    "per layer": {"n_targets": 1},
    "later layers only": {"target_offset": 1},
    "skip": {"skip_connection": True},
    "skip before the norm": {"skip_connection": True, "input_site": "resid_mid", "n_targets": 2},
    "normalised": {"normalize_io": True, "skip_connection": True},
    "divided": {"divide_cross_layer": True},
    "post-encoder": {"train_post_encoder": True, "post_encoder_scale": True},
    "coalesced": {"coalesce_topk": "concat", "topk_coalesced": True},
    "coalesced per layer": {"coalesce_topk": "per-layer", "topk_coalesced": True},
    "tied": {"per_source_tied": True},
    "second decoders": {"secondary_target_tied": True},
}


def traced(name, **options) -> tuple[VLMReplacementModel, LocalModel, AttributionGraph]:
    loaded = shared(name)
    model = VLMReplacementModel(loaded, random_coder(loaded, **options))
    local = LocalModel(model, one_prompt(loaded))
    return model, local, attribute(model, local)


def check_predictions(model, local, graph, count=12, seed=0) -> None:
    adjacency, n = graph.adjacency, graph.n_features
    weight = model.loaded.model.get_output_embeddings().weight
    plain = model.intervene(local, [])
    before = plain.features(graph.features)
    worst, moved = 0.0, 0.0
    chosen = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:count]
    for node in chosen.tolist():
        layer, position, index = graph.features[node].tolist()
        after = model.intervene(local, [Intervention(layer, position, index, 0.0)])
        found = after.features(graph.features) - before
        change = (after.unembedded - plain.unembedded)[-1]
        logits = change[graph.logit_token_ids] - change[: len(weight)].mean()
        expected = -adjacency[:, node]
        worst = max(worst, float((found - expected[:n]).abs().max()))
        worst = max(worst, float((logits - expected[graph.target_nodes]).abs().max()))
        moved = max(moved, float(expected.abs().max()))
    assert worst < TOLERANCE
    assert moved > 100 * TOLERANCE


@pytest.mark.parametrize("name", FAMILIES)
def test_edges_of_every_family(name):
    model, local, graph = traced(name)
    check_predictions(model, local, graph)
    if name in VLMS:
        at_image = (graph.roles == Role.IMAGE)[graph.features[:, 1]]
        assert at_image.any()  # image positions are among those that were set


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["llava", "gemma2"])
def test_edges_of_every_variant_of_coders(variant, name):
    check_predictions(*traced(name, **VARIANTS[variant]))


def test_edges_of_a_coder_on_some_layers():
    hookpoints = shared("gemma3").stack.hookpoints[1:]
    model, local, graph = traced("gemma3", hookpoints=hookpoints, skip_connection=True)
    assert graph.active_features[:, 0].unique().tolist() == [1, 2]
    assert graph.n_layers == 3
    assert graph.error_vectors[0].norm() > 0  # all that its MLP writes
    check_predictions(model, local, graph)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_local_model_has_the_models_logits(name):
    loaded = shared(name)
    inputs = one_prompt(loaded)
    plain = loaded.forward(inputs, logits=True).logits[0]
    for options in ({}, {"input_site": "resid_mid", "skip_connection": True}):
        local = LocalModel(VLMReplacementModel(loaded, random_coder(loaded, **options)), inputs)
        torch.testing.assert_close(local.logits, plain, rtol=0, atol=1e-5)
        torch.testing.assert_close(local.forward().logits, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen3_vl"])
@pytest.mark.parametrize("skip", [False, True])
def test_rows_add_up_to_what_their_targets_read(name, skip, monkeypatch):
    """Without biases and zeroed tokens, features, errors and tokens are all there is."""
    loaded = shared(name)
    coder = random_coder(loaded, biases=0.0, skip_connection=skip)
    model = VLMReplacementModel(loaded, coder, ExcludedTokens())
    monkeypatch.setattr(loaded.stack, "special_ids", frozenset())
    local = LocalModel(model, one_prompt(loaded))
    assert not local.zeroed.any()
    graph = attribute(model, local)
    sums = graph.adjacency.sum(1)
    torch.testing.assert_close(sums[: graph.n_features], graph.activation_values, rtol=0, atol=1e-4)
    logits = local.unembedded[-1]
    torch.testing.assert_close(
        sums[graph.target_nodes],
        logits[graph.logit_token_ids] - logits.mean(),
        rtol=0,
        atol=1e-4,
    )
