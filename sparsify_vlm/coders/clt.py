"""The cross-layer transcoder as a module: weights, encoding, decoding, initialisation.

    a_s = activation(W_enc[s] x_s + b_enc[s])
    ŷ_t = b_dec[t] + Σ_{(s, k) writing to t} f_{s,t} (u_{s,k} Σ W + W_skip[s][k] x_s)
    u_{s,k} = (a_s + post_enc[s][k] · [a_s > 0]) · post_scale[s][k]

Σ W runs over `tables(s, k)`, which is W_dec[s][k] and, with `secondary_target_tied`, W_dec[t][0];
f is 1, or with `divide_cross_layer` 1 / number of other layers that write to t where s ≠ t. With
`topk_coalesced` only the k largest of all the u_{s,k} of one t are kept. With `normalize_io`,
x_s stands for x_s √d / in_norm[s] and the right side of ŷ_t is multiplied by out_norm[t] / √d.

Tables may be one and the same parameter: W_dec[s][k] for all k (`per_source_tied`), or for all s
that write to one t (`coalesce_topk` concat). Where a variant is switched off its tables are None.
All variants have the meaning they have in EleutherAI's clt-training (docs/coders.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsify_vlm.coders.activations import batch_top, group_max, jump, survivors
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


def _decoders(cfg: CltConfig, make: Callable[[], nn.Parameter]) -> PerTarget:
    """W_dec[s][k], the same object where the configuration shares one."""
    shared: dict[int, nn.Parameter] = {}

    def table(s: int, t: int) -> nn.Parameter:
        if cfg.per_source_tied:
            return shared.setdefault(s, make())
        return shared.setdefault(t, make()) if cfg.coalesce_topk == "concat" else make()

    return PerTarget(
        nn.ParameterList(table(s, t) for t in cfg.targets(s)) for s in cfg.source_layers()
    )


def _skips(cfg: CltConfig, make: Callable[[], nn.Parameter]) -> PerTarget:
    """W_skip[s][k]; of a coalesced coder each layer has only its own, k = 0."""
    count = 1 if cfg.own_skip_only or cfg.coalesce_topk != "none" else cfg.n_targets
    return PerTarget(
        nn.ParameterList(make() for _ in cfg.targets(s)[:count]) for s in cfg.source_layers()
    )


class Clt(nn.Module):
    """A cross-layer transcoder with all its layers; per-layer coders are the case n_targets = 1.

    W_enc[s] [F, d] and b_enc[s] [F] for each layer s that has a coder; W_dec[s][k] [F, d] for the
    k-th target of s; b_dec[t] [d] for every layer (a constant 0 where nothing writes). threshold[s]
    [F] of a JumpReLU is trained, [1] of batch top-k is for use after training (0: not learned yet).
    x and y are taken and given as they are, whatever `normalize_io` does inside.
    Made with zero weights: call `initialise`, or load a checkpoint.
    """

    in_norm: Tensor | None
    out_norm: Tensor | None

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
        self.W_dec = _decoders(cfg, lambda: _zeros(F, d, **like))
        self.b_dec = nn.ParameterList(_zeros(d, **like) for _ in cfg.hookpoints)
        for t in range(cfg.target_offset):
            self.b_dec[t].requires_grad_(False)
        self.W_skip = _skips(cfg, lambda: _zeros(d, d, **like)) if cfg.skip_connection else None
        self.post_enc = per_target(_zeros, F) if cfg.train_post_encoder else None
        self.post_scale = per_target(_ones, F) if cfg.post_encoder_scale else None
        size = {"jumprelu": F, "batchtopk": 1}.get(cfg.activation, 0)
        self.threshold = nn.ParameterList(
            _zeros(size, **like).requires_grad_(cfg.activation == "jumprelu")
            for _ in (cfg.source_layers() if size else ())
        )
        norms = _ones(cfg.n_layers, **like).detach() if cfg.normalize_io else None
        self.register_buffer("in_norm", norms)
        self.register_buffer("out_norm", None if norms is None else norms.clone())

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

    def skip_input(self, s: int, x_s: Tensor) -> Tensor:
        """What the skip connections of layer `s` read for x_s [T, d] -> [T, d]."""
        x_s = x_s.to(self.dtype)
        if self.in_norm is None:
            return x_s
        return x_s * (math.sqrt(self.cfg.d_model) / self.in_norm[s])

    def encoder_input(self, s: int, x_s: Tensor) -> Tensor:
        """What the encoder of layer `s` is multiplied with for x_s [T, d] -> [T, d]."""
        x_s = self.skip_input(s, x_s)
        return x_s if self.cfg.transcode else x_s - self.b_dec[s]

    def pre_activations(self, s: int, x_s: Tensor) -> Tensor:
        """What the activation function of layer `s` sees for x_s [T, d] -> [T, F]."""
        return nn.functional.linear(self.encoder_input(s, x_s), self.W_enc[s], self.b_enc[s])

    def encode_layer(
        self, s: int, x_s: Tensor, k: int | None = None, training: bool = False
    ) -> Latents:
        """Active latents of layer `s` for x_s [T, d]; `k` and `training` as in `activate`."""
        limit = PRE_ACTIVATIONS_AT_ONCE.get(x_s.device.type, PRE_ACTIVATIONS_AT_ONCE["cpu"])
        rows = max(1, limit // self.cfg.num_latents)
        if self.cfg.activation not in ("topk", "groupmax") or len(x_s) <= rows:
            return self.activate(s, self.pre_activations(s, x_s), k, training)
        parts = [self.activate(s, self.pre_activations(s, part), k) for part in x_s.split(rows)]
        return Latents(
            torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])
        )

    def activate(
        self, s: int, pre: Tensor, k: int | None = None, training: bool = False
    ) -> Latents:
        """The activation function of layer `s` on its pre-activations [T, F]; differentiable.

        `k` overrides the config's. `training` chooses the batch rule of batch top-k (also used
        while no threshold is learned) and lets a JumpReLU's threshold have a gradient.
        """
        k = min(k or self.cfg.k, self.cfg.num_latents)
        match self.cfg.activation:
            case "topk":
                return select_top(pre, k)
            case "groupmax":
                return group_max(pre, k)
            case "batchtopk" if training or not bool(self.threshold[s] > 0):
                return batch_top(pre, k)
            case "jumprelu" if training:
                return jump(pre, self.threshold[s], self.cfg.jumprelu_bandwidth)
        return select_positive(pre, self.threshold[s] if len(self.threshold) else None)

    def encode(
        self, x: Sequence[Tensor] | Tensor, k: int | None = None, training: bool = False
    ) -> list[Latents | None]:
        """Active latents per layer for x [L, T, d]; None for a layer without a coder."""
        sources = self.cfg.source_layers()
        return [
            self.encode_layer(s, x[s], k, training) if s in sources else None
            for s in range(self.cfg.n_layers)
        ]

    # ---- decoding

    def tables(self, s: int, k: int) -> list[nn.Parameter]:
        """The decoders that u_{s,k} is multiplied with, one or two (possibly twice the same)."""
        tables = [self.W_dec[s][k]]
        if self.cfg.secondary_target_tied:
            tables.append(self.W_dec[self.cfg.targets(s)[k]][0])
        return tables

    def skip(self, s: int, k: int) -> nn.Parameter | None:
        """The skip connection [d, d] of layer `s` to its k-th target, if this pair has one."""
        return None if self.W_skip is None or k >= len(self.W_skip[s]) else self.W_skip[s][k]

    def write_factor(self, s: int, t: int) -> float:
        """What all that layer `s` writes to layer `t` is multiplied with (`divide_cross_layer`)."""
        return self.cfg.write_factor(s, t)

    def out_scale(self, t: int) -> float:
        """What the whole sum for layer `t`, bias included, is multiplied with (`normalize_io`)."""
        if self.out_norm is None:
            return 1.0
        return float(self.out_norm[t]) / math.sqrt(self.cfg.d_model)

    @torch.no_grad()
    def decoder_matrix(self, s: int, k: int) -> Tensor:
        """[F, d]: what a unit of u_{s,k} adds to ŷ_t, the sum over `tables` with all factors."""
        t = self.cfg.targets(s)[k]
        first, *others = self.tables(s, k)
        total = first.detach()
        for W in others:
            total = total + W
        factor = self.write_factor(s, t) * self.out_scale(t)
        return total if factor == 1 else total * factor

    def written_values(self, s: int, k: int, latents: Latents) -> Tensor:
        """u_{s,k} [T, K] before `topk_coalesced`: from activations to what decoders read."""
        values = latents.values
        if self.post_enc is not None:
            values = values + self.post_enc[s][k][latents.indices] * (latents.values > 0)
        if self.post_scale is not None:
            values = values * self.post_scale[s][k][latents.indices]
        return values

    def written_to(
        self, t: int, latents: Sequence[Latents | None], k: int | None = None
    ) -> list[Tensor]:
        """u of every source of layer `t`, in the order of `cfg.sources(t)`, each [T, K].

        With `topk_coalesced` 0 but for the `k` (default: the config's) largest per token.
        Raises `ValueError` if the latents of a source are missing.
        """
        written = []
        for s, place in self.cfg.sources(t):
            active = latents[s]
            if active is None:
                raise ValueError(f"the latents of layer {s} are missing")
            written.append(self.written_values(s, place, active))
        if not self.cfg.topk_coalesced:
            return written
        kept = survivors(written, k or self.cfg.k, positive=self.cfg.activation == "batchtopk")
        return [u * mask for u, mask in zip(written, kept, strict=True)]

    def decode_source(
        self, s: int, k: int, latents: Latents, x_s: Tensor | None, written: Tensor | None = None
    ) -> Tensor:
        """What layer `s` adds to ŷ of its k-th target, [T, d]. x_s is needed for a skip connection.

        `written` [T, K]: u_{s,k} where it depends on other sources, as with `topk_coalesced`.
        """
        if written is None:
            if self.cfg.topk_coalesced:
                raise ValueError("with topk_coalesced what a layer writes depends on the others")
            written = self.written_values(s, k, latents)
        out = self.latent_write(s, k, Latents(written, latents.indices))
        if self.skip(s, k) is None:
            return out
        if x_s is None:
            raise ValueError("decoding a coder with a skip connection needs x")
        return out + self.skip_write(s, k, x_s)

    def latent_write(self, s: int, k: int, written: Latents) -> Tensor:
        """What the latents of layer `s` alone add to ŷ of its k-th target, [T, d]: u_{s,k} as
        `written` times the decoders."""
        first, *others = self.tables(s, k)
        out = decode(written, first)
        for W in others:
            out = out + decode(written, W)
        t = self.cfg.targets(s)[k]
        factor = self.write_factor(s, t) * self.out_scale(t)
        return out if factor == 1 else out * factor

    def skip_write(self, s: int, k: int, x_s: Tensor) -> Tensor:
        """What the skip connection of layer `s` adds to ŷ of its k-th target, [T, d]; x_s [T, d].

        Raises `ValueError` if this pair has none.
        """
        if (W_skip := self.skip(s, k)) is None:
            raise ValueError(f"layer {s} has no skip connection to its target {k}")
        t = self.cfg.targets(s)[k]
        return self.skip_input(s, x_s) @ W_skip.T * (self.write_factor(s, t) * self.out_scale(t))

    def decode_target(
        self,
        t: int,
        latents: Sequence[Latents | None],
        x: Sequence[Tensor] | Tensor | None = None,
        keep: Callable[[int], bool] | None = None,
        k: int | None = None,
    ) -> Tensor:
        """ŷ_t [T, d] from the latents of every layer up to t.

        x[s] [T, d] is needed for skip connections only. `keep(s)` False leaves out what layer s
        writes, skip included; the bias always stays. `k` is for `topk_coalesced`.
        Raises `ValueError` if no coder writes to t.
        """
        sources = self.cfg.sources(t)
        if not sources:
            raise ValueError(f"no coder writes to layer {t} ({self.cfg.hookpoints[t]})")
        scale = self.out_scale(t)
        written = self.written_to(t, latents, k)
        out = self.b_dec[t] if scale == 1 else self.b_dec[t] * scale
        out = out.expand(len(written[0]), -1)
        for (s, place), u in zip(sources, written, strict=True):
            active = latents[s]
            if active is not None and (keep is None or keep(s)):
                out = out + self.decode_source(s, place, active, None if x is None else x[s], u)
        return out.clone() if out.stride(0) == 0 else out

    def decode(
        self,
        latents: Sequence[Latents | None],
        x: Sequence[Tensor] | Tensor | None = None,
        k: int | None = None,
    ) -> list[Tensor | None]:
        """ŷ_t [T, d] per layer; None for a layer no coder writes to. `k` as in `decode_target`."""
        targets = self.cfg.target_layers()
        return [
            self.decode_target(t, latents, x, k=k) if t in targets else None
            for t in range(self.cfg.n_layers)
        ]

    def reconstruct(self, x: Sequence[Tensor] | Tensor) -> list[Tensor | None]:
        """`decode(encode(x), x)` for x [L, T, d]."""
        return self.decode(self.encode(x), x)

    # ---- weights

    @torch.no_grad()
    def initialise(
        self,
        mean_x: Tensor,
        mean_y: Tensor,
        seed: int = 0,
        norm_x: Tensor | None = None,
        norm_y: Tensor | None = None,
        own: Callable[[str, Tensor], Tensor] = lambda _, whole: whole,
    ) -> Clt:
        """Set the weights training starts from, as sparsify does; returns the module.

        mean_x, mean_y [L, d]: means over the first batch's tokens; norm_x, norm_y [L]: those of
        the tokens' norms, needed for `normalize_io` only. Encoders are drawn like those of
        `nn.Linear`, on the CPU, so that they are the same on every device. Transcoders: encoder
        bias −W_enc mean_x, decoders 0. Autoencoders: decoder = encoder. The first ŷ_t is mean_y[t].
        `own` gives this module's part of a parameter, if it is a part of a coder.
        """
        self._set_norms(norm_x, norm_y)
        generator = torch.Generator().manual_seed(seed)
        bound = 1 / math.sqrt(self.cfg.d_model)
        drawn = torch.empty(self.cfg.num_latents, self.cfg.d_model)
        for s in self.cfg.source_layers():
            self.W_enc[s].copy_(own("W_enc", drawn.uniform_(-bound, bound, generator=generator)))
            if self.cfg.transcode:
                self.b_enc[s].copy_(
                    -(self.W_enc[s] @ self.skip_input(s, mean_x[s].to(self.device)))
                )
            else:
                self.W_dec[s][0].copy_(self.W_enc[s])
            if self.cfg.activation == "jumprelu":
                self.threshold[s].fill_(self.cfg.jumprelu_init_threshold)
        for t in self.cfg.target_layers():
            mean = own("b_dec", mean_y[t].to(self.b_dec[t]))
            self.b_dec[t].copy_(mean / self.out_scale(t))
        if self.cfg.normalize_decoder and not self.cfg.transcode:
            self.set_decoder_norm_to_unit_norm()
        return self

    def _set_norms(self, norm_x: Tensor | None, norm_y: Tensor | None) -> None:
        if self.in_norm is None or self.out_norm is None:
            return
        if norm_x is None or norm_y is None:
            raise ValueError("normalize_io needs the mean norms of x and y")
        self.in_norm.copy_(norm_x)
        self.out_norm.copy_(norm_y)

    @torch.no_grad()
    def project(self) -> None:
        """After an update: bring thresholds that became negative back to 0."""
        for threshold in self.threshold:
            threshold.clamp_(min=0)

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
