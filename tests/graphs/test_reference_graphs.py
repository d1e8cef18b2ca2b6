"""The graphs are those of circuit-tracer 0.5.0, on the same models, coders and prompts."""

from __future__ import annotations

import pytest
import torch
from reference_graphs import CASES, inputs, meta, model, oracle

from sparsify_vlm.graphs import AttributionGraph, attribute

ADJACENCY, SCORES = 5e-5, 1e-4


@pytest.fixture(scope="module", params=CASES)
def case(request) -> str:
    return request.param


@pytest.fixture(scope="module", params=[True, False], ids=["matrices", "autograd"])
def graph(request, case) -> AttributionGraph:
    return attribute(model(case), inputs(case), fast=request.param)


def test_the_same_features_targets_and_errors(graph, case):
    reference = oracle(case)
    for name in ("active_features", "selected_features", "logit_token_ids"):
        assert torch.equal(getattr(graph, name), reference[name])
    for name in ("activation_values", "logit_probabilities", "error_vectors"):
        torch.testing.assert_close(getattr(graph, name), reference[name], rtol=0, atol=2e-5)
    torch.testing.assert_close(graph.weights, reference["logit_weights"], rtol=0, atol=1e-5)


def test_the_same_edges(graph, case):
    reference = oracle(case)["adjacency"]
    assert graph.adjacency.shape == reference.shape
    assert (graph.adjacency - reference).abs().max() < ADJACENCY


def test_the_same_influence_and_scores(graph, case):
    reference = oracle(case)
    torch.testing.assert_close(
        graph.node_influence(), reference["node_influence"], rtol=0, atol=1e-5
    )
    scores, expected = graph.scores(), meta(case)
    assert abs(scores.replacement - expected["replacement_score"]) < SCORES
    assert abs(scores.completeness - expected["completeness_score"]) < SCORES


def test_the_same_pruned_graph(graph, case):
    reference, pruned = oracle(case), graph.prune(0.8, 0.98)
    assert torch.equal(pruned.node_mask, reference["prune_node_mask"])
    assert torch.equal(pruned.edges, reference["prune_edge_index"])
    torch.testing.assert_close(
        pruned.cumulative.float(), reference["prune_cumulative"], rtol=0, atol=1e-5
    )
    assert int(pruned.edge_mask.sum()) == len(pruned.edges)
