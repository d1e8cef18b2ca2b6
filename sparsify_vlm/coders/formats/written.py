"""Coders written in other programs' layouts, layer by layer.

Whatever a coder has inside that is a factor (`normalize_io`, `divide_cross_layer`,
`post_encoder_scale`, tied and second decoders, an autoencoder's b_dec before the encoder) is
multiplied out first; what is none and what a layout has no place for is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from torch import Tensor

from sparsify_vlm.coders.clt import Clt
from sparsify_vlm.coders.export import Format
from sparsify_vlm.coders.formats import circuit_tracer, clt_forge, eleuther, gemma_scope
from sparsify_vlm.coders.formats.eleuther_tensors import is_plain
from sparsify_vlm.coders.formats.stored import InMemory, StoredClt
from sparsify_vlm.errors import UserError
from sparsify_vlm.files import write_json, write_tensors, write_text


def export_clt(coder: StoredClt | Clt, format: Format, output_dir: str | Path) -> Path:
    """Write a coder in another program's layout; returns the folder.

    Raises `UserError` if the folder is not empty or the layout cannot express the coder.
    """
    stored = InMemory(coder) if isinstance(coder, Clt) else coder
    folder = Path(output_dir).expanduser()
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"--output_dir {folder} is there and not empty: give another name")
    write, fault = WRITERS[format]
    if (reason := fault(stored)) is not None:
        raise UserError(f"{stored.path}: {format}'s layout {reason}")
    folder.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        write(stored, folder)
    return folder


# ---- what a layout can express


def _no_fault(stored: StoredClt) -> None:
    return None


def _sparsify_fault(stored: StoredClt) -> str | None:
    if is_plain(stored.cfg) and stored.cfg.target_offset == 0:
        return None
    return (
        "has one target per coder, its own layer, and topk, groupmax or ReLU activations; "
        "--format eleuther has the rest"
    )


def _crossing_fault(stored: StoredClt) -> str | None:
    """What none of the other programs' cross-layer layouts can express."""
    cfg = stored.cfg
    learned = all(stored.threshold(s) is not None for s in cfg.source_layers())
    gated = cfg.activation in ("relu", "jumprelu") or (cfg.activation == "batchtopk" and learned)
    reasons = {
        f"knows ReLU and JumpReLU only, not {cfg.activation}"
        + " without a learned threshold" * (cfg.activation == "batchtopk"): not gated,
        "is for transcoders only, not for autoencoders": not cfg.transcode,
        "lets every layer write to itself, not from --target_offset 1 on": cfg.target_offset > 0,
        "has no bias on active latents (--train_post_encoder)": cfg.train_post_encoder,
        "has no selection among all sources (--topk_coalesced)": cfg.topk_coalesced,
    }
    return next((reason for reason, found in reasons.items() if found), None)


def _skip_fault(stored: StoredClt) -> str | None:
    return "has no skip connection" if stored.cfg.skip_connection else None


def _tracer_fault(stored: StoredClt) -> str | None:
    return _crossing_fault(stored) or _skip_fault(stored)


def _site_fault(stored: StoredClt) -> str | None:
    site = stored.cfg.input_site
    return None if site == "mlp_in" else f"reads x behind the norm (mlp_in), not at {site}"


def _forge_fault(stored: StoredClt) -> str | None:
    return _crossing_fault(stored) or _skip_fault(stored) or _site_fault(stored)


def _gemma_fault(stored: StoredClt) -> str | None:
    if (fault := _crossing_fault(stored) or _site_fault(stored)) is not None:
        return fault
    for s in stored.cfg.source_layers():
        for k in range(1, len(stored.cfg.targets(s))):
            if (W := stored.skip(s, k)) is not None and bool(W.any()):
                return f"has skip connections to the own layer only, and layer {s} has others"
    return None


# ---- layouts


def _decoders(stored: StoredClt, s: int, before: int = 0) -> Tensor:
    """[F, slots, d]: those of layer `s` to itself and every later layer, zeros where it does not
    write, and `before` slots of zeros first."""
    cfg, later = stored.cfg, stored.cfg.n_layers - s
    blocks = stored.decoder_blocks(s)
    first, rows = next(blocks)
    W = rows.new_zeros(cfg.num_latents, before + later, cfg.d_model)
    places = slice(before, before + rows.shape[1])
    W[: len(rows), places] = rows
    for first, rows in blocks:
        W[first : first + len(rows), places] = rows
    return W


def _write_circuit_tracer(stored: StoredClt, folder: Path) -> None:
    cfg, metadata = stored.cfg, {"format": "pt"}
    for s in cfg.source_layers():
        tensors = {
            f"W_enc_{s}": stored.encoder(s),
            f"b_enc_{s}": stored.encoder_bias(s),
            f"b_dec_{s}": stored.output_bias(s),
        }
        if (threshold := stored.threshold(s)) is not None:
            # Below 0, where latents are 0 here, circuit-tracer would let negative ones through.
            tensors[f"threshold_{s}"] = threshold.clamp(min=0)
        write_tensors(folder / f"W_enc_{s}.safetensors", tensors, metadata)
        decoders = {f"W_dec_{s}": _decoders(stored, s)}
        write_tensors(folder / f"W_dec_{s}.safetensors", decoders, metadata)
    hooks = {"resid_mid": "hook_resid_mid", "mlp_in": "mlp.hook_in"}
    values = {
        "model_name": cfg.model,
        "model_kind": circuit_tracer.KIND,
        "feature_input_hook": hooks[cfg.input_site],
        "feature_output_hook": circuit_tracer.OUTPUT_HOOKS[0],
        "scan": None,
    }
    write_text(folder / "config.yaml", yaml.safe_dump(values, sort_keys=False))


def _write_gemma_scope(stored: StoredClt, folder: Path) -> None:
    cfg = stored.cfg
    for s in cfg.source_layers():
        encoder, threshold = stored.encoder(s), stored.threshold(s)
        tensors = {
            "w_enc": encoder.T,
            "b_enc": stored.encoder_bias(s),
            "threshold": encoder.new_zeros(len(encoder)) if threshold is None else threshold,
            "w_dec": _decoders(stored, s, before=s),
            "b_dec": stored.output_bias(s),
        }
        if (W_skip := stored.skip(s, 0)) is not None:
            tensors[gemma_scope.SKIP] = W_skip.T
        write_tensors(folder / gemma_scope.NAME.format(s), tensors, {"format": "pt"})
    values = {"architecture": "jump_relu", "model_name": cfg.model}
    write_json(folder / gemma_scope.CONFIG, values)


def _write_clt_forge(stored: StoredClt, folder: Path) -> None:
    """All pairs are one tensor there, so that the whole coder is in memory."""
    cfg, sources = stored.cfg, stored.cfg.source_layers()
    crossing = cfg.n_targets > 1
    decoders = [_decoders(stored, s)[:, : None if crossing else 1] for s in sources]
    W_dec = torch.cat([W.transpose(0, 1) for W in decoders])
    b_dec = W_dec.new_zeros(len(W_dec), cfg.d_model)
    own = [0]
    for W in decoders[:-1]:
        own.append(own[-1] + W.shape[1])
    b_dec[own] = torch.stack([stored.output_bias(s) for s in sources]).to(b_dec)
    thresholds = [stored.threshold(s) for s in sources]
    zeros = W_dec.new_zeros(cfg.num_latents)
    theta = torch.stack([zeros if threshold is None else threshold for threshold in thresholds])
    tensors = {
        "W_enc": torch.stack([stored.encoder(s).T for s in sources]),
        "b_enc": torch.stack([stored.encoder_bias(s) for s in sources]),
        "W_dec": W_dec,
        "b_dec": b_dec,
        "log_threshold": theta.clamp(min=torch.finfo(theta.dtype).tiny).log(),
        clt_forge.IN: torch.ones(cfg.n_layers),
        clt_forge.OUT: torch.ones(cfg.n_layers),
        "feature_count": torch.zeros(cfg.n_layers, cfg.num_latents, dtype=torch.long),
    }
    if crossing:
        owner = torch.repeat_interleave(
            torch.arange(cfg.n_layers), torch.tensor([W.shape[1] for W in decoders])
        )
        mask = (torch.arange(cfg.n_layers)[:, None] == owner).to(W_dec.dtype)
        tensors["layer_mask"] = mask
    write_tensors(folder / clt_forge.WEIGHTS, tensors, {"format": "pt"})
    write_json(folder / clt_forge.CFG, _forge_config(stored, W_dec.dtype, crossing))


def _forge_config(stored: StoredClt, dtype: torch.dtype, crossing: bool) -> dict[str, object]:
    """Its config has no defaults for training settings, so they are written too."""
    cfg = stored.cfg
    return {
        "device": "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "seed": 0,
        "model_name": cfg.model or "",
        "d_in": cfg.d_model,
        "d_latent": cfg.num_latents,
        "n_layers": cfg.n_layers,
        "jumprelu_bandwidth": cfg.jumprelu_bandwidth,
        "jumprelu_init_threshold": cfg.jumprelu_init_threshold,
        "normalize_decoder": False,
        "dead_feature_window": 0,
        "cross_layer_decoders": crossing,
        "context_size": 0,
        "l0_coefficient": 0.0,
        "feature_sharding": False,
    }


def _write_ours(stored: StoredClt, folder: Path) -> None:
    eleuther.save(stored.load(), folder)


WRITERS: dict[str, tuple[Callable[[StoredClt, Path], None], Callable[[StoredClt], str | None]]] = {
    "eleuther": (_write_ours, _no_fault),
    "sparsify": (_write_ours, _sparsify_fault),
    "circuit-tracer": (_write_circuit_tracer, _tracer_fault),
    "gemma-scope-2": (_write_gemma_scope, _gemma_fault),
    "clt-forge": (_write_clt_forge, _forge_fault),
}
