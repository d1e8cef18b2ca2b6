"""Coders whose decoders have known norms, and what their latents do on made-up data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsify_vlm.coders import Clt, CltConfig

D_MODEL = 16
LATENTS = 24


def coder(
    n_layers: int,
    norm: Callable[[int, int], Tensor | float],
    n_targets: int | None = None,
    seed: int = 0,
    **options,
) -> Clt:
    """A ReLU coder in float64 with ‖W_{s→t}[i]‖ = norm(s, t)[i], in random directions, and unit
    encoder rows."""
    cfg = CltConfig(
        D_MODEL,
        [f"layers.{s}.mlp" for s in range(n_layers)],
        num_latents=LATENTS,
        n_targets=n_targets or n_layers,
        activation="relu",
        **options,
    )
    generator = torch.Generator().manual_seed(seed)

    def directions() -> Tensor:
        drawn = torch.randn(LATENTS, D_MODEL, generator=generator, dtype=torch.float64)
        return drawn / drawn.norm(dim=1, keepdim=True)

    clt = Clt(cfg, dtype=torch.float64)
    with torch.no_grad():
        for s in cfg.source_layers():
            clt.W_enc[s].copy_(directions())
            clt.b_enc[s].normal_(generator=generator).abs_()
            for k, t in enumerate(cfg.targets(s)):
                size = torch.as_tensor(norm(s, t), dtype=torch.float64).expand(LATENTS)
                clt.W_dec[s][k].copy_(directions() * size[:, None])
    return clt


@torch.no_grad()
def regauged(clt: Clt, seed: int = 1) -> Clt:
    """The same function: each latent scaled up by a factor from 1/20 to 20, its decoders down."""
    generator = torch.Generator().manual_seed(seed)
    other = Clt(clt.cfg, dtype=torch.float64)
    other.load_state_dict(clt.state_dict())
    for s in clt.cfg.source_layers():
        drawn = torch.rand(clt.cfg.num_latents, generator=generator, dtype=torch.float64)
        factor = 20 ** (2 * drawn - 1)
        other.W_enc[s].mul_(factor[:, None])
        other.b_enc[s].mul_(factor)
        for W in other.W_dec[s]:
            W.div_(factor[:, None])
    x = torch.randn(clt.cfg.n_layers, 5, D_MODEL, generator=generator, dtype=torch.float64)
    for a, b in zip(clt.reconstruct(x), other.reconstruct(x), strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, atol=1e-10)
    return other


@dataclass
class Activity:
    """What the experiments on weights read of measured activity."""

    tokens: dict[str, int]
    energy: dict[str, Tensor]
    frequency: dict[str, Tensor]
    sigma: Tensor
    block_share: dict[str, Tensor] = field(default_factory=dict)
    samples: int = 1


@torch.no_grad()
def measured(clt: Clt, seed: int = 2, tokens: int = 60) -> Activity:
    """Activity on random x of two roles, computed token by token from the definitions."""
    cfg = clt.cfg
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(cfg.n_layers, tokens, D_MODEL, generator=generator, dtype=torch.float64)
    x[:, ::2] += 1
    roles = {"all": slice(None), "image": slice(0, None, 2), "text": slice(1, None, 2)}
    dense = [
        torch.relu(x[s] @ clt.W_enc[s].T + clt.b_enc[s]) for s in cfg.source_layers()
    ]  # [S][T, F]
    energy, frequency, shares = {}, {}, {}
    for role, rows in roles.items():
        energy[role] = torch.zeros(cfg.n_layers, LATENTS, dtype=torch.float64)
        frequency[role] = torch.zeros_like(energy[role])
        for s, active in enumerate(dense):
            energy[role][s] = (active[rows] ** 2).mean(0)
            frequency[role][s] = (active[rows] > 0).double().mean(0)
        shares[role] = torch.full((cfg.n_layers, cfg.n_layers), torch.nan, dtype=torch.float64)
        for t in cfg.target_layers():
            parts = {s: dense[s][rows] @ clt.W_dec[s][k] for s, k in cfg.sources(t)}
            whole = torch.stack([*parts.values()]).sum(0)
            for s, part in parts.items():
                shares[role][s, t] = (part * whole).sum() / (whole**2).sum()
    sigma = torch.linspace(0.5, 3, cfg.n_layers, dtype=torch.float64)
    counts = {"all": tokens, "image": tokens // 2, "text": tokens // 2, "text_only": 0}
    return Activity(counts, energy, frequency, sigma, shares)
