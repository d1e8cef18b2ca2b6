"""The embedded pair's architecture: configurations, word-level tokenizer and processor.

`tiny-llava` is transformers' own LlavaForConditionalGeneration and `tiny-llama` the
LlamaForCausalLM it was tuned from, at 96 dimensions. `scripts/train_tiny_llava.py` trains them; the
results ship as `sparsify_vlm/models/checkpoints/`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsify_vlm.data.shapes import COLOURS, IMAGE_SIZE, PATCH, SHAPES
from sparsify_vlm.data.shapes_questions import NUMBERS
from sparsify_vlm.data.shapes_scenes import PLACES

if TYPE_CHECKING:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

D_MODEL = 96
N_LAYERS = 8
MAX_POSITIONS = 256
PAD, BOS, EOS, UNKNOWN, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<image>"
USER, ASSISTANT, NEWLINE = "USER:", "ASSISTANT:", "\n"
IMAGE_MEAN, IMAGE_STD = (0.75, 0.75, 0.75), (0.25, 0.25, 0.25)

# LLaVA-1.5's prompt, "USER: <image>\nquestion ASSISTANT: answer</s>"; the tokenizer adds BOS.
# A message's content is a string or a list of {"type": "text" | "image", …} parts.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% if message['content'] is string %}{% set text = message['content'] %}"
    "{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% set texts = message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% set text = texts | map(attribute='text') | join(' ') %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ text + eos_token }}{% endgeneration %}"
    "{% else %}{{ text + ' ' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

_ASKING = ("what", "colour", "is", "the", "shape", "one", "how", "many", "shapes", "are")
_TELLING = ("there", "a", "an", "at")


def vocabulary() -> list[str]:
    """Every token in the order of its id: special tokens, then the words of the shapes data."""
    places = [word for place in PLACES for word in place.split()]
    words = [*_ASKING, *_TELLING, *COLOURS, *SHAPES, *NUMBERS, "yes", "no", *places]
    marks = [USER, ASSISTANT, NEWLINE, "?", ".", ","]
    return list(dict.fromkeys([PAD, BOS, EOS, UNKNOWN, IMAGE, *marks, *words]))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The word-level tokenizer; puts BOS in front, decodes without spaces before punctuation."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    # Spaces separate and vanish; newlines and punctuation are tokens; "USER:" keeps its colon.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", "removed"),
            pre_tokenizers.Split(Regex(r"[\n?.,]"), "isolated"),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B:1", special_tokens=[(BOS, ids[BOS])]
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        extra_special_tokens={"image_token": IMAGE},
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def build_processor() -> LlavaProcessor:
    """The image processor (Pillow backend) and tokenizer of tiny-llava, as one LlavaProcessor."""
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = CLIPImageProcessorPil(
        size=side, crop_size=side, image_mean=list(IMAGE_MEAN), image_std=list(IMAGE_STD)
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )


def text_config() -> LlamaConfig:
    """The decoder's configuration, that of tiny-llama."""
    from transformers import LlamaConfig

    words = vocabulary()
    return LlamaConfig(
        vocab_size=len(words),
        hidden_size=D_MODEL,
        intermediate_size=256,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        tie_word_embeddings=False,
        pad_token_id=words.index(PAD),
        bos_token_id=words.index(BOS),
        eos_token_id=words.index(EOS),
    )


def vision_config() -> CLIPVisionConfig:
    """The CLIP tower's configuration: 36 patches of 8 × 8 pixels."""
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=D_MODEL,
        intermediate_size=2 * D_MODEL,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=D_MODEL,
    )


def llava_config() -> LlavaConfig:
    """tiny-llava's configuration: the tower's last layer, without CLS, read by the decoder."""
    from transformers import LlavaConfig

    words = vocabulary()
    return LlavaConfig(
        vision_config=vision_config(),
        text_config=text_config(),
        image_token_index=words.index(IMAGE),
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
        image_seq_length=(IMAGE_SIZE // PATCH) ** 2,
    )
