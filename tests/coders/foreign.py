"""Coders in other programs' layouts, written tensor by tensor, and what they compute in float64.

`write_…` fills a folder with random weights of a small coder. `compute_…` reads a folder of the
layout and returns (activations [L, T, F], ŷ [L, T, d]) for x [L, T, d], from the layout's own
definition. Weights have a fixed seed. There are more than ten layers: order by name is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

L, D, F = 11, 6, 20
Compute = Callable[[Tensor], tuple[Tensor, Tensor]]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(tokens: int = 7, layers: int = L, d: int = D) -> Tensor:
    return normal(layers, tokens, d, seed=999)


def jump_relu(pre: Tensor, threshold: Tensor) -> Tensor:
    return torch.where((pre > threshold) & (pre > 0), pre, torch.zeros_like(pre))


def doubles(path: Path) -> dict[str, Tensor]:
    return {key: tensor.double() for key, tensor in load_file(path).items()}


# ---- Gemma Scope 2


def write_gemma_scope(
    folder: Path, affine: bool = True, acausal: tuple[int, ...] = (), layers: int = L
) -> Compute:
    """params_layer_{i}.safetensors, with a w_dec slot for every layer of the model."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(layers):
        w_dec = normal(F, layers, D, seed=10 * i)
        if i not in acausal:
            w_dec[:, :i] = 0
        params = {
            "w_enc": normal(D, F, seed=10 * i + 1),
            "b_enc": normal(F, seed=10 * i + 2),
            "threshold": normal(F, seed=10 * i + 3).abs(),
            "w_dec": w_dec,
            "b_dec": normal(D, seed=10 * i + 4),
        }
        if affine:
            params["affine_skip_connection"] = normal(D, D, seed=10 * i + 5)
        save_file(params, folder / f"params_layer_{i}.safetensors")
    return partial(compute_gemma_scope, folder)


def compute_gemma_scope(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    layers = len(list(folder.glob("params_layer_*.safetensors")))
    acts, y = [], torch.zeros_like(x, dtype=torch.float64)
    for s in range(layers):
        p, x_s = doubles(folder / f"params_layer_{s}.safetensors"), x[s].double()
        acts.append(jump_relu(x_s @ p["w_enc"] + p["b_enc"], p["threshold"]))
        y[s] += p["b_dec"]
        for t in range(s, layers):
            y[t] += acts[s] @ p["w_dec"][:, t]
        if "affine_skip_connection" in p:
            y[s] += x_s @ p["affine_skip_connection"]
    return torch.stack(acts), y


# ---- circuit-tracer


def write_circuit_tracer(folder: Path, thresholds: bool = True, **config: str) -> Compute:
    """config.yaml, W_enc_{i} and W_dec_{i}, slot 0 of W_dec being the own layer."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = {"model_name": "owner/model", "model_kind": "cross_layer_transcoder"} | config
    text = "".join(f"{name}: {value}\n" for name, value in lines.items())
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    for i in range(L):
        encoder = {
            f"W_enc_{i}": normal(F, D, seed=10 * i),
            f"b_enc_{i}": normal(F, seed=10 * i + 1),
            f"b_dec_{i}": normal(D, seed=10 * i + 2),
        }
        if thresholds:
            encoder[f"threshold_{i}"] = normal(F, seed=10 * i + 3).abs()
        save_file(encoder, folder / f"W_enc_{i}.safetensors")
        decoder = {f"W_dec_{i}": normal(F, L - i, D, seed=10 * i + 4)}
        save_file(decoder, folder / f"W_dec_{i}.safetensors")
    return partial(compute_circuit_tracer, folder)


def compute_circuit_tracer(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    layers = len(list(folder.glob("W_enc_*.safetensors")))
    acts, y = [], torch.zeros_like(x, dtype=torch.float64)
    for i in range(layers):
        p = doubles(folder / f"W_enc_{i}.safetensors")
        pre = torch.einsum("td,fd->tf", x[i].double(), p[f"W_enc_{i}"]) + p[f"b_enc_{i}"]
        zero = torch.zeros(pre.shape[1], dtype=torch.float64)
        acts.append(jump_relu(pre, p.get(f"threshold_{i}", zero)))
        y[i] += p[f"b_dec_{i}"]
        W = doubles(folder / f"W_dec_{i}.safetensors")[f"W_dec_{i}"]
        y[i:] += torch.einsum("tf,fkd->ktd", acts[i], W)
    return torch.stack(acts), y


# ---- CLT-Forge


def write_clt_forge(
    folder: Path, crossing: bool = True, parts: int = 1, scaled: bool = True, **config: object
) -> Compute:
    """clt_cfg.json and one weights file, or `parts` files that split the latents."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = L * (L + 1) // 2 if crossing else L
    tensors = {
        "W_enc": normal(L, D, F, seed=1),
        "b_enc": normal(L, F, seed=2),
        "W_dec": normal(pairs, F, D, seed=3),
        "b_dec": normal(pairs, D, seed=4),
        "log_threshold": normal(L, F, seed=5) - 1,
        "estimated_norm_scaling_factor_in": normal(L, seed=6).mul(scaled).exp(),
        "estimated_norm_scaling_factor_out": normal(L, seed=7).mul(scaled).exp(),
        "feature_count": torch.zeros(L, F, dtype=torch.long),
    }
    axes = {"W_enc": 2, "b_enc": 1, "W_dec": 1, "log_threshold": 1, "feature_count": 1}
    for r in range(parts):
        part = {
            key: (tensor.chunk(parts, axes[key])[r] if key in axes else tensor).contiguous()
            for key, tensor in tensors.items()
        }
        prefix = f"rank{r}_" if parts > 1 else ""
        save_file(part, folder / f"{prefix}clt_weights.safetensors")
    values = {
        **{"device": "cpu", "dtype": "float32", "seed": 0, "model_name": "gpt2"},
        **{"d_in": D, "d_latent": F, "n_layers": L, "cross_layer_decoders": crossing},
        **{"jumprelu_bandwidth": 1.0, "jumprelu_init_threshold": 0.03, "context_size": 16},
        **{"normalize_decoder": False, "dead_feature_window": 250, "l0_coefficient": 2.0},
        **{"feature_sharding": parts > 1},
    }
    (folder / "clt_cfg.json").write_text(json.dumps(values | config), encoding="utf-8")
    return partial(compute_clt_forge, folder)


def compute_clt_forge(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    values = json.loads((folder / "clt_cfg.json").read_text())
    n, names = values["n_layers"], ["clt_weights.safetensors"]
    if values["feature_sharding"]:
        count = len(list(folder.glob("rank*")))
        names = [f"rank{r}_clt_weights.safetensors" for r in range(count)]
    parts = [doubles(folder / name) for name in names]
    p = parts[0] | {
        key: torch.cat([part[key] for part in parts], axis)
        for key, axis in {"W_enc": 2, "b_enc": 1, "W_dec": 1, "log_threshold": 1}.items()
    }
    scaled = x.double() * p["estimated_norm_scaling_factor_in"].view(-1, 1, 1)
    pre = torch.einsum("ltd,ldf->ltf", scaled, p["W_enc"]) + p["b_enc"][:, None]
    acts, y = jump_relu(pre, p["log_threshold"].exp()[:, None]), torch.zeros_like(scaled)
    whole = values["cross_layer_decoders"]
    source, target = torch.triu_indices(n, n) if whole else torch.arange(n).expand(2, n)
    for pair, (s, t) in enumerate(zip(source.tolist(), target.tolist(), strict=True)):
        y[t] += acts[s] @ p["W_dec"][pair] + p["b_dec"][pair]
    return acts, y / p["estimated_norm_scaling_factor_out"].view(-1, 1, 1)


# ---- curt-tigges


def pair_name(tying: str, s: int, t: int) -> str:
    return {"none": f"{s}->{t}", "per_source": f"{s}", "per_target": f"{t}"}[tying]


def write_curt_tigges(
    folder: Path, tying: str = "none", skip: bool = False, normalised: bool = True, **config: object
) -> Compute:
    """cfg.json, one file with the module's state, norm_stats.json one folder up."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"theta_manager.log_threshold": normal(L, F, seed=3) - 1}
    stats: dict[str, dict] = {}
    for s in range(L):
        tensors[f"encoder_module.encoders.{s}.weight"] = normal(F, D, seed=100 + s)
        tensors[f"encoder_module.encoders.{s}.bias_param"] = normal(F, seed=200 + s)
        stats[str(s)] = {
            part: {
                "mean": normal(D, seed=300 + 2 * s + j).tolist(),
                "std": normal(D, seed=400 + 2 * s + j).exp().tolist(),
            }
            for j, part in enumerate(("inputs", "targets"))
        }
        for t in range(s, L):
            key, seed = f"decoder_module.decoders.{pair_name(tying, s, t)}", L * s + t
            tensors[f"{key}.weight"] = normal(D, F, seed=1000 + seed)
            tensors[f"{key}.bias_param"] = normal(D, seed=2000 + seed)
            if skip:
                pair = f"decoder_module.skip_weights.{s}->{t}"
                tensors[pair] = normal(D, D, seed=3000 + seed)
    save_file(tensors, folder / "clt_checkpoint_97689.safetensors")
    if normalised:
        (folder.parent / "norm_stats.json").write_text(json.dumps(stats), encoding="utf-8")
    values = {
        **{"num_features": F, "num_layers": L, "d_model": D, "model_name": "gpt2"},
        **{"activation_fn": "jumprelu", "decoder_tying": tying, "skip_connection": skip},
        **{"normalization_method": "mean_std" if normalised else "none"},
        **{"mlp_input_template": "transformer.h.{}.mlp.input"},
    }
    (folder / "cfg.json").write_text(json.dumps(values | config), encoding="utf-8")
    return partial(compute_curt_tigges, folder)


def compute_curt_tigges(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    values = json.loads((folder / "cfg.json").read_text())
    p, tying = doubles(folder / "clt_checkpoint_97689.safetensors"), values["decoder_tying"]
    normalised = values["normalization_method"] == "mean_std"
    stats = json.loads((folder.parent / "norm_stats.json").read_text()) if normalised else {}

    def norm(s: int, part: str, kind: str) -> Tensor:
        if not normalised:
            return torch.tensor(float(kind == "std"), dtype=torch.float64)
        return torch.tensor(stats[str(s)][part][kind], dtype=torch.float64)

    z = [(x[s].double() - norm(s, "inputs", "mean")) / norm(s, "inputs", "std") for s in range(L)]
    acts, y = [], torch.zeros_like(x, dtype=torch.float64)
    for s in range(L):
        key = f"encoder_module.encoders.{s}"
        pre = z[s] @ p[f"{key}.weight"].T + p[f"{key}.bias_param"]
        theta = p["theta_manager.log_threshold"][s].exp()
        acts.append(torch.where(pre >= theta, pre, torch.zeros_like(pre)))
    for t in range(L):
        for s in range(t + 1):
            key = f"decoder_module.decoders.{pair_name(tying, s, t)}"
            y[t] += acts[s] @ p[f"{key}.weight"].T
            if tying != "per_target" or s == t:
                y[t] += p[f"{key}.bias_param"]
            if values["skip_connection"]:
                y[t] += z[s] @ p[f"decoder_module.skip_weights.{s}->{t}"].T
        y[t] = y[t] * norm(t, "targets", "std") + norm(t, "targets", "mean")
    return torch.stack(acts), y
