"""Small pictures for reports: enlarged images, and images dimmed by an activation per patch."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def png(image: Image.Image, scale: int = 4) -> bytes:
    """The image as PNG bytes, each pixel enlarged to `scale` × `scale`."""
    buffer = io.BytesIO()
    size = (image.width * scale, image.height * scale)
    image.convert("RGB").resize(size, Image.Resampling.NEAREST).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def patch_overlay(
    image: Image.Image, activation: NDArray[np.float32], top: float, scale: int = 2
) -> bytes:
    """The image, dimmed where a latent is silent, as PNG bytes.

    Args:
        image: RGB, its sides multiples of the patch grid's.
        activation: [rows, columns], one value ≥ 0 per patch.
        top: the activation that is shown undimmed.
    """
    pixels = np.asarray(image.convert("RGB"), np.float32)
    rows, columns = activation.shape
    per_patch = (image.height // rows, image.width // columns)
    strength = np.kron(np.clip(activation / max(top, 1e-9), 0.0, 1.0), np.ones(per_patch))
    shown = 0.15 + 0.85 * strength[..., None] ** 0.5
    return png(Image.fromarray((pixels * shown).astype(np.uint8)), scale)
