"""Random deletion of writes, of the same energy as the cross writes: a control for ablating them.

A write is what one latent adds to one layer; its energy is E[a²] ‖d‖² / σ_t². For each target,
writes are drawn at random, own and cross alike, until their energies add up to that of its cross
writes: first all that come before the one that would exceed it, then on among those that still fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify_vlm.coders import Clt

Writes = Mapping[tuple[int, int], Tensor]
"""By (source, place of the target among the source's): [F]."""


@dataclass(frozen=True)
class Deletion:
    """One draw."""

    kept: Writes
    """bool [F]: the latents whose writes stay."""
    deleted: Tensor
    """Energy of what is deleted, [L] by target."""
    wanted: Tensor
    """Energy of the cross writes, [L]."""


@torch.no_grad()
def write_energies(clt: Clt, energy: Tensor, sigma: Tensor) -> dict[tuple[int, int], Tensor]:
    """E[a²] ‖d‖² / σ_t² of every write, float64 [F] on the CPU.

    energy: [L, F] E[a²]; sigma: [L]. Layers without variance have energies 0.
    """
    found = {}
    for s in clt.cfg.source_layers():
        for k, t in enumerate(clt.cfg.targets(s)):
            square = clt.decoder_matrix(s, k).double().square().sum(1).cpu()
            variance = float(sigma[t]) ** 2
            found[s, k] = energy[s] * square / variance if variance > 0 else 0 * square
    return found


def random_deletion(clt: Clt, energies: Writes, seed: int) -> Deletion:
    """One draw of writes with as much energy as every target's cross writes."""
    generator = torch.Generator().manual_seed(seed)
    cfg = clt.cfg
    kept = {write: torch.ones_like(values, dtype=torch.bool) for write, values in energies.items()}
    deleted, wanted = (torch.zeros(cfg.n_layers, dtype=torch.float64) for _ in range(2))
    for t in cfg.target_layers():
        sources = cfg.sources(t)
        every = torch.stack([energies[source] for source in sources])
        cross = torch.tensor([place > 0 for _, place in sources])
        wanted[t] = every[cross].sum()
        chosen = _drawn(every.flatten(), float(wanted[t]), generator)
        deleted[t] = every.flatten()[chosen].sum()
        for source, gone in zip(sources, chosen.view_as(every), strict=True):
            kept[source] = ~gone
    return Deletion(kept, deleted, wanted)


def _drawn(energies: Tensor, wanted: float, generator: torch.Generator) -> Tensor:
    """bool: random entries that add up to at most `wanted`, and to no less than all but the
    smallest of the others would allow."""
    chosen = torch.zeros_like(energies, dtype=torch.bool)
    left = torch.randperm(len(energies), generator=generator)
    left = left[energies[left] > 0]
    missing = wanted
    while len(left := left[energies[left] <= missing]):
        fits = int((energies[left].cumsum(0) <= missing).sum())
        chosen[left[:fits]] = True
        missing -= float(energies[left[:fits]].sum())
        left = left[fits:]
    return chosen
