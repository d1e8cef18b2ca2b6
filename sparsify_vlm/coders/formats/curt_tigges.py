"""Cross-layer transcoders of curt-tigges/crosslayer-coding.

`cfg.json` (`num_layers`, `num_features`, `d_model`, `activation_fn`, …) and one safetensors file of
any name with the module's state: `encoder_module.encoders.{l}.weight` [F, d] and `.bias_param` [F];
`decoder_module.decoders.{s}->{t}.weight` [d, F] and `.bias_param` [d], which each source adds; in
place of them `decoders.{s}` (`decoder_tying` per_source) or `decoders.{t}` (per_target, whose bias
is added once); `decoder_module.skip_weights.{s}->{t}` [d, d], applied as W x, where
`skip_connection` is set; `theta_manager.log_threshold` [L, F], a JumpReLU's: a latent is active
where pre >= exp of it.

`normalization_method` mean_std: the coder works on x and y less their mean, divided by their
standard deviation, which `norm_stats.json` has per layer ("inputs", "targets") and dimension, here
or one folder up. They are folded into the weights. Sources: clt/models/{encoder,decoder,theta,
activations}.py and clt/config/clt_config.py of that repository; EleutherAI/attribute converts it
the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify_vlm.coders.config import CltConfig
from sparsify_vlm.coders.formats.checked import CheckedTensors, positive, read_json
from sparsify_vlm.coders.formats.on_disk import Assembled, Segment
from sparsify_vlm.coders.formats.rows import read_in_turn
from sparsify_vlm.coders.formats.stored import is_finite
from sparsify_vlm.errors import UserError

DESCRIPTION = "curt-tigges' cfg.json with num_features, and a safetensors file"
CFG, STATS = "cfg.json", "norm_stats.json"
ENCODER, DECODER = "encoder_module.encoders", "decoder_module.decoders"
SKIP, THRESHOLD = "decoder_module.skip_weights", "theta_manager.log_threshold"

SITES = {
    "mlp.input": "mlp_in",
    "ln_2.output": "mlp_in",
    "post_attention_layernorm.output": "mlp_in",
    "ln_2.input": "resid_mid",
    "post_attention_layernorm.input": "resid_mid",
}
"""Ends of `mlp_input_template`."""

NORMALISATIONS = {"auto": "mean_std", "estimated_mean_std": "mean_std"}
"""Older names."""

FIELDS = {
    *("num_features", "num_layers", "d_model", "model_name", "normalization_method"),
    *("activation_fn", "decoder_tying", "skip_connection", "mlp_input_template"),
    *("enable_feature_offset", "enable_feature_scale", "sqrt_d_model_normalize"),
    *("jumprelu_threshold", "batchtopk_k", "batchtopk_straight_through", "topk_k", "topk_mode"),
    *("topk_straight_through", "two_stage_batchtopk", "clt_dtype", "expected_input_dtype"),
    *("mlp_output_template", "tl_input_template", "tl_output_template", "context_size"),
}
"""Of `cfg.json`."""

ACTIVATIONS = ("jumprelu", "relu")
TYING = ("none", "per_source", "per_target")


def recognises(folder: Path) -> bool:
    """Whether `folder` holds a cross-layer transcoder of crosslayer-coding."""
    path = folder / CFG
    if not path.is_file():
        return False
    try:
        return {"num_features", "num_layers"} <= set(read_json(path))
    except UserError:
        return False


class Stored(Assembled):
    """One file with the decoders as [d, F], so that a whole layer's is in memory at a time."""

    format = "curt-tigges"

    def __init__(self, folder: Path) -> None:
        values = read_json(folder / CFG)
        self._tying = values.get("decoder_tying", "none")
        super().__init__(folder, _config(values, folder / CFG))
        self._file = CheckedTensors(_weights(folder))
        self.dtype = self._file.dtype(f"{ENCODER}.0.weight")
        self._norms = self._read_norms(folder, values)
        self._check()
        for name in sorted(set(values) - FIELDS):
            self.warnings.append(f"{CFG}: field '{name}' is not known and not used")
        if not values.get("mlp_input_template"):
            self.warnings.append(f"{CFG} does not say where x is read; taken as mlp_in")

    # ---- what there is

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the coder."""
        cfg = self.cfg
        shapes: dict[str, tuple[int, ...]] = {}
        L, F, d = cfg.n_layers, cfg.num_latents, cfg.d_model
        for s in range(L):
            shapes |= {f"{ENCODER}.{s}.weight": (F, d), f"{ENCODER}.{s}.bias_param": (F,)}
            for k, t in enumerate(cfg.targets(s)):
                name = f"{DECODER}.{self._decoder(s, k)}"
                shapes |= {f"{name}.weight": (d, F), f"{name}.bias_param": (d,)}
                if cfg.skip_connection:
                    shapes[f"{SKIP}.{s}->{t}"] = (d, d)
        if cfg.activation == "jumprelu":
            shapes[THRESHOLD] = (L, F)
        return shapes

    def _check(self) -> None:
        shapes = self._shapes()
        for key, shape in shapes.items():
            self._file.check(key, shape)
        self.note_unknown(self._file, shapes)

    def _decoder(self, s: int, k: int) -> str:
        """What the decoder from layer `s` to its k-th target is called."""
        t = self.cfg.targets(s)[k]
        return {"none": f"{s}->{t}", "per_source": f"{s}", "per_target": f"{t}"}[self._tying]

    def _read_norms(self, folder: Path, values: dict[str, Any]) -> list[dict[str, Tensor]] | None:
        """Mean and standard deviation of x and y of each layer."""
        if not _normalised(values, folder / CFG):
            return None
        path = next((p for p in (folder / STATS, folder.parent / STATS) if p.is_file()), None)
        if path is None:
            raise UserError(
                f"{folder / STATS}: the coder works on normalised x and y, and the file with their "
                "means and standard deviations is neither here nor one folder up"
            )
        stats = read_json(path)
        return [_layer_norms(stats, i, self.cfg.d_model, path) for i in range(self.cfg.n_layers)]

    def _norm(self, name: str, layer: int) -> Tensor:
        """[d]: `x_mean`, `x_std`, `y_mean` or `y_std`; only where there is normalisation."""
        assert self._norms is not None
        return self._norms[layer][name]

    # ---- reading

    def stored_encoder(self, s: int) -> Tensor:
        W = self._file.read(f"{ENCODER}.{s}.weight", (self.cfg.num_latents, self.cfg.d_model))
        return W if self._norms is None else W / self._norm("x_std", s)

    def encoder_bias(self, s: int) -> Tensor:
        bias = self._file.read(f"{ENCODER}.{s}.bias_param", (self.cfg.num_latents,))
        return bias if self._norms is None else bias - self.encoder(s) @ self._norm("x_mean", s)

    def threshold(self, s: int) -> Tensor | None:
        if self.cfg.activation != "jumprelu":
            return None
        shape = (self.cfg.n_layers, self.cfg.num_latents)
        theta = self._file.read_row(THRESHOLD, s, shape).exp()
        return torch.nextafter(theta, torch.zeros_like(theta))  # active at theta itself too

    def stored_skip(self, s: int, k: int) -> Tensor | None:
        if not self.cfg.skip_connection:
            return None
        d, t = self.cfg.d_model, self.cfg.targets(s)[k]
        W = self._file.read(f"{SKIP}.{s}->{t}", (d, d))
        if self._norms is None:
            return W
        return W / self._norm("x_std", s) * self._norm("y_std", t)[:, None]

    def stored_bias(self, t: int) -> Tensor:
        names = {f"{DECODER}.{self._decoder(s, k)}.bias_param" for s, k in self.cfg.sources(t)}
        bias = sum(
            (self._file.read(name, (self.cfg.d_model,)) for name in sorted(names)),
            start=torch.zeros(self.cfg.d_model),
        )
        if self._norms is None:
            return bias
        bias = bias * self._norm("y_std", t) + self._norm("y_mean", t)
        for s, k in self.cfg.sources(t):
            if (W := self.stored_skip(s, k)) is not None:
                bias = bias - W @ self._norm("x_mean", s)
        return bias

    def decoder_segments(self, s: int) -> list[Segment]:
        shape = (self.cfg.d_model, self.cfg.num_latents)
        names = [self._decoder(s, k) for k in range(len(self.cfg.targets(s)))]
        keys = [f"{DECODER}.{name}.weight" for name in dict.fromkeys(names)]
        return [Segment([self._file.rows(key, shape) for key in keys])]

    def stored_blocks(self, s: int, max_bytes: int, check: bool) -> Iterator[tuple[int, Tensor]]:
        (segment,) = self.decoder_segments(s)
        (tables,) = read_in_turn([segment.tables])
        if check and not is_finite(tables):
            raise self.not_finite(s)
        count = len(self.cfg.targets(s))
        step = max(1, max_bytes // (count * self.cfg.d_model * tables.itemsize))
        for first in range(0, self.cfg.num_latents, step):
            yield first, self.arrange(s, first, tables[:, :, first : first + step])

    def arrange(self, s: int, first: int, tables: Tensor) -> Tensor:
        W = tables.permute(2, 0, 1).expand(-1, len(self.cfg.targets(s)), -1)
        if self._norms is None:
            return W
        return W * torch.stack([self._norm("y_std", t) for t in self.cfg.targets(s)])


def _config(values: dict[str, Any], path: Path) -> CltConfig:
    n_layers = positive(values, "num_layers", path)
    d, F = positive(values, "d_model", path), positive(values, "num_features", path)
    activation, tying = values.get("activation_fn", "jumprelu"), values.get("decoder_tying", "none")
    skip = bool(values.get("skip_connection", False))
    refused = {
        f"activation_fn '{activation}' (scripts/convert_batchtopk_to_jumprelu.py there makes a "
        "JumpReLU of it)": activation in ("batchtopk", "topk"),
        f"activation_fn '{activation}'": activation
        not in ("jumprelu", "relu", "batchtopk", "topk"),
        f"decoder_tying '{tying}'": tying not in ("none", "per_source", "per_target"),
        f"decoder_tying '{tying}' and skip_connection": tying != "none" and skip,
        "enable_feature_offset": bool(values.get("enable_feature_offset")),
        "enable_feature_scale": bool(values.get("enable_feature_scale")),
    }
    for name, used in refused.items():
        if used:
            raise UserError(f"{path}: coders with {name} cannot be read here")
    return CltConfig(
        d_model=d,
        hookpoints=[f"layers.{i}.mlp" for i in range(n_layers)],
        num_latents=F,
        k=F,
        n_targets=n_layers,
        # with normalisation the factors of each target are folded into tables of their own
        per_source_tied=tying == "per_source" and not _normalised(values, path),
        coalesce_topk="concat" if tying == "per_target" else "none",
        activation=activation,
        skip_connection=skip,
        input_site=_input_site(values.get("mlp_input_template"), path),
        expansion_factor=max(1, F // d),
        model=values.get("model_name"),
    )


def _input_site(template: str | None, path: Path) -> str:
    if not template:
        return "mlp_in"
    for end, site in SITES.items():
        if template.endswith(end):
            return site
    raise UserError(f"{path}: coders with mlp_input_template '{template}' cannot be read here")


def _normalised(values: dict[str, Any], path: Path) -> bool:
    method = values.get("normalization_method", "none")
    method = "sqrt_d_model" if values.get("sqrt_d_model_normalize") else method
    if NORMALISATIONS.get(method, method) not in ("none", "mean_std"):
        raise UserError(f"{path}: coders with normalization_method '{method}' cannot be read here")
    return method != "none"


def _weights(folder: Path) -> Path:
    """The only safetensors file of the folder."""
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        found = f"{len(files)} safetensors files" if files else "no safetensors file"
        raise UserError(f"{folder}: {found} beside {CFG}; one with the coder's weights is expected")
    return files[0]


def _layer_norms(stats: dict[str, Any], layer: int, d: int, path: Path) -> dict[str, Tensor]:
    found = {}
    for name, part in (("x", "inputs"), ("y", "targets")):
        for kind in ("mean", "std"):
            value = stats.get(str(layer), {}).get(part, {}).get(kind)
            try:
                numbers = torch.tensor(value, dtype=torch.float32)
            except (TypeError, ValueError, RuntimeError):
                numbers = torch.empty(0)
            if numbers.shape != (d,) or not bool(torch.isfinite(numbers).all()):
                raise UserError(f"{path}: layer {layer}, {part}: '{kind}' is not {d} numbers")
            found[f"{name}_{kind}"] = numbers
    return found
