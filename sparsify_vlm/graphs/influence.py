"""How much every node and edge counts for the answer, what is pruned, and the scores of a graph.

With Â = |A| / max(row sums, 1e-10) and w the weights of the targets (probabilities of logits),

    influence B = Σ_{k≥1} w Â^k           a node's share of everything that reaches the targets
    edge score  = Â[t, s] (B + w)[t]      on the graph of the nodes that stayed

Nodes are kept in the order of B until they hold `nodes` of its sum, tokens and targets always;
edges likewise; then nodes without an edge are dropped until none is left. Sums run in float64 over
the edges there are.

    replacement  = B(tokens) / B(tokens and errors)
    completeness = Σ (1 − Σ_errors Â) (B + w) / Σ (B + w)

Paths of k edges carry w Â^k to the tokens: their shares in B(tokens), and the mean of k. The other
definitions are those of circuit-tracer (Ameisen et al. 2025).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = 1e-10


@dataclass
class Edges:
    """Non-zero edges: target [E] and source [E] nodes, weight [E]; of `n` nodes."""

    target: Tensor
    source: Tensor
    weight: Tensor
    n: int

    def normalised(self) -> Tensor:
        """Â at the edges [E], float64."""
        weight = self.weight.double().abs()
        sums = torch.zeros(self.n, dtype=torch.float64).index_add_(0, self.target, weight)
        return weight / sums.clamp(min=FLOOR)[self.target]

    def at(self, kept: Tensor) -> Edges:
        """The edges of a bool mask."""
        return Edges(self.target[kept], self.source[kept], self.weight[kept], self.n)


@dataclass
class Pruned:
    """What is left of a graph.

    node_mask [N]; edges [E, 2] as (target, source), sorted; cumulative [N]: share of all influence
    held by a node and those above it.
    """

    node_mask: Tensor
    edges: Tensor
    cumulative: Tensor

    @property
    def edge_mask(self) -> Tensor:
        """bool [N, N], row = target."""
        mask = torch.zeros(len(self.node_mask), len(self.node_mask), dtype=torch.bool)
        mask[self.edges[:, 0], self.edges[:, 1]] = True
        return mask


def steps(edges: Edges, weights: Tensor) -> list[Tensor]:
    """w Â, w Â², … until nothing is left, each [N]."""
    normalised = edges.normalised()
    found: list[Tensor] = []
    now = weights.double()
    for _ in range(edges.n + 1):
        spent = now[edges.target] * normalised
        now = torch.zeros_like(now).index_add_(0, edges.source, spent)
        if not bool(now.any()):
            return found
        found.append(now)
    raise ValueError("the graph has a cycle")


def influence(edges: Edges, weights: Tensor) -> Tensor:
    """B [N], float64."""
    return sum(steps(edges, weights), torch.zeros(edges.n, dtype=torch.float64))


def threshold(scores: Tensor, share: float) -> Tensor:
    """The smallest score that is needed for `share` of their sum."""
    ordered = scores.sort(descending=True).values
    held = ordered.cumsum(0) / ordered.sum()
    place = int(torch.searchsorted(held, torch.tensor(share, dtype=held.dtype)))
    return ordered[min(place, len(ordered) - 1)]


def prune(
    edges: Edges, weights: Tensor, n_features: int, n_always: int, nodes: float, links: float
) -> Pruned:
    """Keep nodes with `nodes` and edges with `links` of the influence.

    The first `n_features` nodes need edges on both sides, all but the last `n_always` one that
    leaves them.
    """
    reached = influence(edges, weights)
    kept = reached >= threshold(reached, nodes)
    kept[edges.n - n_always :] = True
    inside = edges.at(kept[edges.target] & kept[edges.source])
    if len(inside.weight):
        flow = influence(inside, weights) + weights.double()
        score = inside.normalised() * flow[inside.target]
        inside = inside.at(score >= threshold(score, links))
    while True:
        leaving = _counted(inside.source, edges.n)
        entering = _counted(inside.target, edges.n)
        still = kept.clone()
        still[: edges.n - n_always] &= leaving[: edges.n - n_always]
        still[:n_features] &= entering[:n_features]
        inside = inside.at(still[inside.target] & still[inside.source])
        if torch.equal(still, kept):
            break
        kept = still
    pairs = torch.stack([inside.target, inside.source], 1)
    order = (pairs[:, 0] * edges.n + pairs[:, 1]).argsort()
    return Pruned(kept, pairs[order], _cumulative(reached))


def _counted(nodes: Tensor, n: int) -> Tensor:
    mask = torch.zeros(n, dtype=torch.bool)
    mask[nodes] = True
    return mask


def _cumulative(scores: Tensor) -> Tensor:
    ordered, places = scores.sort(descending=True, stable=True)
    found = torch.empty_like(scores)
    found[places] = ordered.cumsum(0) / ordered.sum()
    return found


@dataclass
class Scores:
    """replacement, completeness, and where influence ends, as shares of all that reaches tokens and
    errors: image, words (all other tokens), errors (so replacement = image + words).

    path_lengths[k-1]: share of the tokens' influence that comes over k edges; mean_path_length
    their mean.
    """

    replacement: float
    completeness: float
    image: float
    words: float
    errors: float
    mean_path_length: float
    path_lengths: list[float]


def scores(edges: Edges, weights: Tensor, errors: slice, tokens: slice, image: Tensor) -> Scores:
    """`errors` and `tokens`: their nodes; `image` bool [S]: which tokens are part of an image."""
    lengths = steps(edges, weights)
    reached = sum(lengths, torch.zeros(edges.n, dtype=torch.float64))
    at_tokens, at_errors = reached[tokens], reached[errors].sum()
    ended = (at_tokens.sum() + at_errors).clamp(min=FLOOR)
    is_error = torch.zeros(edges.n, dtype=torch.float64)
    is_error[errors] = 1
    lost = torch.zeros(edges.n, dtype=torch.float64)
    lost.index_add_(0, edges.target, edges.normalised() * is_error[edges.source])
    out = reached + weights.double()
    by_length = torch.stack([step[tokens].sum() for step in lengths] or [reached.sum() * 0])
    by_length = by_length / by_length.sum().clamp(min=FLOOR)
    counted = torch.arange(1, len(by_length) + 1, dtype=torch.float64)
    return Scores(
        replacement=float(at_tokens.sum() / ended),
        completeness=float(((1 - lost) * out).sum() / out.sum()),
        image=float(at_tokens[image].sum() / ended),
        words=float(at_tokens[~image].sum() / ended),
        errors=float(at_errors / ended),
        mean_path_length=float((by_length * counted).sum()),
        path_lengths=by_length.tolist(),
    )
