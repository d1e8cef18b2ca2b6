"""Attribution graphs: what fed an answer, through which features."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

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


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
