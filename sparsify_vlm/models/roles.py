"""What each token is: padding, part of an image, text, or a special token."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Any

import torch

from sparsify_vlm.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch import Tensor


class Role(IntEnum):
    """A token's role, stored as uint8 beside its activations."""

    PAD = 0
    IMAGE = 1
    TEXT = 2
    SPECIAL = 3


ROLE_NAMES = {role.name.lower(): role for role in Role}
"""`{"pad": Role.PAD, "image": …}`, the names used in files and tables."""


def image_token_id(config: Any) -> int | None:
    """The id that stands for one image token in `input_ids`; None for a text model.

    Newer configs call it `image_token_id`, older ones `image_token_index`.
    """
    for name in ("image_token_id", "image_token_index"):
        if (value := getattr(config, name, None)) is not None:
            return int(value)
    return None


_DELIMITERS = ("boi_token_id", "eoi_token_id", "vision_start_token_id", "vision_end_token_id")


def special_ids(config: Any, tokenizer: Any) -> frozenset[int]:
    """Ids of BOS, EOS, PAD and delimiters (of turns, of images, of image rows), no image tokens.

    They are what the tokenizer declares special; without a tokenizer, what the config names. The
    unknown token stands for a word of the text, and is special only where another special token
    shares its id (GPT-2 has one id for all of them).
    """
    ids = {getattr(config, name, None) for name in _DELIMITERS}
    if tokenizer is None:
        text = config.get_text_config(decoder=True)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(text, name, None)
            ids |= set(value) if isinstance(value, list) else {value}
    else:
        ids |= set(tokenizer.all_special_ids)
        ids |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        if tokenizer.unk_token not in (tokenizer.bos_token, tokenizer.eos_token):
            ids.discard(tokenizer.unk_token_id)
    return frozenset(int(i) for i in ids if i is not None and i != image_token_id(config))


def attended(inputs: Mapping[str, Any]) -> Tensor:
    """Which tokens are not padding, bool [B, S], from the attention mask (none: all)."""
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    if mask.shape != ids.shape:
        raise UserError(
            f"attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(ids.shape)}: "
            "pass the processor's batch unchanged"
        )
    return mask.bool()


def token_roles(
    inputs: Mapping[str, Any], image_id: int | None, special: Collection[int]
) -> Tensor:
    """The role of every token, uint8 [B, S]; see `Role`."""
    ids = inputs["input_ids"]
    roles = torch.full_like(ids, Role.TEXT, dtype=torch.uint8)
    specials = torch.tensor(sorted(special), dtype=ids.dtype, device=ids.device)
    roles[torch.isin(ids, specials)] = Role.SPECIAL
    if image_id is not None:
        roles[ids == image_id] = Role.IMAGE
    roles[~attended(inputs)] = Role.PAD
    return roles
