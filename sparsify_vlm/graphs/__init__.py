"""Attribution graphs: what fed an answer, through which features."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsify_vlm._lazy import lazily

if TYPE_CHECKING:
    from sparsify_vlm.graphs.attribution import attribute
    from sparsify_vlm.graphs.graph import AttributionGraph
    from sparsify_vlm.graphs.influence import Pruned, Scores
    from sparsify_vlm.graphs.targets import Difference, Feature

# Imported when first used: reading the commands' configuration must not import torch.
_HOMES = {
    "AttributionGraph": "graph",
    "Difference": "targets",
    "Feature": "targets",
    "Pruned": "influence",
    "Scores": "influence",
    "attribute": "attribution",
}

__all__ = ["AttributionGraph", "Difference", "Feature", "Pruned", "Scores", "attribute"]

__getattr__, __dir__ = lazily(__name__, _HOMES)
