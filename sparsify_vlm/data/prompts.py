"""The text of a sample as the model expects it: its chat template, or a plain stand-in.

- Models with a chat template: the template, the assistant's turn opened for samples without answer.
- Processors that take a `suffix` (PaliGemma): the question as the prefix, read in both directions,
  and the answer as the suffix, read causally; put into one text, answers would see themselves.
- All others: LLaVA-1.5's `USER: <image>\\n… ASSISTANT: …</s>`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from inspect import signature
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from sparsify_vlm.data.images import BadSample
from sparsify_vlm.data.recurring import RecurringPrompts
from sparsify_vlm.data.rows import IMAGE_MARK, Sample, Turn

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from sparsify_vlm.models import LoadedModel


REMEMBERED = 4096
"""Conversations whose rendering is kept: questions come again, and templates are slow."""


@dataclass(frozen=True)
class Prompt:
    """A sample's text, one image token per image; `suffix` is the answer where it stands apart."""

    text: str
    suffix: str | None = None


@dataclass(frozen=True)
class Prompter:
    """Renders and tokenises with a VLM's processor or a text model's tokenizer."""

    processor: Any
    tokens: Any
    image_token: str | None

    @classmethod
    def of(cls, loaded: LoadedModel) -> Prompter:
        """The model's `Prompter`."""
        from sparsify_vlm.models.pixel_batches import in_batches
        from sparsify_vlm.models.roles import image_token_id

        image_token = getattr(loaded.processor, "image_token", None) if loaded.is_vlm else None
        if loaded.is_vlm and image_token is None:
            image_token = loaded.tokenizer.convert_ids_to_tokens(image_token_id(loaded.config))
        return cls(in_batches(loaded.processor), loaded.tokenizer, image_token)

    @cached_property
    def has_template(self) -> bool:
        """Whether there is a chat template; a VLM's tokenizer may have one that knows no images."""
        return bool(getattr(self.processor, "chat_template", None))

    @cached_property
    def takes_suffix(self) -> bool:
        """Whether the processor takes the answer apart from the prompt."""
        return not self.has_template and "suffix" in signature(self.processor.__call__).parameters

    def adds_special_tokens(self, text: str) -> bool:
        """Whether the tokenizer is to add its special tokens: not if the template wrote BOS."""
        return not (self.tokens.bos_token and text.startswith(self.tokens.bos_token))

    @cached_property
    def recurring(self) -> RecurringPrompts | None:
        """The processor for prompts that come again; None for one that is to see all of them."""
        from sparsify_vlm.models.pixel_batches import tokens_by_size

        if not tokens_by_size(self.processor):
            return None
        return RecurringPrompts(self.processor, self.whole, self.tokens.pad_token_id)

    def whole(
        self, prompts: Sequence[Prompt], images: Sequence[list[Image]], adds: bool
    ) -> dict[str, Tensor]:
        """The processor's batch, right-padded; `adds` has the tokenizer add its special tokens."""
        from sparsify_vlm.models.processors import idle_steps

        pairs: dict[str, Any] = {}
        if self.takes_suffix:  # not as `suffix`, which would end rows without answer by EOS too
            pairs = {"text_pair": [prompt.suffix or "" for prompt in prompts]}
        batch = self.processor(
            text=[prompt.text for prompt in prompts],
            images=list(images),
            padding=True,
            padding_side="right",
            return_tensors="pt",
            add_special_tokens=adds,
            **pairs,
            **idle_steps(self.processor, [image for shown in images for image in shown]),
        )
        return {key: value for key, value in batch.items() if key != "labels"}

    def ids(self, text: str) -> list[int]:
        """The tokens of a text without images, BOS where the tokenizer adds it."""
        add = self.adds_special_tokens(text)
        ids: list[int] = self.tokens(text, add_special_tokens=add)["input_ids"]
        return ids

    def render(self, sample: Sample) -> Prompt:
        """The sample's prompt and answer; samples without answer open the assistant's turn.

        Answers end with an end-of-turn token: EOS, where the template writes none (LLaVA's own
        leaves out the EOS that the model learnt to give).

        Raises:
            BadSample: the chat template refuses the turns.
        """
        if sample.text is not None:
            shown = sample.images and self.image_token
            return Prompt(sample.text.replace(IMAGE_MARK, shown) if shown else sample.text)
        open_turn = sample.answer is None
        if self.takes_suffix:
            suffix = None if open_turn else f"{sample.answer}{self.tokens.eos_token}"
            return Prompt(self._prefix(sample.without_answer().turns), suffix)
        if not self.has_template:
            return Prompt(self._llava(sample.turns, open_turn))
        try:
            return Prompt(self._templated(sample.turns, open_turn))
        except (TemplateError, ValueError) as error:
            raise BadSample(sample.id, f"the chat template refuses its turns: {error}") from None

    @cached_property
    def _templated(self) -> Callable[[tuple[Turn, ...], bool], str]:
        return lru_cache(REMEMBERED)(self._apply_template)

    def _apply_template(self, turns: tuple[Turn, ...], open_turn: bool) -> str:
        messages = [self._message(turn) for turn in turns]
        text: str = self.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=open_turn
        )
        return text if open_turn else self._closed(text, turns[-1].text)

    def _message(self, turn: Turn) -> dict[str, Any]:
        if self.image_token is None:
            return {"role": turn.role, "content": turn.text}
        content: list[dict[str, str]] = [{"type": "image"}] * turn.n_images
        if turn.text or not content:
            content = [*content, {"type": "text", "text": turn.text}]
        return {"role": turn.role, "content": content}

    def _closed(self, text: str, answer: str) -> str:
        answer = answer.strip()
        tail = text[text.rfind(answer) + len(answer) :]
        if any(token in tail for token in self.tokens.all_special_tokens):
            return text
        return text.rstrip() + (self.tokens.eos_token or "")

    def _llava(self, turns: Sequence[Turn], open_turn: bool) -> str:
        text = ""
        for turn in turns:
            images = f"{self.image_token}\n" * turn.n_images
            if turn.role == "assistant":
                text += f"ASSISTANT: {turn.text}{self.tokens.eos_token or ''}"
            else:
                text += {"user": "USER: ", "system": ""}[turn.role] + f"{images}{turn.text} "
        return text + "ASSISTANT:" if open_turn else text

    def _prefix(self, turns: Sequence[Turn]) -> str:
        """Images first, then the turns' texts; the processor adds BOS and a newline itself."""
        images = (self.image_token or "") * sum(turn.n_images for turn in turns)
        return images + "\n".join(turn.text for turn in turns)
