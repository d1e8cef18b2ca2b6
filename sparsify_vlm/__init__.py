"""Sparse coders and cross-layer transcoders for vision-language models.

The public names below are imported when they are first used: importing the package itself is
cheap and does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "UserError": "sparsify_vlm.errors",
    "load_model": "sparsify_vlm.models",
    "LoadedModel": "sparsify_vlm.models",
    "load_clt": "sparsify_vlm.coders",
    "Clt": "sparsify_vlm.coders",
    "CltConfig": "sparsify_vlm.coders",
    "ActivationStore": "sparsify_vlm.data",
    "ShapesDataset": "sparsify_vlm.data",
    "VLMReplacementModel": "sparsify_vlm.replacement",
    "Intervention": "sparsify_vlm.replacement",
    "PatchIntervention": "sparsify_vlm.replacement",
    "SteeringVector": "sparsify_vlm.replacement",
    "attribute": "sparsify_vlm.graphs",
    "AttributionGraph": "sparsify_vlm.graphs",
    "analyze": "sparsify_vlm.studies",
    "compare": "sparsify_vlm.studies",
}

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from sparsify_vlm.coders import Clt as Clt
    from sparsify_vlm.coders import CltConfig as CltConfig
    from sparsify_vlm.coders import load_clt as load_clt
    from sparsify_vlm.data import ActivationStore as ActivationStore
    from sparsify_vlm.data import ShapesDataset as ShapesDataset
    from sparsify_vlm.errors import UserError as UserError
    from sparsify_vlm.graphs import AttributionGraph as AttributionGraph
    from sparsify_vlm.graphs import attribute as attribute
    from sparsify_vlm.models import LoadedModel as LoadedModel
    from sparsify_vlm.models import load_model as load_model
    from sparsify_vlm.replacement import Intervention as Intervention
    from sparsify_vlm.replacement import PatchIntervention as PatchIntervention
    from sparsify_vlm.replacement import SteeringVector as SteeringVector
    from sparsify_vlm.replacement import VLMReplacementModel as VLMReplacementModel
    from sparsify_vlm.studies import analyze as analyze
    from sparsify_vlm.studies import compare as compare


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'sparsify_vlm' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
