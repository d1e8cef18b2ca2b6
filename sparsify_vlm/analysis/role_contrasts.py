"""Image tokens less other tokens of the same coder, paired.

Layers differ from each other far more than token roles do, and so do samples; a difference of two
roles is therefore taken within each layer, or each sample, before these are drawn again. Estimates
are named like `mean_reach.image-text`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from sparsify_vlm.analysis.ablation import Ablated
from sparsify_vlm.analysis.activity import Activity
from sparsify_vlm.analysis.arm_intervals import (
    WITH_DRAWS,
    added_error,
    fvu_of,
    of_error,
    place,
)
from sparsify_vlm.analysis.bootstrap import mean_interval, ratio_difference
from sparsify_vlm.analysis.decoders import Decoders
from sparsify_vlm.analysis.features import MEASURES, per_latent
from sparsify_vlm.analysis.tables import Estimate, Experiment
from sparsify_vlm.analysis.tokens import ROLES
from sparsify_vlm.analysis.writes import SOURCES, all_writes

IMAGE = "image"


def others(activity: Activity) -> list[str]:
    """Roles to hold image tokens against: none if there are no image tokens."""
    there = [role for role in ROLES[1:] if activity.tokens[role]]
    return [role for role in there if role != IMAGE] if IMAGE in there else []


def with_roles(
    experiment: Experiment,
    decoders: Decoders,
    activity: Activity,
    seed: int = 0,
    resamples: int | None = None,
) -> Experiment:
    """`experiment` ("weights" or "features") with the differences between roles."""
    if not others(activity):
        return experiment
    make = {"weights": _of_weights, "features": _of_features}[experiment.name]
    found = make(decoders, activity, {"seed": seed, "n": resamples})
    return replace(experiment, estimates={**experiment.estimates, **found})


Sums = dict[str, list[tuple[float, float]]]
"""By role, numerator and denominator of every source layer."""


def _differences(name: str, sums: Sums, roles: Sequence[str], options: dict) -> dict[str, Estimate]:
    image = np.array(sums[IMAGE]).T
    found = {}
    for role in roles:
        other = np.array(sums[role]).T
        known = np.isfinite(image).all(0) & np.isfinite(other).all(0)
        if known.any():
            parts = (image[0, known], image[1, known], other[0, known], other[1, known])
            apart = ratio_difference(*parts, over=SOURCES, **options)
            found[f"{name}.{IMAGE}-{role}"] = apart.estimate()
    return found


def _of_weights(decoders: Decoders, activity: Activity, options: dict) -> dict[str, Estimate]:
    roles = others(activity)
    sums: Sums = {role: [] for role in (IMAGE, *roles)}
    for writes in all_writes(decoders, None, activity):
        for role, rows in sums.items():
            energy = writes.contributions(role).sum(0)
            rows.append((float(energy[0]), float(energy.sum())))
    found = _differences("energy_share_same", sums, roles, options)
    cfg = decoders.cfg
    pairs = [(s, cfg.targets(s)[0]) for s in cfg.source_layers()]
    for role in roles:
        shares = [activity.block_share[one] for one in (IMAGE, role)]
        apart = [float(shares[0][pair] - shares[1][pair]) for pair in pairs]
        mean = mean_interval(apart, over="target layers", **options)
        found[f"block_share_same.{IMAGE}-{role}"] = mean.estimate()
    return found


def _of_features(decoders: Decoders, activity: Activity, options: dict) -> dict[str, Estimate]:
    roles = others(activity)
    sums: Mapping[str, Sums] = {m: {role: [] for role in (IMAGE, *roles)} for m in MEASURES}
    for writes in all_writes(decoders, None, activity):
        measures = per_latent(writes)
        weights = {role: writes.contributions(role).sum(1) for role in (IMAGE, *roles)}
        for name, values in measures.items():
            there = ~values.isnan()
            for role, weight in weights.items():
                above = float((values * weight)[there].sum())
                sums[name][role].append((above, float(weight[there].sum())))
    found: dict[str, Estimate] = {}
    for name, by_role in sums.items():
        found |= _differences(f"mean_{name}", by_role, roles, options)
    return found


def ablation_with_roles(experiment: Ablated, activity: Activity, seed: int = 0) -> Experiment:
    """The ablation with the differences between roles of what an arm adds to the FVU, and to the
    error over the variance of all tokens."""
    sums, roles = experiment.reconstruction, others(activity)
    if sums is None or not roles:
        return experiment
    full, image = sums.arms.index("full"), ROLES.index(IMAGE)
    rest = [ROLES.index(role) for role in roles]

    def apart(error: np.ndarray, total: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        fvu = fvu_of(error, total)
        added = fvu - fvu[:, full, None], added_error(error, total, tokens, full)
        return np.stack([one[:, :, image, None] - one[:, :, rest] for one in added], 1)

    found = of_error(apart, sums, 1, seed)
    estimates = dict(experiment.estimates)
    for i, name in enumerate(("fvu_difference", "error_difference")):
        for a, arm in enumerate(sums.arms):
            over = WITH_DRAWS if arm in sums.draws else None
            for r, role in enumerate(roles):
                if arm != "full":
                    one = place(found, i, a, r, over=over).estimate()
                    estimates[f"{name}.{arm}.{IMAGE}-{role}"] = one
    return replace(experiment, estimates=estimates)
