"""How active latents are, and what layers' writes amount to, by token role: one pass over tokens.

    energy          E[a²] of each latent over the role's tokens
    frequency       share of the role's tokens at which the latent is active
    σ_t             sqrt(E‖y_t − ȳ_t‖²), ȳ_t the role's own mean
    block share     Σ⟨ŷ^{s→t}, ŷ^t⟩ / Σ‖ŷ^t‖² over the role's tokens, ŷ^t = Σ_s ŷ^{s→t} the sum of
                    what latents write, without bias and skip connections; sums to 1 over s

Sums are float64. Memory: two [S, F] tables per role, and of each batch one target's writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify_vlm.analysis.tokens import ROLES, TokenBatch
from sparsify_vlm.coders import Clt, Latents
from sparsify_vlm.errors import UserError


@dataclass(frozen=True)
class Activity:
    """Of a coder with S = L layers (rows of layers without a coder are 0) and F latents.

    All tensors are float64 on the CPU; of a role without tokens they are NaN.
    """

    tokens: Mapping[str, int]
    """By role of `tokens.ROLES`."""
    energy: Mapping[str, Tensor]
    """E[a²], [L, F]."""
    frequency: Mapping[str, Tensor]
    """Share of tokens, [L, F]."""
    sigma: Tensor
    """[L], over all counted tokens."""
    sigma_by_role: Mapping[str, Tensor]
    """[L]."""
    block_share: Mapping[str, Tensor]
    """[L, L] of source and target; NaN where there is no write."""
    mean_y: Mapping[str, Tensor]
    """[L, d]."""
    mean_x: Tensor
    """[L, d], over all counted tokens."""
    mean_cross: Tensor
    """[L, d] by target: the mean over all counted tokens of what latents write there that is not
    their coder's first write."""
    samples: int
    """Samples the tokens are of."""

    def alive(self) -> Tensor:
        """bool [L, F]: latents that were active at all."""
        return self.frequency["all"] > 0

    def mean_l0(self) -> float:
        """Active latents per token, the mean over layers that have any."""
        per_layer = self.frequency["all"].sum(1)
        firing = per_layer[per_layer > 0]
        return float(firing.mean()) if len(firing) else 0.0


def activity(clt: Clt, tokens: Iterable[TokenBatch]) -> Activity:
    """The activity of `clt` on `tokens`. Raises `UserError` if there are none."""
    sums = _Sums(clt)
    for batch in tokens:
        sums.add(batch)
    return sums.result()


class _Sums:
    def __init__(self, clt: Clt) -> None:
        self.clt, cfg = clt, clt.cfg
        L, F, d, R = cfg.n_layers, cfg.num_latents, cfg.d_model, len(ROLES)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=clt.device)

        self.tokens, self.square, self.fired = zeros(R), zeros(R, L, F), zeros(R, L, F)
        self.y, self.y_square = zeros(R, L, d), zeros(R, L)
        self.share, self.x, self.cross = zeros(R, L, L), zeros(L, d), zeros(L, d)
        self.centre: Tensor | None = None
        self.samples = 0

    @torch.no_grad()
    def add(self, batch: TokenBatch) -> None:
        self.samples += len(batch.rows)
        if len(batch) == 0:
            return
        member = batch.members
        self.tokens += member.sum(1)
        latents = self.clt.encode(batch.x)
        for s, active in enumerate(latents):
            if active is not None:
                self._latents(s, active, member)
        if self.centre is None:
            self.centre = torch.stack([y.double().mean(0) for y in batch.y])
        self.x += torch.stack([x.double().sum(0) for x in batch.x])
        for t, y in enumerate(batch.y):
            centred = y.double() - self.centre[t]
            self.y[:, t] += member @ centred
            self.y_square[:, t] += member @ centred.square().sum(1)
        for t in self.clt.cfg.target_layers():
            self._writes(t, latents, member)

    def _latents(self, s: int, active: Latents, member: Tensor) -> None:
        values, F = active.values.double(), self.clt.cfg.num_latents
        token, place = (values > 0).nonzero(as_tuple=True)
        index, value = active.indices[token, place], values[token, place]
        for role, counts in enumerate(member):
            weight = counts[token]
            self.square[role, s] += torch.bincount(index, weight * value.square(), F)
            self.fired[role, s] += torch.bincount(index, weight, F)

    def _writes(self, t: int, latents: list[Latents | None], member: Tensor) -> None:
        parts = latent_writes(self.clt, t, latents)
        total = torch.stack(list(parts.values())).sum(0)
        for s, part in parts.items():
            self.share[:, s, t] += member @ (part * total).sum(1)
            if s != t - self.clt.cfg.target_offset:
                self.cross[t] += part.sum(0)

    def result(self) -> Activity:
        if not self.samples or float(self.tokens[0]) == 0:
            raise UserError("there is no token to measure on")
        assert self.centre is not None
        n = torch.where(self.tokens > 0, self.tokens, torch.nan)
        mean = self.y / n[:, None, None]
        variance = self.y_square / n[:, None] - mean.square().sum(2)
        # What is left of equal values is rounding.
        variance[variance <= 1e-12 * self.y_square / n[:, None]] = 0
        sigma = variance.sqrt().cpu()
        shares = self.share / self.share.sum(1, keepdim=True)
        for t in range(self.clt.cfg.n_layers):
            writing = {s for s, _ in self.clt.cfg.sources(t)}
            others = [s for s in range(self.clt.cfg.n_layers) if s not in writing]
            shares[:, others, t] = torch.nan

        def by_role(values: Tensor) -> dict[str, Tensor]:
            return dict(zip(ROLES, values.cpu(), strict=True))

        return Activity(
            tokens={role: int(k) for role, k in zip(ROLES, self.tokens.tolist(), strict=True)},
            energy=by_role(self.square / n[:, None, None]),
            frequency=by_role(self.fired / n[:, None, None]),
            sigma=sigma[0],
            sigma_by_role=by_role(sigma),
            block_share=by_role(shares),
            mean_y=by_role(self.centre + mean),
            mean_x=(self.x / n[0]).cpu(),
            mean_cross=(self.cross / n[0]).cpu(),
            samples=self.samples,
        )


@torch.no_grad()
def latent_writes(clt: Clt, t: int, latents: list[Latents | None]) -> dict[int, Tensor]:
    """What the latents of each source write to layer t, [T, d] float64 by source."""
    found = {}
    written = clt.written_to(t, latents)
    for (s, place), u in zip(clt.cfg.sources(t), written, strict=True):
        active = latents[s]
        assert active is not None
        found[s] = clt.latent_write(s, place, Latents(u, active.indices)).double()
    return found
