"""What a step asks of those that hold one coder together; here for a process that holds it alone.

A coder may be divided over processes by latents or by columns of d (`training.parallel.Layout`). A
step then goes through this process's tables, which are a part of each, and calls these methods
where the parts have to be put together. "Here" are the latents that the entries of a selection may
have: those of this process's decoders. Its encoders may have fewer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsify_vlm.coders.activations import survivors


class Sharing:
    """Everything is in this process: what is handed over comes back as it is."""

    @property
    def alone(self) -> bool:
        """Whether this process holds the whole coder."""
        return True

    @property
    def decodes_partly(self) -> bool:
        """Whether `sum_outputs` has something to add up."""
        return False

    @property
    def counts_once(self) -> bool:
        """Whether this process is the one that adds to a value's gradient what all know alike."""
        return True

    # ---- who has what

    def own(self, name: str, whole: Tensor) -> Tensor:
        """This process's part of a whole parameter, or of a tensor of its shape: a view."""
        return whole

    def own_columns(self, y: Tensor) -> Tensor:
        """[T, columns] of y [T, d]: what is reconstructed here."""
        return y

    def latents_here(self, num_latents: int) -> int:
        """Number of latents here, of `num_latents` in all."""
        return num_latents

    def own_latents(self, values: Tensor) -> Tensor:
        """Of values per latent here, those of the encoders' rows."""
        return values

    def all_latents(self, values: Tensor) -> Tensor:
        """Values per latent here, from those of the encoders' rows."""
        return values

    # ---- active latents

    def global_top(
        self, pre: Tensor, latent: Tensor, k: int, num_latents: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The k largest of all processes' candidates [T, m], per token: crow, latents and
        pre-activations of those that are here. Alone: the candidates are the k largest."""
        tokens, m = pre.shape
        crow = torch.arange(0, tokens * m + 1, max(m, 1), device=pre.device)[: tokens + 1]
        return crow, latent.flatten(), pre.flatten()

    def all_entries(
        self, crow: Tensor, latent: Tensor, pre: Tensor, num_latents: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The entries that are here, given those that the encoders' rows have found."""
        return crow, latent, pre

    def own_entries(self, latent: Tensor, num_latents: int) -> tuple[Tensor, Tensor]:
        """Which entries [E] belong to encoders' rows that are here, and their own numbers."""
        return torch.ones_like(latent, dtype=torch.bool), latent

    def largest(self, values: Tensor, count: int) -> Tensor:
        """Which of `values` [E] are among the `count` largest of all processes' entries, in order;
        all processes together have at least `count`."""
        return values.topk(count, sorted=False).indices.sort().values

    def lowest(self, values: Tensor) -> Tensor | None:
        """The smallest value of all processes' entries; None if there are none."""
        return values.min() if len(values) else None

    def survivors(self, written: Sequence[Tensor], k: int, positive: bool) -> list[Tensor]:
        """As `activations.survivors`, over all processes' entries; unused places are -inf."""
        return survivors(written, k, positive)

    # ---- sums

    def total(self, number: int) -> int:
        """Of a number of latents or entries here: that of all processes'."""
        return number

    def sum_outputs(self, y_hat: Tensor) -> Tensor:
        """ŷ_t [T, d] from what each process decoded, without what all have (b_dec, W_skip)."""
        return y_hat

    def sum_value_gradients(self, grad: Tensor) -> Tensor:
        """[E]: of the loss by a source's activations, all its targets added up already."""
        return grad

    def sum_columns(self, partial: Tensor) -> Tensor:
        """Sums over d of which each process has its columns' part."""
        return partial

    def sum_features(self, partial: Tensor) -> Tensor:
        """Sums over latents of which each process has its own's part."""
        return partial


ALONE = Sharing()
