"""Coders in other programs' layouts, written tensor by tensor, and what they compute in float64.

Each `write_…` fills a folder with random weights of a small coder and returns `compute`: a function
from x [L, T, d] to (activations [L, T, F], ŷ [L, T, d]), from the layout's own definition. Weights
are random with a fixed seed; there are more than ten layers, so that order by name is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

L, D, F = 11, 6, 20
Compute = Callable[[Tensor], tuple[Tensor, Tensor]]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(tokens: int = 7, layers: int = L) -> Tensor:
    return normal(layers, tokens, D, seed=999)


def jump_relu(pre: Tensor, threshold: Tensor) -> Tensor:
    return torch.where((pre > threshold) & (pre > 0), pre, torch.zeros_like(pre))


def write_gemma_scope(
    folder: Path, affine: bool = True, acausal: tuple[int, ...] = (), layers: int = L
) -> Compute:
    """params_layer_{i}.safetensors, with a w_dec slot for every layer of the model."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = []
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
        stored.append({key: tensor.double() for key, tensor in params.items()})

    def compute(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.double()
        pre = [x[i] @ p["w_enc"] + p["b_enc"] for i, p in enumerate(stored)]
        acts = [jump_relu(a, p["threshold"]) for a, p in zip(pre, stored, strict=True)]
        y = torch.stack([p["b_dec"].expand_as(x[0]) for p in stored]).clone()
        for s, p in enumerate(stored):
            for t in range(s, layers):
                y[t] += acts[s] @ p["w_dec"][:, t]
            if affine:
                y[s] += x[s] @ p["affine_skip_connection"]
        return torch.stack(acts), y

    return compute


def write_circuit_tracer(folder: Path, thresholds: bool = True, **config: str) -> Compute:
    """config.yaml, W_enc_{i} and W_dec_{i}, slot 0 of W_dec being the own layer."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = {"model_name": "owner/model", "model_kind": "cross_layer_transcoder"} | config
    text = "".join(f"{name}: {value}\n" for name, value in lines.items())
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    encoders, decoders = [], []
    for i in range(L):
        encoder = {
            f"W_enc_{i}": normal(F, D, seed=10 * i),
            f"b_enc_{i}": normal(F, seed=10 * i + 1),
            f"b_dec_{i}": normal(D, seed=10 * i + 2),
        }
        if thresholds:
            encoder[f"threshold_{i}"] = normal(F, seed=10 * i + 3).abs()
        decoder = normal(F, L - i, D, seed=10 * i + 4)
        save_file(encoder, folder / f"W_enc_{i}.safetensors")
        save_file({f"W_dec_{i}": decoder}, folder / f"W_dec_{i}.safetensors")
        encoders.append([tensor.double() for tensor in encoder.values()])
        decoders.append(decoder.double())

    def compute(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.double()
        acts, y = [], torch.zeros_like(x)
        for i, (W, b, b_dec, *theta) in enumerate(encoders):
            pre = torch.einsum("td,fd->tf", x[i], W) + b
            acts.append(jump_relu(pre, theta[0]) if theta else pre.clamp(min=0))
            y[i] += b_dec
            y[i:] += torch.einsum("tf,fkd->ktd", acts[i], decoders[i])
        return torch.stack(acts), y

    return compute


def write_clt_forge(
    folder: Path, crossing: bool = True, parts: int = 1, scaled: bool = True, **config: object
) -> Compute:
    """clt_cfg.json and one weights file, or `parts` files that split the latents."""
    folder.mkdir(parents=True, exist_ok=True)
    source, target = torch.triu_indices(L, L) if crossing else (torch.arange(L), torch.arange(L))
    pairs = len(source)
    tensors = {
        "W_enc": normal(L, D, F, seed=1),
        "b_enc": normal(L, F, seed=2),
        "W_dec": normal(pairs, F, D, seed=3),
        "b_dec": normal(pairs, D, seed=4),
        "log_threshold": normal(L, F, seed=5) - 1,
        "estimated_norm_scaling_factor_in": normal(L, seed=6).exp() if scaled else torch.ones(L),
        "estimated_norm_scaling_factor_out": normal(L, seed=7).exp() if scaled else torch.ones(L),
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

    def compute(x: Tensor) -> tuple[Tensor, Tensor]:
        p = {key: tensor.double() for key, tensor in tensors.items()}
        x = x.double() * p["estimated_norm_scaling_factor_in"].view(-1, 1, 1)
        pre = torch.einsum("ltd,ldf->ltf", x, p["W_enc"]) + p["b_enc"][:, None]
        acts, y = jump_relu(pre, p["log_threshold"].exp()[:, None]), torch.zeros_like(x)
        for pair, (s, t) in enumerate(zip(source.tolist(), target.tolist(), strict=True)):
            y[t] += acts[s] @ p["W_dec"][pair] + p["b_dec"][pair]
        return acts, y / p["estimated_norm_scaling_factor_out"].view(-1, 1, 1)

    return compute


def write_curt_tigges(
    folder: Path, tying: str = "none", skip: bool = False, normalised: bool = True, **config: object
) -> Compute:
    """cfg.json, one file with the module's state, norm_stats.json one folder up."""
    folder.mkdir(parents=True, exist_ok=True)
    name = {
        "none": lambda s, t: f"{s}->{t}",
        "per_source": lambda s, t: f"{s}",
        "per_target": lambda s, t: f"{t}",
    }[tying]
    encoders, decoders = "encoder_module.encoders", "decoder_module.decoders"
    tensors = {"theta_manager.log_threshold": normal(L, F, seed=3) - 1}
    stats: dict[str, dict] = {}
    for s in range(L):
        tensors[f"{encoders}.{s}.weight"] = normal(F, D, seed=100 + s)
        tensors[f"{encoders}.{s}.bias_param"] = normal(F, seed=200 + s)
        stats[str(s)] = {
            part: {
                "mean": normal(D, seed=300 + 2 * s + j).tolist(),
                "std": normal(D, seed=400 + 2 * s + j).exp().tolist(),
            }
            for j, part in enumerate(("inputs", "targets"))
        }
        for t in range(s, L):
            key = f"{decoders}.{name(s, t)}"
            tensors[f"{key}.weight"] = normal(D, F, seed=1000 + L * s + t)
            tensors[f"{key}.bias_param"] = normal(D, seed=2000 + L * s + t)
            if skip:
                tensors[f"decoder_module.skip_weights.{s}->{t}"] = normal(
                    D, D, seed=3000 + L * s + t
                )
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

    def norm(s: int, part: str, kind: str) -> Tensor:
        value = torch.tensor(stats[str(s)][part][kind], dtype=torch.float64)
        return value if normalised else torch.full_like(value, float(kind == "std"))

    def compute(x: Tensor) -> tuple[Tensor, Tensor]:
        p = {key: tensor.double() for key, tensor in tensors.items()}
        z = [
            (x[s].double() - norm(s, "inputs", "mean")) / norm(s, "inputs", "std") for s in range(L)
        ]
        acts, y = [], torch.zeros_like(x, dtype=torch.float64)
        for s in range(L):
            pre = z[s] @ p[f"{encoders}.{s}.weight"].T + p[f"{encoders}.{s}.bias_param"]
            theta = p["theta_manager.log_threshold"][s].exp()
            acts.append(torch.where(pre >= theta, pre, torch.zeros_like(pre)))
        for t in range(L):
            for s in range(t + 1):
                key = f"{decoders}.{name(s, t)}"
                y[t] += acts[s] @ p[f"{key}.weight"].T
                if tying != "per_target" or s == t:
                    y[t] += p[f"{key}.bias_param"]
                if skip:
                    y[t] += z[s] @ p[f"decoder_module.skip_weights.{s}->{t}"].T
            y[t] = y[t] * norm(t, "targets", "std") + norm(t, "targets", "mean")
        return torch.stack(acts), y

    return compute
