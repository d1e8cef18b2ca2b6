"""A coder looked at layer by layer, so that a part of one decoder is in memory at a time."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from sparsify_vlm.coders.clt import Clt
from sparsify_vlm.coders.config import CltConfig
from sparsify_vlm.errors import UserError

BLOCK_BYTES = 2 << 20
"""A piece of a decoder that stays in the processor's cache while it is worked on."""


class StoredClt(ABC):
    """A coder on disk. Layers are counted as in `cfg`; s is a layer that has a coder.

    All is given as for x and y as they are, whatever normalisation the coder has inside.
    """

    format: str

    def __init__(self, path: Path, cfg: CltConfig) -> None:
        self.path = path
        self.cfg = cfg
        self.warnings: list[str] = []
        """What was found and not used, by layer and name; grows as layers are read."""

    @abstractmethod
    def encoder(self, s: int) -> Tensor:
        """W_enc [F, d] of layer `s`, as multiplied with x."""

    @abstractmethod
    def encoder_bias(self, s: int) -> Tensor:
        """[F]: what is added to W_enc x."""

    @abstractmethod
    def threshold(self, s: int) -> Tensor | None:
        """[F]: a latent is active above it; None where activations have no threshold."""

    @abstractmethod
    def output_bias(self, t: int) -> Tensor:
        """[d]: ŷ of target `t` where no latent is active, less skip connections."""

    @abstractmethod
    def skip(self, s: int, k: int) -> Tensor | None:
        """W_skip [d, d] of layer `s` to its k-th target, as in W_skip x; None if there is none."""

    @abstractmethod
    def decoder_blocks(
        self, s: int, max_bytes: int = BLOCK_BYTES, check: bool = True
    ) -> Iterator[tuple[int, Tensor]]:
        """Pieces (i, W [rows, n_targets, d]) of the decoders of layer `s`, rows in order from i.

        W[j, k]: what one unit of the activation of latent i + j adds to ŷ of the k-th target of s,
        in y's units. W is of the stored dtype or float32, strided, and overwritten by the next
        step. Larger pieces than the default are slower. NaN and infinite values raise `UserError`
        naming file and key, unless `check` is False: then `not_finite` finds them.
        """

    @abstractmethod
    def not_finite(self, s: int) -> UserError:
        """An error naming the file and key of the decoder of layer `s` that holds NaN or infinite
        values."""

    @abstractmethod
    def load(self, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Clt:
        """The whole coder; `dtype` None keeps the stored one."""


class InMemory(StoredClt):
    """The same view of a coder that is in memory."""

    format = "memory"

    def __init__(self, clt: Clt) -> None:
        super().__init__(Path(clt.cfg.model or "."), clt.cfg)
        self.clt = clt

    @torch.no_grad()
    def encoder(self, s: int) -> Tensor:
        W = self.clt.W_enc[s].detach()
        if self.clt.in_norm is None:
            return W
        return W * (self.cfg.d_model**0.5 / self.clt.in_norm[s])

    @torch.no_grad()
    def encoder_bias(self, s: int) -> Tensor:
        bias = self.clt.b_enc[s].detach()
        return bias if self.cfg.transcode else bias - self.clt.W_enc[s] @ self.clt.b_dec[s]

    def threshold(self, s: int) -> Tensor | None:
        return full_threshold(self.cfg, self.clt.threshold[s]) if len(self.clt.threshold) else None

    @torch.no_grad()
    def output_bias(self, t: int) -> Tensor:
        return self.clt.b_dec[t].detach() * self.clt.out_scale(t)

    @torch.no_grad()
    def skip(self, s: int, k: int) -> Tensor | None:
        W, t = self.clt.skip(s, k), self.cfg.targets(s)[k]
        if W is None:
            return None
        factor = self.cfg.write_factor(s, t) * self.clt.out_scale(t)
        unit = torch.eye(self.cfg.d_model, dtype=W.dtype, device=W.device)
        return (self.clt.skip_input(s, unit) @ W.T).T * factor

    @torch.no_grad()
    def decoder_blocks(
        self, s: int, max_bytes: int = BLOCK_BYTES, check: bool = True
    ) -> Iterator[tuple[int, Tensor]]:
        targets = self.cfg.targets(s)
        step = max(1, max_bytes // (len(targets) * self.cfg.d_model * 4))
        for first in range(0, self.cfg.num_latents, step):
            rows = slice(first, first + step)
            W = torch.stack([self._rows(s, k, rows) for k in range(len(targets))], dim=1)
            if check and not is_finite(W):
                raise self.not_finite(s)
            yield first, W

    def _rows(self, s: int, k: int, rows: slice) -> Tensor:
        t = self.cfg.targets(s)[k]
        total = torch.stack([W.detach()[rows] for W in self.clt.tables(s, k)]).sum(0)
        if self.clt.post_scale is not None:
            total = total * self.clt.post_scale[s][k].detach()[rows, None]
        factor = self.clt.write_factor(s, t) * self.clt.out_scale(t)
        return total if factor == 1 else total * factor

    def not_finite(self, s: int) -> UserError:
        return UserError(f"a decoder of {self.cfg.hookpoints[s]} holds NaN or infinite values")

    def load(self, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Clt:
        if self.clt.device == torch.device(device) and dtype in (None, self.clt.dtype):
            return self.clt
        return copy.deepcopy(self.clt).to(device=device, dtype=dtype)


def full_threshold(cfg: CltConfig, threshold: Tensor) -> Tensor | None:
    """[F] from a coder's stored threshold [F] or [1]; None for one that is not learned yet."""
    if cfg.activation == "batchtopk" and not bool(threshold > 0):
        return None
    return threshold.detach().expand(cfg.num_latents)


def is_finite(tables: Tensor) -> bool:
    """Whether all values are finite: one sum, and a closer look only where it is not."""
    total = tables.sum(dtype=torch.promote_types(tables.dtype, torch.float32))
    return bool(torch.isfinite(total)) or bool(torch.isfinite(tables).all())
