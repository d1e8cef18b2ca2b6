"""Pixtral's processor (Pixtral, Mistral 3) for where torchvision is not installed.

transformers' own cannot be imported then. The same keys of `processor_config.json` are read and
the same prompts are made: a row of `[IMG]` tokens, one for each merged patch, then `[IMG_BREAK]`,
and `[IMG_END]` after the last row.
"""

from __future__ import annotations

from typing import Any

from transformers.processing_utils import ProcessorMixin


class PixtralProcessor(ProcessorMixin):
    """Images and text for a Pixtral tower; patches are `patch_size * spatial_merge_size` wide."""

    text_kwargs = {"return_tensors": "pt"}  # noqa: RUF012 - declared so by transformers
    images_kwargs = {"return_tensors": "pt"}  # noqa: RUF012

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int = 16,
        spatial_merge_size: int = 1,
        chat_template: str | None = None,
        image_token: str = "[IMG]",
        image_break_token: str = "[IMG_BREAK]",
        image_end_token: str = "[IMG_END]",
        **_: Any,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.patch_size, self.spatial_merge_size = patch_size, spatial_merge_size
        self.image_token = image_token
        self.image_break_token, self.image_end_token = image_break_token, image_end_token
        tokens = (image_token, image_break_token, image_end_token)
        self.image_token_id, self.image_break_token_id, self.image_end_token_id = (
            tokenizer.convert_tokens_to_ids(list(tokens))
        )
        self.image_token_ids = tokenizer.convert_tokens_to_ids(list(tokens))

    @property
    def model_input_names(self) -> list[str]:
        """Names of what the model takes."""
        parts = (self.tokenizer, self.image_processor)
        return [*(name for part in parts for name in part.model_input_names), "image_sizes"]

    def _process_images(self, images: Any, **images_kwargs: Any) -> Any:
        images_kwargs["patch_size"] = self.patch_size * self.spatial_merge_size
        return super()._process_images(images, **images_kwargs)

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **_: Any) -> str:
        """The text that stands for one image."""
        patch = self.patch_size * self.spatial_merge_size
        height, width = (int(n) for n in image_inputs["image_sizes"][image_idx])
        row = self.image_token * (width // patch)
        return self.image_break_token.join([row] * (height // patch)) + self.image_end_token
