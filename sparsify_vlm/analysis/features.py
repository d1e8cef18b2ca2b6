"""Which latents write across layers, and how far.

Of each live latent of source layer l, with its shares p(t) (`writes`):

    cross-layer score    C = 1 − p(own), 0 to 1
    effective targets    exp H(p) = exp(−Σ p ln p), 1 to T
    reach                Σ p(t) (t − l), in layers
    own cosine           mean over later targets of the cosine of the decoder there and the own one

None of them changes when a latent is scaled up and its decoders down. Means count every live latent
alike, or (`.energy`, and the roles) by its contribution energy E[a²] Σ_t ‖d^t‖²/σ_t² over the
tokens in question; the mean score weighted so is 1 − the share of energy in `weights`. Intervals
are over source layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsify_vlm.analysis.bootstrap import ratio_interval
from sparsify_vlm.analysis.decoders import Coder, one_thread
from sparsify_vlm.analysis.tables import Estimate, Experiment, Table
from sparsify_vlm.analysis.writes import (
    ALL,
    BINS,
    SOURCES,
    Numbers,
    Writes,
    all_writes,
    defined,
    histogram,
)

if TYPE_CHECKING:
    from sparsify_vlm.analysis.activity import Activity

TOP = 5
TINY = torch.finfo(torch.float64).tiny
MEASURES = ("cross_score", "effective_targets", "reach", "own_cosine")
TOP_COLUMNS = (
    "source",
    "latent",
    "score",
    *MEASURES[1:],
    "energy",
    "frequency",
    "label",
)
LAYER_COLUMNS = (
    "source",
    "mean_score",
    *(f"mean_{name}" for name in MEASURES[1:]),
    "live",
    "dead",
)


@one_thread()
def features(
    coder: Coder,
    sigma: Numbers | None = None,
    activity: Activity | None = None,
    labels: Mapping[tuple[int, int], str] | None = None,
    top: int = TOP,
    seed: int = 0,
    resamples: int | None = None,
) -> Experiment:
    """The experiment on single latents; arguments as of `weights`.

    Args:
        labels: a text by (source layer, latent), shown with the top latents.
        top: latents listed of each source layer, those with the largest scores.
    """
    writes = all_writes(coder, sigma, activity)
    layers = [_layer(one, writes.roles, labels or {}, top) for one in writes]
    options = {"n": resamples, "seed": seed, "over": SOURCES}
    estimates = {"dead_share": _dead_share(layers), **_uniform(layers)}
    for name in MEASURES:
        for weighting in layers[0].sums:
            suffix = f".{weighting}" if weighting else ""
            sums = [layer.sums[weighting][name] for layer in layers]
            above, below = zip(*sums, strict=True)
            estimates[f"mean_{name}{suffix}"] = ratio_interval(above, below, **options).estimate()
    dead, live = (sum(getattr(layer, name) for layer in layers) for name in ("dead", "live"))
    return Experiment(
        "features",
        estimates,
        {
            "score_distribution": _distribution(layers),
            "top_features": Table.from_rows([r for a in layers for r in a.top], TOP_COLUMNS),
            "per_latent_by_layer": Table.from_rows([_row(a) for a in layers], LAYER_COLUMNS),
        },
        [*writes.notes(), f"{dead} of {dead + live} latents are dead and left out."],
    )


@dataclass(frozen=True)
class _Layer:
    """One source layer."""

    source: int
    n_targets: int
    live: int
    dead: int
    sums: dict[str, dict[str, tuple[float, float]]]
    """By weighting and measure: Σ weight · measure and Σ weight, over latents that have it."""
    histogram: list[int]
    top: list[dict[str, Any]]


def _layer(
    writes: Writes, roles: Sequence[str], labels: Mapping[tuple[int, int], str], top: int
) -> _Layer:
    measures = per_latent(writes)
    weightings = {"": torch.ones(writes.n_live, dtype=torch.float64)}
    for role in roles:
        name = "energy" if role == ALL else role
        weightings[name] = writes.contributions(role).sum(1)
    sums = {
        name: {key: _weighted(values, weight) for key, values in measures.items()}
        for name, weight in weightings.items()
    }
    return _Layer(
        writes.source,
        len(writes.targets),
        writes.n_live,
        writes.n_dead,
        sums,
        histogram(measures["cross_score"]),
        _top(writes, measures, labels, top) if len(writes.targets) > 1 else [],
    )


def per_latent(writes: Writes) -> dict[str, Tensor]:
    """The four measures of each live latent [n]; the cosine is NaN where no later decoder is."""
    p = writes.shares()
    distance = torch.tensor([t - writes.source for t in writes.targets], dtype=torch.float64)
    later = writes.decoders.cosine()[writes.live][:, 1:]
    return {
        "cross_score": (1 - p[:, 0]).clamp(min=0),
        "effective_targets": (-p * p.clamp(min=TINY).log()).sum(1).exp(),
        "reach": p @ distance,
        "own_cosine": later.nanmean(1),
    }


def _weighted(values: Tensor, weight: Tensor) -> tuple[float, float]:
    there = ~values.isnan()
    return float((values[there] * weight[there]).sum()), float(weight[there].sum())


def _top(
    writes: Writes, measures: dict[str, Tensor], labels: Mapping[tuple[int, int], str], top: int
) -> list[dict[str, Any]]:
    """The latents with the largest scores, the first ones of equal scores."""
    ids = writes.live.nonzero()[:, 0]
    order = measures["cross_score"].argsort(descending=True, stable=True)[:top]
    energy = writes.contributions(ALL).sum(1) if writes.activation else None
    rows = []
    for i in order.tolist():
        latent = int(ids[i])
        rows.append(
            {
                "source": writes.source,
                "latent": latent,
                "score": float(measures["cross_score"][i]),
                **{name: defined(float(measures[name][i])) for name in MEASURES[1:]},
                "energy": None if energy is None else float(energy[i]),
                "frequency": float(writes.frequency[ALL][i]) if writes.frequency else None,
                "label": labels.get((writes.source, latent)),
            }
        )
    return rows


def _dead_share(layers: Sequence[_Layer]) -> Estimate:
    dead, live = sum(a.dead for a in layers), sum(a.live for a in layers)
    return Estimate.of(dead / (dead + live), n=dead + live, over="latents")


def _uniform(layers: Sequence[_Layer]) -> dict[str, Estimate]:
    """The means if every live latent wrote the same to each of its layer's targets."""
    live = sum(layer.live for layer in layers)

    def mean(value: Any) -> Estimate:
        total = sum(layer.live * value(layer.n_targets) for layer in layers)
        return Estimate.of(total / live if live else math.nan)

    return {
        "mean_cross_score.uniform": mean(lambda n: 1 - 1 / n),
        "mean_effective_targets.uniform": mean(lambda n: n),
    }


def _distribution(layers: Sequence[_Layer]) -> Table:
    """How many latents have which score: `bin` is the left edge of one of BINS bins."""
    rows = [
        {"source": layer.source, "bin": i / BINS, "count": count}
        for layer in layers
        for i, count in enumerate(layer.histogram)
    ]
    return Table.from_rows(rows, ("source", "bin", "count"))


def _row(layer: _Layer) -> dict[str, Any]:
    sums = layer.sums[""]
    means = {name: above / below if below else None for name, (above, below) in sums.items()}
    return {
        "source": layer.source,
        "mean_score": means.pop("cross_score"),
        **{f"mean_{name}": value for name, value in means.items()},
        "live": layer.live,
        "dead": layer.dead,
    }
