"""Figures, intervals and tables of the ablation experiment, from sums per sample."""

from __future__ import annotations

from typing import Any

import numpy as np

from sparsify_vlm.analysis.bootstrap import Intervals, intervals
from sparsify_vlm.analysis.reconstruction import ReconstructionSums
from sparsify_vlm.analysis.spliced import SUMS, SplicedSums
from sparsify_vlm.analysis.tables import Table
from sparsify_vlm.analysis.tokens import ROLES

Array = np.ndarray
N, CE, KL, SAME = range(len(SUMS))
FVU_COLUMNS = ("layer", "arm", "role", "fvu", "low", "high")
LOSS_COLUMNS = (
    *("arm", "scope", "layer", "ce", "delta_ce", "kl", "top1_match", "low", "high", "n_tokens"),
)


def mean_over(values: Array, axis: int) -> Array:
    """The mean of what is not NaN; NaN where nothing is."""
    known = np.isfinite(values)
    count = known.sum(axis)
    total = np.where(known, values, 0.0).sum(axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def fvu_of(error: Array, total: Array) -> Array:
    """Mean over layers of the FVU, [R, A, roles], of sums error [R, A, roles, T], total
    [R, roles, T]."""
    return mean_over(error / total[:, None], -1)


def fvu_intervals(sums: ReconstructionSums, seed: int = 0) -> dict[str, Intervals]:
    """By name: fvu.<arm>, fvu_difference.<arm> (less the full coder's) and fvu_increase.<arm> (the
    same as a share of the full coder's), each for all tokens and with `.<role>`."""
    full = sums.arms.index("full")

    def figures(error: Array, total: Array) -> Array:
        fvu = fvu_of(error, total)
        difference = fvu - fvu[:, full, None]
        return np.stack([fvu, difference, difference / fvu[:, full, None]], 1)

    found = intervals(figures, sums.error, sums.total, seed=seed)
    named = {}
    for i, name in enumerate(("fvu", "fvu_difference", "fvu_increase")):
        for a, arm in enumerate(sums.arms):
            for r, role in enumerate(ROLES):
                if name == "fvu" or arm != "full":
                    end = "" if role == "all" else f".{role}"
                    named[f"{name}.{arm}{end}"] = place(found, i, a, r)
    return named


def refit_recovers(sums: ReconstructionSums, seed: int = 0) -> dict[str, Intervals]:
    """Of all tokens: `refit_gain`, the share of the full coder's FVU that refitting its own-layer
    decoders alone takes away; `refit_recovers`, the share of the FVU that `same_only` adds to the
    full coder's which refitting takes away again."""
    if "refit" not in sums.arms:
        return {}
    at = [sums.arms.index(name) for name in ("full", "same_only", "refit")]

    def figures(error: Array, total: Array) -> Array:
        full, same, refit = (fvu_of(error, total)[:, a, 0] for a in at)
        # Without cross writes the two are equal up to rounding: no harm to recover from.
        harm = np.where(same - full > 1e-9 * full, same - full, np.nan)
        return np.stack([(full - refit) / full, (same - refit) / harm], 1)

    found = intervals(figures, sums.error, sums.total, seed=seed)
    return {"refit_gain": place(found, 0), "refit_recovers": place(found, 1)}


def fvu_table(sums: ReconstructionSums, seed: int = 0) -> Table:
    """The table "fvu_comparison"."""
    found = intervals(lambda e, t: e / t[:, None], sums.error, sums.total, seed=seed)
    rows = []
    for a, arm in enumerate(sums.arms):
        for r, role in enumerate(ROLES):
            for i, layer in enumerate(sums.layers):
                one = found.estimate(a, r, i)
                rows.append(
                    {
                        "layer": layer,
                        "arm": arm,
                        "role": role,
                        "fvu": one.value,
                        "low": one.low,
                        "high": one.high,
                    }
                )
    return Table.from_rows(rows, FVU_COLUMNS)


def loss_intervals(sums: SplicedSums, seed: int = 0) -> dict[str, Intervals]:
    """By name, all layers spliced: ce.model; ce, delta_ce, kl and top1 of every arm; and of all but
    the full one delta_ce_difference and kl_difference, less the full coder's. One layer at a time,
    the mean over layers: delta_ce_one_layer and kl_one_layer."""
    full = sums.arms.index("full")

    def figures(own: Array, spliced: Array) -> Array:
        mean = spliced / spliced[..., :1]
        delta = mean[..., CE] - (own[:, CE] / own[:, N])[:, None]
        kl = mean[..., KL]
        more = (delta - delta[:, full, None], kl - kl[:, full, None])
        return np.stack([mean[..., CE], delta, kl, mean[..., SAME], *more], 1)

    found = intervals(figures, sums.model, sums.all_layers, seed=seed)
    names = ("ce", "delta_ce", "kl", "top1", "delta_ce_difference", "kl_difference")
    named = {"ce.model": intervals(lambda own: own[:, CE] / own[:, N], sums.model, seed=seed)}
    for i, name in enumerate(names):
        for a, arm in enumerate(sums.arms):
            if not (name.endswith("difference") and arm == "full"):
                named[f"{name}.{arm}"] = place(found, i, a)
    if sums.one_layer.size:
        single = intervals(
            lambda own, one: one_layer_means(own, one).mean(-1),
            sums.model[: len(sums.one_layer)],
            sums.one_layer,
            seed=seed,
        )
        for i, name in enumerate(("delta_ce_one_layer", "kl_one_layer")):
            for a, arm in enumerate(sums.one_layer_arms):
                named[f"{name}.{arm}"] = place(single, i, a)
    return named


def one_layer_means(own: Array, one: Array) -> Array:
    """Δ cross-entropy and KL, [R, 2, A, T], of sums own [R, 4], one [R, A, T, 4]."""
    mean = one / one[..., :1]
    delta = mean[..., CE] - (own[:, CE] / own[:, N])[:, None, None]
    return np.stack([delta, mean[..., KL]], 1)


def loss_table(sums: SplicedSums, seed: int = 0) -> Table:
    """The table "delta_loss"; low and high are of delta_ce, layer −1 stands for all layers."""
    with np.errstate(all="ignore"):
        rows = _loss_rows(
            "all_layers", [-1], sums.arms, sums.model, sums.all_layers[:, :, None], seed
        )
        if sums.one_layer.size:
            own = sums.model[: len(sums.one_layer)]
            rows += _loss_rows(
                "one_layer", sums.layers, sums.one_layer_arms, own, sums.one_layer, seed
            )
    return Table.from_rows(rows, LOSS_COLUMNS)


def _loss_rows(
    scope: str, layers: list[int], arms: list[str], own: Array, spliced: Array, seed: int
) -> list[dict[str, Any]]:
    delta = intervals(lambda a, b: one_layer_means(a, b)[:, 0], own, spliced, seed=seed)
    total = spliced.sum(0)
    mean = total / total[..., :1]
    rows = []
    for a, arm in enumerate(arms):
        for i, layer in enumerate(layers):
            one = delta.estimate(a, i)
            values = {"ce": CE, "kl": KL, "top1_match": SAME}
            known = {n: float(mean[a, i, at]) for n, at in values.items()}
            rows.append(
                {n: v if np.isfinite(v) else None for n, v in known.items()}
                | {"arm": arm, "scope": scope, "layer": layer, "n_tokens": int(total[a, i, N])}
                | {"delta_ce": one.value, "low": one.low, "high": one.high}
            )
    return rows


def place(found: Intervals, *at: int) -> Intervals:
    """One entry, as scalars."""
    value, low, high = (np.asarray(v[at]) for v in (found.value, found.low, found.high))
    return Intervals(value, low, high, found.n, found.over)
