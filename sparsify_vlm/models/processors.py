"""Loading a model's processor, with or without torchvision.

Processors are built to take images and text only: those of Qwen-VL, LLaVA-OneVision, InternVL and
SmolVLM otherwise bring a video processor, which needs torchvision, and so does an import of
Pixtral's. Images are prepared by transformers' default backend: torchvision if it is installed,
else Pillow (their pixels differ in the last bits).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify_vlm.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image


def load_processor(path: str, config: Any, source: Mapping[str, Any]) -> Any:
    """The processor of a vision-language model, the tokenizer of a text model.

    `source` holds revision, token and trust_remote_code. Raises what transformers raises.
    """
    from transformers import AutoProcessor, AutoTokenizer
    from transformers.utils import is_torchvision_available

    if getattr(config, "vision_config", None) is None:
        return AutoTokenizer.from_pretrained(path, **source)
    kind = image_only(_processor_class(path, config, source)) or AutoProcessor
    backend = {} if is_torchvision_available() else {"backend": "pil"}
    return kind.from_pretrained(path, **backend, **source)


def _processor_class(path: str, config: Any, source: Mapping[str, Any]) -> str:
    """The class that the model's files name; else the one of its type."""
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
    from transformers.utils import cached_file

    missing_is_none = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
        "_raise_exceptions_for_gated_repo": False,
    }
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        wanted = {k: v for k, v in source.items() if k != "trust_remote_code"}
        file = cached_file(path, name, **wanted, **missing_is_none)
        if file is not None:
            declared = json.loads(Path(file).read_text(encoding="utf-8")).get("processor_class")
            if declared is not None:
                return declared
    return PROCESSOR_MAPPING_NAMES.get(config.model_type, "")


def image_only(name: str) -> Any | None:
    """The processor class `name` without its video processor; None where it can be used as it is.

    Raises `UserError` where a package is missing that even images need.
    """
    import transformers
    from transformers.utils import is_num2words_available, is_torchvision_available

    if name == "PixtralProcessor" and not is_torchvision_available():
        from sparsify_vlm.models.pixtral import PixtralProcessor

        return PixtralProcessor
    if name == "SmolVLMProcessor" and not is_num2words_available():
        raise UserError("SmolVLM's processor needs the package num2words: pip install num2words")
    whole = getattr(transformers, name, None)
    if whole is None or "video_processor" not in whole.get_attributes():
        return None
    parts = whole.get_attributes()
    place = parts.index("video_processor")
    del parts[place]

    def get_attributes(cls: type) -> list[str]:
        return list(parts)

    def from_args_and_dict(cls: Any, args: Any, processor_dict: Any, **kwargs: Any) -> Any:
        known = {k: v for k, v in processor_dict.items() if k != "video_processor"}
        args = [*args[:place], None, *args[place:]]
        return super(made, cls).from_args_and_dict(args, known, **kwargs)

    methods = {f.__name__: classmethod(f) for f in (get_attributes, from_args_and_dict)}
    made: Any = type(name, (whole,), methods)
    return made


def idle_steps(processor: Any, images: Sequence[Image]) -> dict[str, bool]:
    """Steps of the processor that would leave every one of these images as it is, switched off.

    Known are resizing and cropping of RGB images by transformers' Pillow backend, which resizes
    one image after the other even where its size is the one wanted.
    """
    from transformers.image_processing_backends import PilBackend

    steps = getattr(processor, "image_processor", None)
    sizes = {image.size for image in images if image.mode == "RGB"}
    if len(sizes) != 1 or not isinstance(steps, PilBackend):
        return {}
    ((width, height),) = sizes
    wanted = {"height": height, "width": width}
    off = {}
    for step, name, setting in (
        ("do_resize", "resize", "size"),
        ("do_center_crop", "center_crop", "crop_size"),
    ):
        plain = getattr(type(steps), name) is getattr(PilBackend, name)
        if plain and getattr(steps, step, False) and dict(getattr(steps, setting)) == wanted:
            off[step] = False
    whole = type(steps)._preprocess is PilBackend._preprocess
    return off if whole and all(image.mode == "RGB" for image in images) else {}
