"""Where the weight of the decoders lies: how much of it writes to the own layer.

Of norms m(s, t), means over the live latents of source layer s, and squared norms Q(s, t), sums
over them, each in the variants of `writes`:

    share by mean norm       Σ_s m(s, own) / Σ_s Σ_t m(s, t)
    share by squared norm    Σ_s Q(s, own) / Σ_s Σ_t Q(s, t)
    share per latent         mean of p(own) over all live latents
    share of energy          the same as by squared norm, with contributions E[a²] ‖d^t‖²/σ_t²
    block share              mean over targets of ⟨ŷ^{own→t}, ŷ^t⟩ / ‖ŷ^t‖², which counts how writes
                             of several layers align, and sums to 1 over the sources of t

Equal mass on every pair of layers gives own pairs / all pairs: 2/(L+1) where all later layers are
targets. Intervals are over source layers (block share: over target layers).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsify_vlm.analysis.bootstrap import Intervals, mean_interval, ratio_interval
from sparsify_vlm.analysis.decoders import Coder, one_thread
from sparsify_vlm.analysis.tables import Estimate, Experiment, Table
from sparsify_vlm.analysis.writes import (
    ALL,
    BINS,
    SOURCES,
    AllWrites,
    Numbers,
    Writes,
    all_writes,
    defined,
    histogram,
)

if TYPE_CHECKING:
    from sparsify_vlm.analysis.activity import Activity

HEATMAP = ("source", "target", "variant", "mean_norm", "squared_share")
WITH_DATA = ("energy_share", "block_share")


@one_thread()
def weights(
    coder: Coder,
    sigma: Numbers | None = None,
    activity: Activity | None = None,
    seed: int = 0,
    resamples: int | None = None,
) -> Experiment:
    """The experiment on weight mass.

    Args:
        coder: a stored coder, one in memory, or decoders that were read already.
        sigma: σ_t = sqrt(E‖y_t − ȳ_t‖²) of each layer [L]; None: the activity's, or not known.
        activity: what the latents do on data; None for weights alone.
        seed, resamples: of the intervals.

    Raises `UserError` for weights that are not finite and data that does not fit the coder.
    """
    writes = all_writes(coder, sigma, activity)
    layers = [_Layer(one, writes.roles) for one in writes]
    options = {"n": resamples, "seed": seed, "over": SOURCES}
    estimates = _null(writes, layers)
    for variant in layers[0].mean:
        estimates |= _of_variant(layers, variant, options)
    for role in writes.roles:
        estimates |= _of_role(writes, layers, role, options)
    dead, all_latents = sum(a.dead for a in layers), sum(a.dead + a.live for a in layers)
    return Experiment(
        "weights",
        estimates,
        {
            "weight_heatmap": _heatmap(writes, layers),
            "weight_distribution": _distribution(layers),
        },
        [*writes.notes(), f"{dead} of {all_latents} latents are dead and left out."],
    )


class _Layer:
    """Sums over the live latents of one source layer; lists are over its targets."""

    def __init__(self, writes: Writes, roles: Sequence[str]) -> None:
        self.source, self.targets = writes.source, writes.targets
        self.live, self.dead = writes.n_live, writes.n_dead
        self.mean: dict[str, list[float]] = {}
        self.squares: dict[str, list[float]] = {}
        self.own_share: dict[str, float] = {}
        """Sum over latents of p(own)."""
        self.histogram: dict[str, list[int]] = {}
        for variant in writes.variants:
            squared = writes.squared_norms(variant)
            self.mean[variant] = squared.sqrt().mean(0).tolist()
            self.squares[variant] = squared.sum(0).tolist()
            if variant != "scaled":  # of one latent, scaled and corrected shares are the same
                own = writes.shares(variant)[:, 0]
                self.own_share[variant] = float(own.sum())
                self.histogram[variant] = histogram(own)
        self.energy = {role: writes.contributions(role).sum(0).tolist() for role in roles}


def _ratio(parts: Sequence[Sequence[float]], options: dict[str, Any]) -> Estimate:
    """First entries over all entries, of one list for every source layer."""
    known = [part for part in parts if not math.isnan(sum(part))]
    own, whole = [part[0] for part in known], [sum(part) for part in known]
    return ratio_interval(own or [0.0], whole or [0.0], **options).estimate()


def _of_variant(
    layers: Sequence[_Layer], variant: str, options: dict[str, Any]
) -> dict[str, Estimate]:
    known = [layer for layer in layers if layer.live]
    means = [layer.mean[variant] for layer in known]
    across = [(sum(part[1:]), len(part) - 1) for part in means] or [(0.0, 0)]
    plain = variant == "plain"
    name = "" if plain else f".{variant}"
    found = {
        f"same_layer_share_mean_norm{name}": _ratio(means, options),
        f"same_layer_share_squared_norm{name}": _ratio(
            [layer.squares[variant] for layer in known], options
        ),
        f"mean_norm_same{name}": mean_interval(
            [part[0] for part in means] or [math.nan], **options
        ).estimate(),
        f"mean_norm_cross{name}": ratio_interval(*zip(*across, strict=True), **options).estimate(),
    }
    if variant in layers[0].own_share:
        found[f"same_layer_share_per_latent{name}"] = ratio_interval(
            [layer.own_share[variant] for layer in layers],
            [layer.live for layer in layers],
            **options,
        ).estimate()
    return found


def _of_role(
    writes: AllWrites, layers: Sequence[_Layer], role: str, options: dict[str, Any]
) -> dict[str, Estimate]:
    name = "" if role == ALL else f".{role}"
    blocks = _own_blocks(writes, role, {**options, "over": "target layers"})
    return {
        f"energy_share_same{name}": _ratio([layer.energy[role] for layer in layers], options),
        f"block_share_same{name}": blocks.estimate(),
    }


def _own_blocks(writes: AllWrites, role: str, options: dict[str, Any]) -> Intervals:
    """⟨ŷ^{own→t}, ŷ^t⟩ / ‖ŷ^t‖², mean over the targets."""
    cfg, activity = writes.decoders.cfg, writes.activity
    assert activity is not None
    shares = [float(activity.block_share[role][s, cfg.targets(s)[0]]) for s in cfg.source_layers()]
    return mean_interval(shares, **options)


def _null(writes: AllWrites, layers: Sequence[_Layer]) -> dict[str, Estimate]:
    """The same shares if every pair of layers had the same mass."""
    cfg = writes.decoders.cfg
    pairs = [len(layer.targets) for layer in layers]
    live = sum(layer.live for layer in layers)
    found = {
        "uniform_null": Estimate.of(len(pairs) / sum(pairs)),
        "uniform_null.per_latent": Estimate.of(
            sum(a.live / len(a.targets) for a in layers) / live if live else math.nan
        ),
        "dead_share": Estimate.of(
            sum(a.dead for a in layers) / sum(a.dead + a.live for a in layers)
        ),
    }
    if writes.roles:
        sources = [len(cfg.sources(t)) for t in cfg.target_layers()]
        found["uniform_null.block"] = Estimate.of(float(np.mean([1 / n for n in sources])))
    return found


def _heatmap(writes: AllWrites, layers: Sequence[_Layer]) -> Table:
    """Each pair of layers; shares are of the whole coder's squared norm and energy, a block share
    is of its target."""
    rows, activity = [], writes.activity
    energy = sum(sum(layer.energy[ALL]) for layer in layers) if activity else math.nan
    for variant in layers[0].mean:
        total = sum(sum(layer.squares[variant]) for layer in layers)
        for layer in layers:
            for k, t in enumerate(layer.targets):
                row = {
                    "source": layer.source,
                    "target": t,
                    "variant": variant,
                    "mean_norm": defined(layer.mean[variant][k]),
                    "squared_share": defined(layer.squares[variant][k] / total if total else None),
                }
                if activity is not None:
                    share = layer.energy[ALL][k] / energy if energy else None
                    block = float(activity.block_share[ALL][layer.source, t])
                    row |= {"energy_share": defined(share), "block_share": defined(block)}
                rows.append(row)
    return Table.from_rows(rows, [*HEATMAP, *(WITH_DATA if activity is not None else ())])


def _distribution(layers: Sequence[_Layer]) -> Table:
    """How many latents have which p(own): `bin` is the left edge of one of BINS bins."""
    rows = [
        {"source": layer.source, "variant": variant, "bin": i / BINS, "count": count}
        for variant in layers[0].histogram
        for layer in layers
        for i, count in enumerate(layer.histogram[variant])
    ]
    return Table.from_rows(rows, ("source", "variant", "bin", "count"))
