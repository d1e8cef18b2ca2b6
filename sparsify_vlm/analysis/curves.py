"""Mean norms of each source layer against distance, and their means over source layers.

A curve is one variant, weighting and role. Weighting `latents`: the mean over the latents that are
live (for a role: active on its tokens) of the norm in that variant. Weighting `energy`: the root of
the mean of E[a²] ‖d^t‖²/σ_t² over all live latents, which is the norm of what they do write; the
encoder's norm has no part in it, as E[a²] makes up for the latents' scale.

Panel `all`: at each distance, the sources that have it, so that sources change along the curve.
Panel `balanced`: as many distances as at least half of the sources with several targets have, and
only the sources that have them all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparsify_vlm.analysis.bootstrap import Intervals, mean_interval
from sparsify_vlm.analysis.writes import ALL, SOURCES, AllWrites, Writes

Array = np.ndarray
PANELS = ("all", "balanced")
HALVES = 2


class Kind(NamedTuple):
    """Which curve."""

    variant: str
    weighting: str
    role: str


@dataclass(frozen=True)
class Curves:
    """Of every source layer, for one kind."""

    kind: Kind
    sources: Sequence[int]
    distances: Array
    """[D], from the nearest target on."""
    means: Array
    """[S, D]; NaN where a source has no target at a distance, or no live latent."""
    halves: Array
    """[2, S, D]: the same of two random halves of the latents."""

    def panel(self, name: str) -> Panel:
        """Rows and columns of one panel."""
        if name == "all":
            return Panel(self.distances, self.means, self.halves)
        reach = np.isfinite(self.means).sum(1)
        wide = sorted(reach[reach > 1], reverse=True)
        if not wide:
            return Panel(self.distances[:0], self.means[:, :0], self.halves[:, :, :0])
        shared = wide[(len(wide) + 1) // 2 - 1]
        rows = reach >= shared
        return Panel(
            self.distances[:shared], self.means[rows, :shared], self.halves[:, rows, :shared]
        )


@dataclass(frozen=True)
class Panel:
    """Curves [S, D] of some sources at some distances [D]."""

    distances: Array
    means: Array
    halves: Array

    def intervals(self, **options: object) -> Intervals:
        """The mean over sources at each distance [D]."""
        return mean_interval(self.means, over=SOURCES, **options)

    def counts(self) -> list[int]:
        """How many sources there are at each distance."""
        return np.isfinite(self.means).sum(0).tolist()


def read_curves(writes: AllWrites, seed: int = 0) -> list[Curves]:
    """Every kind of curve; halves of the latents are drawn by `seed`."""
    cfg = writes.decoders.cfg
    generator = torch.Generator().manual_seed(seed)
    width = max(len(cfg.targets(s)) for s in cfg.source_layers())
    parts: dict[Kind, list[Array]] = {}
    sources = []
    for one in writes:
        sources.append(one.source)
        first = torch.rand(one.n_live, generator=generator) < 0.5
        for kind, means in _kinds(one, writes.roles, [first | True, first, ~first]):
            padded = np.full((1 + HALVES, width), math.nan)
            padded[:, : len(one.targets)] = means
            parts.setdefault(kind, []).append(padded)
    distances = np.arange(width) + cfg.target_offset
    found = []
    for kind, rows in parts.items():
        stacked = np.stack(rows, 1)
        found.append(Curves(kind, sources, distances.astype(float), stacked[0], stacked[1:]))
    return found


def _kinds(
    writes: Writes, roles: Sequence[str], groups: Sequence[Tensor]
) -> Iterator[tuple[Kind, Array]]:
    """Of every kind the curve [T] of each group of latents (masks [n]), as [groups, T]."""
    for variant in writes.variants:
        norms = writes.squared_norms(variant).sqrt()
        for role in roles or [ALL]:
            active = writes.frequency[role] > 0 if roles else torch.ones(writes.n_live) > 0
            yield Kind(variant, "latents", role), _means(norms, [g & active for g in groups])
    for role in roles:
        energy = writes.activation[role][:, None]
        plain = _means(energy * writes.squared, groups)
        yield Kind("plain", "energy", role), np.sqrt(plain)
        yield (
            Kind("corrected", "energy", role),
            np.sqrt(_means(writes.contributions(role), groups)),
        )


def _means(values: Tensor, groups: Sequence[Tensor]) -> Array:
    """Means of values [n, T] over each group; NaN of an empty one."""
    return torch.stack([values[group].mean(0) for group in groups]).numpy()
