"""The cross-layer transcoder as a module: weights, encoding, decoding, initialisation.

    a_s = activation(W_enc[s] x_s + b_enc[s])
    ŷ_t = b_dec[t] + Σ_{(s, k) writing to t} u_{s,k} W_dec[s][k] + W_skip[s][k] x_s
    u_{s,k} = (a_s + post_enc[s][k] · [a_s > 0]) · post_scale[s][k]

Where a variant is switched off its tables are None. Skip connection and post-encoder have the
meaning they have in EleutherAI's clt-training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsify_vlm.coders.config import CltConfig
from sparsify_vlm.coders.sparse_ops import Latents, decode, select_positive, select_top

PRE_ACTIVATIONS_AT_ONCE = {"cpu": 1 << 22, "cuda": 1 << 27}
"""Pre-activations held at a time while encoding. Smaller pieces are slower (docs/log.md)."""


class PerTarget(nn.ModuleList):
    """One table per (layer with a coder, target index): `tables[s][k]`."""

    if TYPE_CHECKING:

        def __getitem__(self, s: int) -> nn.ParameterList: ...  # type: ignore[override]

        def __iter__(self) -> Iterator[nn.ParameterList]: ...


def _zeros(*shape: int, **like: Any) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape, **like))


def _ones(*shape: int, **like: Any) -> nn.Parameter:
    return nn.Parameter(torch.ones(*shape, **like))


class Clt(nn.Module):
    """A cross-layer transcoder with all its layers; per-layer coders are the case n_targets = 1.

    W_enc[s] [F, d] and b_enc[s] [F] for each layer s that has a coder; W_dec[s][k] [F, d] for the
    k-th target of s; b_dec[t] [d] for every layer (a constant 0 where nothing writes).
    Made with zero weights: call `initialise`, or load a checkpoint.
    """

    def __init__(
        self,
        cfg: CltConfig,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.cfg = cfg
        d, F, like = cfg.d_model, cfg.num_latents, {"device": device, "dtype": dtype}

        def per_target(make: Callable[..., nn.Parameter], *shape: int) -> PerTarget:
            return PerTarget(
                nn.ParameterList(make(*shape, **like) for _ in cfg.targets(s))
                for s in cfg.source_layers()
            )

        self.W_enc = nn.ParameterList(_zeros(F, d, **like) for _ in cfg.source_layers())
        self.b_enc = nn.ParameterList(_zeros(F, **like) for _ in cfg.source_layers())
        self.W_dec = per_target(_zeros, F, d)
        self.b_dec = nn.ParameterList(_zeros(d, **like) for _ in cfg.hookpoints)
        for t in range(cfg.target_offset):
            self.b_dec[t].requires_grad_(False)
        self.W_skip = per_target(_zeros, d, d) if cfg.skip_connection else None
        self.post_enc = per_target(_zeros, F) if cfg.train_post_encoder else None
        self.post_scale = per_target(_ones, F) if cfg.post_encoder_scale else None
        self.threshold = nn.ParameterList(
            _zeros(F, **like).requires_grad_(False)
            for _ in (cfg.source_layers() if cfg.activation == "jumprelu" else ())
        )

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Clt:
        """Same as `load_clt`."""
        from sparsify_vlm.coders.formats import load_clt

        return load_clt(path_or_hub_id, device=device, dtype=dtype)

    @property
    def device(self) -> torch.device:
        return self.W_enc[0].device

    @property
    def dtype(self) -> torch.dtype:
        return self.W_enc[0].dtype

    # ---- encoding

    def pre_activations(self, s: int, x_s: Tensor) -> Tensor:
        """What the activation function of layer `s` sees for x_s [T, d] -> [T, F]."""
        x_s = x_s.to(self.dtype)
        if not self.cfg.transcode:
            x_s = x_s - self.b_dec[s]
        return nn.functional.linear(x_s, self.W_enc[s], self.b_enc[s])

    def encode_layer(self, s: int, x_s: Tensor, k: int | None = None) -> Latents:
        """Active latents of layer `s` for x_s [T, d]; `k` overrides the config's (top-k only)."""
        limit = PRE_ACTIVATIONS_AT_ONCE.get(x_s.device.type, PRE_ACTIVATIONS_AT_ONCE["cpu"])
        rows = max(1, limit // self.cfg.num_latents)
        if self.cfg.activation != "topk" or len(x_s) <= rows:
            return self._activate(s, self.pre_activations(s, x_s), k)
        parts = [self._activate(s, self.pre_activations(s, part), k) for part in x_s.split(rows)]
        return Latents(
            torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])
        )

    def _activate(self, s: int, pre: Tensor, k: int | None) -> Latents:
        if self.cfg.activation == "topk":
            return select_top(pre, min(k or self.cfg.k, self.cfg.num_latents))
        return select_positive(pre, self.threshold[s] if len(self.threshold) else None)

    def encode(self, x: Sequence[Tensor] | Tensor, k: int | None = None) -> list[Latents | None]:
        """Active latents per layer for x [L, T, d]; None for a layer without a coder."""
        sources = self.cfg.source_layers()
        return [
            self.encode_layer(s, x[s], k) if s in sources else None
            for s in range(self.cfg.n_layers)
        ]

    # ---- decoding

    def written_values(self, s: int, k: int, latents: Latents) -> Tensor:
        """u_{s,k}: what latents of layer `s` are multiplied with for its k-th target, [T, K]."""
        values = latents.values
        if self.post_enc is not None:
            values = values + self.post_enc[s][k][latents.indices] * (latents.values > 0)
        if self.post_scale is not None:
            values = values * self.post_scale[s][k][latents.indices]
        return values

    def decode_source(self, s: int, k: int, latents: Latents, x_s: Tensor | None) -> Tensor:
        """What layer `s` writes to its k-th target, [T, d]. x_s is needed for a skip connection."""
        written = Latents(self.written_values(s, k, latents), latents.indices)
        out = decode(written, self.W_dec[s][k])
        if self.W_skip is not None:
            if x_s is None:
                raise ValueError("decoding a coder with a skip connection needs x")
            out = out + x_s.to(self.dtype) @ self.W_skip[s][k].T
        return out

    def decode_target(
        self,
        t: int,
        latents: Sequence[Latents | None],
        x: Sequence[Tensor] | Tensor | None = None,
        keep: Callable[[int], bool] | None = None,
    ) -> Tensor:
        """ŷ_t [T, d] from the latents of every layer up to t.

        x[s] [T, d] is needed for skip connections only. `keep(s)` False leaves out what layer s
        writes, skip included; the bias always stays. Raises `ValueError` if no coder writes to t.
        """
        sources = self.cfg.sources(t)
        if not sources:
            raise ValueError(f"no coder writes to layer {t} ({self.cfg.hookpoints[t]})")
        out: Tensor = self.b_dec[t]
        for s, k in sources:
            if keep is not None and not keep(s):
                continue
            active = latents[s]
            if active is None:
                raise ValueError(f"the latents of layer {s} are missing")
            out = out + self.decode_source(s, k, active, None if x is None else x[s])
        if out.ndim == 1:
            tokens = next(len(active.values) for active in latents if active is not None)
            out = out.expand(tokens, -1).clone()
        return out

    def decode(
        self, latents: Sequence[Latents | None], x: Sequence[Tensor] | Tensor | None = None
    ) -> list[Tensor | None]:
        """ŷ_t [T, d] per layer; None for a layer no coder writes to."""
        targets = self.cfg.target_layers()
        return [
            self.decode_target(t, latents, x) if t in targets else None
            for t in range(self.cfg.n_layers)
        ]

    def reconstruct(self, x: Sequence[Tensor] | Tensor) -> list[Tensor | None]:
        """`decode(encode(x), x)` for x [L, T, d]."""
        return self.decode(self.encode(x), x)

    # ---- weights

    @torch.no_grad()
    def initialise(self, mean_x: Tensor, mean_y: Tensor, seed: int = 0) -> Clt:
        """Set the weights training starts from, as sparsify does; returns the module.

        mean_x, mean_y [L, d]: means over the first batch's tokens. Encoders are drawn like those
        of `nn.Linear`, on the CPU, so that they are the same on every device. Transcoders: encoder
        bias −W_enc mean_x, decoders 0. Autoencoders: decoder = encoder. b_dec[t] = mean_y[t].
        """
        generator = torch.Generator().manual_seed(seed)
        bound = 1 / math.sqrt(self.cfg.d_model)
        for s in self.cfg.source_layers():
            drawn = torch.empty(self.W_enc[s].shape).uniform_(-bound, bound, generator=generator)
            self.W_enc[s].copy_(drawn)
            if self.cfg.transcode:
                self.b_enc[s].copy_(-(self.W_enc[s] @ mean_x[s].to(self.W_enc[s])))
            else:
                self.W_dec[s][0].copy_(self.W_enc[s])
        for t in self.cfg.target_layers():
            self.b_dec[t].copy_(mean_y[t])
        if self.cfg.normalize_decoder and not self.cfg.transcode:
            self.set_decoder_norm_to_unit_norm()
        return self

    @torch.no_grad()
    def set_decoder_norm_to_unit_norm(self) -> None:
        """Divide every decoder row by its norm."""
        for tables in self.W_dec:
            for W in tables:
                W.div_(W.norm(dim=1, keepdim=True) + torch.finfo(W.dtype).eps)

    @torch.no_grad()
    def remove_gradient_parallel_to_decoder_directions(self) -> None:
        """Project the decoders' gradients to be orthogonal to their (unit-norm) rows."""
        for tables in self.W_dec:
            for W in tables:
                if W.grad is not None:
                    W.grad -= (W.grad * W).sum(1, keepdim=True) * W
