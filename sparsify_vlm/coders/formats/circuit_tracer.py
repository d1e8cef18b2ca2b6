"""Cross-layer transcoders of circuit-tracer (read only).

`config.yaml`; `W_enc_{i}.safetensors` with `W_enc_i` [F, d], `b_enc_i` [F], `b_dec_i` [d] and
optionally `threshold_i` [F]; `W_dec_{i}.safetensors` with `W_dec_i` [F, L − i, d], slot 0 being the
own layer. The activation is ReLU, or JumpReLU where there are thresholds.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import yaml

from sparsify_vlm.coders.clt import Clt
from sparsify_vlm.coders.config import CltConfig
from sparsify_vlm.coders.formats.checked import CheckedTensors
from sparsify_vlm.errors import UserError

DESCRIPTION = "circuit-tracer's config.yaml with W_enc_0.safetensors"

# TransformerLens puts `hook_mlp_in`, as `hook_resid_mid`, before the norm; `mlp.hook_in` after it.
INPUT_SITES = {"hook_resid_mid": "resid_mid", "hook_mlp_in": "resid_mid", "mlp.hook_in": "mlp_in"}
OUTPUT_HOOKS = ("hook_mlp_out", "mlp.hook_out")


def recognises(folder: Path) -> bool:
    """Whether `folder` holds a cross-layer transcoder of circuit-tracer."""
    return (folder / "config.yaml").is_file() and (folder / "W_enc_0.safetensors").is_file()


def load(folder: Path, device: str | torch.device, dtype: torch.dtype | None) -> Clt:
    """Read the folder, layer by layer."""
    n_layers = _count_layers(folder)
    first = CheckedTensors(folder / "W_enc_0.safetensors")
    F, d = first.shape("W_enc_0")
    jumping = "threshold_0" in first.keys
    config = CltConfig(
        d_model=d,
        hookpoints=[f"layers.{i}.mlp" for i in range(n_layers)],
        num_latents=F,
        k=F,
        n_targets=n_layers,
        activation="jumprelu" if jumping else "relu",
        expansion_factor=max(1, F // d),
        **_from_yaml(folder / "config.yaml"),
    )
    clt = Clt(config, device, dtype or first.dtype("W_enc_0"))
    with torch.no_grad():
        for s in range(n_layers):
            _read_layer(clt, s, folder)
    return clt


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
    kind = values.get("model_kind", "cross_layer_transcoder")
    if kind != "cross_layer_transcoder":
        raise UserError(f"{path}: model_kind '{kind}' cannot be read here")
    hook_in = values.get("feature_input_hook", "hook_resid_mid")
    hook_out = values.get("feature_output_hook", "hook_mlp_out")
    if hook_in not in INPUT_SITES:
        raise UserError(f"{path}: coders that read '{hook_in}' are not supported")
    if hook_out not in OUTPUT_HOOKS:
        raise UserError(f"{path}: coders that write to '{hook_out}' are not supported")
    return {"input_site": INPUT_SITES[hook_in], "model": values.get("model_name")}


def _read_layer(clt: Clt, s: int, folder: Path) -> None:
    d, F = clt.cfg.d_model, clt.cfg.num_latents
    encoder = CheckedTensors(folder / f"W_enc_{s}.safetensors")
    clt.W_enc[s].copy_(encoder.read(f"W_enc_{s}", (F, d)))
    clt.b_enc[s].copy_(encoder.read(f"b_enc_{s}", (F,)))
    clt.b_dec[s].copy_(encoder.read(f"b_dec_{s}", (d,)))
    if clt.cfg.activation == "jumprelu":
        clt.threshold[s].copy_(encoder.read(f"threshold_{s}", (F,)))
    decoder = CheckedTensors(folder / f"W_dec_{s}.safetensors")
    tables = decoder.read(f"W_dec_{s}", (F, len(clt.cfg.targets(s)), d))
    for k, W in enumerate(clt.W_dec[s]):
        W.copy_(tables[:, k])
