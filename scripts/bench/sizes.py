"""The sizes that are measured, their coders and their tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsify_vlm.coders import Clt, CltConfig

GIB = 2**30
DATA = ("random", "zipf")

ZIPF_EXPONENT = 1.0
FREQUENT = 0.5
"""Of `zipf`: the most frequent latent is active at this share of the tokens."""


@dataclass(frozen=True)
class Size:
    """A full cross-layer transcoder and the tokens of one step."""

    layers: int
    d_model: int
    num_latents: int
    k: int
    tokens: int

    @property
    def pairs(self) -> int:
        """Decoders: one for each source and each target from it on."""
        return self.layers * (self.layers + 1) // 2

    @property
    def weights(self) -> int:
        """Numbers in the encoders and decoders (biases are left out)."""
        return (self.pairs + self.layers) * self.num_latents * self.d_model

    @property
    def largest_system(self) -> int:
        """Bytes that the largest system needs: weights, gradients and Adam's two moments in
        float32, and three [T, F] matrices per layer that the dense one keeps for its backward."""
        kept = 3 * self.layers * self.tokens * self.num_latents
        tokens = 2 * self.layers * self.tokens * self.d_model
        return 4 * (4 * self.weights + kept + tokens)

    def config(self) -> CltConfig:
        """The coder."""
        return CltConfig(
            d_model=self.d_model,
            hookpoints=[f"layers.{i}.mlp" for i in range(self.layers)],
            num_latents=self.num_latents,
            k=self.k,
            n_targets=self.layers,
        )

    def __str__(self) -> str:
        return (
            f"L={self.layers}, d={self.d_model}, F={self.num_latents:,}, k={self.k}, "
            f"{self.tokens:,} tokens, all {self.pairs} source-target pairs"
        )


def widest(size: Size, memory: int, step: int) -> Size:
    """`size` with as many latents, in multiples of `step`, as let every system fit in `memory`."""
    latents = size.num_latents // step * step
    while latents > step and replace(size, num_latents=latents).largest_system > memory:
        latents -= step
    return replace(size, num_latents=latents)


MACHINE, SYSTEM = 24 * GIB, 2 * GIB
"""Memory that the gpt2 size is cut to, and what is left of it to everything else."""

GPT2 = Size(layers=12, d_model=768, num_latents=24576, k=32, tokens=1024)
SIZES = {
    "tiny": Size(layers=8, d_model=96, num_latents=768, k=16, tokens=3000),
    "A": Size(layers=8, d_model=256, num_latents=4096, k=16, tokens=2048),
    "B": Size(layers=12, d_model=768, num_latents=6144, k=32, tokens=1024),
    "gpt2": widest(GPT2, MACHINE - SYSTEM, 2048),
}


def draw(size: Size, data: str = "random", seed: int = 0) -> tuple[Tensor, Tensor]:
    """x, y [L, T, d]. `random`: independent normal numbers. `zipf`: most of the variance in a few
    directions of each layer, with a spectrum that falls like 1/i."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, size.layers, size.tokens, size.d_model)
    drawn = torch.randn(shape, generator=generator)
    if data == "zipf":
        axes = torch.randn(2, size.layers, size.d_model, size.d_model, generator=generator)
        spectrum = 1 / torch.arange(1, size.d_model + 1).sqrt()
        drawn = drawn * (spectrum / spectrum.norm()) @ axes
    return drawn[0], drawn[1]


def zipf_frequencies(num_latents: int, k: int) -> Tensor:
    """[F] float64, falling: shares of the tokens at which a latent is active, which add up to k.
    Like 1/rank^ZIPF_EXPONENT, but at most FREQUENT."""
    falling = torch.arange(1, num_latents + 1, dtype=torch.float64) ** -ZIPF_EXPONENT
    scale = torch.tensor(float(k), dtype=torch.float64)
    for _ in range(100):  # towards the factor with which the capped shares add up
        scale *= k / (scale * falling).clamp(max=FREQUENT).sum()
    return (scale * falling).clamp(max=FREQUENT)


def build(size: Size, data: str = "random", device: str = "cpu", seed: int = 0) -> Clt:
    """A coder with random decoders. `zipf`: biases with which its latents are active as often as
    `zipf_frequencies` says, on the tokens of `draw`."""
    x, y = draw(size, data)
    clt = Clt(size.config()).initialise(x.mean(1), y.mean(1), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tables in clt.W_dec:
            for W in tables:
                W.normal_(std=0.01, generator=generator)
        if data == "zipf":
            quantile = torch.special.ndtri(zipf_frequencies(size.num_latents, size.k))
            for W, b, x_s in zip(clt.W_enc, clt.b_enc, x, strict=True):
                place = torch.randperm(size.num_latents, generator=generator)
                spread = (x_s[:256] @ W.T).std(0)
                b += spread * (quantile[place].to(b) + math.sqrt(2 * math.log(size.num_latents)))
    return clt.to(device)
