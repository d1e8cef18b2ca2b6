"""Features that take on the values they have on a recoloured picture: does the answer follow?

The unchanged model sees the first picture (mode `free`). Features are chosen by what the graphs
predict for each alone (target: second colour minus first): its total effect, times the share by
which it changes on the way from the first picture to the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ground_truth.scenes import Case, Scenes
from sparsify_vlm import AttributionGraph, Intervention, attribute
from sparsify_vlm.data.shapes import render_array
from sparsify_vlm.graphs import Difference
from sparsify_vlm.graphs.effects import patch_grid, total_effects
from sparsify_vlm.replacement import LocalModel

SWAPPED = (1, 2, 5, 10, 15, 25, 50)
"""Features that are swapped together."""
FEW = 5
"""Of these there are random ones for every choice."""
RANKS = 60
"""Features, in the order of what is predicted for them, for which predictions are kept."""
ARMS = {
    "own": "{n} largest of this scene's graph",
    "own-random": "{n} random active ones of this scene",
    "either": "{n} largest of both graphs",
    "either-random": "{n} random ones, active on either picture",
    "each": "{n} largest of each graph (up to twice {n})",
    "each-random": "{n} random active ones of each scene",
    "each-beside": "as many random others of the same layers and positions (for {n} of each)",
}
PLACE = "place"
PLACE_LABEL = "all that are active at the one layer and position of the largest predicted change"

Feature = tuple[int, int, int]
"""Layer, position and index."""
Active = dict[Feature, float]
"""Activations, or other values, by feature."""


@dataclass
class Pair:
    """A scene and its recoloured one, with their graphs and what is predicted for each feature."""

    case: Case
    other: Case
    here: AttributionGraph
    there: AttributionGraph

    def __post_init__(self) -> None:
        self.before, self.after = activations(self.here), activations(self.there)
        self.own = predicted(self.here, self.before, self.after, 1.0)
        self.others = predicted(self.there, self.after, self.before, -1.0)
        self.either = self.others | self.own

    def together(self, sets: Sequence[Sequence[Feature]]) -> list[float]:
        """What the graphs predict for the features of each set, changed together: the first scene's
        for those that are active there, the second's for those that become active."""
        off = [[f for f in one if f in self.before] for one in sets]
        on = [[f for f in one if f not in self.before] for one in sets]
        removed = changed_together(self.here, self.before, self.after, off)
        missing = changed_together(self.there, self.after, self.before, on)
        return (removed - missing).tolist()


def swaps(scenes: Scenes, case: Case, nodes: int, drawn: bool) -> dict[str, Any] | None:
    """What the model says and the two colours' difference of logits, by which features took on the
    other scene's values; with all that figures show of the scene if it is to be `drawn`. None where
    the model does not see the second colour."""
    other = scenes.recoloured(case)
    if other is None:
        return None
    difference = Difference(scenes.tokens[other.colour], scenes.tokens[case.colour])
    here, there = (
        attribute(scenes.model, one.inputs, targets=[difference], max_feature_nodes=nodes)
        for one in (case, other)
    )
    pair = Pair(case, other, here, there)

    def gap(logits: Tensor) -> float:
        return float(logits[difference.plus] - logits[difference.minus])

    arms = _arms(scenes, pair)
    local = LocalModel(scenes.model, case.inputs)
    before = gap(scenes.model.intervene(local, [], "free").logits[-1])
    made: dict[str, Any] = {}
    for (name, features), together in zip(
        arms.items(), pair.together(list(arms.values())), strict=True
    ):
        changes = [Intervention(*f, pair.after.get(f, 0.0)) for f in features]
        logits = scenes.model.intervene(local, changes, "free").logits[-1]
        made[name] = {
            "n": len(features),
            "says": scenes.says(logits),
            "moved": gap(logits) - before,
            "predicted": together,
        }
    shown = {"example": _example(scenes, pair)} if drawn else {}
    return shown | {
        "from": case.colour,
        "to": other.colour,
        "before": before,
        "on_second": gap(scenes.logits(other.inputs)),
        "last": case.inputs["input_ids"].shape[1] - 1,
        "arms": made,
        "ranks": _ranks(pair),
    }


def _arms(scenes: Scenes, pair: Pair) -> dict[str, list[Feature]]:
    """The features of each arm."""
    draw, before, after = scenes.random.sample, sorted(pair.before), sorted(pair.after)
    active = sorted(pair.before | pair.after)
    arms: dict[str, list[Feature]] = {}
    for n in SWAPPED:
        each = list(dict.fromkeys(largest(pair.own, n) + largest(pair.others, n)))
        arms[f"own-{n}"] = largest(pair.own, n)
        arms[f"either-{n}"] = largest(pair.either, n)
        arms[f"each-{n}"] = each
        arms[f"each-random-{n}"] = list(dict.fromkeys(draw(before, n) + draw(after, n)))
        near, chosen = {f[:2] for f in each}, set(each)
        beside = [f for f in active if f[:2] in near and f not in chosen]
        if len(beside) >= len(each):
            arms[f"each-beside-{n}"] = draw(beside, len(each))
    arms[f"own-random-{FEW}"] = draw(before, FEW)
    arms[f"either-random-{FEW}"] = draw(active, FEW)
    place = largest_place(pair.either)
    arms[PLACE] = [f for f in active if f[:2] == place]
    return arms


def _ranks(pair: Pair) -> dict[str, Any]:
    """The features for which most is predicted, in order, and what is predicted for the first
    1, 2, … of them together."""
    own, either = largest(pair.own, RANKS), largest(pair.either, RANKS)
    return {
        "own": _first(pair, own),
        "either": _first(pair, either),
        "features": [[*f, pair.either[f], f in pair.before] for f in either],
    }


def _first(pair: Pair, features: list[Feature]) -> list[float]:
    return pair.together([features[: n + 1] for n in range(len(features))])


def _example(scenes: Scenes, pair: Pair) -> dict[str, Any]:
    """The question, both pictures [48, 48, 3], the prompt's tokens (None: an image token), and what
    each patch [6, 6] adds to the first colour's logit over the second's."""
    effects = -total_effects(pair.here)[0, pair.here.token_nodes]
    ids = pair.case.inputs["input_ids"][0].tolist()
    image = scenes.loaded.config.image_token_id
    return {
        "question": pair.case.question,
        "pictures": [render_array(one.scene).tolist() for one in (pair.case, pair.other)],
        "effects": patch_grid(pair.here, 0).of(effects).tolist(),
        "tokens": [None if i == image else scenes.loaded.tokenizer.decode([i]) for i in ids],
    }


def activations(graph: AttributionGraph) -> Active:
    """All active features."""
    rows = graph.active_features.tolist()
    return dict(zip(map(tuple, rows), graph.activation_values.tolist(), strict=True))


def largest(values: Active, n: int) -> list[Feature]:
    """The n features of the largest values."""
    return sorted(values, key=lambda f: -values[f])[:n]


def largest_place(values: Active) -> tuple[int, int]:
    """The layer and position whose features' values have the largest sum."""
    sums: dict[tuple[int, int], float] = {}
    for (layer, position, _), value in values.items():
        sums[layer, position] = sums.get((layer, position), 0.0) + value
    return max(sums, key=lambda place: sums[place])


def predicted(graph: AttributionGraph, own: Active, other: Active, sign: float) -> Active:
    """By feature node: its total effect on the target, times the share by which it changes on the
    way from `own` to `other` (with `sign` -1: from `other` to `own`)."""
    effects = total_effects(graph)[0, : graph.n_features].tolist()
    features = [tuple(f) for f in graph.features.tolist()]
    pairs = zip(features, effects, strict=True)
    return {f: sign * e * (other.get(f, 0.0) / own[f] - 1) for f, e in pairs}


def changed_together(
    graph: AttributionGraph, own: Active, other: Active, sets: Sequence[Sequence[Feature]]
) -> Tensor:
    """[len(sets)]: what the graph predicts for its first target when the features of a set go from
    their values in `own` to those in `other`. All other nodes follow:
    D[t] = Σ_s A[t, s] D[s] / a_s. Paths between features of a set do not count, so that nothing is
    counted twice, as it is in a sum of total effects. Features that are no nodes carry nothing."""
    nodes = {tuple(f): i for i, f in enumerate(graph.features.tolist())}
    n, layers = graph.n_features, graph.features[:, 0]
    values = graph.activation_values[graph.selected_features].double()
    per_unit = graph.adjacency.double()[:, :n] / values
    change = torch.zeros(len(sets), n, dtype=torch.float64)
    held = torch.zeros(len(sets), n, dtype=torch.bool)
    for i, features in enumerate(sets):
        for f in features:
            if f in nodes:
                held[i, nodes[f]] = True
                change[i, nodes[f]] = other.get(f, 0.0) - own[f]
    for layer in range(graph.n_layers):
        here = layers == layer
        follows = change @ per_unit[:n][here].T
        change[:, here] = torch.where(held[:, here], change[:, here], follows)
    return change @ per_unit[graph.target_nodes.start]
