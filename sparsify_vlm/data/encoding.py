"""Samples to model inputs: the processor over the whole batch, padding, cutting, answers.

Every key the processor returns is kept (Gemma 3 without `token_type_ids` and Qwen2.5-VL without
`mm_token_type_ids` run, and give other logits). It never truncates: what is too long is cut here,
and only if no image token is lost. Rows without images bypass the processor, since not all of them
take a batch in which only some rows show an image, and are put between its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsify_vlm.data.images import BadImage, BadSample
from sparsify_vlm.data.prompts import Prompt, Prompter
from sparsify_vlm.data.rows import Sample
from sparsify_vlm.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from sparsify_vlm.models import LoadedModel

TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")


@dataclass
class EncodedBatch:
    """A batch as the model takes it, on the CPU. A batch without samples has no inputs.

    Attributes:
        inputs: what the processor returned; `input_ids` and `attention_mask` are [B, S].
        samples: the samples, in the order of the rows.
        number: its number among the global batches, where it is one of `batches`.
    """

    inputs: dict[str, Tensor]
    samples: list[Sample]
    number: int = field(default=0, kw_only=True)
    _prompter: Prompter | None = field(default=None, repr=False)
    _prompts: list[Prompt | None] = field(default_factory=list, repr=False)
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
        The answer starts where the tokens of the prompt, tokenised alone, end.

        Raises:
            UserError: the tokens before the answer change when the answer follows, so that there is
                no such place.
        """
        if self._prompter is None:
            return None
        mask = torch.zeros_like(self.inputs["input_ids"], dtype=torch.bool)
        for row, (sample, prompt) in enumerate(zip(self.samples, self._prompts, strict=True)):
            if sample.answer is None or prompt is None:
                continue
            if prompt.suffix is not None:
                mask[row] = self.inputs["token_type_ids"][row] == 1
            else:
                start, stop = self._answer(self._prompter, sample, prompt.text)
                mask[row, self._lengths[row] - start : self._lengths[row] - stop] = True
        return mask & self.inputs["attention_mask"].bool()

    def _answer(self, prompter: Prompter, sample: Sample, text: str) -> tuple[int, int]:
        """How far from the row's end the answer starts and stops, in tokens.

        Counted from the end, where image tokens, which the processor multiplies, do not come.
        """
        prompt = prompter.ids(prompter.render(sample.without_answer()).text)
        ids = prompter.ids(text)
        if ids[: len(prompt)] != prompt:
            raise UserError(
                f"{sample.id}: the chat template's tokens before the answer differ with and "
                "without it, so its tokens cannot be told from the prompt's"
            )
        tail = ids[len(prompt) :]
        special = set(prompter.tokens.all_special_ids)
        stop = next((i + 1 for i, token in enumerate(tail) if token in special), len(tail))
        return len(tail), len(tail) - stop


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
    prompter: Prompter | None = None,
) -> EncodedBatch:
    """`encode` of samples whose images are decoded already, one list of images per sample.

    `prompter` is the model's, kept by callers with many batches: it remembers what it rendered.
    """
    prompter = prompter or Prompter.of(loaded)
    samples = list(samples) if with_answer else [s.without_answer() for s in samples]
    prompts = [None if s.input_ids is not None else prompter.render(s) for s in samples]
    _check_tokens(loaded, prompter, samples, prompts)
    inputs = _process(prompter, samples, prompts, images)
    lengths = inputs["attention_mask"].sum(dim=1).tolist()
    limit = min(ctx_len, prompter.tokens.model_max_length)
    inputs = _cut(loaded, samples, inputs, lengths, limit, with_answer)
    if not with_answer:
        return EncodedBatch(_to_the_right(inputs, lengths), samples)
    return EncodedBatch(inputs, samples, prompter, prompts, lengths)


def _check_tokens(
    loaded: LoadedModel,
    prompter: Prompter,
    samples: Sequence[Sample],
    prompts: Sequence[Prompt | None],
) -> None:
    """Refuse tokens of another model, and text that would be taken for an image."""
    from sparsify_vlm.models.roles import image_token_id

    image_id = image_token_id(loaded.config)
    n_tokens = loaded.model.get_input_embeddings().num_embeddings
    for sample, prompt in zip(samples, prompts, strict=True):
        if prompt is None:
            ids = sample.input_ids or ()
            if not 0 <= min(ids) <= max(ids) < n_tokens:
                strange = max(ids) if min(ids) >= 0 else min(ids)
                raise BadSample(
                    sample.id,
                    f"token {strange} is not among the {n_tokens} of {loaded.name}; it was "
                    "tokenised for another model",
                )
            found = sum(token == image_id for token in ids)
        else:
            found = f"{prompt.text}{prompt.suffix}".count(prompter.image_token or "\0")
        if found != len(sample.images):
            raise BadSample(
                sample.id,
                f"its text and template hold the image token {prompter.image_token} {found} times "
                f"for {len(sample.images)} images",
            )


def _process(
    prompter: Prompter,
    samples: Sequence[Sample],
    prompts: Sequence[Prompt | None],
    images: Sequence[list[Image]],
) -> dict[str, Tensor]:
    """The batch, right-padded: rows with images by the processor, the others between them."""
    rows = {
        i: (sample, prompt, images[i])
        for i, (sample, prompt) in enumerate(zip(samples, prompts, strict=True))
        if images[i] and prompt is not None
    }
    shown = list(rows)
    inputs = _process_shown(prompter, list(rows.values())) if rows else {}
    if len(shown) == len(samples):
        return inputs
    plain = {
        i: _plain_row(prompter, sample, prompt)
        for i, (sample, prompt) in enumerate(zip(samples, prompts, strict=True))
        if i not in rows
    }
    return _between(prompter, shown, inputs, plain)


def _process_shown(
    prompter: Prompter, rows: list[tuple[Sample, Prompt, list[Image]]]
) -> dict[str, Tensor]:
    """The rows with images. Raises `BadSample` for the first that the processor refuses."""
    try:
        return _call(prompter, [prompt for _, prompt, _ in rows], [shown for *_, shown in rows])
    except ValueError as error:  # an image's proportions, for example
        if len(rows) == 1:
            raise BadSample(rows[0][0].id, f"the model's processor refuses it: {error}") from None
        for row in rows:
            _process_shown(prompter, [row])
        raise


def _call(
    prompter: Prompter, prompts: Sequence[Prompt], images: Sequence[list[Image]]
) -> dict[str, Tensor]:
    if prompter.tokens.pad_token is None:
        prompter.tokens.pad_token = prompter.tokens.eos_token
    adds = prompter.adds_special_tokens(prompts[0].text)
    return (prompter.recurring or prompter.whole)(prompts, images, adds)


@dataclass(frozen=True)
class _Row:
    """The tokens of a row without images; `prefix` of them are read in both directions."""

    ids: Sequence[int]
    prefix: int


def _plain_row(prompter: Prompter, sample: Sample, prompt: Prompt | None) -> _Row:
    if prompt is None:
        return _Row(sample.input_ids or (), 0)
    if not prompter.takes_suffix or sample.text is not None:
        return _Row(prompter.ids(prompt.text), 0)
    prefix = prompter.ids(f"{prompter.tokens.bos_token}{prompt.text}\n")
    answer = prompter.tokens(prompt.suffix or "", add_special_tokens=False)["input_ids"]
    return _Row([*prefix, *answer], len(prefix))


def _between(
    prompter: Prompter, shown: list[int], inputs: dict[str, Tensor], plain: dict[int, _Row]
) -> dict[str, Tensor]:
    """The processor's rows `shown` and the rows `plain` as one right-padded batch.

    Token types are 0 for text, except that 1 marks what is read causally where there is a prefix.
    """
    width = max(len(row.ids) for row in plain.values())
    if inputs:
        shape = inputs["input_ids"].shape
        keys = [key for key, value in inputs.items() if value.shape == shape]
        width = max(width, shape[1])
    else:
        keys = ["input_ids", "attention_mask", *_type_keys(prompter)]
    merged = dict(inputs)
    for key in keys:
        fill = (prompter.tokens.pad_token_id or 0) if key == "input_ids" else 0
        rows = torch.full((len(shown) + len(plain), width), fill, dtype=torch.long)
        if inputs:
            rows[shown, : shape[1]] = inputs[key]
        for i, row in plain.items():
            if key == "input_ids":
                rows[i, : len(row.ids)] = torch.tensor(row.ids)
            elif key == "attention_mask":
                rows[i, : len(row.ids)] = 1
            elif prompter.takes_suffix:
                rows[i, row.prefix : len(row.ids)] = 1
        merged[key] = rows
    return merged


def _type_keys(prompter: Prompter) -> list[str]:
    """What a VLM's processor tells about each token beside its id."""
    if prompter.image_token is None:
        return []
    return [name for name in TOKEN_TYPES if name in prompter.processor.model_input_names]


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
