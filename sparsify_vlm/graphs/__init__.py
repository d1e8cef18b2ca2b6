"""Attribution graphs: what fed an answer, through which features."""

from __future__ import annotations

from sparsify_vlm.graphs.attribution import attribute
from sparsify_vlm.graphs.graph import AttributionGraph
from sparsify_vlm.graphs.influence import Pruned, Scores
from sparsify_vlm.graphs.targets import Difference, Feature

__all__ = ["AttributionGraph", "Difference", "Feature", "Pruned", "Scores", "attribute"]
