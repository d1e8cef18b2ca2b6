"""Cross-layer transcoders of circuit-tracer.

`config.yaml`; `W_enc_{i}.safetensors` with `W_enc_i` [F, d], `b_enc_i` [F], `b_dec_i` [d] and
optionally `threshold_i` [F]; `W_dec_{i}.safetensors` with `W_dec_i` [F, L − i, d], slot 0 being the
own layer. The activation is ReLU, or JumpReLU where there are thresholds.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from sparsify_vlm.coders.config import CltConfig
from sparsify_vlm.coders.formats.checked import CheckedTensors
from sparsify_vlm.coders.formats.on_disk import Assembled, Segment
from sparsify_vlm.errors import UserError

DESCRIPTION = "circuit-tracer's config.yaml with W_enc_0.safetensors"

# TransformerLens puts `hook_mlp_in`, as `hook_resid_mid`, before the norm; `mlp.hook_in` after it.
INPUT_SITES = {"hook_resid_mid": "resid_mid", "hook_mlp_in": "resid_mid", "mlp.hook_in": "mlp_in"}
KIND = "cross_layer_transcoder"
OUTPUT_HOOKS = ("hook_mlp_out", "mlp.hook_out")


def recognises(folder: Path) -> bool:
    """Whether `folder` holds a cross-layer transcoder of circuit-tracer."""
    return (folder / "config.yaml").is_file() and (folder / "W_enc_0.safetensors").is_file()


class Stored(Assembled):
    """Two files per layer."""

    format = "circuit-tracer"

    def __init__(self, folder: Path) -> None:
        n_layers = _count_layers(folder)
        first = CheckedTensors(folder / "W_enc_0.safetensors")
        F, d = first.shape("W_enc_0")
        jumping = "threshold_0" in first.keys
        cfg = CltConfig(
            d_model=d,
            hookpoints=[f"layers.{i}.mlp" for i in range(n_layers)],
            num_latents=F,
            k=F,
            n_targets=n_layers,
            activation="jumprelu" if jumping else "relu",
            expansion_factor=max(1, F // d),
            **_from_yaml(folder / "config.yaml"),
        )
        super().__init__(folder, cfg)
        self.dtype = first.dtype("W_enc_0")
        for s in range(n_layers):
            names = (*("W_enc", "b_enc", "b_dec"), *(["threshold"] if jumping else []))
            self.note_unknown(
                CheckedTensors(folder / f"W_enc_{s}.safetensors"), [f"{name}_{s}" for name in names]
            )

    def _read(self, name: str, s: int, *shape: int) -> Tensor:
        return CheckedTensors(self.path / f"W_enc_{s}.safetensors").read(f"{name}_{s}", shape)

    def stored_encoder(self, s: int) -> Tensor:
        return self._read("W_enc", s, self.cfg.num_latents, self.cfg.d_model)

    def encoder_bias(self, s: int) -> Tensor:
        return self._read("b_enc", s, self.cfg.num_latents)

    def threshold(self, s: int) -> Tensor | None:
        if self.cfg.activation != "jumprelu":
            return None
        threshold = self._read("threshold", s, self.cfg.num_latents)
        if bool((threshold < 0).any()):
            raise UserError(
                f"{self.path}: 'threshold_{s}' is negative somewhere, where circuit-tracer lets "
                "latents be negative; they are not here"
            )
        return threshold

    def stored_bias(self, t: int) -> Tensor:
        return self._read("b_dec", t, self.cfg.d_model)

    def decoder_segments(self, s: int) -> list[Segment]:
        file = CheckedTensors(self.path / f"W_dec_{s}.safetensors")
        shape = (self.cfg.num_latents, len(self.cfg.targets(s)), self.cfg.d_model)
        return [Segment([file.rows(f"W_dec_{s}", shape)])]

    def arrange(self, s: int, first: int, tables: Tensor) -> Tensor:
        return tables[0]


def _count_layers(folder: Path) -> int:
    names = [re.fullmatch(r"W_enc_(\d+)\.safetensors", child.name) for child in folder.iterdir()]
    numbers = sorted(int(match[1]) for match in names if match)
    for expected, number in enumerate(numbers):
        if number != expected:
            raise UserError(f"{folder / f'W_enc_{expected}.safetensors'}: the file is missing")
    return len(numbers)


def _from_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as YAML") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping")
    kind = values.get("model_kind", KIND)
    if kind != KIND:
        raise UserError(f"{path}: model_kind '{kind}' cannot be read here")
    hook_in = values.get("feature_input_hook", "hook_resid_mid")
    hook_out = values.get("feature_output_hook", "hook_mlp_out")
    if hook_in not in INPUT_SITES:
        raise UserError(f"{path}: coders that read '{hook_in}' are not supported")
    if hook_out not in OUTPUT_HOOKS:
        raise UserError(f"{path}: coders that write to '{hook_out}' are not supported")
    return {"input_site": INPUT_SITES[hook_in], "model": values.get("model_name")}
