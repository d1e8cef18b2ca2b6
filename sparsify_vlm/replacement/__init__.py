"""The model with its MLPs replaced by a coder: splicing, ablations, measures of faithfulness."""

from __future__ import annotations

from sparsify_vlm.replacement.ablation import Ablation
from sparsify_vlm.replacement.excluded import ExcludedTokens
from sparsify_vlm.replacement.model import VLMReplacementModel

__all__ = ["Ablation", "ExcludedTokens", "VLMReplacementModel"]
