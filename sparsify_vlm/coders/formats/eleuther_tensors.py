"""The tensors of one layer's `sae.safetensors`, in EleutherAI's naming (docs/formats.md).

A cross-layer coder numbers what it has per target (`W_decs.k`, `b_decs.k`, `W_skips.k`,
`post_encs.k`, `post_enc_scales.k`), others use the singular. `W_dec` alone is stored where a source
has one decoder (`per_source_tied`) or a target has (`coalesce_topk`: `concat` one for all its
sources, `per-layer` a block of rows for each), and then also `b_dec` and `W_skip` of that target.

A target has one bias here and one per source there, which are summed: the nearest source's carries
it, the others' are 0. With `secondary_target_tied` the own coder's bias and skip connection count
twice there, so half of ours is stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify_vlm.coders.clt import Clt
from sparsify_vlm.coders.config import CltConfig
from sparsify_vlm.coders.formats.checked import CheckedTensors
from sparsify_vlm.errors import UserError


def is_plain(cfg: CltConfig) -> bool:
    """Whether PyPI's sparsify can express these coders."""
    most = max(len(cfg.targets(s)) for s in cfg.source_layers())
    variants = (
        cfg.train_post_encoder,
        cfg.post_encoder_scale,
        cfg.normalize_io,
        cfg.secondary_target_tied,
        cfg.activation in ("batchtopk", "jumprelu"),
    )
    return most == 1 and not any(variants)


def is_numbered(cfg: CltConfig) -> bool:
    """Whether what there is per target is stored under numbered names."""
    return cfg.transcode and not is_plain(cfg)


def nearest_share(cfg: CltConfig) -> float:
    """How often the nearest source's bias and skip connection count."""
    return 2.0 if cfg.secondary_target_tied else 1.0


# ---- reading


def target_key(name: str, k: int, file: CheckedTensors) -> str:
    """The key for target k: numbered, or for the first target also the single-target name."""
    numbered = f"{name}s.{k}"
    return name if k == 0 and numbered not in file.keys and name in file.keys else numbered


def read_layer(clt: Clt, s: int, file: CheckedTensors, n_sources: int | None) -> None:
    """Copy the tensors of layer `s` into the coder, biases of its targets onto those there.

    `n_sources`: blocks of a `per-layer` decoder according to `cfg.json`, where it says so.
    """
    cfg = clt.cfg
    d, F = cfg.d_model, cfg.num_latents
    clt.W_enc[s].copy_(file.read("encoder.weight", (F, d)))
    clt.b_enc[s].copy_(file.read("encoder.bias", (F,)))
    for k in range(len(cfg.targets(s))):
        _read_bias_and_skip(clt, s, k, file)
        if clt.post_enc is not None and (key := target_key("post_enc", k, file)) in file.keys:
            clt.post_enc[s][k].copy_(file.read(key, (F,)))
        if clt.post_scale is not None:
            clt.post_scale[s][k].copy_(file.read(target_key("post_enc_scale", k, file), (F,)))
    _read_decoders(clt, s, file, n_sources)
    if clt.in_norm is not None and clt.out_norm is not None:
        clt.in_norm[s] = file.read("in_norm", (1,))[0]
        clt.out_norm[cfg.targets(s)[0]] = file.read("out_norm", (1,))[0]
    if cfg.activation == "jumprelu" or (cfg.activation == "batchtopk" and "threshold" in file.keys):
        clt.threshold[s].copy_(file.read("threshold", tuple(clt.threshold[s].shape)))


def stored_bias(cfg: CltConfig, s: int, k: int, file: CheckedTensors) -> Tensor | None:
    """What layer `s` adds to the bias [d] of its k-th target, if the bias is stored with it."""
    if k > 0 and cfg.coalesce_topk != "none":
        return None
    factor = nearest_share(cfg) if k == 0 else cfg.write_factor(s, cfg.targets(s)[k])
    return file.read(target_key("b_dec", k, file), (cfg.d_model,)) * factor


def stored_skip(cfg: CltConfig, s: int, k: int, file: CheckedTensors) -> Tensor | None:
    """W_skip [d, d] of layer `s` to its k-th target, if there is one."""
    if not cfg.skip_connection or (k > 0 and cfg.coalesce_topk != "none"):
        return None
    share = nearest_share(cfg) if k == 0 else 1.0
    return file.read(target_key("W_skip", k, file), (cfg.d_model, cfg.d_model)) * share


def _read_bias_and_skip(clt: Clt, s: int, k: int, file: CheckedTensors) -> None:
    bias, W_skip = stored_bias(clt.cfg, s, k, file), stored_skip(clt.cfg, s, k, file)
    b_dec, own = clt.b_dec[clt.cfg.targets(s)[k]], clt.skip(s, k)
    if bias is not None:
        b_dec.add_(bias.to(b_dec))
    if W_skip is not None and own is not None:
        own.copy_(W_skip)


def _read_decoders(clt: Clt, s: int, file: CheckedTensors, n_sources: int | None) -> None:
    cfg = clt.cfg
    d, F = cfg.d_model, cfg.num_latents
    if cfg.coalesce_topk == "per-layer":
        _read_blocks(clt, s, file, n_sources)
    elif cfg.coalesce_topk == "concat" or cfg.per_source_tied:
        clt.W_dec[s][0].copy_(file.read(target_key("W_dec", 0, file), (F, d)))
    else:
        for k, W in enumerate(clt.W_dec[s]):
            W.copy_(file.read(target_key("W_dec", k, file), (F, d)))


def _read_blocks(clt: Clt, t: int, file: CheckedTensors, n_sources: int | None) -> None:
    """`W_dec` of target t, a block of rows per source. EleutherAI's trainer makes one block too
    many for layers that are out of some source's reach; its rows, the last, are never used."""
    F, sources = clt.cfg.num_latents, clt.cfg.sources(t)
    blocks = n_sources or len(sources)
    if blocks < len(sources):
        raise UserError(
            f"{file.path}: n_sources is {blocks} in cfg.json, but {len(sources)} layers write here"
        )
    table = file.read("W_dec", (blocks * F, clt.cfg.d_model))
    for block, (s, k) in zip(table.split(F), sources, strict=False):
        clt.W_dec[s][k].copy_(block)


# ---- writing


def layer_tensors(clt: Clt, s: int) -> dict[str, Tensor]:
    """What is stored for layer `s`, by key."""
    tensors = {"encoder.weight": clt.W_enc[s], "encoder.bias": clt.b_enc[s]}
    tensors |= _decoder_tensors(clt, s) | _bias_and_skip_tensors(clt, s)
    if not is_plain(clt.cfg):
        tensors |= _post_encoder_tensors(clt, s)
    if clt.in_norm is not None and clt.out_norm is not None:
        t = clt.cfg.targets(s)[0]
        tensors |= {"in_norm": clt.in_norm[s : s + 1], "out_norm": clt.out_norm[t : t + 1]}
    if len(clt.threshold):
        tensors["threshold"] = clt.threshold[s]
    return {key: tensor.detach().contiguous() for key, tensor in tensors.items()}


def _decoder_tensors(clt: Clt, s: int) -> dict[str, Tensor]:
    cfg = clt.cfg
    if cfg.coalesce_topk == "per-layer":
        return {"W_dec": torch.cat([clt.W_dec[source][k] for source, k in cfg.sources(s)])}
    if cfg.coalesce_topk == "concat" or cfg.per_source_tied or not is_numbered(cfg):
        return {"W_dec": clt.W_dec[s][0]}
    return {f"W_decs.{k}": W for k, W in enumerate(clt.W_dec[s])}


def _bias_and_skip_tensors(clt: Clt, s: int) -> dict[str, Tensor]:
    cfg, tensors = clt.cfg, {}
    singular = cfg.coalesce_topk != "none" or not is_numbered(cfg)
    for k, t in enumerate(cfg.targets(s)[:1] if singular else cfg.targets(s)):
        ending = "" if singular else f"s.{k}"
        share = nearest_share(cfg) if k == 0 else 1.0
        bias = clt.b_dec[t] / share
        tensors[f"b_dec{ending}"] = bias if k == 0 else torch.zeros_like(bias)
        if (W_skip := clt.skip(s, k)) is not None:
            tensors[f"W_skip{ending}"] = W_skip / share
        elif cfg.skip_connection:  # `own_skip_only`, which the fork does not know
            tensors[f"W_skip{ending}"] = bias.new_zeros(cfg.d_model, cfg.d_model)
    return tensors


def _post_encoder_tensors(clt: Clt, s: int) -> dict[str, Tensor]:
    tensors = {}
    for k in range(len(clt.cfg.targets(s))):
        ending = f"s.{k}" if is_numbered(clt.cfg) else ""
        zeros = torch.zeros_like(clt.b_enc[s])
        tensors[f"post_enc{ending}"] = zeros if clt.post_enc is None else clt.post_enc[s][k]
        if clt.post_scale is not None:
            tensors[f"post_enc_scale{ending}"] = clt.post_scale[s][k]
    return tensors
