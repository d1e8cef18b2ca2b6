"""Results of an analysis with invented numbers, in the shape that the experiments give them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from sparsify_vlm.analysis.results import Results
from sparsify_vlm.analysis.tables import Estimate, Experiment, Table

ARMS = {
    "full": 0.20,
    "same_only": 0.35,
    "cross_mean": 0.31,
    "refit": 0.26,
    "cross_only": 0.80,
    "reach_1": 0.30,
    "reach_2": 0.25,
    "reach_4": 0.21,
    "random_deletion": 0.27,
    "plt": 0.24,
    "random_init": 0.98,
    "mean": 1.0,
}
ROLES = ("all", "image", "text", "text_only")


def estimate(value: float | None, width: float | None = 0.01, **more: Any) -> Estimate:
    """With an interval of `value` ± `width`."""
    if value is None or width is None:
        return Estimate(value)
    return Estimate(value, value - width, value + width, **{"n": 100, "over": "samples", **more})


def results(layers: int = 6, data: bool = True, roles: Sequence[str] = ROLES) -> Results:
    """All experiments; without data the three that need none."""
    found = [weights(layers, data, roles), features(layers, data), distance(layers, data)]
    if data:
        found.insert(1, ablation(layers, roles))
    return Results({one.name: one for one in found}, provenance(layers, data))


def provenance(layers: int, data: bool) -> dict[str, Any]:
    return {
        "coder": {
            "path": "runs/made-up",
            "format": "sparsify",
            "model": "tiny-llava",
            "n_layers": layers,
            "num_latents": 64,
            "d_model": 16,
            "n_targets": layers,
            "target_offset": 0,
            "targets": [layers - s for s in range(layers)],
            "activation": "topk",
            "k": 8,
            "input_site": "mlp_in",
            "training": {},
        },
        "data": {
            "source": "shapes",
            "split": "heldout",
            "samples": 100,
            "tokens": {"image": 6400, "text": 1500, "text_only": 700},
        }
        if data
        else None,
        "plt": "runs/made-up-plt" if data else None,
        "settings": {"seed": 0, "bootstrap": None},
        "versions": {"sparsify-vlm": "0.1.0"},
        "warnings": [],
    }


def variants(data: bool) -> list[str]:
    return ["plain", *(["scaled"] if data else []), "corrected"]


def norm(distance: int, variant: str) -> float:
    base = {"plain": 0.4, "scaled": 0.5, "corrected": 1.5}[variant]
    return base * 2 ** (-distance / 3)


def pairs(layers: int) -> list[tuple[int, int]]:
    return [(s, t) for s in range(layers) for t in range(s, layers)]


def weights(layers: int, data: bool, roles: Sequence[str]) -> Experiment:
    values: dict[str, Estimate] = {}
    for variant in variants(data):
        shift = {"plain": 0.0, "scaled": 0.02, "corrected": 0.05}[variant]
        end = "" if variant == "plain" else f".{variant}"
        values[f"same_layer_share_mean_norm{end}"] = estimate(0.41 + shift, over="source layers")
        values[f"same_layer_share_squared_norm{end}"] = estimate(0.52 + shift)
        values[f"mean_norm_same{end}"] = estimate(norm(0, variant))
        values[f"mean_norm_cross{end}"] = estimate(norm(2, variant))
    values["same_layer_share_per_latent.corrected"] = estimate(0.55)
    values["uniform_null"] = Estimate(2 / (layers + 1))
    values["uniform_null.per_latent"] = Estimate(sum(1 / (n + 1) for n in range(layers)) / layers)
    if data:
        for role in roles:
            end = "" if role == "all" else f".{role}"
            values[f"energy_share_same{end}"] = estimate(0.6 + len(role) / 100)
            values[f"block_share_same{end}"] = estimate(0.65 + len(role) / 100)
    heat = [
        {
            "source": s,
            "target": t,
            "variant": v,
            "mean_norm": norm(t - s, v) * (1 + 0.1 * s),
            "squared_share": 0.9 ** (t - s) / (layers - s),
            "energy_share": 0.8 ** (t - s) if data else None,
            "block_share": (0.7 if s == t else 0.3 / max(t, 1)) if data else None,
        }
        for v in variants(data)
        for s, t in pairs(layers)
    ]
    histogram = [
        {"source": s, "variant": v, "bin": b / 20, "count": round(1000 * bump(b / 20, 0.3 + s / 9))}
        for v in ("plain", "corrected")
        for s in range(layers)
        for b in range(20)
    ]
    return Experiment(
        "weights",
        values,
        {
            "weight_heatmap": Table.from_rows(heat, list(heat[0])),
            "weight_distribution": Table.from_rows(histogram, list(histogram[0])),
        },
        () if data else ("σ of the targets is unknown without data.",),
    )


def bump(x: float, middle: float) -> float:
    return math.exp(-(((x - middle) / 0.15) ** 2))


def ablation(layers: int, roles: Sequence[str]) -> Experiment:
    values: dict[str, Estimate] = {}
    by_layer: list[dict[str, Any]] = []
    loss: list[dict[str, Any]] = []
    for arm, fvu in ARMS.items():
        for role in roles:
            end = "" if role == "all" else f".{role}"
            level = fvu * (1 if role == "all" else 0.7 + len(role) / 20)
            full = ARMS["full"] * level / fvu
            values[f"fvu.{arm}{end}"] = estimate(level)
            if arm != "full":
                values[f"fvu_difference.{arm}{end}"] = estimate(level - full)
                values[f"fvu_increase.{arm}{end}"] = estimate(level / full - 1, 0.05)
            for layer in range(layers):
                at = level * (0.7 + 0.1 * layer)
                by_layer.append(
                    {"layer": layer, "arm": arm, "role": role}
                    | {"fvu": at, "low": at * 0.95, "high": at * 1.06}
                )
        values |= {
            f"ce.{arm}": estimate(1.5 + fvu),
            f"kl.{arm}": estimate(fvu / 2),
            f"top1.{arm}": estimate(1 - fvu / 2),
            f"delta_ce.{arm}": estimate(fvu, 0.05),
        }
        if arm != "full":
            values[f"delta_ce_difference.{arm}"] = estimate(fvu - ARMS["full"], 0.02)
        for layer in (-1, *range(layers)):
            scope, size = ("all_layers", 1.0) if layer < 0 else ("one_layer", 0.1 + 0.02 * layer)
            loss.append(
                {"arm": arm, "scope": scope, "layer": layer, "ce": 1.5 + size * fvu}
                | {"delta_ce": size * fvu, "kl": size * fvu / 2, "top1_match": 1 - size * fvu / 2}
                | {"low": size * fvu * 0.9, "high": size * fvu * 1.1, "n_tokens": 900}
            )
    return Experiment(
        "ablation",
        values,
        {
            "fvu_comparison": Table.from_rows(by_layer, list(by_layer[0])),
            "delta_loss": Table.from_rows(loss, list(loss[0])),
        },
        ("Random deletion removes as much energy as the cross-layer writes have.",),
    )


def features(layers: int, data: bool) -> Experiment:
    values = {
        "mean_cross_score": estimate(0.45),
        "mean_effective_targets": estimate(2.4, 0.2),
        "mean_reach": estimate(0.9, 0.1),
        "mean_own_cosine": estimate(0.3, 0.05),
        "dead_share": Estimate(0.125),
    }
    if data:
        for role, shift in (("energy", -0.1), ("image", -0.2), ("text", 0.1), ("text_only", 0.2)):
            for name in ("mean_cross_score", "mean_effective_targets", "mean_reach"):
                middle = values[name].value
                assert middle is not None
                values[f"{name}.{role}"] = estimate(middle * (1 + shift), 0.02)
    bins = [
        {"source": s, "bin": b / 20, "count": round(200 * bump(b / 20, 0.7 - s / 10))}
        for s in range(layers)
        for b in range(20)
    ]
    top = [
        {
            "source": s,
            "latent": 10 * s + i,
            "score": 0.95 - 0.1 * s - 0.02 * i,
            "effective_targets": 4.0 - 0.5 * s,
            "reach": 2.0 - 0.3 * s,
            "own_cosine": 0.2,
            "energy": 0.5 if data else None,
            "frequency": 0.02 if data else None,
            "label": "red <b>patches</b>" if (s, i) == (0, 0) else None,
            "causal": 0.8 if data and i == 0 else None,
            "causal_low": 0.7 if data and i == 0 else None,
            "causal_high": 0.9 if data and i == 0 else None,
        }
        for s in range(layers - 1)
        for i in range(5)
    ]
    layers_table = [
        {"source": s, "mean_score": 0.6 - 0.1 * s, "mean_effective_targets": 3.0 - 0.4 * s}
        | {"mean_reach": 1.5 - 0.2 * s, "mean_own_cosine": 0.3, "live": 56, "dead": 8}
        for s in range(layers)
    ]
    tables = {
        "score_distribution": Table.from_rows(bins, list(bins[0])),
        "per_latent_by_layer": Table.from_rows(layers_table, list(layers_table[0])),
    }
    if top and data:
        values |= {
            "causal_ratio.top": estimate(0.6, 0.1, n=5, over="latents"),
            "causal_ratio.random": estimate(0.3, 0.1, n=5, over="latents"),
            "causal_ratio.top-random": estimate(0.3, 0.14, n=5, over="latents"),
        }
        tested = [
            {"source": s, "latent": 10 * s + 9 * i, "chosen": chosen, "score": score - 0.1 * s}
            | {"ratio": score - 0.2, "low": score - 0.3, "high": score - 0.1}
            | {"kl_without_cross": 0.01, "kl_without_any": 0.02, "n_tokens": 7}
            for s in range(layers - 1)
            for i, (chosen, score) in enumerate((("top", 0.95), ("random", 0.6)))
        ]
        tables["causal"] = Table.from_rows(tested, list(tested[0]))
    if top:
        tables["top_features"] = Table.from_rows(top, list(top[0]))
    return Experiment("features", values, tables)


def distance(layers: int, data: bool) -> Experiment:
    values: dict[str, Estimate] = {}
    decay: list[dict[str, Any]] = []
    detail: list[dict[str, Any]] = []
    for variant in variants(data):
        end = "" if variant == "plain" else f".{variant}"
        if layers > 5:
            factor = norm(5, variant) / norm(0, variant)
            values[f"decay_factor_0_5{end}"] = estimate(factor, 0.04, over="source layers")
        else:
            values[f"decay_factor_0_5{end}"] = Estimate(None)
        values[f"decay_factor_0_1{end}"] = estimate(2 ** (-1 / 3), 0.05)
        values[f"half_life{end}"] = estimate(3.0, 1.0)
        for panel in ("all", "balanced"):
            for d in range(layers if panel == "all" else (layers + 1) // 2):
                mean = norm(d, variant)
                decay.append(
                    {"distance": d, "variant": variant, "weighting": "latents", "role": "all"}
                    | {"panel": panel, "mean": mean, "low": mean * 0.9, "high": mean * 1.12}
                    | {"sources": layers - d}
                )
        detail += [
            {"source": s, "distance": t - s, "variant": variant}
            | {"mean": norm(t - s, variant) * (1 + 0.1 * s)}
            for s, t in pairs(layers)
        ]
    if data:
        decay += [
            row | {"role": role, "weighting": "energy", "mean": row["mean"] * factor}
            for role, factor in (("all", 1.0), ("image", 0.8), ("text", 1.2))
            for row in decay
            if row["variant"] == "corrected" and row["weighting"] == "latents"
        ]
    return Experiment(
        "distance",
        values,
        {
            "distance_decay": Table.from_rows(decay, list(decay[0])),
            "per_layer_patterns": Table.from_rows(detail, list(detail[0])),
            "detailed_heatmap": Table.from_rows(detail, list(detail[0])),
        },
        ("One half-life is not identifiable from these distances.",),
    )
