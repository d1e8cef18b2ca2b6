"""Pretraining of the vision tower: every patch names the colour and shape it holds.

It stands in for CLIP's contrastive pretraining, without which questions about images do not take
off; being per patch, it also keeps what the tower knows where it sees it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify_vlm.data.shapes import (
    COLOURS,
    PATCH_GRID,
    SHAPES,
    Scene,
    draw_scene,
    object_patches,
)
from tiny_llava.batches import pixel_values


class PatchHeads(nn.Module):
    """Linear read-outs of colour and shape (class 0: background) from each patch's final state."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.colour = nn.Linear(d_model, 1 + len(COLOURS))
        self.shape = nn.Linear(d_model, 1 + len(SHAPES))

    def loss(self, states: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of both read-outs; states [B, 36, d], labels int64 [B, 36, 2]."""
        colour = F.cross_entropy(self.colour(states).flatten(0, 1), labels[..., 0].flatten())
        shape = F.cross_entropy(self.shape(states).flatten(0, 1), labels[..., 1].flatten())
        return colour + shape

    @torch.no_grad()
    def accuracy(self, states: Tensor, labels: Tensor) -> float:
        """Share of object patches with both read-outs right."""
        right = (self.colour(states).argmax(-1) == labels[..., 0]) & (
            self.shape(states).argmax(-1) == labels[..., 1]
        )
        return right[labels[..., 0] > 0].float().mean().item()


def patch_labels(scenes: Sequence[Scene]) -> Tensor:
    """int64 [B, 36, 2]: 1 + index of each patch's colour and shape; 0 is background."""
    labels = np.zeros((len(scenes), PATCH_GRID, PATCH_GRID, 2), dtype=np.int64)
    for b, scene in enumerate(scenes):
        for item in scene.objects:
            kind = 1 + COLOURS.index(item.colour), 1 + SHAPES.index(item.shape)
            for row, column in object_patches(item):
                labels[b, row, column] = kind
    return torch.from_numpy(labels).flatten(1, 2)


def patches_batch(rng: np.random.Generator, rows: int, split: str) -> tuple[Tensor, Tensor]:
    """Pixels [B, 3, 48, 48] and patch labels [B, 36, 2] of freshly drawn scenes."""
    scenes = [draw_scene(rng, split) for _ in range(rows)]
    return pixel_values(scenes), patch_labels(scenes)
