"""Sparse coders: the cross-layer transcoder, its joint training step, its checkpoint formats."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsify_vlm._lazy import lazily

if TYPE_CHECKING:
    from sparsify_vlm.coders.clt import Clt
    from sparsify_vlm.coders.config import CltConfig
    from sparsify_vlm.coders.export import ExportConfig
    from sparsify_vlm.coders.formats import export_clt, load_clt, open_clt, save_clt
    from sparsify_vlm.coders.joint import JointStats, forward_backward, target_variance
    from sparsify_vlm.coders.loss import joint_loss
    from sparsify_vlm.coders.objective import Objective
    from sparsify_vlm.coders.sparse_ops import Latents

# Imported when first used: reading the configuration must not import torch.
_HOMES = {
    "Clt": "clt",
    "CltConfig": "config",
    "ExportConfig": "export",
    "JointStats": "joint",
    "Latents": "sparse_ops",
    "Objective": "objective",
    "export_clt": "formats",
    "forward_backward": "joint",
    "joint_loss": "loss",
    "load_clt": "formats",
    "open_clt": "formats",
    "save_clt": "formats",
    "target_variance": "joint",
}

__all__ = [
    "Clt",
    "CltConfig",
    "ExportConfig",
    "JointStats",
    "Latents",
    "Objective",
    "export_clt",
    "forward_backward",
    "joint_loss",
    "load_clt",
    "open_clt",
    "save_clt",
    "target_variance",
]

__getattr__, __dir__ = lazily(__name__, _HOMES)
