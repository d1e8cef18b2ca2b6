"""The sentences of the study's page: what the intervals allow to say, for every way of training.

A difference between the models that holds for one way of training the coders and not for another
says something of the training. So every claim names the coders that it holds for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from study_rows import (
    ARMS,
    CUT,
    FVU,
    NAMES,
    REFIT,
    ROLES,
    ROWS,
    SHORT,
    Groups,
    between,
    mean,
    paired,
    size,
)

from sparsify_vlm.analysis.compare import Comparison
from sparsify_vlm.analysis.tables import Estimate
from sparsify_vlm.report.analysis.wording import (
    in_points,
    interval,
    listed,
    percent,
    verdict,
)

BETWEEN = {
    "same_layer_share_per_latent.corrected": "The own layer's share of a latent's squared norm",
    "block_share_same": "The own layer's block share",
    "mean_effective_targets": "The effective number of targets",
    "mean_effective_targets.energy": "The effective number of targets weighted by activity",
    "mean_reach": "The reach",
    "mean_reach.energy": "The reach weighted by activity",
    "decay_factor_0_5.corrected": "The gauge-free norm at distance 5 over that at 0",
    CUT: "The FVU added by zeroing cross-layer writes",
    REFIT: "The FVU added by cutting them and refitting same-layer decoders",
    "delta_ce_difference.same_only": "The cross-entropy (nats) added by zeroing them",
}
"""Quantities that are said to differ between the models, or not."""
OF_IMAGES = "block_share_same"
TEXTS = ("text", "text_only")
"""Roles that image tokens are compared with."""
BY_ROLE = {
    OF_IMAGES: "The own layer's block share",
    "fvu_difference.same_only": "The FVU added by cutting cross-layer writes",
    "error_difference.same_only": "The error so added, over the variance of all tokens,",
}


def in_short(groups: Groups, found: Mapping[str, Comparison]) -> list[str]:
    """What a reader should take away, as far as the intervals allow."""
    points = []
    for model, name in NAMES.items():
        zero = groups[model, "clt"]
        cut, refit = (mean(zero, key) for key in (CUT, REFIT))
        if verdict(cut) == "above":
            points.append(
                f"In {name} zeroing the cross-layer writes of a CLT {ARMS['clt']} adds "
                f"{in_points(cut)} of FVU to {interval(mean(zero, FVU), percent)}; with the own "
                f"layer's decoders refitted, {in_points(refit)} are left."
            )
        points.append(_path_of_training(groups, model))
    points.append(directions(groups))
    points += [_of_roles(found, OF_IMAGES, other) for other in TEXTS]
    return [point for point in points if point]


def one_by_one(groups: Groups, found: Mapping[str, Comparison]) -> list[str]:
    """Every quantity between the models, and the others between the kinds of tokens."""
    points = [between_models(groups, name) for name in BETWEEN]
    others = [name for name in BY_ROLE if name != OF_IMAGES]
    points += [_of_roles(found, name, text) for name in others for text in TEXTS]
    return [point for point in points if point]


def _path_of_training(groups: Groups, model: str) -> str:
    """Whether the cost of the cut is the coder's or the model's: two ways to train on it."""
    long, warm = groups[model, "long"], groups[model, "warm"]
    cost, quality = (paired(warm, long, name) for name in (CUT, FVU))
    said = {"below": "costs less", "above": "costs more"}.get(verdict(cost))
    if said is None:
        return (
            f"In {NAMES[model]} there is no evidence that the cut costs a CLT {ARMS['warm']} more "
            f"or less than one {ARMS['long']} (difference {in_points(cost)})."
        )
    levels = " against ".join(in_points(mean(group, CUT)) for group in (warm, long))
    of_whole = {
        "above": f"while the FVU of the whole coder is higher by {in_points(quality)}",
        "below": f"while the FVU of the whole coder is lower (difference {in_points(quality)})",
    }.get(verdict(quality), f"with no evidence of a difference in FVU ({in_points(quality)})")
    return (
        f"The same cut {said} in a CLT of {NAMES[model]} {ARMS['warm']} than in one "
        f"{ARMS['long']}, for equally many steps in all: {levels} (difference "
        f"{in_points(cost)}), {of_whole}. What is lost without cross-layer writes then says how "
        "the coder was trained, not only what the model does."
    )


def between_models(groups: Groups, name: str) -> str:
    """A quantity of tiny-llava's coders less tiny-llama's, for every way of training."""
    differences = {arm: between(groups, arm, name) for arm in ARMS}
    if any(e.value is None for e in differences.values()):
        return ""
    sizes = {arm: size(e, ROWS[name].form) for arm, e in differences.items()}
    return by_training(BETWEEN[name], "in tiny-llava than in tiny-llama", differences, sizes)


def directions(groups: Groups) -> str:
    """How many of the quantities differ alike however the coders were trained."""
    found = [{verdict(between(groups, arm, name)) for arm in ARMS} for name in BETWEEN]
    found = [kinds for kinds in found if "undefined" not in kinds]
    same = sum(kinds in ({"above"}, {"below"}) for kinds in found)
    turned = sum({"above", "below"} <= kinds for kinds in found)
    return (
        f"Of the {len(found)} quantities compared between the two models one by one below, "
        f"{same} differ in the same direction in all three kinds of CLTs, and {turned} in one "
        "direction or the other by how the CLTs were trained."
    )


def _of_roles(found: Mapping[str, Comparison], name: str, other: str) -> str:
    """A quantity on image tokens less that on others, in tiny-llava's coders."""
    differences = {
        arm: e
        for arm, one in found.items()
        if (e := one.roles.get(name, {}).get(f"image-{other}")) is not None
    }
    if len(differences) < len(found):
        return ""
    what = f"on tiny-llava's image tokens than on its {ROLES[other]}"
    sizes = {arm: in_points(e) for arm, e in differences.items()}
    return by_training(BY_ROLE[name], what, differences, sizes)


def by_training(
    what: str, than: str, differences: Mapping[str, Estimate], sizes: Mapping[str, str]
) -> str:
    """Whether `what` is higher or lower, in coders of all ways of training or of some."""
    arms: dict[str, list[str]] = {}
    for arm, e in differences.items():
        arms.setdefault(verdict(e), []).append(arm)
    each = "differences: " + "; ".join(f"{SHORT[arm]} {text}" for arm, text in sizes.items())
    words = {"above": "higher", "below": "lower"}
    told = [v for v in arms if v in words]
    if not told:
        return f"{what} is not known to be higher or lower {than} ({each})."
    if len(told) > 1:
        return (
            f"{what} is in some CLTs higher, in others lower {than}, by how the CLTs were "
            f"trained ({each})."
        )
    word = words[told[0]]
    if len(arms) == 1:
        return f"{what} is {word} {than} in all kinds of CLTs ({each})."
    some = listed([ARMS[arm] for arm in arms[told[0]]])
    return f"{what} is {word} {than} in CLTs {some}, without evidence in the others ({each})."


def chance(groups: Groups, names: Sequence[str]) -> str:
    """How many of the differences between the models have an interval without 0."""
    known = [verdict(between(groups, arm, name)) for arm in ARMS for name in names]
    told = [v for v in known if v in ("above", "below", "none")]
    apart = sum(v != "none" for v in told)
    return (
        f"No correction is made for the number of quantities looked at: of the {len(told)} "
        f"differences between the models in the first table {apart} have an interval without 0; "
        f"without any difference about {0.05 * len(told):.0f} would be expected to. Quantities are "
        "not independent of each other."
    )


def beside_clip(found: Mapping[str, Comparison]) -> str:
    """Whether image tokens lean on their own layer's coder, as patches were found to in CLIP."""
    words = {"above": "more", "below": "less", "none": "no evidence of a difference"}
    said = []
    for other in ("text_only", "text"):
        parts = []
        for arm, one in found.items():
            difference = one.roles.get("block_share_same", {}).get(f"image-{other}")
            if text := words.get(verdict(difference)):
                parts.append(f"{text} in CLTs {ARMS[arm]} ({in_points(difference)})")
        if parts:
            said.append(f"beside {ROLES[other]}, {'; '.join(parts)}")
    return (
        "In CLTs of CLIP's own tower patches were seen to draw on the coder of their own layer and "
        "[CLS] on those of many (Chatzoudis et al. 2026, arXiv:2604.13304). In the language model "
        "looked at here, how much image tokens lean on the coder of their own layer, by its exact "
        f"block share: {'. And '.join(said)}."
    )
