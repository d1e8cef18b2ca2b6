"""Small random coders and tokens for the tests of the analyses, and their slow float64 twin."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from sparsify_vlm.analysis.tokens import GROUPS, TokenBatch, Tokens
from sparsify_vlm.coders import Clt, CltConfig

L, D, F, K = 4, 6, 10, 3


def random_clt(seed: int = 5, scale: float = 0.5, **changes: Any) -> Clt:
    """A coder with random weights; by default L layers that write to all later ones."""
    options: dict[str, Any] = {"num_latents": F, "k": K, "n_targets": L} | changes
    cfg = CltConfig(D, [f"layers.{i}.mlp" for i in range(L)], **options)
    clt = Clt(cfg).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in clt.parameters():
        parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    for threshold in clt.threshold:
        threshold.abs_()
    for norm in (clt.in_norm, clt.out_norm):
        if norm is not None:
            norm.copy_(2 + torch.rand(L, generator=generator))
    return clt


class MadeUp(Tokens):
    """Samples of 5 to 12 tokens: every third is text only, the others have all groups."""

    name = "made up"

    def __init__(self, samples: int = 30, seed: int = 1, together: int = 7) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.size, self.together = samples, together
        lengths = torch.randint(5, 13, (samples,), generator=generator)
        self.sample = torch.arange(samples).repeat_interleave(lengths)
        n = len(self.sample)
        self.x = torch.randn(L, n, D, generator=generator)
        mix = torch.randn(L, D, D, generator=generator)
        noise = torch.randn(L, n, D, generator=generator)
        self.y = 20 + torch.tanh(self.x @ mix) + 0.5 * self.x.cumsum(0) + 0.1 * noise
        self.group = torch.randint(0, 3, (n,), generator=generator).to(torch.uint8)
        self.group[self.sample % 3 == 0] = GROUPS.index("text_only")

    def __iter__(self) -> Iterator[TokenBatch]:
        assert self.size is not None
        for first in range(0, self.size, self.together):
            last = min(first + self.together, self.size)
            kept = (self.sample >= first) & (self.sample < last)
            yield TokenBatch(
                self.x[:, kept],
                self.y[:, kept],
                self.group[kept],
                self.sample[kept],
                torch.arange(first, last),
            )

    def chosen(self, role: str) -> np.ndarray:
        """bool [T]: the tokens of a role."""
        if role == "all":
            return np.ones(len(self.group), dtype=bool)
        return (self.group == GROUPS.index(role)).numpy()


def array(values: torch.Tensor) -> np.ndarray:
    """As float64."""
    return values.detach().double().numpy()


def top_activations(clt: Clt, s: int, x: np.ndarray) -> np.ndarray:
    """[T, F] of a plain top-k coder, one token at a time."""
    pre = x @ array(clt.W_enc[s]).T + array(clt.b_enc[s])
    out = np.zeros_like(pre)
    for row, token in zip(out, pre, strict=True):
        best = np.argsort(-token)[: clt.cfg.k]
        row[best] = np.maximum(token[best], 0)
    return out
