"""A coder in its model, as the flags of a command say."""

from __future__ import annotations

from sparsify_vlm.coders import Clt
from sparsify_vlm.errors import UserError
from sparsify_vlm.models import load_model
from sparsify_vlm.replacement.config import ReplacedConfig
from sparsify_vlm.replacement.model import VLMReplacementModel


def load_replacement(cfg: ReplacedConfig, clt: Clt, given: str) -> VLMReplacementModel:
    """`clt`, which the user `given` as this, in the model of `cfg`: by default its own."""
    name = cfg.model or clt.cfg.model
    if name is None:
        raise UserError(f"{given} does not say which model it was trained on: give --model")
    loaded = load_model(
        name,
        cfg.device,
        cfg.dtype,
        revision=cfg.revision or (clt.cfg.revision if name == clt.cfg.model else None),
        trust_remote_code=cfg.trust_remote_code,
        token=cfg.hf_token,
        load_in_8bit=cfg.load_in_8bit,
        load_in_4bit=cfg.load_in_4bit,
    )
    return VLMReplacementModel.from_pretrained(loaded, clt)
