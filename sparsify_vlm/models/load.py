"""Loading a model with its processor, and running it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify_vlm.aliases import EMBEDDED, HUB_ALIASES
from sparsify_vlm.errors import UserError
from sparsify_vlm.hub import offline_if_unreachable
from sparsify_vlm.models.hub_errors import WAY_OUT, explained
from sparsify_vlm.models.memory import keep_freed_memory
from sparsify_vlm.models.processors import load_processor
from sparsify_vlm.models.resolve import is_multimodal, resolve_stack
from sparsify_vlm.models.stack import Stack

FOUR_BIT_BLOCK = 64
"""bitsandbytes quantises so many weights of a row together."""

CHECKPOINTS = Path(__file__).parent / "checkpoints"
ALIASES = {**HUB_ALIASES, **{name: str(CHECKPOINTS / name) for name in EMBEDDED}}


@dataclass
class LoadedModel:
    """A model with everything needed to run it and to read its MLPs."""

    model: Any
    """The Hugging Face model, in eval mode, without gradients."""
    processor: Any
    """The processor of a vision-language model, the tokenizer of a text model."""
    stack: Stack
    name: str
    """As the user gave it."""
    revision: str | None = None
    """Commit on the Hub, where known."""

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    @property
    def is_vlm(self) -> bool:
        """Whether the model takes images."""
        return is_multimodal(self.config)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def image_processor(self) -> Any | None:
        """The image processor; None for text models."""
        return getattr(self.processor, "image_processor", None)

    @cached_property
    def device(self) -> torch.device:
        """Where the inputs go: the device of the input embeddings."""
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The model's floating-point dtype."""
        return self.model.dtype

    @cached_property
    def _keeps_logits(self) -> bool:
        return "logits_to_keep" in signature(self.model.forward).parameters

    def to_device(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The processor's batch on the model's device, pixels in its dtype."""
        moved = {}
        for name, value in inputs.items():
            if name == "labels":  # PaliGemma's processor adds them; the loss is not ours
                continue
            if isinstance(value, Tensor):
                dtype = self.dtype if value.is_floating_point() else None
                value = value.to(self.device, dtype)
            moved[name] = value
        return moved

    def forward(
        self, inputs: Mapping[str, Any], logits: bool = False, gradients: bool = False
    ) -> Any:
        """Run the model on a processor's whole batch without cache, and without gradients unless
        `gradients` leaves the choice to the caller.

        The output's `logits` are [B, S, V] if `logits`, else only those of the last position where
        the model can save the rest. Raises `UserError` when image tokens are missing.
        """
        self.stack.layout.check(inputs)
        extra = {} if logits or not self._keeps_logits else {"logits_to_keep": 1}
        try:
            with nullcontext() if gradients else torch.no_grad():
                return self.model(**self.to_device(inputs), use_cache=False, **extra)
        except ValueError as error:  # families whose grid `ImageLayout` does not know
            if "image tokens do not match" not in str(error):
                raise
            raise UserError(
                f"image tokens were cut off or added; raise --ctx_len: {error}"
            ) from error


def load_model(
    name_or_path: str,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    token: str | bool | None = None,
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
) -> LoadedModel:
    """Load a model from the Hub, a local folder or an alias, with its processor and `Stack`.

    - `name_or_path`: Hub id, folder, or one of `llava`, `tiny-llava`, `tiny-llama`.
    - `device`: default CUDA if there, else CPU; `"auto"` spreads the model over all devices.
    - `dtype`: default float32 on the CPU, bfloat16 on CUDA; `"auto"` takes the checkpoint's.
    - `revision`, `trust_remote_code`, `token`: as in transformers; remote code is off unless asked.
    - `load_in_8bit`, `load_in_4bit`: quantise the frozen weights with bitsandbytes.

    On a CPU, glibc is told to keep what is freed (`keep_freed_memory`), for the whole process.

    Raises `UserError`, one line, when the model cannot be had or cannot be used.
    """
    source = {
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        "token": token,
    }
    where = usable_device(device)
    bits = _bits(load_in_8bit, load_in_4bit)
    if where.startswith("cpu"):
        keep_freed_memory()
    path = ALIASES.get(name_or_path, name_or_path)
    with explained(name_or_path):
        config = _config(path, source)
        _check_width(name_or_path, config, bits)
        model = _model(path, config, where, _dtype(dtype, where), bits, source)
        processor = load_processor(path, config, source)
    model.requires_grad_(False).eval()
    try:
        stack = resolve_stack(model, processor)
    except UserError as error:
        raise UserError(f"model '{name_or_path}': {error} ({WAY_OUT})") from error
    commit = getattr(config, "_commit_hash", None) or revision
    return LoadedModel(model, processor, stack, name_or_path, commit)


def usable_device(device: str | torch.device | None) -> str:
    """The device to work on, by default CUDA if there: a torch device's name or "auto".

    Raises `UserError` for a name that is no device's, and for one that is not there.
    """
    there = torch.cuda.is_available()
    if device is None:
        return "cuda" if there else "cpu"
    if str(device).startswith("cuda") and not there:
        raise UserError(f"device '{device}': torch sees no CUDA device here; take --device cpu")
    try:
        if device != "auto":
            torch.zeros(1, device=device).item()  # which "meta" cannot do either
        return str(device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(
            f"device '{device}' cannot be used here: give cpu, or cuda:0 and so on"
        ) from None


def _dtype(dtype: str | torch.dtype | None, device: str) -> str | torch.dtype:
    """The dtype to load in: a torch.dtype or "auto"."""
    if dtype is None:
        return torch.float32 if device.startswith("cpu") else torch.bfloat16
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    short = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    found = getattr(torch, short.get(dtype, dtype), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UserError(f"dtype '{dtype}' is none of float32, bfloat16, float16, auto")
    return found


def _config(path: str, source: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    if not Path(path).is_dir():
        offline_if_unreachable()
    elif not (Path(path) / "config.json").is_file():
        raise UserError(f"folder '{path}' holds no model: it has no config.json ({WAY_OUT})")
    return AutoConfig.from_pretrained(path, **source)


def _auto_class(config: Any) -> Any:
    """The auto class that loads the model with its language-modelling head."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    own_code = getattr(config, "auto_map", None) or {}
    for auto, known in (
        (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
        (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
    ):
        if type(config) in known or auto.__name__ in own_code:
            return auto
    raise UserError(
        f"a {config.model_type} model generates no text, so it has no decoder MLPs to train on "
        f"({WAY_OUT})"
    )


def _model(
    path: str,
    config: Any,
    device: str,
    dtype: str | torch.dtype,
    bits: int | None,
    source: Mapping[str, Any],
) -> Any:
    options: dict[str, Any] = {"dtype": dtype, **source}
    if bits is not None:
        options["quantization_config"] = _quantised(bits, dtype)
    if bits is not None or device == "auto":
        options["device_map"] = "auto" if device == "auto" else {"": device}
    model, report = _auto_class(config).from_pretrained(
        path, config=config, output_loading_info=True, **options
    )
    _require_decoder(path, model, report["missing_keys"])
    return model if "device_map" in options else model.to(device)


def _bits(in_8: bool, in_4: bool) -> int | None:
    """Bits per weight asked for; raises `UserError` where bitsandbytes is missing."""
    if in_8 and in_4:
        raise UserError("--load_in_8bit and --load_in_4bit exclude each other: give only one")
    bits = 8 if in_8 else 4 if in_4 else None
    if bits is not None and find_spec("bitsandbytes") is None:
        raise UserError(
            f"--load_in_{bits}bit needs the package bitsandbytes: pip install bitsandbytes"
        )
    return bits


def _check_width(name: str, config: Any, bits: int | None) -> None:
    width = getattr(config.get_text_config(decoder=True), "hidden_size", FOUR_BIT_BLOCK)
    if bits == 4 and width % FOUR_BIT_BLOCK:
        raise UserError(
            f"model '{name}' is {width} wide: 4-bit weights need a multiple of {FOUR_BIT_BLOCK}, "
            "take --load_in_8bit"
        )


def _quantised(bits: int, dtype: str | torch.dtype) -> Any:
    """Of 4-bit weights (NF4) the products are in the model's own type."""
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = None if dtype == "auto" else dtype
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
    )


def _require_decoder(path: str, model: Any, missing: Collection[str]) -> None:
    """transformers fills missing weights with random ones: not in a decoder that is studied."""
    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    lacking = sorted(key for key in missing if key.startswith(prefix))
    if lacking:
        raise UserError(
            f"model '{path}' lacks {len(lacking)} weights of its decoder, {lacking[0]} first: the "
            f"checkpoint is incomplete or of another architecture ({WAY_OUT})"
        )
