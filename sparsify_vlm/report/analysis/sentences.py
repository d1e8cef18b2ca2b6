"""What may be said of an estimate: one function per kind of sentence.

Every function takes estimates and gives one sentence (or "" where there is nothing to say). It
claims a direction only if the 95 % interval lies on one side, says "no evidence" if the interval
holds the value of no effect, and makes no claim without an interval.
"""

from __future__ import annotations

from sparsify_vlm.analysis.tables import Estimate
from sparsify_vlm.report.analysis.wording import (
    UNDEFINED,
    Verdict,
    in_points,
    interval,
    number,
    percent,
    verdict,
)

NO_CLAIM = "without an interval nothing is claimed"


def own_share(what: str, share: Estimate | None, null: float | None) -> str:
    """The own layer's share beside what writing alike to every target would give."""
    if share is None or share.value is None or null is None:
        return f"{what}: the own layer's share is {UNDEFINED} here."
    start = f"{what}, {interval(share, percent)} stands at the source's own layer"
    alike = f"the {percent(null)} that writing alike to every target would put there"
    return {
        "above": f"{start}, more than {alike}.",
        "below": f"{start}, less than {alike}.",
        "none": f"{start}: no evidence of a difference from {alike}.",
        "unknown": f"{start}, beside {alike}; {NO_CLAIM}.",
        "undefined": "",
    }[verdict(share, null)]


def agreement(plain: Verdict, corrected: Verdict, what: str) -> str:
    """Whether the plain and the gauge-free number say the same of `what`.

    Evidence by the one and none by the other is no disagreement: the two may be close.
    """
    said = {"above": "more", "below": "less", "none": "no evidence"}
    if plain not in said or corrected not in said:
        return ""
    if plain == corrected == "none":
        return f"Neither the plain nor the gauge-free number is evidence about {what}."
    if plain == corrected:
        return f"The plain and the gauge-free number agree about {what}."
    start = (
        "Only one of the two is evidence" if "none" in (plain, corrected) else "The two disagree"
    )
    return (
        f"{start} about {what}: plain norms say “{said[plain]}”, the gauge-free number "
        f"“{said[corrected]}”. Plain norms leave out how large activations are: twice the "
        "activation with half the decoder writes the same. The gauge-free number is the one to "
        "rely on."
    )


def ablated(
    how: str, full: Estimate | None, arm: Estimate | None, difference: Estimate | None
) -> str:
    """FVU of an arm beside the full coder's."""
    kind = verdict(difference)
    if kind == "undefined" or difference is None:
        return f"{how}, the change of FVU is {UNDEFINED}."
    levels = (
        f"{percent(full.value if full else None)} to {percent(arm.value if arm else None)}"
        f" (difference {in_points(difference)})"
    )
    return {
        "above": f"{how}, FVU rises from {levels}.",
        "below": f"{how}, FVU falls from {levels}.",
        "none": f"{how}, there is no evidence that FVU changes: from {levels}.",
        "unknown": f"{how}, FVU goes from {levels}; {NO_CLAIM}.",
    }[kind]


def no_better_than_the_mean(full: Estimate | None) -> str:
    """Said of a coder whose FVU is 1 or more; else ""."""
    if full is None or full.value is None or full.value < 1:
        return ""
    return (
        f"This CLT reconstructs no better than the mean of every layer does (FVU "
        f"{interval(full, percent)}): what it loses or gains by a cut is no measure of what "
        "cross-layer writes are worth in a trained one."
    )


def loss(how: str, difference: Estimate | None) -> str:
    """Cross-entropy of an arm less that of the full coder, in nats a token."""
    size = f"{interval(difference)} nats a token"
    return {
        "above": f"{how}, the spliced model's cross-entropy is higher by {size}.",
        "below": f"{how}, the spliced model's cross-entropy is lower by {size} (negative: a gain).",
        "none": f"{how}, there is no evidence that the spliced model's cross-entropy changes "
        f"({size}).",
        "unknown": f"{how}, the spliced model's cross-entropy differs by {size}; {NO_CLAIM}.",
        "undefined": "",
    }[verdict(difference)]


def refitted(difference: Estimate | None, recovers: Estimate | None = None) -> str:
    """The arm in which same-layer decoders were refitted, less the full coder; `recovers`: the
    share of the FVU added by the cut that refitting takes away again."""
    size = in_points(difference)
    if recovers is not None and recovers.value is not None and recovers.value < 0:
        return (
            "Refitted same-layer decoders are worse than the cut alone on the samples they were "
            f"not fitted to (FVU above the full CLT's: {size}). There were too few tokens to fit "
            "them, so they say nothing about what cross-layer writes are needed for."
        )
    known = recovers is not None and recovers.value is not None
    share = f" ({interval(recovers, percent)} of the rise taken away)" * known
    return {
        "above": f"With same-layer decoders refitted on the same latents{share}, FVU stays above "
        f"the full CLT's by {size}: that much was not made up by linear decoders of the own "
        "layer's latents, fitted on other samples.",
        "below": f"Same-layer decoders refitted on the same latents{share} reconstruct better than "
        f"the full CLT (difference {size}): what the plain cut costs is no sign that cross-layer "
        "decoders are needed. Refitting also makes up for what training left undone, so this does "
        "not say that the full CLT could not be as good.",
        "none": f"With same-layer decoders refitted on the same latents{share} there is no "
        f"evidence that FVU is above the full CLT's (difference {size}). Refitting also makes up "
        "for what training left undone, so cross-layer writes may still be worth something.",
        "unknown": f"With same-layer decoders refitted, FVU differs from the full CLT's by {size}; "
        f"{NO_CLAIM}.",
        "undefined": "",
    }[verdict(difference)]


def worse_than_the_cut(cut: Estimate | None, refit: Estimate | None, where: str = "") -> str:
    """Said where a refit adds more FVU than the cut alone and cannot be compared; else ""."""
    if cut is None or refit is None or cut.value is None or refit.value is None:
        return ""
    if refit.value <= cut.value:
        return ""
    return (
        f"Refitted same-layer decoders are worse{where} than the cut alone (added FVU "
        f"{in_points(refit)}, by the cut {in_points(cut)}): there were too few tokens to fit them, "
        "so they are not compared."
    )


def beside_random(difference: Estimate | None) -> str:
    """Cross writes zeroed, less the deletion of as much energy at random."""
    size = in_points(difference)
    return {
        "above": "Deleting as much energy at random costs less, so cross-layer writes carry more "
        f"than their size says (difference in FVU {size}).",
        "below": "Deleting as much energy at random costs more, so cross-layer writes carry less "
        f"than their size says (difference in FVU {size}).",
        "none": "There is no evidence that cutting cross-layer writes costs more or less than "
        f"deleting as much energy at random (difference in FVU {size}).",
        "unknown": f"Beside deleting as much energy at random, FVU differs by {size}; {NO_CLAIM}.",
        "undefined": "",
    }[verdict(difference)]


def beside_plt(difference: Estimate | None) -> str:
    """A per-layer transcoder trained alike, less the full CLT."""
    size = in_points(difference)
    return {
        "above": f"Per-layer transcoders trained alike reconstruct worse than the CLT, by {size}.",
        "below": "Per-layer transcoders trained alike reconstruct better than the CLT (difference "
        f"{size}): what the cut costs is not what cross-layer training gains.",
        "none": "There is no evidence that per-layer transcoders trained alike reconstruct better "
        f"or worse than the CLT (difference {size}).",
        "unknown": f"Per-layer transcoders trained alike differ from the CLT by {size}; "
        f"{NO_CLAIM}.",
        "undefined": "",
    }[verdict(difference)]


def cut_beside_plt(difference: Estimate | None) -> str:
    """FVU with cross writes zeroed less that of a per-layer transcoder trained alike."""
    size = in_points(difference)
    return {
        "above": f"Cutting cross-layer writes costs more than training without them, by {size}: "
        "the cut says how much this coder relies on them, not how much they are worth.",
        "below": "Cutting cross-layer writes costs less than training without them (difference "
        f"{size}).",
        "none": "There is no evidence that cutting cross-layer writes costs more or less than "
        f"training without them (difference {size}).",
        "unknown": f"Beside training without cross-layer writes the cut differs by {size}; "
        f"{NO_CLAIM}.",
        "undefined": "",
    }[verdict(difference)]


def spread(effective: Estimate | None, reach: Estimate | None, possible: float | None) -> str:
    """To how many layers a live latent writes in effect, and how far."""
    if effective is None or effective.value is None:
        return ""
    of = f" of the {number(possible)} open to it" if possible is not None else ""
    known = reach is not None and reach.value is not None
    far = f", at a mean distance of {interval(reach)} layers" if known else ""
    return f"A live latent writes in effect to {interval(effective)} layers{of} on average{far}."


def direction(cosine: Estimate | None) -> str:
    """Cosine of own and later decoders."""
    size = interval(cosine)
    return {
        "above": f"Later decoders point partly the way of the own one (mean cosine {size}).",
        "below": f"Later decoders point partly against the own one (mean cosine {size}).",
        "none": "There is no evidence that later decoders point with or against the own one "
        f"(mean cosine {size}).",
        "unknown": f"The mean cosine of later decoders with the own one is {size}; {NO_CLAIM}.",
        "undefined": "",
    }[verdict(cosine)]


def score_tells(difference: Estimate | None) -> str:
    """The causal share of latents with large scores less that of random ones."""
    size = interval(difference)
    return {
        "above": "Latents with a large score do act more through cross-layer writes than random "
        f"ones (difference {size}).",
        "below": "Latents with a large score act less through cross-layer writes than random ones "
        f"(difference {size}): the score of the weights misleads here.",
        "none": "There is no evidence that latents with a large score act more through "
        f"cross-layer writes than random ones (difference {size}).",
        "unknown": f"The two differ by {size}; {NO_CLAIM}.",
        "undefined": "",
    }[verdict(difference)]


def decay(which: str, distance: int, factor: Estimate | None) -> str:
    """The mean norm at a distance over that at distance 0."""
    size = interval(factor)
    return {
        "above": f"{which} grow with distance: at {distance} they are {size} times those at 0.",
        "below": f"{which} fall with distance: at {distance} they are {size} of those at 0.",
        "none": f"{which} give no evidence of a change with distance: at {distance} they are "
        f"{size} of those at 0.",
        "unknown": f"{which} at distance {distance} are {size} of those at 0; {NO_CLAIM}.",
        "undefined": f"{which} at distance {distance} beside 0 are {UNDEFINED}: no live latents "
        "write to both distances.",
    }[verdict(factor, 1.0)]


def roles_differ(
    what: str, one: str, other: str, difference: Estimate | None, shares: bool = True
) -> str:
    """A quantity for tokens of one role less that for those of another; `shares`: a percentage."""
    size = in_points(difference) if shares else interval(difference)
    return {
        "above": f"{what} is larger on {one} than on {other}, by {size}.",
        "below": f"{what} is smaller on {one} than on {other} (difference {size}).",
        "none": f"There is no evidence that {what[0].lower() + what[1:]} differs between {one} and "
        f"{other} (difference {size}).",
        "unknown": f"{what} differs between {one} and {other} by {size}; {NO_CLAIM}.",
        "undefined": "",
    }[verdict(difference)]


def models_differ(what: str, text: str, vlm: str, difference: Estimate | None, size: str) -> str:
    """A quantity of the vision-language model's CLT less that of the text model's.

    `text`, `vlm` and `size` are the two numbers and their difference as text.
    """
    levels = f"{vlm} against {text}, difference {size}"
    return {
        "above": f"{what} is higher in the vision-language model: {levels}.",
        "below": f"{what} is lower in the vision-language model: {levels}.",
        "none": f"{what}: no evidence of a difference ({levels}).",
        "unknown": f"{what}: {levels}; {NO_CLAIM}.",
        "undefined": f"{what} is {UNDEFINED} in at least one of the two.",
    }[verdict(difference)]
