"""Tokens a coder was not trained on, at which the model's own MLPs go on writing.

In large models attention sinks at the first token, whose MLP outputs can be orders of magnitude
above all others (Sun et al. 2024, arXiv:2402.17762). Training leaves it out, so a coder's guess
there is arbitrary, and a wrong value there reaches every later token through attention.
circuit-tracer zeroes features and errors of the special tokens at the start for the same reason.
docs/replacement.md has measurements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsify_vlm.errors import UserError


@dataclass(frozen=True)
class ExcludedTokens:
    """A rule for tokens that do not count: the same as in training."""

    bos_token_id: int | None = None
    """Exclude every token of this id."""
    first_token: bool = False
    """Exclude the first token of every sample."""
    ids: tuple[int, ...] = ()
    """Exclude these ids too."""

    @classmethod
    def as_trained(cls, training: Mapping[str, Any], tokenizer: Any) -> ExcludedTokens:
        """The rule in a coder's training summary; where it says nothing, BOS is excluded."""
        filter_bos = training.get("filter_bos", True)
        return cls(
            bos_token_id=tokenizer.bos_token_id if filter_bos else None,
            first_token=bool(training.get("remove_first_token", False)),
            ids=tuple(training.get("exclude_tokens") or ()),
        )

    def of(self, input_ids: Tensor, position: Tensor) -> Tensor:
        """Which tokens are excluded, bool like `input_ids`. `position` counts a sample's tokens."""
        excluded = torch.zeros_like(input_ids, dtype=torch.bool)
        for token in {self.bos_token_id, *self.ids} - {None}:
            excluded |= input_ids == token
        if self.first_token:
            excluded |= position == 0
        return excluded

    @property
    def _nothing(self) -> bool:
        return self.bos_token_id is None and not self.first_token and not self.ids

    def in_forward(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        """The excluded tokens of a model's forward call, bool [B, S]; None if there are none.

        With a key-value cache S counts the new tokens, and the attention mask covers all.
        Raises `UserError` for a call without `input_ids`, from which nothing can be told.
        """
        if self._nothing:
            return None
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        if input_ids is None:
            raise UserError(
                "a replacement model needs input_ids: inputs_embeds alone do not tell "
                "which tokens its coders were trained on"
            )
        excluded = self.of(input_ids, _positions(input_ids, kwargs))
        mask = kwargs.get("attention_mask")
        if mask is not None:
            excluded &= mask[:, -input_ids.shape[1] :].bool()
        return excluded if bool(excluded.any()) else None


def _positions(input_ids: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """Index of each new token among its sample's tokens, [B, S]."""
    mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
    if mask is not None:
        return (mask.long().cumsum(1) - 1)[:, -input_ids.shape[1] :]
    past = cache.get_seq_length() if cache is not None else 0
    return torch.arange(past, past + input_ids.shape[1], device=input_ids.device).expand_as(
        input_ids
    )
