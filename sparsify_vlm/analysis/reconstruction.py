"""Squared errors of every arm on clean inputs, summed per sample, token role and layer.

    FVU_t = Σ‖y_t − ŷ_t‖² / Σ‖y_t − ȳ_t‖²     over the tokens of a role, ȳ_t the role's mean

ȳ_t is the mean over all measured samples, also in resamples of them: with n samples the denominator
of a resample is off by a share of about 1/n, the same for every arm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparsify_vlm.analysis.arms import Arm, Parts
from sparsify_vlm.analysis.tokens import ROLES, TokenBatch, Tokens
from sparsify_vlm.coders import CltConfig


@dataclass(frozen=True)
class ReconstructionSums:
    """N samples, A arms, R roles of `tokens.ROLES`, T layers that are written to; float64."""

    arms: list[str]
    layers: list[int]
    error: np.ndarray
    """Σ‖y − ŷ‖², [N, A, R, T]."""
    total: np.ndarray
    """Σ‖y − ȳ‖², [N, R, T]; NaN where a role's y does not vary."""
    tokens: np.ndarray
    """[N, R]."""
    draws: Mapping[str, np.ndarray]
    """Of arms that are drawn at random: the error of each draw, [draws, R, T]. Their `error` is the
    mean of the draws'."""


@torch.no_grad()
def reconstruction(
    cfg: CltConfig,
    arms: Sequence[Arm],
    tokens: Tokens,
    mean_y: Mapping[str, Tensor],
    sigma: Mapping[str, Tensor],
) -> ReconstructionSums:
    """Sums of `arms` on `tokens`; mean_y [L, d] and sigma [L] by role. Arms of one name are draws
    of one arm."""
    layers = list(cfg.target_layers())
    errors, totals, counts = [], [], []
    for batch in tokens:
        error, total = _batch_sums(arms, layers, batch, mean_y)
        errors.append(error.cpu().numpy())
        totals.append(total.cpu().numpy())
        counts.append(per_sample(batch, torch.ones_like(batch.members)).cpu().numpy())
    every = np.concatenate(errors)
    flat = np.stack([sigma[role][layers].numpy() for role in ROLES]) == 0
    names = list(dict.fromkeys(arm.name for arm in arms))
    by_name = {name: [i for i, arm in enumerate(arms) if arm.name == name] for name in names}
    return ReconstructionSums(
        arms=names,
        layers=layers,
        error=np.stack([every[:, by_name[name]].mean(1) for name in names], 1),
        total=np.where(flat, np.nan, np.concatenate(totals)),
        tokens=np.concatenate(counts),
        draws={n: every[:, at].sum(0) for n, at in by_name.items() if len(at) > 1},
    )


def _batch_sums(
    arms: Sequence[Arm], layers: Sequence[int], batch: TokenBatch, mean_y: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """error [B, A, R, T] and total [B, R, T] of a batch of B samples."""
    parts = clean_parts(arms, batch)
    errors, totals = [], []
    for t in layers:
        y = batch.y[t].double()
        squares = [(y - arm.decode(parts[id(arm.clt)], t).double()).square().sum(1) for arm in arms]
        about = [(y - mean_y[role][t].to(y)).square().sum(1) for role in ROLES]
        errors.append(torch.stack([per_sample(batch, e.expand(len(ROLES), -1)) for e in squares]))
        totals.append(per_sample(batch, torch.stack(about)))
    return torch.stack(errors, -1).transpose(0, 1), torch.stack(totals, -1)


def per_sample(batch: TokenBatch, values: Tensor) -> Tensor:
    """Sums of values [R, T] over each sample's tokens of each role, [B, R] float64."""
    sums = torch.zeros(len(batch.rows), len(ROLES), dtype=torch.float64, device=values.device)
    return sums.index_add_(0, batch.local, (values.double() * batch.members).T)


def clean_parts(arms: Sequence[Arm], batch: TokenBatch) -> dict[int, Parts]:
    """By the id of an arm's coder: its parts on the clean inputs of `batch`."""
    half, found = batch.sample % 2, {}
    for clt in {id(arm.clt): arm.clt for arm in arms}.values():
        latents = [] if clt is None else clt.encode(batch.x)
        found[id(clt)] = Parts(clt, latents, batch.x, half)  # type: ignore[arg-type]
    return found
