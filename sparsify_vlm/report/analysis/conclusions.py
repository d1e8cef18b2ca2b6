"""The paragraphs of conclusions, put together from the numbers of one analysis."""

from __future__ import annotations

from statistics import fmean, median

from sparsify_vlm.analysis.results import Results
from sparsify_vlm.report.analysis import sentences
from sparsify_vlm.report.analysis.facts import Facts
from sparsify_vlm.report.analysis.style import ROLE_NAMES
from sparsify_vlm.report.analysis.wording import (
    in_points,
    interval,
    listed,
    number,
    percent,
    points,
    verdict,
)

FACTOR_DISTANCE = 5
"""The distance whose decay factor the study reports."""
NOTHING_TO_CUT = (
    "Every coder here writes to one layer only: there are no cross-layer connections to measure."
)


FROM_NEXT = (
    "These coders write from the next layer on: “own layer” stands for the first layer that a "
    "coder writes to."
)
NOT_MEASURED = (
    "How much the reconstruction or the model would lose without cross-layer writes was not "
    "measured: that needs tokens. Decoder norms alone do not say it."
)


def conclusions(results: Results) -> dict[str, list[str]]:
    """Sentences by experiment."""
    facts = Facts(results)
    if not facts.crosses:
        return {"Weights": [NOTHING_TO_CUT]}
    made = {
        "weights": _weights,
        "ablation": _ablation,
        "features": _features,
        "distance": _distance,
    }
    told = {n.capitalize(): tell(facts) for n, tell in made.items() if n in results.experiments}
    if not results.provenance.get("data"):
        told["Ablation"] = [NOT_MEASURED]
    if not facts.has_own:
        told = {"Layers": [FROM_NEXT], **told}
    kept = {name: [one for one in found if one] for name, found in told.items()}
    return {name: found for name, found in kept.items() if found}


def _weights(facts: Facts) -> list[str]:
    plain = facts.get("same_layer_share_mean_norm")
    squared = facts.get("same_layer_share_squared_norm")
    corrected = facts.get("same_layer_share_squared_norm", "corrected")
    null = facts.pooled_null
    told = [
        sentences.own_share("Of the mean decoder norms of all pairs of layers, raw", plain, null),
        sentences.own_share("Of the squared norms, raw", squared, null),
    ]
    if corrected is not None:
        told.append(sentences.own_share("Of the squared norms, gauge-free", corrected, null))
        if null is not None:
            verdicts = verdict(squared, null), verdict(corrected, null)
            told.append(sentences.agreement(*verdicts, "the own layer's share"))
    per_latent = facts.get("same_layer_share_per_latent", "corrected")
    if per_latent is not None:
        what = "Of a live latent's squared norm, on average"
        told.append(sentences.own_share(what, per_latent, facts.latent_null))
    block = facts.get("block_share_same")
    if block is not None and block.value is not None:
        told.append(
            f"On these tokens {interval(block, percent)} of what is written to a layer comes from "
            "the coder of that layer (exact block share), the rest from earlier ones."
        )
    told += _roles(facts, "block_share_same", "The own layer's block share")
    return told


def _roles(facts: Facts, name: str, what: str) -> list[str]:
    """Image tokens against each other role."""
    if "image" not in facts.roles(name):
        return []
    return [
        sentences.roles_differ(
            what, ROLE_NAMES["image"], ROLE_NAMES[role], facts.role_difference(name, "image", role)
        )
        for role in facts.roles(name)
        if role != "image"
    ]


def _ablation(facts: Facts) -> list[str]:
    full = facts.arm("fvu", "full")
    told = [sentences.no_better_than_the_mean(full)]
    for arm, how in (
        ("same_only", "With every cross-layer write set to zero"),
        ("cross_mean", "With cross-layer writes held at their means instead"),
    ):
        level = facts.arm("fvu", arm)
        if level is not None:
            told.append(sentences.ablated(how, full, level, facts.difference("fvu", arm)))
    refit = facts.difference("fvu", "refit")
    told.append(sentences.refitted(refit, facts.get("refit_recovers")))
    told.append(sentences.beside_random(facts.difference("fvu", "same_only", "random_deletion")))
    told.append(sentences.beside_plt(facts.difference("fvu", "plt")))
    told.append(sentences.cut_beside_plt(facts.difference("fvu", "same_only", "plt")))
    told.append(
        sentences.loss("With all layers replaced", facts.difference("delta_ce", "same_only"))
    )
    told += _roles(facts, "fvu_difference.same_only", "The rise of FVU by the cut")
    told += _roles(
        facts,
        "error_difference.same_only",
        "The error that the cut adds, over the variance of all tokens,",
    )
    return told


def _features(facts: Facts) -> list[str]:
    targets = [n for n in facts.targets if n > 0]
    possible = fmean(targets) if targets else None
    told = [
        sentences.spread(facts.get("mean_effective_targets"), facts.get("mean_reach"), possible),
        sentences.direction(facts.get("mean_own_cosine")),
    ]
    table = facts.results.table("top_features")
    if table is not None:
        rows = table.rows()
        best = max(rows, key=lambda row: row["score"])
        n = facts.targets[best["source"]] if best["source"] < len(facts.targets) else 0
        null = f", where writing alike to all its targets would give {number(1 - 1 / max(n, 1))}"
        told.append(
            f"The largest cross-layer score is {number(best['score'])}, of latent "
            f"{best['latent']} in layer {best['source']}{null if n else ''}."
        )
    told += _causal(facts)
    return told


def _causal(facts: Facts) -> list[str]:
    """What removing writes of single latents does to the model."""
    top, drawn = (facts.results.estimate(f"causal_ratio.{kind}") for kind in ("top", "random"))
    if top is None or drawn is None:
        return []
    told = [
        "In the model itself, removing only a latent's cross-layer writes does "
        f"{interval(top)} (KL, mean over {top.n or 0} latents with large scores) of what removing "
        f"all of its writes does; for {drawn.n or 0} latents drawn at random it is "
        f"{interval(drawn)}."
    ]
    table = facts.results.table("causal")
    sizes = [r["kl_without_any"] for r in table.rows() if r["ratio"] is not None] if table else []
    if sizes:
        told[0] += (
            f" Half of these latents, removed whole, change predictions by more than "
            f"{number(median(sizes))} nats (KL, mean over scored tokens)."
        )
    return [*told, sentences.score_tells(facts.results.estimate("causal_ratio.top-random"))]


def _distance(facts: Facts) -> list[str]:
    told, verdicts = [], []
    for variant, which in (("plain", "Raw decoder norms"), ("corrected", "Gauge-free norms")):
        factor = facts.get(f"decay_factor_0_{FACTOR_DISTANCE}", variant)
        told.append(sentences.decay(which, FACTOR_DISTANCE, factor))
        verdicts.append(verdict(factor, 1.0))
    told.append(sentences.agreement(verdicts[0], verdicts[1], "the norm at a distance"))
    return told


def implications(results: Results) -> list[str]:
    """What follows for attribution graphs made with this coder; each rests on a number above."""
    facts = Facts(results)
    if not facts.crosses:
        return ["A graph made with this coder has no cross-layer edges of single features."]
    points = [_of_edges(facts), _of_reach(facts), _of_norms(facts), _of_top(facts)]
    if not results.provenance.get("data"):
        points.insert(
            0,
            "Nothing here says what a graph would lose without cross-layer edges: run analyze with "
            "a dataset.",
        )
    return [point for point in points if point]


def _of_edges(facts: Facts) -> str:
    size = facts.difference("fvu", "same_only")
    shown = in_points(size)
    return {
        "above": "Cross-layer edges of this coder are not optional: a graph that left them out "
        f"would describe a replacement model whose FVU is higher by {shown}.",
        "below": "A graph without cross-layer edges would describe a replacement model that "
        f"reconstructs better (FVU {shown}); these edges need justifying.",
        "none": "There is no evidence that a graph without cross-layer edges would describe a "
        f"worse replacement model (change of FVU {shown}).",
    }.get(verdict(size), "")


def _of_reach(facts: Facts) -> str:
    """The shortest limit of the reach that costs nothing that can be seen."""
    limits = {d: facts.difference("fvu", f"reach_{d}") for d in facts.numbered("fvu.reach_")}
    known = {d: e for d, e in limits.items() if verdict(e) in ("above", "below", "none")}
    if not known:
        return ""
    costs = listed([f"≤ {d}: {interval(e, points)}" for d, e in known.items()])
    costly = max((d for d, e in known.items() if verdict(e) == "above"), default=-1)
    enough = [d for d in known if d > costly]
    if not enough:
        return (
            "Every limit to the reach that was tried costs reconstruction (added FVU in points, "
            f"{costs})."
        )
    return (
        f"There is no evidence that writes further than {min(enough)} layers matter for "
        f"reconstruction (added FVU in points, {costs}): edges up to that length may do."
    )


def _of_norms(facts: Facts) -> str:
    plain, fair = (facts.get("mean_norm_cross", v) for v in ("plain", "corrected"))
    if plain is None or fair is None:
        return ""
    return (
        "Raw decoder norms are no measure of how much an edge carries: they leave out how large "
        "activations are, and they grow with the scale of the target layer. "
        "Compare edges by what is written on tokens."
    )


def _of_top(facts: Facts) -> str:
    table = facts.results.table("top_features")
    if table is None or not any(n > 1 for n in facts.targets):
        return ""
    rows = [row for row in table.rows() if row["source"] < len(facts.targets)]
    above = [r for r in rows if r["score"] > 1 - 1 / max(facts.targets[r["source"]], 1)]
    layers = listed([str(layer) for layer in sorted({row["source"] for row in above})])
    if not above:
        return (
            "No listed latent writes more of its norm across layers than writing alike to all "
            "targets would: a high score alone only says that a layer is early."
        )
    return (
        f"{len(above)} of the {len(rows)} listed latents, in layers {layers}, write "
        "more of their norm across layers than writing alike to all targets would; in a "
        "graph these are the nodes whose single name stands for several layers."
    )
