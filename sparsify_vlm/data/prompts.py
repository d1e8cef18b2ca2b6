"""Samples to model inputs: chat template, the processor over the whole batch, padding, answers.

The processor sees all chat samples of a batch at once and every key it returns is kept (Gemma 3
without `token_type_ids` and Qwen2.5-VL without `mm_token_type_ids` run, and give other logits). It
never truncates: what is too long is cut here, and only if no image token is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsify_vlm.data.images import BadImage, BadSample
from sparsify_vlm.data.rows import Sample, Turn
from sparsify_vlm.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from sparsify_vlm.models import LoadedModel


@dataclass
class EncodedBatch:
    """A batch as the model takes it, on the CPU. A batch without samples has no inputs.

    Attributes:
        inputs: what the processor returned; `input_ids` and `attention_mask` are [B, S].
        samples: the samples, in the order of the rows.
    """

    inputs: dict[str, Tensor]
    samples: list[Sample]
    _texts: list[str | None] = field(default_factory=list, repr=False)
    _tokenizer: Any = field(default=None, repr=False)
    _lengths: list[int] = field(default_factory=list, repr=False)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def ids(self) -> list[str]:
        """The samples' ids."""
        return [sample.id for sample in self.samples]

    @cached_property
    def answer_mask(self) -> Tensor | None:
        """bool [B, S]: the tokens of each row's last answer, its end-of-turn token included.

        None if the batch was encoded without answers. Rows without an answer are False throughout.
        The answer starts where the text up to it, tokenised alone, ends.

        Raises:
            UserError: the tokens before the answer change when the answer follows, so that there is
                no such place.
        """
        if not self._texts:
            return None
        mask = torch.zeros_like(self.inputs["input_ids"], dtype=torch.bool)
        for row, (sample, text) in enumerate(zip(self.samples, self._texts, strict=True)):
            if text is not None and sample.answer is not None:
                n, end = self._lengths[row], self._answer_end(sample, text)
                mask[row, n - end[0] : n - end[1]] = True
        return mask

    def _answer_end(self, sample: Sample, text: str) -> tuple[int, int]:
        """How far from the row's end the answer starts and stops, in tokens."""
        tokenizer = self._tokenizer
        before = _render(tokenizer, sample.without_answer(), generation=True)
        ids, prompt = (_token_ids(tokenizer.tokens, t) for t in (text, before))
        if ids[: len(prompt)] != prompt:
            raise UserError(
                f"{sample.id}: the chat template's tokens before the answer differ with and "
                "without it, so its tokens cannot be told from the prompt's"
            )
        tail = ids[len(prompt) :]
        special = set(tokenizer.tokens.all_special_ids)
        stop = next((i + 1 for i, token in enumerate(tail) if token in special), len(tail))
        return len(tail), len(tail) - stop


@dataclass(frozen=True)
class Prompter:
    """What renders and tokenises: a VLM's processor or a text model's tokenizer."""

    processor: Any
    tokens: Any
    image_token: str | None

    @property
    def has_template(self) -> bool:
        """Whether the model brings a chat template of its own."""
        return bool(
            getattr(self.processor, "chat_template", None)
            or getattr(self.tokens, "chat_template", None)
        )


def prompter(loaded: LoadedModel) -> Prompter:
    """The model's `Prompter`."""
    image_token = getattr(loaded.processor, "image_token", None) if loaded.is_vlm else None
    return Prompter(loaded.processor, loaded.tokenizer, image_token)


def _token_ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=_wants_bos(tokenizer, text))["input_ids"]
    return ids


def _wants_bos(tokenizer: Any, text: str) -> bool:
    """Whether the tokenizer should add its special tokens: not if the template wrote BOS."""
    return not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))


def _render(prompter: Prompter, sample: Sample, *, generation: bool) -> str:
    """A sample's text with one image token per image.

    `generation` opens the assistant's turn at the end. Samples with an answer end with an
    end-of-turn token: EOS, if the template writes none.
    """
    if sample.text is not None:
        return sample.text
    if not prompter.has_template:
        return _llava_prompt(prompter, sample.turns, generation)
    messages = [_message(prompter, turn) for turn in sample.turns]
    text: str = prompter.processor.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=generation
    )
    if not generation and sample.answer is not None:
        text = _closed(prompter, text, sample.answer)
    return text


def _closed(prompter: Prompter, text: str, answer: str) -> str:
    """LLaVA's own template leaves out the EOS after the answer that the model learnt to give."""
    tail = text[text.rfind(answer.strip()) + len(answer.strip()) :]
    if any(token in tail for token in prompter.tokens.all_special_tokens):
        return text
    return text.rstrip() + (prompter.tokens.eos_token or "")


def _message(prompter: Prompter, turn: Turn) -> dict[str, Any]:
    if prompter.image_token is None:
        return {"role": turn.role, "content": turn.text}
    content: list[dict[str, str]] = [{"type": "image"}] * turn.n_images
    if turn.text or not content:
        content = [*content, {"type": "text", "text": turn.text}]
    return {"role": turn.role, "content": content}


def _llava_prompt(prompter: Prompter, turns: Sequence[Turn], generation: bool) -> str:
    """LLaVA-1.5's prompt, for models that bring no chat template."""
    text = ""
    for turn in turns:
        images = f"{prompter.image_token}\n" * turn.n_images
        if turn.role == "assistant":
            text += f"ASSISTANT: {turn.text}{prompter.tokens.eos_token or ''}"
        else:
            text += {"user": "USER: ", "system": ""}[turn.role] + f"{images}{turn.text} "
    return text + "ASSISTANT:" if generation else text


def encode(
    loaded: LoadedModel, samples: Sequence[Sample], ctx_len: int, *, with_answer: bool = True
) -> EncodedBatch:
    """Decode, render and tokenise samples as one batch.

    Args:
        loaded: whose processor (or tokenizer) is used.
        samples: at least one.
        ctx_len: tokens per row at most, also limited by the tokenizer's own maximum.
        with_answer: True pads on the right and keeps the answers; False pads on the left and stops
            where the assistant's turn opens, for `generate`.

    Raises:
        BadSample: an image cannot be decoded, or does not fit into `ctx_len`; a prompt for
            generation is longer than `ctx_len`; text contains the model's image token.
    """
    images = [decode_images(loaded, sample) for sample in samples]
    return encode_decoded(loaded, samples, images, ctx_len, with_answer=with_answer)


def decode_images(
    loaded: LoadedModel, sample: Sample, max_pixels: int | None = None
) -> list[Image]:
    """A sample's images as RGB. Raises `BadSample`."""
    if sample.images and not loaded.is_vlm:
        raise BadSample(sample.id, f"has an image, and {loaded.name} reads text only")
    try:
        limit = {} if max_pixels is None else {"max_pixels": max_pixels}
        return [image.decode(**limit) for image in sample.images]
    except BadImage as error:
        raise BadSample(sample.id, str(error)) from None


def encode_decoded(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    images: Sequence[list[Image]],
    ctx_len: int,
    *,
    with_answer: bool = True,
) -> EncodedBatch:
    """`encode` of samples whose images are decoded already, one list of images per sample."""
    prompt = prompter(loaded)
    samples = list(samples) if with_answer else [s.without_answer() for s in samples]
    texts: list[str | None] = [
        None
        if sample.input_ids is not None
        else _render(prompt, sample, generation=sample.kind == "chat" and sample.answer is None)
        for sample in samples
    ]
    _refuse_image_tokens(loaded, prompt, samples, texts)
    inputs = _process(prompt, samples, texts, images)
    lengths = inputs["attention_mask"].sum(dim=1).tolist()
    limit = min(ctx_len, prompt.tokens.model_max_length)
    inputs = _cut(loaded, samples, inputs, lengths, limit, with_answer)
    if not with_answer:
        return EncodedBatch(_to_the_right(inputs, lengths), samples)
    return EncodedBatch(inputs, samples, texts, prompt, lengths)


def _refuse_image_tokens(
    loaded: LoadedModel, prompt: Prompter, samples: Sequence[Sample], texts: Sequence[str | None]
) -> None:
    """A text that happens to contain the image token would be taken for an image."""
    from sparsify_vlm.models.roles import image_token_id

    if prompt.image_token is None:
        return
    image_id = image_token_id(loaded.config)
    for sample, text in zip(samples, texts, strict=True):
        if text is None:
            found = sum(token == image_id for token in sample.input_ids or ())
        else:
            found = text.count(prompt.image_token)
        if found != len(sample.images):
            raise BadSample(
                sample.id,
                f"its text and template hold the image token {prompt.image_token} {found} times "
                f"for {len(sample.images)} images",
            )


def _process(
    prompt: Prompter,
    samples: Sequence[Sample],
    texts: Sequence[str | None],
    images: Sequence[list[Image]],
) -> dict[str, Tensor]:
    """The batch, right-padded: rows with images by the processor, put between the others."""
    shown = [i for i, found in enumerate(images) if found]
    inputs: dict[str, Tensor] = {}
    if shown:
        inputs = _call(prompt, [texts[i] or "" for i in shown], [list(images[i]) for i in shown])
    if len(shown) == len(samples):
        return inputs
    plain = {
        i: list(sample.input_ids) if text is None else _token_ids(prompt.tokens, text)
        for i, (sample, text) in enumerate(zip(samples, texts, strict=True))
        if i not in set(shown)
    }
    return _between(prompt, len(samples), shown, inputs, plain)


def _call(prompt: Prompter, texts: list[str], images: list[list[Image]]) -> dict[str, Tensor]:
    if prompt.tokens.pad_token is None:
        prompt.tokens.pad_token = prompt.tokens.eos_token
    batch = prompt.processor(
        text=texts,
        images=images,
        padding=True,
        padding_side="right",
        return_tensors="pt",
        add_special_tokens=_wants_bos(prompt.tokens, texts[0]),
    )
    return dict(batch)


def _between(
    prompt: Prompter,
    n_rows: int,
    shown: list[int],
    inputs: dict[str, Tensor],
    plain: dict[int, list[int]],
) -> dict[str, Tensor]:
    """The processor's rows `shown` and the rows of ids `plain` as one right-padded batch.

    What else the processor gives for each token is 0 for text in every model that has it.
    """
    if inputs:
        shape = inputs["input_ids"].shape
        keys = {key: value.dtype for key, value in inputs.items() if value.shape == shape}
        width = max(shape[1], *map(len, plain.values()))
    else:
        keys = dict.fromkeys(["input_ids", "attention_mask", *_type_keys(prompt)], torch.long)
        width = max(map(len, plain.values()))
    merged = dict(inputs)
    for key, dtype in keys.items():
        fill = (prompt.tokens.pad_token_id or 0) if key == "input_ids" else 0
        rows = torch.full((n_rows, width), fill, dtype=dtype)
        if inputs:
            rows[shown, : shape[1]] = inputs[key]
        for i, ids in plain.items():
            if key == "input_ids":
                rows[i, : len(ids)] = torch.tensor(ids, dtype=dtype)
            elif key == "attention_mask":
                rows[i, : len(ids)] = 1
        merged[key] = rows
    return merged


def _type_keys(prompt: Prompter) -> list[str]:
    """What a VLM's processor tells about each token beside its id."""
    if prompt.image_token is None:
        return []
    names = prompt.processor.model_input_names
    return [name for name in ("token_type_ids", "mm_token_type_ids") if name in names]


def _cut(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    inputs: dict[str, Tensor],
    lengths: Sequence[int],
    limit: int,
    with_answer: bool,
) -> dict[str, Tensor]:
    """Keep `limit` tokens of every row. Raises `BadSample` if that is not harmless."""
    from sparsify_vlm.models import Role

    shape = inputs["input_ids"].shape
    if shape[1] <= limit:
        return inputs
    lost = (loaded.stack.roles(inputs)[:, limit:] == Role.IMAGE).sum(dim=1).tolist()
    for sample, length, n_lost in zip(samples, lengths, lost, strict=True):
        if n_lost:
            raise BadSample(
                sample.id,
                f"{n_lost} image tokens lie beyond {limit} tokens; the sample has {length}: raise "
                "--ctx_len",
            )
        if length > limit and not with_answer:
            raise BadSample(
                sample.id, f"its prompt has {length} tokens, more than {limit}: raise --ctx_len"
            )
    return {k: v[:, :limit] if v.shape == shape else v for k, v in inputs.items()}


def _to_the_right(inputs: dict[str, Tensor], lengths: Sequence[int]) -> dict[str, Tensor]:
    """Right-padded rows as left-padded ones."""
    shape = inputs["input_ids"].shape
    shift = shape[1] - torch.tensor(lengths)
    order = (torch.arange(shape[1]) - shift[:, None]) % shape[1]
    return {k: v.gather(1, order) if v.shape == shape else v for k, v in inputs.items()}
