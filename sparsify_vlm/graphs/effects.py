"""Signed total effects on a target, through the local replacement model.

With patterns and scales frozen and the active latents staying active, the model is linear in its
features, errors and tokens. An edge A[t, s] is what s adds to t; a feature s whose pre-activation
grows by the share A[s, r] / a_s writes that much more, so that r adds to t over all paths

    E[t, r] = A[t, r] + Σ_s E[t, s] A[s, r] / a_s          s: feature nodes

solved from the top layer down, E[t, t] = 1. Unlike influence it keeps signs, and paths of opposite
sign cancel: E[t, token p] is what would be missing from the target if the token's embedding were
taken away and all that is frozen stayed. Over tokens, errors and biases E adds up to the target.
Features that are not nodes (`max_feature_nodes`) carry nothing. With a post-encoder bias, where
writes are not proportional to activations, E is an approximation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from sparsify_vlm.graphs.graph import AttributionGraph


def total_effects(graph: AttributionGraph) -> Tensor:
    """E [targets, N] float64: what each node adds to each target over all paths."""
    edges, first_target = graph.edges, graph.target_nodes.start
    activation = graph.activation_values[graph.selected_features].double()
    layers = _by_layer(graph)
    direct = slice(layers[-1].stop, None)
    total = torch.zeros(graph.n_nodes - first_target, graph.n_nodes, dtype=torch.float64)
    rows = edges.target[direct] - first_target
    total[rows, edges.source[direct]] = edges.weight[direct].double()
    for here in reversed(layers):
        target, source = edges.target[here], edges.source[here]
        share = edges.weight[here].double() / activation[target]
        total.index_add_(1, source, total[:, target] * share)
    total[:, graph.target_nodes] += torch.eye(len(total), dtype=torch.float64)
    return total


def changes_without(graph: AttributionGraph, sets: Sequence[Tensor]) -> Tensor:
    """[len(sets), N] float64: how nodes change when the features of a set (node numbers) are set
    to 0 and the change goes on through the others, D[t] = Σ_s A[t, s] D[s] / a_s.

    Units are those of the nodes: pre-activations, targets; errors and tokens do not change.
    """
    edges, n = graph.edges, graph.n_features
    activation = graph.activation_values[graph.selected_features].double()
    layers = _by_layer(graph)
    held = torch.zeros(len(sets), graph.n_nodes, dtype=torch.bool)
    change = torch.zeros(len(sets), graph.n_nodes, dtype=torch.float64)
    for i, features in enumerate(sets):
        held[i, features] = True
        change[i, features] = -activation[features]
    for here in [*layers, slice(layers[-1].stop, None)]:
        of_features = edges.source[here] < n
        target, source = edges.target[here][of_features], edges.source[here][of_features]
        per_unit = edges.weight[here][of_features].double() / activation[source]
        passed = (change[:, source] * per_unit).masked_fill(held[:, target], 0)
        change.index_add_(1, target, passed)
    return change


def _by_layer(graph: AttributionGraph) -> list[slice]:
    """The edges into the feature nodes of each layer; those into targets follow."""
    layers = graph.features[:, 0].contiguous()
    nodes = torch.searchsorted(layers, torch.arange(graph.n_layers + 1))
    places = torch.searchsorted(graph.edges.target, nodes).tolist()
    return [slice(first, last) for first, last in pairwise(places)]


@dataclass
class PatchGrid:
    """One image's tokens on its patches. positions [n], row and column [n] of each."""

    rows: int
    columns: int
    positions: Tensor
    row: Tensor
    column: Tensor

    def of(self, values: Tensor) -> Tensor:
        """Sums [rows, columns] of `values` [S] by patch."""
        grid = values.new_zeros(self.rows, self.columns)
        return grid.index_put_((self.row, self.column), values[self.positions], accumulate=True)


def patch_grid(graph: AttributionGraph, image: int) -> PatchGrid:
    """The grid of one image; 0 × 0 where it is not known which token is which patch."""
    here = ((graph.images == image) & (graph.patches[:, 0] >= 0)).nonzero()[:, 0]
    places = graph.patches[here].long()
    rows, columns = (places.amax(0) + 1).tolist() if len(here) else (0, 0)
    return PatchGrid(rows, columns, here, places[:, 0], places[:, 1])
