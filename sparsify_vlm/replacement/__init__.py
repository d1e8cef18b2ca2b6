"""The model with its MLPs replaced by a coder: splicing, ablations, measures of faithfulness."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsify_vlm._lazy import lazily

if TYPE_CHECKING:
    from sparsify_vlm.replacement.ablation import Ablation
    from sparsify_vlm.replacement.config import EvaluateConfig
    from sparsify_vlm.replacement.excluded import ExcludedTokens
    from sparsify_vlm.replacement.interventions import Intervention
    from sparsify_vlm.replacement.local import LocalModel
    from sparsify_vlm.replacement.model import VLMReplacementModel
    from sparsify_vlm.replacement.patches import PatchIntervention
    from sparsify_vlm.replacement.steering import SteeringVector

# Imported when first used: reading the configuration must not import torch.
_HOMES = {
    "Ablation": "ablation",
    "EvaluateConfig": "config",
    "ExcludedTokens": "excluded",
    "Intervention": "interventions",
    "LocalModel": "local",
    "PatchIntervention": "patches",
    "SteeringVector": "steering",
    "VLMReplacementModel": "model",
}

__all__ = [
    "Ablation",
    "EvaluateConfig",
    "ExcludedTokens",
    "Intervention",
    "LocalModel",
    "PatchIntervention",
    "SteeringVector",
    "VLMReplacementModel",
]

__getattr__, __dir__ = lazily(__name__, _HOMES)
