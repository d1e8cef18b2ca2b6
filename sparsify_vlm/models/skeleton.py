"""A model's sizes from its configuration alone, before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sparsify_vlm.models.hub_errors import explained
from sparsify_vlm.models.load import ALIASES, _auto_class, _config
from sparsify_vlm.models.resolve import find_layers, is_multimodal

DEFAULT_IMAGE_PATCHES, DEFAULT_IMAGE_SIDE = 576, 336
"""Patches and pixels per side of one image where the configuration does not tell: LLaVA-1.5's."""


@dataclass(frozen=True)
class Skeleton:
    """What the configuration of a model says."""

    name: str
    n_layers: int
    d_model: int
    intermediate: int
    """Width of the MLPs' hidden layer."""
    parameters: int
    """All of the model."""
    decoder_parameters: int
    """Of the decoder's layers, which see every token."""
    encoder_parameters: int
    """Of what sees images only: everything but decoder layers, embeddings and head."""
    image_patches: int
    """Patches of one image in the vision tower; 0 for a text model."""
    image_numbers: int
    """Numbers that one image is given to the model as; 0 for a text model."""
    vocabulary: int
    """Words that are scored at every token."""
    max_positions: int
    """Longest sequence."""

    def forward_flops(self, tokens: int, samples: int) -> float:
        """Of one forward pass, with one image per sample: 2 per weight and token that uses it, and
        attention's two products over a causal half."""
        length = tokens / max(samples, 1)
        attention = 2 * self.n_layers * tokens * length * self.d_model
        images = 2 * self.encoder_parameters * self.image_patches * samples
        return 2 * self.decoder_parameters * tokens + attention + images


def read_skeleton(name_or_path: str, **source: Any) -> Skeleton:
    """The sizes of a model on the Hub, in a folder, or behind an alias, as `load_model` finds it.

    Only its configuration is read; the model is built without memory for its weights. `source` are
    `revision`, `token` and `trust_remote_code`. Raises `UserError` as `load_model` does.
    """
    path = ALIASES.get(name_or_path, name_or_path)
    with explained(name_or_path):
        config = _config(path, source)
        own_code = {k: v for k, v in source.items() if k == "trust_remote_code"}
        with torch.device("meta"):
            model = _auto_class(config).from_config(config, **own_code)
    text = config.get_text_config(decoder=True)
    _, layers = find_layers(model)
    decoder = {id(p) for layer in layers for p in layer.parameters()}
    ends = [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m]
    edges = {id(p) for module in ends for p in module.parameters()}
    sizes = {id(p): p.numel() for p in model.parameters()}
    return Skeleton(
        name=name_or_path,
        n_layers=len(layers),
        d_model=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        parameters=sum(sizes.values()),
        decoder_parameters=sum(n for i, n in sizes.items() if i in decoder),
        encoder_parameters=sum(n for i, n in sizes.items() if i not in decoder | edges),
        image_patches=_image_patches(config),
        image_numbers=_image_numbers(config),
        vocabulary=text.vocab_size,
        max_positions=getattr(text, "max_position_embeddings", None) or 1 << 30,
    )


def _image_patches(config: Any) -> int:
    if not is_multimodal(config):
        return 0
    vision = config.vision_config
    side, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    if not isinstance(side, int) or not isinstance(patch, int):
        return DEFAULT_IMAGE_PATCHES
    return (side // patch) ** 2


def _image_numbers(config: Any) -> int:
    """Of one image in the size that the vision tower takes; where the configuration does not tell,
    LLaVA-1.5's."""
    if not is_multimodal(config):
        return 0
    side = getattr(config.vision_config, "image_size", None)
    return 3 * (side if isinstance(side, int) else DEFAULT_IMAGE_SIDE) ** 2
