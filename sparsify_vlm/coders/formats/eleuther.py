"""The layout of EleutherAI's clt-training and sparsify, which is this project's own.

One folder per layer that has a coder, named like its hookpoint, with `cfg.json` and
`sae.safetensors`; beside them our `clt.json`. With one target and no post-encoder the keys are
those of PyPI's sparsify, so that its `SparseCoder.load_from_disk` reads the folder. docs/formats.md
lists every key.

Read are also the fork's `per_source_tied`, `concat` and `per-layer` layouts where the coder they
describe is a cross-layer transcoder as here: `concat` holds one table at the target, shared by all
sources, `per-layer` one at the target with a block of rows for each source.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from natsort import natsorted
from torch import Tensor, nn

from sparsify_vlm.coders.clt import Clt
from sparsify_vlm.coders.config import CltConfig
from sparsify_vlm.coders.formats.checked import CheckedTensors, read_json
from sparsify_vlm.errors import UserError
from sparsify_vlm.files import write_json, write_tensors

DESCRIPTION = "hookpoint folders with cfg.json and sae.safetensors"
FORMAT, VERSION = "sparsify-vlm clt", 1
SHEET, CFG, TENSORS = "clt.json", "cfg.json", "sae.safetensors"
SAME_IN_EVERY_LAYER = ("d_in", "num_latents", "k", "transcode", "skip_connection")


def recognises(folder: Path) -> bool:
    """Whether `folder` is a checkpoint of this layout, or one of its coder folders."""
    return (
        (folder / SHEET).is_file()
        or (folder / CFG).is_file()
        or any((child / CFG).is_file() for child in folder.iterdir())
    )


# ---- reading


@dataclass
class _Stored:
    """What the JSON files say, before any tensor is read."""

    folders: list[Path]  # one per layer with a coder, in order
    cfgs: list[dict[str, Any]]
    config: CltConfig
    has_sheet: bool

    @property
    def layout(self) -> str:
        return self.cfgs[0].get("coalesce_topk", "none")

    @property
    def per_source_tied(self) -> bool:
        return bool(self.cfgs[0].get("per_source_tied", False))


def load(folder: Path, device: str | torch.device, dtype: torch.dtype | None) -> Clt:
    """Read a checkpoint folder, layer by layer."""
    stored = _read_config(folder)
    files = [CheckedTensors(child / TENSORS) for child in stored.folders]
    config = stored.config
    config.train_post_encoder = _post_encoder_wanted(stored, files)
    if dtype is None:
        dtype = files[0].dtype("encoder.weight") if "encoder.weight" in files[0].keys else None
    clt = Clt(config, device, dtype or torch.float32)
    with torch.no_grad():
        for s, file in enumerate(files):
            _read_layer(clt, s, file, stored)
        if stored.layout in ("concat", "per-layer"):
            for t, file in enumerate(files):
                _read_coalesced_decoder(clt, t, file, stored.layout)
    return clt


def _read_config(folder: Path) -> _Stored:
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
    return _Stored(folders, cfgs, config, sheet is not None)


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
    layout = cfg.get("coalesce_topk", "none")
    refused = {
        "normalize_io": bool(cfg.get("normalize_io")),
        "divide_cross_layer": bool(cfg.get("divide_cross_layer")),
        "topk_coalesced": bool(cfg.get("topk_coalesced")),
        "secondary_target_tied": bool(cfg.get("secondary_target_tied")),
        f"coalesce_topk '{layout}'": layout not in ("none", "concat", "per-layer"),
        f"activation '{cfg.get('activation')}'": cfg.get("activation", "topk") != "topk",
    }
    for name, used in refused.items():
        if used:
            raise UserError(f"{path}: coders with {name} cannot be read yet")


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
    k = int(_field(cfg, "k", path))
    return CltConfig(
        d_model=d_model,
        hookpoints=hookpoints,
        num_latents=num_latents,
        k=k,
        n_targets=int(sheet.get("n_targets", max(_n_targets(c) for c in cfgs))),
        target_offset=offset,
        activation="relu" if k == num_latents else "topk",
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
    )


def _check_depths(folders: list[Path], cfgs: list[dict[str, Any]], config: CltConfig) -> None:
    for s, cfg in enumerate(cfgs):
        expected = len(config.targets(s))
        if _n_targets(cfg) != expected:
            raise UserError(
                f"{folders[s] / CFG}: n_targets is {_n_targets(cfg)}, expected {expected} for "
                f"layer {s + 1} of {len(cfgs)}; is a layer's folder missing?"
            )


def _target_key(name: str, k: int, file: CheckedTensors) -> str:
    """The key for target k: numbered, or for the first target also the single-target name."""
    numbered = f"{name}s.{k}"
    return name if k == 0 and numbered not in file.keys and name in file.keys else numbered


def _post_encoder_wanted(stored: _Stored, files: list[CheckedTensors]) -> bool:
    """Whether post-encoder biases are part of the coder: trained on here, or not all zero."""
    if stored.has_sheet and stored.config.train_post_encoder:
        return True
    shape = (stored.config.num_latents,)
    return any(
        bool(file.read(key, shape).any())
        for s, file in enumerate(files)
        for k in range(len(stored.config.targets(s)))
        if (key := _target_key("post_enc", k, file)) in file.keys
    )


def _read_layer(clt: Clt, s: int, file: CheckedTensors, stored: _Stored) -> None:
    cfg = clt.cfg
    d, F = cfg.d_model, cfg.num_latents
    clt.W_enc[s].copy_(file.read("encoder.weight", (F, d)))
    clt.b_enc[s].copy_(file.read("encoder.bias", (F,)))
    coalesced = stored.layout != "none"
    for k, t in enumerate(cfg.targets(s)):
        if not coalesced or k == 0:
            clt.b_dec[t].add_(file.read(_target_key("b_dec", k, file), (d,)).to(clt.b_dec[t]))
            if clt.W_skip is not None:
                clt.W_skip[s][k].copy_(file.read(_target_key("W_skip", k, file), (d, d)))
        if not coalesced:
            _read_decoder(clt, s, k, file, stored.per_source_tied)
        if clt.post_enc is not None and (key := _target_key("post_enc", k, file)) in file.keys:
            clt.post_enc[s][k].copy_(file.read(key, (F,)))
        if clt.post_scale is not None:
            clt.post_scale[s][k].copy_(file.read(_target_key("post_enc_scale", k, file), (F,)))


def _read_decoder(clt: Clt, s: int, k: int, file: CheckedTensors, tied: bool) -> None:
    shape = (clt.cfg.num_latents, clt.cfg.d_model)
    if tied and k > 0:
        clt.W_dec[s][k] = clt.W_dec[s][0]
    else:
        clt.W_dec[s][k].copy_(file.read(_target_key("W_dec", k, file), shape))


def _read_coalesced_decoder(clt: Clt, t: int, file: CheckedTensors, layout: str) -> None:
    """Decoders kept at the target: one for all sources (`concat`), or one block of rows each."""
    d, F = clt.cfg.d_model, clt.cfg.num_latents
    sources = clt.cfg.sources(t)
    if layout == "concat":
        shared = nn.Parameter(file.read("W_dec", (F, d)).to(clt.W_enc[0]))
        for s, k in sources:
            clt.W_dec[s][k] = shared
        return
    table = file.read("W_dec", (len(sources) * F, d))
    for block, (s, k) in enumerate(sources):
        clt.W_dec[s][k].copy_(table[block * F : (block + 1) * F])


# ---- writing


def save(clt: Clt, folder: Path) -> Path:
    """Write the checkpoint; `clt.json` comes last, when every layer is there."""
    if clt.cfg.activation == "jumprelu":
        raise UserError(f"{folder}: this layout has no thresholds, JumpReLU coders cannot be saved")
    for s in clt.cfg.source_layers():
        child = folder / clt.cfg.hookpoints[s]
        metadata = {"format": "sparsify coder", "version": "1"}
        write_tensors(child / TENSORS, _unshared(_layer_tensors(clt, s)), metadata)
        write_json(child / CFG, _layer_cfg(clt, s))
    write_json(folder / SHEET, _sheet(clt.cfg))
    return folder


def is_single_target(clt: Clt) -> bool:
    """Whether PyPI's sparsify can express these coders."""
    most = max(len(clt.cfg.targets(s)) for s in clt.cfg.source_layers())
    return most == 1 and clt.post_enc is None and clt.post_scale is None


def _layer_tensors(clt: Clt, s: int) -> dict[str, Tensor]:
    targets = clt.cfg.targets(s)
    tensors: dict[str, Tensor] = {"encoder.weight": clt.W_enc[s], "encoder.bias": clt.b_enc[s]}
    if is_single_target(clt):
        tensors |= {"W_dec": clt.W_dec[s][0], "b_dec": clt.b_dec[targets[0]]}
        return tensors | ({} if clt.W_skip is None else {"W_skip": clt.W_skip[s][0]})
    for k, t in enumerate(targets):
        # A target has one bias here and one per source in the fork, which sums them: the nearest
        # source carries it.
        tensors[f"W_decs.{k}"] = clt.W_dec[s][k]
        tensors[f"b_decs.{k}"] = clt.b_dec[t] if k == 0 else torch.zeros_like(clt.b_dec[t])
        zeros = torch.zeros_like(clt.b_enc[s])
        tensors[f"post_encs.{k}"] = zeros if clt.post_enc is None else clt.post_enc[s][k]
        if clt.post_scale is not None:
            tensors[f"post_enc_scales.{k}"] = clt.post_scale[s][k]
        if clt.W_skip is not None:
            tensors[f"W_skips.{k}"] = clt.W_skip[s][k]
    return tensors


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tied tables, which safetensors refuses to store under two names."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        result[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return result


def _layer_cfg(clt: Clt, s: int) -> dict[str, Any]:
    cfg = clt.cfg
    values = {
        "activation": "topk",
        "expansion_factor": cfg.expansion_factor,
        "normalize_decoder": cfg.normalize_decoder,
        "num_latents": cfg.num_latents,
        "k": cfg.k if cfg.activation == "topk" else cfg.num_latents,
        "multi_topk": False,
        "skip_connection": cfg.skip_connection,
        "transcode": cfg.transcode,
        "d_in": cfg.d_model,
    }
    if is_single_target(clt):
        return values
    targets = cfg.targets(s)
    return values | {
        "n_targets": len(targets),
        "n_sources": len(cfg.sources(targets[0])),
        "train_post_encoder": cfg.train_post_encoder,
        "post_encoder_scale": cfg.post_encoder_scale,
        "coalesce_topk": "none",
    }


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
