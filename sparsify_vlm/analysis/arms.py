"""The arms of the ablation experiment: ways to make ŷ_t of one coder's latents.

    full              b_t + Σ_s a_s W_{s→t} (+ skip), the coder as it is
    same_only         only what each coder writes to its first target, skip included
    cross_mean        the same, and every cross write its mean over the measured tokens
    refit             frozen encoders, first-target decoders and biases refitted (`refit.py`)
    cross_only        without what each coder writes to its first target
    reach_D           only writes over at most D layers
    random_deletion   without random writes of the cross writes' energy (`deletion.py`)
    no_skip           without skip connections
    plt               another, per-layer coder
    random_init       random encoders of the same size and L0, their decoders fitted as in `refit`
    mean, zero        every y its mean over the measured tokens; nothing

An arm is told by how it decodes. What it needs of a batch, `Parts` keeps, so that arms of one coder
share the encoding and each source's write.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparsify_vlm.analysis.deletion import Deletion
from sparsify_vlm.analysis.refit import Refitted
from sparsify_vlm.coders import Clt, CltConfig, Latents
from sparsify_vlm.coders.sparse_ops import decode


class Parts:
    """What the sources of one target after the other write, on T tokens.

    `latents[s]`, `x[s]` [T, d] by layer, as far as they are known; half [T]: 0 or 1, which half of
    the samples a token is of.
    """

    def __init__(self, clt: Clt, latents: Sequence[Latents | None], x: Any, half: Tensor) -> None:
        self.clt, self.latents, self.x, self.half = clt, latents, x, half
        self._target = -1
        self._made: dict[Any, Any] = {}

    def _kept(self, t: int, what: Any, make: Callable[[], Any]) -> Any:
        if t != self._target:
            self._target, self._made = t, {}
        if what not in self._made:
            self._made[what] = make()
        return self._made[what]

    def written(self, t: int) -> list[Tensor]:
        """u of every source of t, [T, K] each, in the order of `cfg.sources(t)`."""
        made: list[Tensor] = self._kept(t, "u", lambda: self.clt.written_to(t, self.latents))
        return made

    def active(self, s: int) -> Latents:
        """The latents of layer s."""
        active = self.latents[s]
        assert active is not None
        return active

    def latent_write(self, t: int, i: int, keep: Tensor | None = None) -> Tensor:
        """What the latents of the i-th source of t write, [T, d]; `keep` bool [F]: only those."""
        s, place = self.clt.cfg.sources(t)[i]
        index = self.active(s).indices
        if keep is not None:
            return self.clt.latent_write(s, place, Latents(self.written(t)[i] * keep[index], index))
        made: Tensor = self._kept(
            t, i, lambda: self.clt.latent_write(s, place, Latents(self.written(t)[i], index))
        )
        return made

    def skip_write(self, t: int, i: int) -> Tensor | None:
        """What the skip connection of the i-th source of t writes, [T, d], if it has one."""
        s, place = self.clt.cfg.sources(t)[i]
        if self.clt.skip(s, place) is None:
            return None
        made: Tensor = self._kept(t, ("skip", i), lambda: self.clt.skip_write(s, place, self.x[s]))
        return made

    def bias(self, t: int) -> Tensor:
        """b_t for every token, [T, d], to be added to."""
        bias = self.clt.b_dec[t] * self.clt.out_scale(t)
        return bias.expand(len(self.half), -1).clone()


@dataclass(frozen=True)
class Arm:
    """A way to make ŷ_t [T, d]: `decode(parts, t)`, parts being those of `clt`.

    Without a `clt` nothing is encoded, and ŷ_t is `constant[t]`.
    """

    name: str
    clt: Clt | None
    decode: Callable[[Parts, int], Tensor]
    constant: Tensor | None = None
    """[L, d]."""


def kept_arm(
    name: str,
    clt: Clt,
    keep: Callable[[int], bool],
    skip: bool = True,
    shift: Tensor | None = None,
) -> Arm:
    """Only writes over the distances (target − source) that `keep` wants; `shift` [L, d] is added
    to ŷ."""

    def make(parts: Parts, t: int) -> Tensor:
        y_hat = parts.bias(t)
        for i, (s, _) in enumerate(clt.cfg.sources(t)):
            if not keep(t - s):
                continue
            y_hat += parts.latent_write(t, i)
            if skip and (through := parts.skip_write(t, i)) is not None:
                y_hat += through
        return y_hat if shift is None else y_hat + shift[t].to(y_hat)

    return Arm(name, clt, make)


def masked_arm(name: str, clt: Clt, deletion: Deletion) -> Arm:
    """Without the writes of a random deletion; skip connections stay."""
    kept = {write: mask.to(clt.device) for write, mask in deletion.kept.items()}

    def make(parts: Parts, t: int) -> Tensor:
        y_hat = parts.bias(t)
        for i, source in enumerate(clt.cfg.sources(t)):
            y_hat += parts.latent_write(t, i, kept[source])
            if (through := parts.skip_write(t, i)) is not None:
                y_hat += through
        return y_hat

    return Arm(name, clt, make)


def refitted_arm(name: str, clt: Clt, halves: Sequence[Refitted]) -> Arm:
    """The refits of `clt`, each token with the one that its own half was not fitted on."""

    def one(parts: Parts, t: int, fit: Refitted) -> Tensor:
        s = t - clt.cfg.target_offset
        y_hat = fit.bias[t] + decode(parts.active(s), fit.W[s])
        return y_hat if fit.skip is None else y_hat + clt.skip_input(s, parts.x[s]) @ fit.skip[s]

    def make(parts: Parts, t: int) -> Tensor:
        even, odd = (one(parts, t, fit) for fit in halves)
        return torch.where(parts.half[:, None] == 0, even, odd)

    return Arm(name, clt, make)


def constant_arm(name: str, values: Tensor) -> Arm:
    """ŷ_t = values[t], values [L, d]."""

    def make(parts: Parts, t: int) -> Tensor:
        return values[t].to(parts.half.device).expand(len(parts.half), -1)

    return Arm(name, None, make, values)


def reaches(cfg: CltConfig) -> list[int]:
    """1, 2, 4 … below the longest distance that is written over, above the shortest."""
    longest = max(cfg.targets(s)[-1] - s for s in cfg.source_layers())
    powers = [2**i for i in range(longest.bit_length())]
    return [D for D in powers if cfg.target_offset < D < longest]


def random_coder(clt: Clt, mean_x: Tensor, k: int, seed: int) -> Clt:
    """A per-layer coder with random encoders, `k` active latents per token, decoders 0.

    Encoders are drawn as training's are. mean_x [L, d].
    """
    cfg = replace(
        clt.cfg,
        k=k,
        activation="topk",
        n_targets=1,
        coalesce_topk="none",
        topk_coalesced=False,
        per_source_tied=False,
        secondary_target_tied=False,
        divide_cross_layer=False,
        train_post_encoder=False,
        post_encoder_scale=False,
        normalize_io=False,
        transcode=True,
    )
    made = Clt(cfg, clt.device, clt.dtype).requires_grad_(False)
    return made.initialise(mean_x.to(clt.device), torch.zeros_like(mean_x), seed)
