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

import torch
from torch import Tensor

from sparsify_vlm.graphs.graph import AttributionGraph


def total_effects(graph: AttributionGraph) -> Tensor:
    """E [targets, N] float64: what each node adds to each target over all paths."""
    edges, n = graph.edges, graph.n_nodes
    weight = edges.weight.double()
    of_features = edges.target < graph.n_features
    activation = graph.activation_values[graph.selected_features].double()
    share = weight[of_features] / activation[edges.target[of_features]]
    target, source = edges.target[of_features], edges.source[of_features]
    starts = torch.searchsorted(target, _layer_starts(graph)).tolist()

    total = torch.zeros(n - graph.target_nodes.start, n, dtype=torch.float64)
    direct = ~of_features
    rows = edges.target[direct] - graph.target_nodes.start
    total[rows, edges.source[direct]] = weight[direct]
    for first, last in zip(reversed(starts[:-1]), reversed(starts[1:]), strict=True):
        here = slice(first, last)
        total.index_add_(1, source[here], total[:, target[here]] * share[here])
    total[:, graph.target_nodes] += torch.eye(len(total), dtype=torch.float64)
    return total


def changes_without(graph: AttributionGraph, sets: Sequence[Tensor]) -> Tensor:
    """[len(sets), N] float64: how nodes change when the features of a set (node numbers) are set
    to 0 and the change goes on through the others, D[t] = Σ_s A[t, s] D[s] / a_s.

    Units are those of the nodes: pre-activations, targets; errors and tokens do not change.
    """
    edges, n = graph.edges, graph.n_features
    activation = graph.activation_values[graph.selected_features].double()
    inside = (edges.source < n) & ((edges.target < n) | (edges.target >= graph.target_nodes.start))
    target, source = edges.target[inside], edges.source[inside]
    per_unit = edges.weight[inside].double() / activation[source]
    starts = torch.searchsorted(target, _layer_starts(graph)).tolist()

    held = torch.zeros(len(sets), graph.n_nodes, dtype=torch.bool)
    change = torch.zeros(len(sets), graph.n_nodes, dtype=torch.float64)
    for i, features in enumerate(sets):
        held[i, features] = True
        change[i, features] = -activation[features]
    for first, last in zip(starts, [*starts[1:], len(target)], strict=True):
        here = slice(first, last)
        passed = change[:, source[here]] * per_unit[here]
        passed = passed.masked_fill(held[:, target[here]], 0)
        change.index_add_(1, target[here], passed)
    return change


def _layer_starts(graph: AttributionGraph) -> Tensor:
    """[L + 1]: the first feature node of each layer, and the number of them."""
    layers = graph.features[:, 0].contiguous()
    return torch.searchsorted(layers, torch.arange(graph.n_layers + 1))


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
