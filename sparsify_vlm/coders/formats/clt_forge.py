"""Cross-layer transcoders of CLT-Forge.

`clt_cfg.json` and `clt_weights.safetensors`: `W_enc` [L, d, F], `b_enc` and `log_threshold` [L, F]
(threshold = exp), `W_dec` [P, F, d] and `b_dec` [P, d] for the P = L(L+1)/2 pairs of a source and a
target, ordered by source, then target; with `cross_layer_decoders` false P = L, each layer's own.
Biases of a target are summed. `estimated_norm_scaling_factor_in` and `_out` [L], which its encode
and decode leave to the caller: they are given x · in, and y is what they return divided by out.

With `feature_sharding` the latents are split over `rank{r}_clt_weights.safetensors`, in order, and
`b_dec` and the factors are the same in each. It captures x at TransformerLens'
`ln2.hook_normalized` (github.com/LLM-Interp/CLT-Forge, training/activations_store.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify_vlm.coders.config import CltConfig
from sparsify_vlm.coders.formats.checked import CheckedTensors, positive, read_json
from sparsify_vlm.coders.formats.on_disk import Assembled, Segment, numbered_files
from sparsify_vlm.errors import UserError

DESCRIPTION = "CLT-Forge's clt_cfg.json with clt_weights.safetensors"
CFG, WEIGHTS = "clt_cfg.json", "clt_weights.safetensors"
SHARD, SHARD_PATTERN = "rank{}_clt_weights.safetensors", r"rank(\d+)_clt_weights\.safetensors"
IN, OUT = "estimated_norm_scaling_factor_in", "estimated_norm_scaling_factor_out"
KEYS = ("W_enc", "b_enc", "log_threshold", "W_dec", "b_dec", IN, OUT)
DERIVED = ("layer_mask", "feature_count", "l_idx", "k_idx")
"""Stored beside the weights, without effect on what the coder computes."""

FIELDS = {
    *("n_layers", "d_in", "d_latent", "cross_layer_decoders", "activation_fn", "feature_sharding"),
    *("world_size", "model_name", "jumprelu_bandwidth", "jumprelu_init_threshold", "device"),
    *("dtype", "seed", "debug", "normalize_decoder", "dead_feature_window", "context_size", "k"),
    *("functional_loss", "l0_coefficient", "sparse_decode", "sparse_threshold", "ddp", "fsdp"),
}
"""Of `clt_cfg.json`."""


def recognises(folder: Path) -> bool:
    """Whether `folder` holds a cross-layer transcoder of CLT-Forge."""
    return (folder / CFG).is_file()


class Stored(Assembled):
    """One file of weights, or one per part of the latents."""

    format = "clt-forge"

    def __init__(self, folder: Path) -> None:
        values = read_json(folder / CFG)
        cfg = _config(values, folder / CFG)
        self._files = _weight_files(folder, values)
        self._in, self._out = (self._files[0].read(key, (cfg.n_layers,)) for key in (IN, OUT))
        if not bool((self._in > 0).all() and (self._out > 0).all()):
            raise UserError(f"{self._files[0].path}: '{IN}' and '{OUT}' must be positive")
        cfg.normalize_io = bool((self._in != 1).any() or (self._out != 1).any())
        super().__init__(folder, cfg)
        self._crossing = values["cross_layer_decoders"]
        self.dtype = self._files[0].dtype("b_enc")
        self._widths = [file.shape("b_enc")[-1] for file in self._files]
        self._check(values)

    def _check(self, values: dict[str, Any]) -> None:
        cfg = self.cfg
        if sum(self._widths) != cfg.num_latents:
            raise UserError(
                f"{self.path}: the files hold {sum(self._widths)} latents, but {CFG} says "
                f"d_latent {cfg.num_latents}; is a {SHARD.format('{r}')} missing?"
            )
        L, d, pairs = cfg.n_layers, cfg.d_model, self._pair(cfg.n_layers, 0)
        for file, F in zip(self._files, self._widths, strict=True):
            shapes = {"W_enc": (L, d, F), "W_dec": (pairs, F, d), "b_dec": (pairs, d)}
            for key, shape in (shapes | dict.fromkeys(("b_enc", "log_threshold"), (L, F))).items():
                file.check(key, shape)
            self.note_unknown(file, (*KEYS, *DERIVED))
            if not torch.equal(file.read("b_dec", (pairs, d)), self._biases()):
                raise UserError(f"{file.path}: 'b_dec' is not that of {self._files[0].path.name}")
        for name in sorted(set(values) - FIELDS):
            self.warnings.append(f"{CFG}: field '{name}' is not known and not used")
        self.warnings.append(
            "x is TransformerLens' ln2.hook_normalized, which is mlp_in only where the norm's "
            "weight is folded into the MLP"
        )

    def _pair(self, s: int, k: int) -> int:
        """The place of layer s's k-th target among the stored pairs."""
        L = self.cfg.n_layers
        return s * L - s * (s - 1) // 2 + k if self._crossing else s

    def _biases(self) -> Tensor:
        return self._files[0].read("b_dec", self._files[0].shape("b_dec"))

    def in_scale(self, s: int) -> float:
        return float(self._in[s])

    def out_scale(self, t: int) -> float:
        return 1 / float(self._out[t])

    def _row(self, key: str, s: int, *shape: int) -> list[Tensor]:
        """Row `s` of a tensor of every file."""
        return [
            file.read_row(key, s, (self.cfg.n_layers, *shape, F))
            for file, F in zip(self._files, self._widths, strict=True)
        ]

    def stored_encoder(self, s: int) -> Tensor:
        return torch.cat(self._row("W_enc", s, self.cfg.d_model), dim=1).T

    def encoder_bias(self, s: int) -> Tensor:
        return torch.cat(self._row("b_enc", s))

    def threshold(self, s: int) -> Tensor:
        return torch.cat(self._row("log_threshold", s)).exp()

    def stored_bias(self, t: int) -> Tensor:
        biases = self._biases()
        return torch.stack([biases[self._pair(s, k)] for s, k in self.cfg.sources(t)]).sum(0)

    def decoder_segments(self, s: int) -> list[Segment]:
        return [
            Segment(
                [
                    rows.inside(self._pair(s, k))
                    for rows in [file.rows("W_dec", file.shape("W_dec"))]
                    for k in range(len(self.cfg.targets(s)))
                ]
            )
            for file in self._files
        ]

    def arrange(self, s: int, first: int, tables: Tensor) -> Tensor:
        return tables.transpose(0, 1)


def _config(values: dict[str, Any], path: Path) -> CltConfig:
    n_layers = positive(values, "n_layers", path)
    d, F = positive(values, "d_in", path), positive(values, "d_latent", path)
    activation = values.get("activation_fn", "jumprelu")
    if activation != "jumprelu":
        raise UserError(f"{path}: coders with activation_fn '{activation}' cannot be read here")
    for name in ("cross_layer_decoders", "feature_sharding"):
        if not isinstance(values.setdefault(name, name == "cross_layer_decoders"), bool):
            raise UserError(f"{path}: field '{name}' is {values[name]!r}, not true or false")
    return CltConfig(
        d_model=d,
        hookpoints=[f"layers.{i}.mlp" for i in range(n_layers)],
        num_latents=F,
        n_targets=n_layers if values["cross_layer_decoders"] else 1,
        activation="jumprelu",
        expansion_factor=max(1, F // d),
        model=values.get("model_name"),
    )


def _weight_files(folder: Path, values: dict[str, Any]) -> list[CheckedTensors]:
    numbers = numbered_files(folder, SHARD_PATTERN)
    if not values["feature_sharding"]:
        if numbers:
            raise UserError(
                f"{folder / SHARD.format(numbers[0])}: {CFG} says nothing of feature_sharding"
            )
        return [CheckedTensors(folder / WEIGHTS)]
    if (folder / WEIGHTS).is_file():
        raise UserError(f"{folder / WEIGHTS}: {CFG} says feature_sharding, with {SHARD.format(0)}")
    count = values.get("world_size", max(numbers, default=0) + 1)
    if (missing := [r for r in range(count) if r not in numbers]) or len(numbers) > count:
        name = SHARD.format(missing[0] if missing else numbers[-1])
        state = "the file is missing" if missing else "the file is one too many"
        raise UserError(f"{folder / name}: {state}; {count} parts are expected")
    return [CheckedTensors(folder / SHARD.format(r)) for r in numbers]
