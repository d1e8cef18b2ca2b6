"""Sparse coders and cross-layer transcoders for vision-language models.

The public names below are imported when they are first used: importing the package itself is
cheap and does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsify_vlm._lazy import lazily

__version__ = "0.1.0"

_HOMES = {
    "UserError": "errors",
    "load_model": "models",
    "LoadedModel": "models",
    "load_clt": "coders",
    "Clt": "coders",
    "CltConfig": "coders",
    "ActivationStore": "data",
    "ShapesDataset": "data",
    "VLMReplacementModel": "replacement",
    "Intervention": "replacement",
    "PatchIntervention": "replacement",
    "SteeringVector": "replacement",
    "attribute": "graphs",
    "AttributionGraph": "graphs",
    "analyze": "studies",
    "compare": "studies",
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

__getattr__, _names = lazily(__name__, _HOMES)


def __dir__() -> list[str]:
    return ["__version__", *_names()]
