"""What the study's page tells: names, quantities, and what stands beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from sparsify_vlm.analysis.contrasts import over_seeds, paired_difference, seeds_difference
from sparsify_vlm.analysis.results import Results
from sparsify_vlm.analysis.tables import Estimate
from sparsify_vlm.report.analysis import published
from sparsify_vlm.report.analysis.wording import in_points, interval, number, percent

NAMES = {"llm": "tiny-llama", "vlm": "tiny-llava"}
ARMS = {
    "clt": "trained from zero",
    "long": "trained from zero for twice as long",
    "warm": "started from per-layer transcoders",
}
SHORT = {"clt": "from zero", "long": "from zero, twice as long", "warm": "from the PLT"}
ROLES = {"image": "image tokens", "text": "text after an image", "text_only": "text without image"}
Group = Sequence[Results]
Groups = Mapping[tuple[str, str], Group]
"""By model and arm; one analysis per seed."""


@dataclass(frozen=True)
class Quantity:
    """A row of the tables."""

    label: str
    form: Callable[[float | None], str]
    null: str | None = None
    """The estimate that has its value for latents that write alike to all their targets."""
    published: float | None = None


_SHARES = {
    "same_layer_share_per_latent.corrected": Quantity(
        "Own layer's share of a latent's squared norm, gauge-free",
        percent,
        "uniform_null.per_latent",
    ),
    "same_layer_share_mean_norm": Quantity(
        "… of mean norms, plain", percent, "uniform_null", published.SAME_LAYER_SHARE_MEAN_NORM
    ),
    "same_layer_share_squared_norm": Quantity(
        "… of squared norms, plain",
        percent,
        "uniform_null",
        published.SAME_LAYER_SHARE_SQUARED_NORM,
    ),
    "same_layer_share_squared_norm.corrected": Quantity(
        "… of squared norms, gauge-free", percent, "uniform_null"
    ),
    "energy_share_same": Quantity("… of contribution energy", percent, "uniform_null"),
    "block_share_same": Quantity("Own layer's exact block share", percent, "uniform_null.block"),
}
_USE = {
    "mean_effective_targets": Quantity(
        "Effective number of targets", number, "mean_effective_targets.uniform"
    ),
    "mean_effective_targets.energy": Quantity("… weighted by activity", number),
    "mean_reach": Quantity("Reach, layers", number),
    "mean_reach.energy": Quantity("… weighted by activity", number),
    "mean_own_cosine": Quantity("Cosine of later decoders with the own one", number),
    "dead_share": Quantity("Latents never active on these tokens", percent),
    "causal_ratio.top": Quantity(
        "KL without a latent's cross writes / without any: high scores", number
    ),
    "causal_ratio.random": Quantity("… random latents", number),
    "causal_ratio.top-random": Quantity("… high scores less random", number),
}
_DECAY = {
    "decay_factor_0_1": Quantity(
        "Norm at distance 1 over that at 0, plain", number, None, published.decay_factor(1)
    ),
    "decay_factor_0_1.corrected": Quantity("… gauge-free", number),
    "decay_factor_0_5": Quantity(
        "Norm at distance 5 over that at 0, plain", number, None, published.decay_factor(5)
    ),
    "decay_factor_0_5.corrected": Quantity("… gauge-free", number),
    "decay_factor_0_5.corrected.balanced": Quantity(
        "… gauge-free, source layers that have both", number
    ),
}
_COSTS = {
    "fvu.full": Quantity("FVU of the whole coder", percent, None, published.FVU_FULL),
    "fvu_difference.same_only": Quantity(
        "FVU added: cross writes zeroed", percent, None, published.FVU_ABLATED - published.FVU_FULL
    ),
    "fvu_difference.cross_mean": Quantity("FVU added: cross writes at their mean", percent),
    "fvu_difference.refit": Quantity("FVU added: own-layer decoders refitted", percent),
    "fvu_difference.random_deletion": Quantity(
        "FVU added: as much energy deleted at random", percent
    ),
    "fvu_contrast.same_only-random_deletion": Quantity(
        "FVU: cross writes zeroed less random deletion", percent
    ),
    "fvu_difference.plt": Quantity("FVU of per-layer transcoders above the CLT's", percent),
}
_PREDICTIONS = {
    "kl.full": Quantity("KL of the whole coder, nats", number),
    "kl.same_only": Quantity("KL: cross writes zeroed", number),
    "kl.refit": Quantity("KL: own-layer decoders refitted", number),
    "kl.plt": Quantity("KL: per-layer transcoders", number),
    "kl_one_layer.same_only": Quantity(
        "KL: cross writes zeroed in one layer at a time, mean over layers", number
    ),
    "delta_ce_difference.same_only": Quantity(
        "Cross-entropy added by zeroing cross writes, nats", number
    ),
    "top1.full": Quantity("Same top token as the model: whole coder", percent),
    "top1.same_only": Quantity("… cross writes zeroed", percent),
}
ROWS = _SHARES | _USE | _DECAY | _COSTS | _PREDICTIONS
FVU, CUT, REFIT = "fvu.full", "fvu_difference.same_only", "fvu_difference.refit"
OF_PLT = frozenset({"kl.plt"})
"""Quantities of the per-layer transcoder alone: the same beside every CLT of its seed."""


def mean(group: Group, name: str) -> Estimate:
    """Over the seeds."""
    return over_seeds([one.estimate(name) for one in group])


def paired(a: Group, b: Group, name: str) -> Estimate:
    """a − b, of coders of the same seed."""
    return paired_difference(*([one.estimate(name) for one in group] for group in (a, b)))


def between(groups: Groups, arm: str, name: str) -> Estimate:
    """tiny-llava's less tiny-llama's, of coders trained alike."""
    sides = ([one.estimate(name) for one in groups[model, arm]] for model in ("vlm", "llm"))
    return seeds_difference(*sides)


def there(name: str, *groups: Group) -> bool:
    """Whether every analysis has this estimate."""
    return all(one.estimate(name) is not None for group in groups for one in group)


def size(difference: Estimate | None, form: Callable[[float | None], str]) -> str:
    """A difference with its interval and unit."""
    return in_points(difference) if form is percent else interval(difference, form)


def alike(groups: Sequence[Group], name: str) -> str:
    """A quantity's value for latents that write alike to all their targets, mean over coders."""
    quantity = ROWS[name]
    if name == "mean_reach":  # over n targets from the own layer on: (n − 1) / 2
        n = _mean_value(groups, "mean_effective_targets.uniform")
        return "" if n is None else quantity.form((n - 1) / 2)
    found = None if quantity.null is None else _mean_value(groups, quantity.null)
    return "" if found is None else quantity.form(found)


def _mean_value(groups: Sequence[Group], name: str) -> float | None:
    found = [one.estimate(name) for group in groups for one in group]
    known = [e.value for e in found if e is not None and e.value is not None]
    return fmean(known) if known else None
