"""What the live latents of one source layer write, in every variant that is reported.

With d^t the decoder of a latent to target t, e its encoder row, σ_t the scale of the target:

    plain       ‖d^t‖                  as published
    scaled      ‖d^t‖ / σ_t            targets can be compared
    corrected   ‖e‖ ‖d^t‖ / σ_t        latents too: scaling e up and d down changes nothing

Without data σ_t is not known and taken as 1; there is no `scaled` then. Shares of one latent are
p(t) = (‖d^t‖²/σ_t²) / Σ_t' (‖d^t'‖²/σ_t'²), in which the latent's own scale cancels, and its
contribution energy is w = E[a²] Σ_t ‖d^t‖²/σ_t², which no scaling changes either.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsify_vlm.analysis.decoders import Coder, Decoders, SourceDecoders, read_decoders
from sparsify_vlm.errors import UserError

if TYPE_CHECKING:
    from sparsify_vlm.analysis.activity import Activity

ALL = "all"
SOURCES = "source layers"
"""What most intervals of these experiments are over."""
BINS = 50
"""Of the histograms of a share, 0 to 1."""
Numbers = Sequence[float] | Tensor


@dataclass(frozen=True)
class Writes:
    """Of the n live latents of one source layer; all in float64."""

    decoders: SourceDecoders
    live: Tensor
    """[F]: active on some token (without data: of some decoder not 0), and writing anywhere."""
    squared: Tensor
    """[n, T]: ‖d^t‖²."""
    sigma: Tensor | None
    """[T]: σ_t of the targets."""
    encoder_norm: Tensor
    """[n]: ‖e‖."""
    activation: dict[str, Tensor]
    """By role, E[a²] of each latent [n]; empty without data."""
    frequency: dict[str, Tensor]
    """By role, how often each latent is active [n]."""

    @property
    def source(self) -> int:
        return self.decoders.source

    @property
    def targets(self) -> range:
        return self.decoders.targets

    @property
    def n_live(self) -> int:
        return len(self.squared)

    @property
    def n_dead(self) -> int:
        return len(self.live) - self.n_live

    @property
    def variants(self) -> list[str]:
        """Those that there are."""
        return ["plain", "corrected"] if self.sigma is None else ["plain", "scaled", "corrected"]

    @property
    def in_sigma(self) -> Tensor:
        """[n, T]: ‖d^t‖²/σ_t², or ‖d^t‖² where σ_t is not known."""
        return self.squared if self.sigma is None else self.squared / self.sigma**2

    def squared_norms(self, variant: str) -> Tensor:
        """[n, T]: the squared norm in this variant."""
        if variant == "plain":
            return self.squared
        if variant == "scaled":
            return self.in_sigma
        return self.in_sigma * self.encoder_norm[:, None] ** 2

    def shares(self, variant: str = "corrected") -> Tensor:
        """[n, T]: p(t); in the plain variant without σ_t."""
        squared = self.squared if variant == "plain" else self.in_sigma
        return squared / squared.sum(1, keepdim=True)

    def contributions(self, role: str) -> Tensor:
        """[n, T]: E[a²] ‖d^t‖²/σ_t² over the tokens of this role."""
        return self.activation[role][:, None] * self.in_sigma


@dataclass(frozen=True)
class AllWrites:
    """`Writes` of every source layer, one at a time."""

    decoders: Decoders
    sigma: Tensor | None
    activity: Activity | None

    @property
    def roles(self) -> list[str]:
        """Roles with tokens, "all" first; empty without data."""
        if self.activity is None:
            return []
        return [ALL, *(r for r, n in self.activity.tokens.items() if r != ALL and n)]

    def __iter__(self) -> Iterator[Writes]:
        for decoders in self.decoders.sources:
            yield self._of(decoders)

    def _of(self, decoders: SourceDecoders) -> Writes:
        live, s, activity = decoders.writes, decoders.source, self.activity
        if activity is not None:
            live = live & (activity.frequency[ALL][s] > 0)
        sigma = None if self.sigma is None else self.sigma[list(decoders.targets)]
        energy = {} if activity is None else {r: activity.energy[r][s] for r in self.roles}
        often = {} if activity is None else {r: activity.frequency[r][s] for r in self.roles}
        return Writes(
            decoders,
            live,
            decoders.squared[live].double(),
            sigma,
            decoders.encoder_norm[live].double(),
            {role: values[live].double() for role, values in energy.items()},
            {role: values[live].double() for role, values in often.items()},
        )

    def notes(self) -> list[str]:
        """What all experiments on weights have to say about what they read."""
        cfg, notes = self.decoders.cfg, list(self.decoders.warnings)
        if self.sigma is None:
            notes.append(
                "No data was given: the scale of the targets is not known, so corrected norms are "
                "free of the latents' scale only, and dead latents are those without a decoder."
            )
        if cfg.target_offset:
            notes.append(
                "The coders write to no layer of their own; the next layer, their first target, "
                "stands for it in what is called own or same-layer."
            )
        if not self.decoders.writes_across:
            notes.append(
                "Every coder writes to one layer only: there are no cross-layer writes to measure."
            )
        if cfg.train_post_encoder:
            notes.append(
                "The coder adds a trained bias to the activations before they are written; norms "
                "and energies leave it out."
            )
        return notes


def all_writes(
    coder: Coder, sigma: Numbers | None = None, activity: Activity | None = None
) -> AllWrites:
    """The writes of a coder; `sigma` [L] defaults to the activity's.

    Raises `UserError` where data and coder do not fit each other, or a target has no variance.
    """
    decoders = read_decoders(coder)
    cfg = decoders.cfg
    if activity is not None:
        found = tuple(activity.energy[ALL].shape)
        wanted = (cfg.n_layers, cfg.num_latents)
        if found != wanted:
            raise UserError(
                f"the activity is of {found[0]} layers of {found[1]} latents, this coder has "
                f"{wanted[0]} of {wanted[1]}; measure it again"
            )
        sigma = activity.sigma if sigma is None else sigma
    scale = None if sigma is None else torch.as_tensor(sigma, dtype=torch.float64)
    if scale is not None:
        if len(scale) != cfg.n_layers:
            raise UserError(f"{len(scale)} scales of targets for {cfg.n_layers} layers")
        for t in cfg.target_layers():
            if not (scale[t] > 0 and torch.isfinite(scale[t])):
                raise UserError(
                    f"{cfg.hookpoints[t]}: y has no finite variance on this data; give more tokens"
                )
    return AllWrites(decoders, scale, activity)


def histogram(values: Tensor) -> list[int]:
    """How many of the values, 0 to 1, lie in each of BINS bins; the left edge belongs to a bin."""
    bins = (values * BINS + 1e-9).long()  # rounding must not move a share that is a bin's edge
    return torch.bincount(bins.clamp(0, BINS - 1), minlength=BINS).tolist()


def defined(value: float | None) -> float | None:
    """A number of a table: None where it is undefined."""
    return value if value is not None and math.isfinite(value) else None
