"""Sparse coders: the cross-layer transcoder, its joint training step, its checkpoint formats."""

from __future__ import annotations

from sparsify_vlm.coders.clt import Clt
from sparsify_vlm.coders.config import CltConfig
from sparsify_vlm.coders.formats import load_clt, save_clt
from sparsify_vlm.coders.joint import JointStats, forward_backward, target_variance
from sparsify_vlm.coders.loss import joint_loss
from sparsify_vlm.coders.objective import Objective
from sparsify_vlm.coders.sparse_ops import Latents

__all__ = [
    "Clt",
    "CltConfig",
    "JointStats",
    "Latents",
    "Objective",
    "forward_backward",
    "joint_loss",
    "load_clt",
    "save_clt",
    "target_variance",
]
