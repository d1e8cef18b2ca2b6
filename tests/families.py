"""Tiny random models of every supported family, with their processors, built without any download.

    folder = build("qwen2_5_vl", tmp_path)        # as `save_pretrained` leaves it
    loaded = load("qwen2_5_vl", tmp_path)         # the same, through `load_model`
    loaded = shared("qwen2_5_vl")                 # one for all tests: leave it as it is
    inputs = example(loaded)                      # two samples, images in VLMs, padded

The weights are random but not small, so that every part of a model matters for its logits.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers as tf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from sparsify_vlm.models import LoadedModel, load_model
from sparsify_vlm.models.processors import image_only

N_LAYERS, D_MODEL = 3, 32
WORDS = "what colour is the thing in this picture ? it red green blue and a User: Assistant: . :"


@dataclass(frozen=True)
class Family:
    """How to build one family; `image` is what stands for an image in its prompts."""

    build: Callable[[], tuple[Any, Any]]
    image: str = ""
    tokens: tuple[str, ...] = ()
    """Its processor's special tokens."""


def tokenizer(*special: str, bos: str | None = "<s>", **named: str) -> Any:
    """A word-level tokenizer; `named` tokens become attributes (`image_token="<image>"`)."""
    base = ["<pad>", "</s>", "<unk>", *([bos] if bos else [])]
    vocabulary = list(dict.fromkeys([*base, *named.values(), *special, "\n", *WORDS.split()]))
    ids = {word: i for i, word in enumerate(vocabulary)}
    inner = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n", "isolated")]
    )
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, ids[bos])]
        )
    made = tf.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        bos_token=bos,
        extra_special_tokens=named,
    )
    made.add_tokens([tf.AddedToken(t, special=True, normalized=False) for t in special])
    return made


def text(kind: Any, tok: Any, **extra: Any) -> Any:
    """A text decoder's config of class `kind`."""
    sizes = {
        "hidden_size": D_MODEL,
        "intermediate_size": 48,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
    }
    ids = {f"{n}_token_id": getattr(tok, f"{n}_token_id") for n in ("bos", "eos", "pad")}
    return kind(vocab_size=len(tok), **{**sizes, **ids, **extra})


def vision(kind: Any, image_size: int = 32, patch_size: int = 8, **extra: Any) -> Any:
    """A vision tower's config of class `kind`."""
    return kind(
        hidden_size=D_MODEL,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=patch_size,
        **extra,
    )


def _square(side: int) -> dict[str, dict[str, int]]:
    return {"size": {"height": side, "width": side}}


def _llava() -> tuple[Any, Any]:
    tok = tokenizer(image_token="<image>")
    config = tf.LlavaConfig(
        vision_config=vision(tf.CLIPVisionConfig, projection_dim=D_MODEL),
        text_config=text(tf.LlamaConfig, tok),
        image_token_index=tok.image_token_id,
        vision_feature_layer=-1,
    )
    side = _square(32)["size"]
    processor = tf.LlavaProcessor(
        tf.CLIPImageProcessorPil(size=side, crop_size=side),
        tok,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return tf.LlavaForConditionalGeneration(config), processor


PINPOINTS = [[32, 64], [64, 32], [64, 64]]


def _llava_next() -> tuple[Any, Any]:
    tok = tokenizer(image_token="<image>")
    config = tf.LlavaNextConfig(
        vision_config=vision(tf.CLIPVisionConfig, projection_dim=D_MODEL),
        text_config=text(tf.MistralConfig, tok, sliding_window=None),
        image_token_index=tok.image_token_id,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
    )
    images = tf.LlavaNextImageProcessorPil(
        size={"shortest_edge": 32}, crop_size=_square(32)["size"], image_grid_pinpoints=PINPOINTS
    )
    processor = tf.LlavaNextProcessor(
        images,
        tok,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return tf.LlavaNextForConditionalGeneration(config), processor


def _without_video(name: str) -> Any:
    """The processor class as `load_model` builds it: for images only."""
    return image_only(name) or getattr(tf, name)


def _llava_onevision() -> tuple[Any, Any]:
    tok = tokenizer(image_token="<image>", video_token="<video>", bos=None)
    points = [[32 * i, 32 * j] for i in (1, 2, 3) for j in (1, 2, 3)]
    config = tf.LlavaOnevisionConfig(
        vision_config=vision(tf.SiglipVisionConfig, vision_use_head=False),
        text_config=text(tf.Qwen2Config, tok),
        image_token_index=tok.image_token_id,
        video_token_index=tok.video_token_id,
        image_grid_pinpoints=points,
        vision_aspect_ratio="anyres_max_2",
    )
    images = tf.LlavaOnevisionImageProcessorPil(**_square(32), image_grid_pinpoints=points)
    processor = _without_video("LlavaOnevisionProcessor")(
        images,
        tok,
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_2",
    )
    return tf.LlavaOnevisionForConditionalGeneration(config), processor


_TOWER = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": D_MODEL,
}
_QWEN = ("<|vision_start|>", "<|vision_end|>", "<|im_start|>", "<|im_end|>")


def _qwen(name: str, vision_config: Any, text_kind: Any) -> tuple[Any, Any]:
    tok = tokenizer(*_QWEN, image_token="<|image_pad|>", video_token="<|video_pad|>", bos=None)
    start, end = tok.convert_tokens_to_ids(list(_QWEN[:2]))
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    config = getattr(tf, f"{name}Config")(
        vision_config=vision_config,
        text_config=text(text_kind, tok, rope_parameters=rope).to_dict(),
        image_token_id=tok.image_token_id,
        video_token_id=tok.video_token_id,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    images = tf.Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 2048}
    )
    processor = _without_video(f"{name}Processor")(images, tok)
    return getattr(tf, f"{name}ForConditionalGeneration")(config), processor


def _qwen2_5_vl() -> tuple[Any, Any]:
    tower = _TOWER | {"window_size": 16, "fullatt_block_indexes": [1]}
    return _qwen("Qwen2_5_VL", tower, tf.Qwen2_5_VLTextConfig)


def _qwen3_vl() -> tuple[Any, Any]:
    tower = _TOWER | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    return _qwen("Qwen3VL", tower, tf.Qwen3VLTextConfig)


def _glm4v() -> tuple[Any, Any]:
    tokens = ("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")
    tok = tokenizer(*tokens, image_token="<|image|>", video_token="<|video|>", bos=None)
    start, end, *_ = tok.convert_tokens_to_ids(list(tokens))
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    rope["partial_rotary_factor"] = 1.0
    config = tf.Glm4vConfig(
        vision_config=_TOWER | {"image_size": 32, "num_heads": 4},
        text_config=text(tf.Glm4vTextConfig, tok, rope_parameters=rope).to_dict(),
        image_token_id=tok.image_token_id,
        video_token_id=tok.video_token_id,
        image_start_token_id=start,
        image_end_token_id=end,
    )
    size = {"shortest_edge": 128, "longest_edge": 8192}
    images = tf.Glm4vImageProcessorPil(patch_size=4, merge_size=2, size=size)
    processor = _without_video("Glm4vProcessor")(images, tok)
    return tf.Glm4vForConditionalGeneration(config), processor


def _gemma3() -> tuple[Any, Any]:
    tok = tokenizer(
        image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>"
    )
    config = tf.Gemma3Config(
        vision_config=vision(tf.SiglipVisionConfig, vision_use_head=False),
        text_config=text(tf.Gemma3TextConfig, tok, sliding_window=16),
        mm_tokens_per_image=4,
        image_token_index=tok.image_token_id,
        boi_token_index=tok.boi_token_id,
        eoi_token_index=tok.eoi_token_id,
    )
    images = tf.Gemma3ImageProcessorPil(**_square(32))
    return tf.Gemma3ForConditionalGeneration(config), tf.Gemma3Processor(
        images, tok, image_seq_length=4
    )


def _paligemma(kind: Any) -> tuple[Any, Any]:
    tok = tokenizer(image_token="<image>")
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    images = tf.SiglipImageProcessorPil(**_square(32))
    images.image_seq_length = 16
    processor = tf.PaliGemmaProcessor(images, tok)
    config = tf.PaliGemmaConfig(
        vision_config=vision(tf.SiglipVisionConfig, vision_use_head=False),
        text_config=text(kind, tok),
        image_token_index=tok.image_token_id,
        projection_dim=D_MODEL,
        hidden_size=D_MODEL,
    )
    return tf.PaliGemmaForConditionalGeneration(config), processor


def _internvl() -> tuple[Any, Any]:
    tok = tokenizer(
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
        bos=None,
    )
    config = tf.InternVLConfig(
        vision_config=vision(tf.InternVLVisionConfig),
        text_config=text(tf.Qwen2Config, tok),
        image_token_id=tok.context_image_token_id,
        image_seq_length=4,
    )
    images = tf.GotOcr2ImageProcessorPil(**_square(32), crop_to_patches=True, max_patches=4)
    processor = _without_video("InternVLProcessor")(images, tok, image_seq_length=4)
    return tf.InternVLForConditionalGeneration(config), processor


_TILES = tuple(f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5))


def _smolvlm(name: str) -> tuple[Any, Any]:
    tok = tokenizer(
        *("<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *_TILES),
        image_token="<image>",
    )
    config = getattr(tf, f"{name}Config")(
        vision_config=vision(getattr(tf, f"{name}VisionConfig")).to_dict(),
        text_config=text(tf.LlamaConfig, tok).to_dict(),
        image_token_id=tok.image_token_id,
        scale_factor=2,
    )
    images = getattr(tf, f"{name}ImageProcessorPil")(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 32}
    )
    kind = _without_video(f"{name}Processor")
    video = [None] if name == "SmolVLM" else []
    processor = kind(images, tok, *video, image_seq_len=4)
    return getattr(tf, f"{name}ForConditionalGeneration")(config), processor


def _pixtral() -> tuple[Any, Any]:
    tok = tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    config = tf.LlavaConfig(
        vision_config=vision(tf.PixtralVisionConfig, image_size=64, patch_size=8),
        text_config=text(tf.MistralConfig, tok, sliding_window=None),
        image_token_index=tok.convert_tokens_to_ids("[IMG]"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    images = tf.PixtralImageProcessorPil(patch_size=8, size={"longest_edge": 40})
    processor = _without_video("PixtralProcessor")(images, tok, patch_size=8)
    return tf.LlavaForConditionalGeneration(config), processor


def _mistral3() -> tuple[Any, Any]:
    tok = tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    config = tf.Mistral3Config(
        vision_config=vision(tf.PixtralVisionConfig, image_size=64, patch_size=4),
        text_config=text(tf.MistralConfig, tok, sliding_window=None),
        image_token_index=tok.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
    )
    images = tf.PixtralImageProcessorPil(patch_size=8, size={"longest_edge": 40})
    processor = _without_video("PixtralProcessor")(images, tok, patch_size=4, spatial_merge_size=2)
    return tf.Mistral3ForConditionalGeneration(config), processor


def _causal(model: Any, config: Any, **extra: Any) -> tuple[Any, Any]:
    tok = tokenizer()
    return model(text(config, tok, **extra)), tok


def _gpt2() -> tuple[Any, Any]:
    tok = tokenizer()
    config = tf.GPT2Config(
        vocab_size=len(tok),
        n_embd=D_MODEL,
        n_layer=N_LAYERS,
        n_head=4,
        n_positions=512,
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
    )
    return tf.GPT2LMHeadModel(config), tok


FAMILIES: dict[str, Family] = {
    "llava": Family(_llava, "<image>"),
    "llava_next": Family(_llava_next, "<image>"),
    "llava_onevision": Family(_llava_onevision, "<image>"),
    "qwen2_5_vl": Family(_qwen2_5_vl, "<|vision_start|><|image_pad|><|vision_end|>"),
    "qwen3_vl": Family(_qwen3_vl, "<|vision_start|><|image_pad|><|vision_end|>"),
    "glm4v": Family(_glm4v, "<|begin_of_image|><|image|><|end_of_image|>"),
    "gemma3": Family(_gemma3, "<start_of_image>"),
    "paligemma": Family(lambda: _paligemma(tf.GemmaConfig), "<image>"),
    "paligemma2": Family(lambda: _paligemma(tf.Gemma2Config), "<image>"),
    "internvl": Family(_internvl, "<IMG_CONTEXT>"),
    "smolvlm": Family(lambda: _smolvlm("SmolVLM"), "<image>"),
    "idefics3": Family(lambda: _smolvlm("Idefics3"), "<image>"),
    "mistral3": Family(_mistral3, "[IMG]"),
    "pixtral": Family(_pixtral, "[IMG]"),
    "llama": Family(lambda: _causal(tf.LlamaForCausalLM, tf.LlamaConfig)),
    "gpt2": Family(_gpt2),
    "gemma2": Family(lambda: _causal(tf.Gemma2ForCausalLM, tf.Gemma2Config)),
    "qwen3": Family(lambda: _causal(tf.Qwen3ForCausalLM, tf.Qwen3Config)),
    "granite": Family(
        lambda: _causal(tf.GraniteForCausalLM, tf.GraniteConfig, residual_multiplier=0.3)
    ),
    "olmo2": Family(lambda: _causal(tf.Olmo2ForCausalLM, tf.Olmo2Config)),
}
VLMS = [name for name, family in FAMILIES.items() if family.image]
TEXTS = [name for name, family in FAMILIES.items() if not family.image]


def randomise(model: Any, seed: int = 0) -> None:
    """Weights large enough that every module matters; norms stay near their initial scale."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                fan_in = max(parameter[0].numel(), 1)
                parameter.copy_(noise * min(0.5, fan_in**-0.5))
            else:
                parameter.add_(0.1 * noise)


def build(name: str, folder: Path, seed: int = 0) -> Path:
    """Save the family's model and processor into `folder / name`."""
    torch.manual_seed(seed)
    model, processor = FAMILIES[name].build()
    randomise(model, seed)
    model.save_pretrained(folder / name)
    processor.save_pretrained(folder / name)
    return folder / name


def load(name: str, folder: Path, seed: int = 0, **options: Any) -> LoadedModel:
    """The family's model through `load_model`, on the CPU in float32."""
    path = build(name, folder, seed)
    return load_model(str(path), "cpu", **options)


@cache
def shared(name: str) -> LoadedModel:
    """The family's model, loaded once for a run. Who changes it changes it back."""
    with TemporaryDirectory() as folder:
        return load(name, Path(folder))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def example(loaded: LoadedModel, side: str = "right") -> dict[str, Any]:
    """Two samples of different length, each with a picture of its own shape in a VLM."""
    image = FAMILIES[Path(loaded.name).name].image
    prompts = [
        f"{image} what colour is the thing in this picture ? it is red .",
        f"{image} what is the thing ?",
    ]
    loaded.tokenizer.padding_side = side
    options: dict[str, Any] = {"padding": True, "return_tensors": "pt", "padding_side": side}
    if not image:
        return dict(loaded.processor([p.strip() for p in prompts], **options))
    images = [[picture(40, 24, seed=1)], [picture(24, 32, seed=2)]]
    return dict(loaded.processor(images=images, text=prompts, **options))
