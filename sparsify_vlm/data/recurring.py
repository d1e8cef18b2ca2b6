"""Prompts that come again: their tokens are kept, and only their images go through the processor.

Datasets ask the same questions of many images, and a processor's text side (putting in the image
tokens, tokenising, padding) costs more than preparing a small image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

if TYPE_CHECKING:
    from PIL.Image import Image

    from sparsify_vlm.data.prompts import Prompt

REMEMBERED = 4096
"""Prompts whose tokens are kept, the first that come."""

Inputs = dict[str, Tensor]
Key = tuple[str, tuple[tuple[int, int], ...], bool]
"""A prompt's text, the sizes of its images, whether the tokenizer adds its special tokens."""
Whole = Callable[[Sequence["Prompt"], Sequence[list["Image"]], bool], Inputs]
"""The processor on prompts and their images, adding special tokens or not; padded on the right."""


class RecurringPrompts:
    """What a processor gives for prompts with images, from what it gave for the same prompts.

    For processors whose tokens follow from the text and the images' sizes (`tokens_by_size`).
    """

    def __init__(self, processor: Any, whole: Whole, pad: int) -> None:
        self.processor, self.whole, self.pad = processor, whole, pad
        self._rows: dict[Key, Inputs] = {}

    def __call__(
        self, prompts: Sequence[Prompt], images: Sequence[list[Image]], adds: bool
    ) -> Inputs:
        """What `whole` gives for the same arguments; it is asked for new prompts only."""
        sizes = [tuple(image.size for image in shown) for shown in images]
        keys = [(p.text, size, adds) for p, size in zip(prompts, sizes, strict=True)]
        new = {key: i for i, key in enumerate(keys) if key not in self._rows}
        rows = self._rows
        if new:
            places = new.values()
            made = self.whole([prompts[i] for i in places], [images[i] for i in places], adds)
            rows = rows | dict(zip(new, _rows(made), strict=True))
            if len(rows) <= REMEMBERED:
                self._rows = rows
        pixels = self._pixels([image for shown in images for image in shown])
        return self._padded([rows[key] for key in keys]) | pixels

    def _padded(self, rows: Sequence[Inputs]) -> Inputs:
        fill = {"input_ids": self.pad}
        return {
            name: pad_sequence([row[name] for row in rows], True, fill.get(name, 0))
            for name in rows[0]
        }

    def _pixels(self, images: list[Image]) -> Inputs:
        from sparsify_vlm.models.processors import idle_steps

        steps = idle_steps(self.processor, images)
        return dict(self.processor.image_processor(images, return_tensors="pt", **steps))


def _rows(inputs: Inputs) -> list[Inputs]:
    """The tokens of every row, without its padding."""
    shape = inputs["input_ids"].shape
    tokens = {name: value for name, value in inputs.items() if value.shape == shape}
    return [
        {name: value[row, :length].clone() for name, value in tokens.items()}
        for row, length in enumerate(inputs["attention_mask"].sum(1).tolist())
    ]
