"""Which latents are active at which tokens, as every kernel path takes it.

A `Selection` is a sparse [T, F] pattern in compressed rows: the entries of token t are
`crow[t]:crow[t+1]`, `col` is each entry's latent. Its `order` sorts the entries by latent and is
made once, however many decoders are gone through. `Entries` are a selection's values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

Sort = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]


@dataclass
class Selection:
    """The active latents of one source at T tokens."""

    crow: Tensor
    """[T+1] int64."""

    col: Tensor
    """[E] int64, distinct within a token."""

    num_latents: int
    """F."""

    width: int | None = None
    """Entries per token where it is the same for all."""

    sort: Sort | None = None
    """Gives (order, start, token) for (crow, col, F); None: torch's stable sort."""

    _by_latent: tuple[Tensor, Tensor, Tensor] | None = field(default=None, repr=False)
    _row: Tensor | None = field(default=None, repr=False)

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.crow) - 1

    @property
    def row(self) -> Tensor:
        """[E] int64: each entry's token."""
        if self._row is None:
            each = torch.arange(self.tokens, device=self.col.device)
            self._row = each.repeat_interleave(self.crow.diff(), output_size=len(self.col))
        return self._row

    @property
    def order(self) -> Tensor:
        """[E] int64: the entries by latent, those of one latent by token."""
        return self._sorted()[0]

    @property
    def start(self) -> Tensor:
        """[F+1] int64: the entries of latent i are `order[start[i]:start[i+1]]`."""
        return self._sorted()[1]

    @property
    def token(self) -> Tensor:
        """[E] int64: token of entry `order[j]`."""
        return self._sorted()[2]

    def _sorted(self) -> tuple[Tensor, Tensor, Tensor]:
        if self._by_latent is None:
            if self.sort is not None:
                self._by_latent = self.sort(self.crow, self.col, self.num_latents)
            else:
                order, start = sorted_by_latent(self.col, self.num_latents)
                self._by_latent = order, start, self.row[order]
        return self._by_latent

    def counts(self, mask: Tensor) -> Tensor:
        """[T] int64: entries of each token where `mask` [E] holds."""
        if self.width:
            return mask.view(self.tokens, self.width).sum(1)
        return torch.bincount(self.row[mask], minlength=self.tokens)

    def totals(self, values: Tensor) -> Tensor:
        """[F]: Σ of `values` [E] over the entries of each latent."""
        summed = values.new_zeros(self.num_latents)
        return summed.index_add_(0, self.col, values)


def sorted_by_latent(col: Tensor, num_latents: int) -> tuple[Tensor, Tensor]:
    """`order` and `start` of a selection's columns."""
    ordered, order = col.sort(stable=True)
    latents = torch.arange(num_latents + 1, device=col.device)
    return order, torch.searchsorted(ordered, latents)


@dataclass
class Entries:
    """Values [E] of a selection, and what kernels have arranged of them for repeated use."""

    selection: Selection
    values: Tensor
    _arranged: Tensor | None = field(default=None, repr=False)
    _dense: Tensor | None = field(default=None, repr=False)

    @property
    def by_latent(self) -> Tensor:
        """[E]: the values in the order of the latents."""
        if self._arranged is None:
            self._arranged = self.values[self.selection.order]
        return self._arranged

    @property
    def dense(self) -> Tensor:
        """[T, F]: the values as a matrix."""
        if self._dense is None:
            sel = self.selection
            out = self.values.new_zeros(sel.tokens, sel.num_latents)
            if sel.width:
                shape = (sel.tokens, sel.width)
                self._dense = out.scatter_(1, sel.col.view(shape), self.values.view(shape))
            else:
                self._dense = out.index_put_((sel.row, sel.col), self.values)
        return self._dense


@dataclass
class AdamState:
    """The state of one table in Adam, and what this step's update takes."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: int
    """This step's number, from 1."""
    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
