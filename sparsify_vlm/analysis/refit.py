"""Same-layer decoders refitted in closed form, encoders frozen.

Deleting the cross writes of a coder leaves own decoders that were trained to share the work. What
its encoders can do alone is the least-squares fit of every y_t on the latents of the one layer that
writes to it from nearest (with a skip connection: on that layer's x too), with a bias:

    min Σ_tokens ‖y − b − a W − x S‖² + Σ_j λ_j ‖row j of (W − W₀, S − S₀)‖²
    λ_j = ridge · mean diagonal of the centred Gram matrix of the block (latents, or x) of row j

The penalty pulls towards the coder's own decoders W₀ and skip connection S₀, so that few tokens
make the fit fall back to what is there (with its bias refitted), not to nothing: a per-layer coder
keeps its decoders, which have seen more tokens than any measurement.

It needs the Gram matrices of latents and y of one pass over tokens, summed in float64. Two halves
of the samples (by number: even, odd) are summed apart: what is measured on one half is fitted on
the other, so that every sample is measured and none is fitted on itself. Of several `ridge` every
layer takes the one with the least error on the halves that were not fitted: too weak a penalty
would make the refit look worse than it is. (That one number has seen what is measured.) Where
other data are given to fit on, strengths are chosen on their halves, and all of them are fitted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsify_vlm.coders import Clt, CltConfig
from sparsify_vlm.errors import UserError

if TYPE_CHECKING:
    from sparsify_vlm.analysis.tokens import TokenBatch, Tokens

FOLDS = 2
ROWS_AT_ONCE = 4096
"""Tokens whose latents are held as a dense table."""


@dataclass
class Refitted:
    """Own-layer decoders fitted to some tokens, by source layer."""

    W: list[Tensor]
    """[F, d]: what a unit of activation adds to y of the layer written to first."""
    skip: list[Tensor] | None
    """[d, d]: what x adds there, as `skip_input @ skip`."""
    bias: Tensor
    """[L, d]."""
    tokens: int
    """They were fitted on."""
    ridge: list[float]
    """The strength that each source layer took."""


def refit_bytes(cfg: CltConfig) -> int:
    """Memory for the sums of one layer."""
    width = cfg.num_latents + cfg.d_model * cfg.skip_connection
    return FOLDS * 8 * width * (width + cfg.d_model)


@torch.no_grad()
def refit(
    coders: Sequence[Clt],
    tokens: Tokens,
    centre: Tensor,
    ridge: Sequence[float],
    limit: float,
    halved: bool = True,
) -> list[list[Refitted]]:
    """For every coder its refits; the one at place h is for measuring samples with number % 2 = h.

    Args:
        centre: [L, d], about the mean of y: keeps the sums small.
        ridge: strengths to choose from.
        halved: False: what is measured is not among `tokens`; fit all of them, for both places.
        limit: bytes for sums. Layers are fitted in as many passes over `tokens` as that takes.

    Raises:
        UserError: the sums of one layer take more, or a half of the samples has no tokens.
    """
    fits = [_Fit(clt, s, centre) for clt in coders for s in clt.cfg.source_layers()]
    solved: list[list[_Solution]] = []
    for group in _groups(fits, limit):
        for fit in group:
            fit.begin()
        for batch in tokens:
            for fit in group:
                fit.add(batch)
        solved += [fit.solve(ridge, halved) for fit in group]
    found = []
    for clt in coders:
        own = [solved.pop(0) for _ in clt.cfg.source_layers()]
        found.append([_together(clt, [halves[h] for halves in own], centre) for h in range(FOLDS)])
    return found


def _together(clt: Clt, solved: Sequence[_Solution], centre: Tensor) -> Refitted:
    F, offset = clt.cfg.num_latents, clt.cfg.target_offset
    bias = centre.clone().to(clt.device)
    bias[offset:] += torch.stack([one.bias for one in solved])
    return Refitted(
        W=[one.W[:F].to(clt.dtype) for one in solved],
        skip=[one.W[F:].to(clt.dtype) for one in solved] if clt.cfg.skip_connection else None,
        bias=bias.to(clt.dtype),
        tokens=solved[0].tokens,
        ridge=[one.ridge for one in solved],
    )


@dataclass
class _Solution:
    W: Tensor
    bias: Tensor
    tokens: int
    ridge: float


@dataclass
class _Moments:
    """Centred sums of one half's n tokens."""

    n: Tensor
    mean_a: Tensor
    mean_y: Tensor
    gram: Tensor
    cross: Tensor

    def error(self, one: _Solution) -> float:
        """Σ‖y − ŷ‖² of a solution, up to a constant of these tokens."""
        off = self.mean_y - one.bias - self.mean_a @ one.W
        fitted = (one.W * (self.gram @ one.W - 2 * self.cross)).sum()
        return float(fitted + self.n * off.square().sum())


def _groups(fits: Sequence[_Fit], limit: float) -> Iterator[list[_Fit]]:
    group: list[_Fit] = []
    for fit in fits:
        if fit.bytes > limit:
            raise UserError(
                f"refitting {fit.clt.cfg.num_latents} latents takes {fit.bytes / 2**30:.1f} GiB "
                f"for the sums of a layer, more than the {limit / 2**30:.1f} GiB allowed: allow "
                "more, or leave the refit out"
            )
        if group and fit.bytes + sum(other.bytes for other in group) > limit:
            yield group
            group = []
        group.append(fit)
    yield group


class _Fit:
    """Sums of one source layer's latents (and x) and of the y it writes to first."""

    def __init__(self, clt: Clt, s: int, centre: Tensor) -> None:
        self.clt, self.s, self.t = clt, s, s + clt.cfg.target_offset
        self.centre = centre[self.t].to(clt.device)
        self.bytes = refit_bytes(clt.cfg)
        self.widths = [clt.cfg.num_latents] + [clt.cfg.d_model] * clt.cfg.skip_connection

    def begin(self) -> None:
        cfg, width = self.clt.cfg, sum(self.widths)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(FOLDS, *shape, dtype=torch.float64, device=self.clt.device)

        self.n, self.sum_a, self.sum_y = zeros(), zeros(width), zeros(cfg.d_model)
        self.gram, self.cross = zeros(width, width), zeros(width, cfg.d_model)
        self.start = _own_decoders(self.clt, self.s).double()

    def add(self, batch: TokenBatch) -> None:
        for half in range(FOLDS):
            for rows in (batch.sample % FOLDS == half).nonzero()[:, 0].split(ROWS_AT_ONCE):
                self._add(half, batch.x[self.s][rows], batch.y[self.t][rows])

    def _add(self, half: int, x: Tensor, y: Tensor) -> None:
        a = self.clt.encode_layer(self.s, x).dense(self.clt.cfg.num_latents)
        if self.clt.cfg.skip_connection:
            a = torch.cat([a, self.clt.skip_input(self.s, x)], 1)
        about = y.double() - self.centre
        self.n[half] += len(x)
        self.sum_a[half] += a.sum(0, dtype=torch.float64)
        self.sum_y[half] += about.sum(0)
        # Products of up to ROWS_AT_ONCE tokens in float32, their sums in float64.
        self.gram[half] += a.T @ a
        self.cross[half] += a.T @ about.to(a.dtype)

    def solve(self, ridge: Sequence[float], halved: bool) -> list[_Solution]:
        """By half that is measured: fitted on the other half, or on both. Frees the sums."""
        if not bool((self.n > 0).all()):
            raise UserError("refitting needs tokens of at least two samples")
        halves = [self._moments([half]) for half in range(FOLDS)]
        best: list[_Solution] = []
        least = math.inf
        for strength in ridge:
            found = [self._solution(fitted, strength) for fitted in halves[::-1]]
            error = sum(half.error(one) for half, one in zip(halves, found, strict=True))
            if error < least:
                best, least = found, error
        if not halved:
            best = [self._solution(self._moments(range(FOLDS)), best[0].ridge)] * FOLDS
        del self.gram, self.cross
        return best

    def _moments(self, halves: Sequence[int]) -> _Moments:
        def total(sums: Tensor) -> Tensor:
            return sums[list(halves)].sum(0)

        n = total(self.n)
        mean_a, mean_y = total(self.sum_a) / n, total(self.sum_y) / n
        gram = total(self.gram) - n * torch.outer(mean_a, mean_a)
        cross = total(self.cross) - n * torch.outer(mean_a, mean_y)
        return _Moments(n, mean_a, mean_y, gram, cross)

    def _solution(self, half: _Moments, ridge: float) -> _Solution:
        gram = half.gram.clone()
        blocks = half.gram.diagonal().split(self.widths)
        gram.diagonal().add_(torch.cat([(ridge * b.mean()).expand_as(b) for b in blocks]))
        # The row of a latent that was never active is empty, and its decoder stays.
        gram.diagonal()[gram.diagonal() == 0] = 1.0
        W = self.start + torch.linalg.solve(gram, half.cross - half.gram @ self.start)
        return _Solution(W, half.mean_y - half.mean_a @ W, int(half.n), ridge)


def _own_decoders(clt: Clt, s: int) -> Tensor:
    """[F (+ d), d]: what a unit of activation (and of what the skip connection reads) of layer `s`
    adds to y of its first target."""
    decoders = clt.decoder_matrix(s, 0)
    if clt.post_scale is not None:
        decoders = decoders * clt.post_scale[s][0][:, None]
    if (skip := clt.skip(s, 0)) is None:
        return decoders
    t = s + clt.cfg.target_offset
    return torch.cat([decoders, skip.T * (clt.write_factor(s, t) * clt.out_scale(t))])
