"""Running the pair on packed batches, and the loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tiny_llava.architecture import IMAGE
from tiny_llava.batches import IDS, Batch


def final_hidden(model: nn.Module, batch: Batch, features: Tensor | None = None) -> Tensor:
    """The decoder's normed final stream [B, S, d] on a packed batch; `model` is either of the pair.

    `features` [B, 36, d] stand in for the projected image tokens.
    """
    decoder = model.get_decoder()
    embeds = decoder.embed_tokens(batch.ids)
    if batch.pixels is not None:
        shown = image_features(model, batch.pixels) if features is None else features
        embeds = insert_images(embeds, batch.ids, shown)
    out = decoder(
        inputs_embeds=embeds,
        attention_mask=batch.allowed,
        position_ids=batch.positions,
        use_cache=False,
    )
    return out.last_hidden_state


def image_features(model: nn.Module, pixels: Tensor) -> Tensor:
    """Projected image tokens [B, 36, d]."""
    tower = model.model.vision_tower(pixels).last_hidden_state[:, 1:]
    return model.model.multi_modal_projector(tower)


def insert_images(embeds: Tensor, ids: Tensor, features: Tensor) -> Tensor:
    """`embeds` [B, S, d] with image positions taken from `features` [B, n, d] in order."""
    is_image = (ids == IDS[IMAGE])[..., None].expand_as(embeds)
    return embeds.masked_scatter(is_image, features.to(embeds.dtype))


def loss(model: nn.Module, batch: Batch, text_weight: float) -> Tensor:
    """Mean cross-entropy of answers + `text_weight` × that of the other text tokens."""
    hidden = final_hidden(model, batch)
    counted = batch.labels >= 0
    logits = model.lm_head(hidden[counted])
    each = F.cross_entropy(logits, batch.labels[counted], reduction="none")
    answer = batch.is_answer[counted]
    return each[answer].mean() + text_weight * each[~answer].mean()


@torch.no_grad()
def exact_match(model: nn.Module, batch: Batch) -> list[bool]:
    """Per answer: whether greedy decoding gives its word and then the end of sequence."""
    hidden = final_hidden(model, batch)[batch.is_answer]
    right = model.lm_head(hidden).argmax(-1) == batch.labels[batch.is_answer]
    return right.view(-1, 2).all(1).tolist()


@contextmanager
def noisy_writes(model: nn.Module, scale: float) -> Iterator[None]:
    """Add Gaussian noise to what every MLP of the decoder writes.

    Its standard deviation is `scale` × that of the layer's writes over the batch: the model learns
    answers that survive errors of about that size, as a transcoder in the MLP's place makes.
    """

    def disturb(_module: nn.Module, _inputs: object, write: Tensor) -> Tensor:
        spread = write.detach().flatten(0, 1).var(0).mean().sqrt()
        return write + torch.randn_like(write) * (scale * spread)

    layers = model.get_decoder().layers if scale > 0 else []
    handles = [layer.mlp.register_forward_hook(disturb) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
