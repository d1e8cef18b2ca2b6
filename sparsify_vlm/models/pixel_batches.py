"""Rescaling and normalising all images of a batch at once.

transformers' Pillow backend takes one image after the other, which for small ones costs more than
the arithmetic. Both steps treat every pixel by itself, so that images of one size, laid side by
side as a single tall one, come out with the same numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

PLAIN = (
    "_preprocess_image_like_inputs",
    "_prepare_image_like_inputs",
    "_prepare_images_structure",
    "_preprocess",
    "process_image",
    "convert_to_rgb",
    "rescale",
    "normalize",
)
"""What has to be the backend's own for the batch to be taken at once."""


def in_batches(processor: Any) -> Any:
    """The processor with an image processor that prepares a batch of images of one size at once.

    Its pixels are the same, bit for bit. It is the same object where there is no image processor or
    one that does anything of its own; images that have to be resized are taken one by one.
    """
    from transformers.image_processing_backends import PilBackend

    steps = getattr(processor, "image_processor", None)
    kind: Any = type(steps)
    if not isinstance(steps, PilBackend) or any(
        getattr(kind, name) is not getattr(PilBackend, name) for name in PLAIN
    ):
        return processor
    quick, made = copy.copy(steps), copy.copy(processor)
    quick.__class__ = _in_batches(kind)
    made.image_processor = quick
    return made


def tokens_by_size(processor: Any) -> bool:
    """Whether the tokens of a prompt follow from its text and the sizes of its images alone.

    Known of LLaVA's processor, which counts an image's tokens by the size it is brought to, with an
    image processor of `in_batches`.
    """
    from transformers import LlavaProcessor

    if type(processor) is not LlavaProcessor:
        return False
    steps = processor.image_processor
    return getattr(steps, "takes_batches", False) and not getattr(steps, "do_pad", False)


@cache
def _in_batches(kind: Any) -> Any:
    def preprocess(self: Any, images: Any, *args: Any, **kwargs: Any) -> Any:
        from transformers.feature_extraction_utils import BatchFeature

        flat = self._prepare_images_structure(images)
        if args or not _one_size(flat) or _moves_pixels(kwargs):
            return kind._preprocess_image_like_inputs(self, images, *args, **kwargs)
        return BatchFeature({"pixel_values": _pixels(self, flat, kwargs)}, tensor_type="pt")

    methods = {"_preprocess_image_like_inputs": preprocess, "takes_batches": True}
    return type(kind.__name__, (kind,), methods)


def _one_size(images: Sequence[Any]) -> bool:
    """Whether all are Pillow's 8-bit RGB images of the same size."""
    from PIL.Image import Image

    if not all(isinstance(image, Image) and image.mode == "RGB" for image in images):
        return False
    return len({image.size for image in images}) == 1


def _moves_pixels(steps: Mapping[str, Any]) -> bool:
    """Whether a step changes more than each pixel's value, or something else than torch's tensors
    is wanted."""
    moves = any(steps.get(name) for name in ("do_resize", "do_center_crop", "do_pad"))
    return moves or steps.get("return_tensors") != "pt"


def _pixels(processor: Any, images: Sequence[Image], steps: Mapping[str, Any]) -> np.ndarray:
    """[N, 3, height, width] of N images of one size."""
    n, (width, height) = len(images), images[0].size
    rows = np.stack([np.asarray(image) for image in images]).reshape(n * height, width, 3)
    tall = np.ascontiguousarray(rows.transpose(2, 0, 1))
    if steps["do_rescale"]:
        tall = processor.rescale(tall, steps["rescale_factor"])
    if steps["do_normalize"]:
        tall = processor.normalize(tall, steps["image_mean"], steps["image_std"])
    return np.ascontiguousarray(tall.reshape(3, n, height, width).transpose(1, 0, 2, 3))
