"""Figures, intervals and tables of the ablation experiment, from sums per sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sparsify_vlm.analysis.arm_intervals import (
    WITH_DRAWS,
    added_error,
    fvu_of,
    of_error,
    of_losses,
    place,
    with_draws,
)
from sparsify_vlm.analysis.bootstrap import Intervals, intervals
from sparsify_vlm.analysis.reconstruction import ReconstructionSums
from sparsify_vlm.analysis.spliced import SUMS, SplicedSums
from sparsify_vlm.analysis.tables import Table
from sparsify_vlm.analysis.tokens import ROLES

Array = np.ndarray
N, CE, KL, SAME = range(len(SUMS))
FVU_COLUMNS = ("layer", "arm", "role", "fvu", "low", "high")
CONTRASTS = (("same_only", "random_deletion"), ("same_only", "plt"))
"""Pairs of arms whose FVU is compared."""
LOSS_COLUMNS = (
    *("arm", "scope", "layer", "ce", "delta_ce", "kl", "top1_match", "low", "high", "n_tokens"),
)


def fvu_intervals(sums: ReconstructionSums, seed: int = 0) -> dict[str, Intervals]:
    """By name: fvu.<arm>, fvu_difference.<arm> (less the full coder's) and fvu_increase.<arm> (the
    same as a share of the full coder's), each for all tokens and with `.<role>`; and by role
    error_difference.<arm>.<role> (`added_error`)."""
    full = sums.arms.index("full")

    def figures(error: Array, total: Array, tokens: Array) -> Array:
        fvu = fvu_of(error, total)
        difference = fvu - fvu[:, full, None]
        increase = difference / fvu[:, full, None]
        return np.stack([fvu, difference, increase, added_error(error, total, tokens, full)], 1)

    found = of_error(figures, sums, 1, seed)
    named = {}
    for i, name in enumerate(("fvu", "fvu_difference", "fvu_increase", "error_difference")):
        for a, arm in enumerate(sums.arms):
            for r, role in enumerate(ROLES):
                if name == "error_difference" and role == "all":
                    continue  # fvu_difference, once more
                if name == "fvu" or arm != "full":
                    end = "" if role == "all" else f".{role}"
                    over = _over(sums.draws, arm)
                    named[f"{name}.{arm}{end}"] = place(found, i, a, r, over=over)
    return named


def _over(draws: Mapping[str, Array], *arms: str) -> str | None:
    """What the interval of these arms is over, where it is not samples alone."""
    return WITH_DRAWS if set(arms) & set(draws) else None


def fvu_contrasts(sums: ReconstructionSums, seed: int = 0) -> dict[str, Intervals]:
    """fvu_contrast.<a>-<b> of CONTRASTS: the FVU of one arm less that of another, of the same
    samples."""
    pairs = [pair for pair in CONTRASTS if set(pair) <= set(sums.arms)]
    if not pairs:
        return {}
    at = np.array([[sums.arms.index(arm) for arm in pair] for pair in pairs])

    def figures(error: Array, total: Array, tokens: Array) -> Array:
        fvu = fvu_of(error, total)[..., 0]
        return fvu[:, at[:, 0]] - fvu[:, at[:, 1]]

    touched = {arm: (at == sums.arms.index(arm)).any(1) for arm in sums.draws}
    found = intervals(figures, sums.error, sums.total, sums.tokens, seed=seed)
    found = with_draws(found, figures, sums, touched)
    return {
        f"fvu_contrast.{a}-{b}": place(found, i, over=_over(sums.draws, a, b))
        for i, (a, b) in enumerate(pairs)
    }


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

    def figures(error: Array, total: Array, tokens: Array) -> Array:
        return error / total[:, None]

    found = of_error(figures, sums, 0, seed)
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

    found = of_losses(figures, sums, seed)
    names = ("ce", "delta_ce", "kl", "top1", "delta_ce_difference", "kl_difference")
    named = {"ce.model": intervals(lambda own: own[:, CE] / own[:, N], sums.model, seed=seed)}
    for i, name in enumerate(names):
        for a, arm in enumerate(sums.arms):
            if not (name.endswith("difference") and arm == "full"):
                named[f"{name}.{arm}"] = place(found, i, a, over=_over(sums.draws, arm))
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
