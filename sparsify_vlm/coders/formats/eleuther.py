"""The layout of EleutherAI's clt-training and sparsify, which is this project's own.

One folder per layer that has a coder, named like its hookpoint, with `cfg.json` and
`sae.safetensors`; beside them our `clt.json`. With one target and no post-encoder the keys are
those of PyPI's sparsify, so that its `SparseCoder.load_from_disk` reads the folder. docs/formats.md
lists every key.

Coders of the fork without `clt.json` are read with its meanings (docs/coders.md). A flag that has
no effect there beside another one is dropped. `cfg.json` also holds what the fork has no field for:
`activation` "jumprelu", which it refuses, and the JumpReLU's bandwidth.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from natsort import natsorted

from sparsify_vlm.coders.clt import Clt
from sparsify_vlm.coders.config import COALESCE, CltConfig
from sparsify_vlm.coders.formats.checked import CheckedTensors, read_json
from sparsify_vlm.coders.formats.eleuther_tensors import (
    is_numbered,
    is_plain,
    layer_tensors,
    read_layer,
    target_key,
)
from sparsify_vlm.errors import UserError
from sparsify_vlm.files import write_json, write_tensors

DESCRIPTION = "hookpoint folders with cfg.json and sae.safetensors"
FORMAT, VERSION = "sparsify-vlm clt", 1
SHEET, CFG, TENSORS = "clt.json", "cfg.json", "sae.safetensors"
VARIANTS = {
    "coalesce_topk": "none",
    "topk_coalesced": False,
    "per_source_tied": False,
    "secondary_target_tied": False,
    "divide_cross_layer": False,
    "normalize_io": False,
}
"""Fields of the fork that PyPI's sparsify lacks, with their defaults."""

SAME_IN_EVERY_LAYER = (
    *("d_in", "num_latents", "k", "transcode", "skip_connection", "activation"),
    *("post_encoder_scale", *VARIANTS),
)
JUMPRELU = ("jumprelu_bandwidth", "jumprelu_init_threshold")
READ_ACTIVATIONS = ("topk", "batchtopk", "groupmax", "jumprelu")


# ---- reading


@dataclass
class StoredConfig:
    """What the JSON files say, before any tensor is read."""

    folders: list[Path]  # one per layer with a coder, in order
    cfgs: list[dict[str, Any]]
    config: CltConfig
    has_sheet: bool


def load(folder: Path, device: str | torch.device, dtype: torch.dtype | None) -> Clt:
    """Read a checkpoint folder, layer by layer."""
    stored = read_config(folder)
    files = [CheckedTensors(child / TENSORS) for child in stored.folders]
    config = stored.config
    config.train_post_encoder = post_encoder_wanted(stored, files)
    if dtype is None:
        dtype = files[0].dtype("encoder.weight") if "encoder.weight" in files[0].keys else None
    clt = Clt(config, device, dtype or torch.float32)
    with torch.no_grad():
        for s, (file, cfg) in enumerate(zip(files, stored.cfgs, strict=True)):
            read_layer(clt, s, file, cfg.get("n_sources"))
    return clt


def read_config(folder: Path) -> StoredConfig:
    sheet = _read_sheet(folder / SHEET) if (folder / SHEET).is_file() else None
    if sheet is not None:
        hookpoints, offset = sheet["hookpoints"], sheet["target_offset"]
        folders = [folder / name for name in hookpoints[: len(hookpoints) - offset]]
    else:
        offset = 0
        folders = (
            [folder]
            if (folder / CFG).is_file()
            else natsorted(
                (child for child in folder.iterdir() if (child / CFG).is_file()),
                key=lambda child: child.name,
            )
        )
        hookpoints = [child.name for child in folders]
    cfgs = [read_json(child / CFG) for child in folders]
    _check_agreement(folders, cfgs)
    for child, cfg in zip(folders, cfgs, strict=True):
        _refuse_unsupported(child / CFG, cfg)
    config = _clt_config(cfgs, folders[0] / CFG, hookpoints, offset, sheet or {})
    if sheet is None:
        _check_depths(folders, cfgs, config)
    return StoredConfig(folders, cfgs, config, sheet is not None)


def _read_sheet(path: Path) -> dict[str, Any]:
    """`clt.json`, its fields checked."""
    sheet = read_json(path)
    if sheet.get("format") != FORMAT or sheet.get("version") != VERSION:
        raise UserError(
            f"{path}: format '{sheet.get('format')}' version {sheet.get('version')} is not known "
            f"here (expected '{FORMAT}' version {VERSION}); update sparsify-vlm"
        )
    names = _field(sheet, "hookpoints", path)
    offset = _field(sheet, "target_offset", path)
    model, n_targets = sheet.get("model"), sheet.get("n_targets", 1)
    wrong = {
        "hookpoints": not (isinstance(names, list) and all(isinstance(n, str) for n in names)),
        "target_offset": type(offset) is not int or offset not in (0, 1),
        "n_targets": type(n_targets) is not int,
        "model": not (model is None or isinstance(model, str)),
        "normalisation": sheet.get("normalisation") is not None,  # would change what x and y are
        "training": not isinstance(sheet.get("training") or {}, dict),
    }
    for name in wrong:
        if wrong[name]:
            raise UserError(f"{path}: {name} {sheet[name]!r} is not understood")
    if len(names) <= offset:
        raise UserError(f"{path}: hookpoints names no layer that has a coder")
    return sheet


def _field(values: dict[str, Any], name: str, path: Path) -> Any:
    if name not in values:
        raise UserError(f"{path}: field '{name}' is missing")
    return values[name]


def _check_agreement(folders: list[Path], cfgs: list[dict[str, Any]]) -> None:
    for name in SAME_IN_EVERY_LAYER:
        values = [cfg.get(name) for cfg in cfgs]
        for folder, value in zip(folders, values, strict=True):
            if value != values[0]:
                raise UserError(
                    f"{folder / CFG}: '{name}' is {value}, but {values[0]} in {folders[0].name}; "
                    "the layers of a cross-layer transcoder must agree"
                )


def _refuse_unsupported(path: Path, cfg: dict[str, Any]) -> None:
    layout, activation = cfg.get("coalesce_topk", "none"), cfg.get("activation", "topk")
    refused = {
        f"coalesce_topk '{layout}'": layout not in COALESCE,
        f"activation '{activation}'": activation not in READ_ACTIVATIONS,
    }
    for name, used in refused.items():
        if used:
            raise UserError(f"{path}: coders with {name} cannot be read here")


def _variants(cfg: dict[str, Any]) -> dict[str, Any]:
    """The fork's flags, without those that do nothing there beside others."""
    flags = {name: cfg.get(name, default) for name, default in VARIANTS.items()}
    coalesced = flags["coalesce_topk"] != "none"
    without_effect = {
        "coalesce_topk": not cfg.get("transcode"),  # an autoencoder's decoder is its own anyway
        "topk_coalesced": not cfg.get("transcode") or not coalesced,
        "per_source_tied": coalesced,
        "divide_cross_layer": coalesced,
    }
    return flags | {name: VARIANTS[name] for name, nothing in without_effect.items() if nothing}


def _n_targets(cfg: dict[str, Any]) -> int:
    return max(1, int(cfg.get("n_targets", 1) or 1))


def _clt_config(
    cfgs: list[dict[str, Any]],
    path: Path,
    hookpoints: list[str],
    offset: int,
    sheet: dict[str, Any],
) -> CltConfig:
    cfg = cfgs[0]
    d_model = int(_field(cfg, "d_in", path))
    num_latents = int(
        cfg.get("num_latents") or d_model * int(_field(cfg, "expansion_factor", path))
    )
    k, variants = int(_field(cfg, "k", path)), _variants(cfg)
    activation = cfg.get("activation", "topk")
    if activation == "topk" and k == num_latents and not variants["topk_coalesced"]:
        activation = "relu"
    values = dict(
        d_model=d_model,
        hookpoints=hookpoints,
        num_latents=num_latents,
        k=k,
        n_targets=int(sheet.get("n_targets", max(_n_targets(c) for c in cfgs))),
        target_offset=offset,
        activation=activation,
        transcode=bool(cfg.get("transcode", False)),
        skip_connection=bool(cfg.get("skip_connection", False)),
        train_post_encoder=bool(cfg.get("train_post_encoder", False)),
        post_encoder_scale=bool(cfg.get("post_encoder_scale", False)),
        normalize_decoder=bool(cfg.get("normalize_decoder", True)),
        expansion_factor=int(cfg.get("expansion_factor", 32)),
        input_site=sheet.get("input_site", "mlp_in" if cfg.get("transcode") else "mlp_out"),
        model=sheet.get("model"),
        revision=sheet.get("revision"),
        training=sheet.get("training") or {},
        **variants,
        **{name: float(cfg[name]) for name in JUMPRELU if name in cfg},
    )
    try:
        return CltConfig(**values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _check_depths(folders: list[Path], cfgs: list[dict[str, Any]], config: CltConfig) -> None:
    for s, cfg in enumerate(cfgs):
        expected = len(config.targets(s))
        if _n_targets(cfg) != expected:
            raise UserError(
                f"{folders[s] / CFG}: n_targets is {_n_targets(cfg)}, expected {expected} for "
                f"layer {s + 1} of {len(cfgs)}; is a layer's folder missing?"
            )


def post_encoder_wanted(stored: StoredConfig, files: list[CheckedTensors]) -> bool:
    """Whether post-encoder biases are part of the coder: trained on here, or not all zero."""
    if stored.has_sheet and stored.config.train_post_encoder:
        return True
    shape = (stored.config.num_latents,)
    return any(
        bool(file.read(key, shape).any())
        for s, file in enumerate(files)
        for k in range(len(stored.config.targets(s)))
        if (key := target_key("post_enc", k, file)) in file.keys
    )


# ---- writing


def save(clt: Clt, folder: Path) -> Path:
    """Write the checkpoint; `clt.json` comes last, when every layer is there."""
    for s in clt.cfg.source_layers():
        child = folder / clt.cfg.hookpoints[s]
        metadata = {"format": "sparsify coder", "version": "1"}
        write_tensors(child / TENSORS, layer_tensors(clt, s), metadata)
        write_json(child / CFG, _layer_cfg(clt.cfg, s))
    write_json(folder / SHEET, _sheet(clt.cfg))
    return folder


def _layer_cfg(cfg: CltConfig, s: int) -> dict[str, Any]:
    values = {
        "activation": "topk" if cfg.activation == "relu" else cfg.activation,
        "expansion_factor": cfg.expansion_factor,
        "normalize_decoder": cfg.normalize_decoder,
        "num_latents": cfg.num_latents,
        "k": cfg.k,
        "multi_topk": False,
        "skip_connection": cfg.skip_connection,
        "transcode": cfg.transcode,
        "d_in": cfg.d_model,
    }
    flags = {name: getattr(cfg, name) for name in VARIANTS}
    if cfg.activation == "jumprelu":
        values |= {name: getattr(cfg, name) for name in JUMPRELU}
    if is_plain(cfg):
        return values | {name: flags[name] for name in flags if flags[name] != VARIANTS[name]}
    targets = cfg.targets(s)
    numbers = {"n_targets": len(targets), "n_sources": len(cfg.sources(targets[0]))}
    posts = {
        "train_post_encoder": cfg.train_post_encoder,
        "post_encoder_scale": cfg.post_encoder_scale,
    }
    return values | (numbers if is_numbered(cfg) else {}) | posts | flags


def _sheet(cfg: CltConfig) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": cfg.model,
        "revision": cfg.revision,
        "hookpoints": cfg.hookpoints,
        "n_targets": cfg.n_targets,
        "target_offset": cfg.target_offset,
        "input_site": cfg.input_site,
        "normalisation": None,
        "training": cfg.training,
    }
