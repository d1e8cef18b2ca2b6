"""Pictures as a model's processor made them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

    from sparsify_vlm.models import LoadedModel


def as_seen(
    loaded: LoadedModel, inputs: Mapping[str, Tensor], shown: Sequence[Image]
) -> Sequence[Image]:
    """The pictures as the patch grid lies on them: what the processor made of them where that is
    one picture each (it may have been cropped), else the pictures themselves."""
    pixels = inputs.get("pixel_values")
    images = loaded.stack.images(inputs)
    n_images = int(images.max()) + 1
    if pixels is None or pixels.ndim != 4 or pixels.shape[1] != 3 or len(pixels) != n_images:
        return shown if n_images in (0, len(shown)) else ()
    sizes = inputs.get("image_sizes")
    pictures = [_picture(loaded.image_processor, one) for one in pixels]
    if sizes is not None:  # padded to the largest of the batch
        pictures = [
            picture.crop((0, 0, width, height))
            for picture, (height, width) in zip(pictures, sizes.tolist(), strict=True)
        ]
    return pictures


def _picture(processor: Any, pixels: Tensor) -> Image:
    """Undo the processor's normalisation of pixels [3, H, W]."""
    from PIL import Image

    values = pixels.float()
    if getattr(processor, "do_normalize", False):
        mean, std = (torch.tensor(getattr(processor, f"image_{k}")) for k in ("mean", "std"))
        values = values * std[:, None, None] + mean[:, None, None]
    if getattr(processor, "do_rescale", False):
        values = values / processor.rescale_factor
    rows = values.round().clamp(0, 255).byte().permute(1, 2, 0)
    return Image.fromarray(rows.contiguous().numpy())
