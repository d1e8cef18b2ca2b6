"""An attribution graph: nodes, edges, and what belongs to them.

Nodes in order, rows and columns alike (row = target, column = source): selected features by (layer,
position, index), errors by (layer, position), tokens by position, targets. Only non-zero edges are
held. Layers are the decoder's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify_vlm.graphs.influence import Edges, Pruned, Scores, influence, prune, scores
from sparsify_vlm.models import Role


@dataclass
class PixelEffects:
    """Signed total effects of patches of pixels, made by `graphs.pixels.pixel_effects`."""

    effects: Tensor
    """[targets, patches]: over all paths; pictures one after the other, row by row."""
    direct: Tensor
    """[targets, patches]: over the targets' own edges to image tokens alone."""
    outside: Tensor
    """[targets]: of pixels that are no part of a picture (padding)."""
    grids: Tensor
    """int32 [images, 2]: rows and columns of each picture's patches."""
    gradient: str
    """`frozen` or `plain`, see `graphs.pixels`."""

    def table(self, image: int = 0, values: Tensor | None = None) -> Tensor:
        """[targets, rows, columns] of one picture; `values` takes the place of `effects`."""
        counts = self.grids.prod(1).tolist()
        first = sum(counts[:image])
        rows, columns = self.grids[image].tolist()
        chosen = self.effects if values is None else values
        return chosen[:, first : first + counts[image]].view(-1, rows, columns)


@dataclass
class AttributionGraph:
    """Made by `attribute`. Sizes: n active features, m of them selected, L layers, S positions, N =
    m + L·S + S + targets nodes."""

    active_features: Tensor
    """[n, 3]: layer, position, index."""
    activation_values: Tensor
    """[n]."""
    selected_features: Tensor
    """[m]: which of the active features are nodes."""
    edges: Edges
    """All non-zero edges, by target, then source."""
    logit_token_ids: Tensor
    """[targets]: token of each target, -1 for a target that is no token."""
    logit_probabilities: Tensor
    """[targets]: probability of the token; 1 for other targets."""
    target_labels: list[str]
    """Text of each target."""
    error_vectors: Tensor
    """[L, S, d]: y − ŷ; 0 at zeroed positions."""
    logits: Tensor
    """[V]: the model's logits at the last position."""
    input_ids: Tensor
    """[S]."""
    tokens: list[str]
    """The prompt's tokens as text."""
    roles: Tensor
    """uint8 [S], see `Role`."""
    patches: Tensor
    """int16 [S, 2]: row and column of image tokens that are patches, else -1."""
    images: Tensor
    """int16 [S]: which image a token belongs to, else -1."""
    zeroed: Tensor
    """bool [S]: where features and errors are no nodes."""
    info: dict[str, Any] = field(default_factory=dict)
    """Names of model and coder, prompt, sites."""
    pixels: PixelEffects | None = None
    """What patches of pixels add, where it was asked for."""

    @property
    def n_features(self) -> int:
        """m."""
        return len(self.selected_features)

    @property
    def n_layers(self) -> int:
        """L."""
        return len(self.error_vectors)

    @property
    def n_positions(self) -> int:
        """S."""
        return len(self.input_ids)

    @property
    def n_nodes(self) -> int:
        """N."""
        return self.edges.n

    @property
    def errors(self) -> slice:
        """The error nodes."""
        return slice(self.n_features, self.n_features + self.n_layers * self.n_positions)

    @property
    def token_nodes(self) -> slice:
        """The token nodes."""
        return slice(self.errors.stop, self.errors.stop + self.n_positions)

    @property
    def target_nodes(self) -> slice:
        """The target nodes."""
        return slice(self.token_nodes.stop, self.n_nodes)

    @property
    def features(self) -> Tensor:
        """[m, 3]: layer, position, index of the feature nodes."""
        return self.active_features[self.selected_features]

    @property
    def weights(self) -> Tensor:
        """[N]: probabilities at the targets, 0 elsewhere."""
        weights = torch.zeros(self.n_nodes)
        weights[self.target_nodes] = self.logit_probabilities
        return weights

    @property
    def adjacency(self) -> Tensor:
        """[N, N] dense, row = target, column = source."""
        dense = torch.zeros(self.n_nodes, self.n_nodes)
        dense[self.edges.target, self.edges.source] = self.edges.weight
        return dense

    @cached_property
    def _influence(self) -> Tensor:
        return influence(self.edges, self.weights)

    def node_influence(self) -> Tensor:
        """[N]: each node's share in everything that reaches the targets."""
        return self._influence.float()

    def scores(self) -> Scores:
        """Replacement, completeness, path lengths, shares; see `Scores`."""
        image = self.roles == Role.IMAGE
        return scores(self.edges, self.weights, self.errors, self.token_nodes, image)

    def prune(self, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> Pruned:
        """The nodes that hold `node_threshold` of the influence, and of their edges those that hold
        `edge_threshold`."""
        always = self.n_nodes - self.errors.stop
        return prune(
            self.edges, self.weights, self.n_features, always, node_threshold, edge_threshold
        )

    def save(self, folder: str | Path) -> Path:
        """Write `graph.safetensors` and `graph.json` into `folder`; returns the folder."""
        from sparsify_vlm.graphs.stored import save

        return save(self, Path(folder))

    @classmethod
    def load(cls, folder: str | Path) -> AttributionGraph:
        """What `save` wrote. Raises `UserError` for a folder that is damaged or of another kind."""
        from sparsify_vlm.graphs.stored import load

        return load(Path(folder))
