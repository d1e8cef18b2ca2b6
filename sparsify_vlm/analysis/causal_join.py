"""What the weights say of single latents beside what the model says: `features` with `causal`.

Tested are the latents with the largest cross-layer scores of every layer that writes to several,
in turn, and as many drawn at random from the live ones, so that the score can be judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sparsify_vlm.analysis.activity import Activity
from sparsify_vlm.analysis.bootstrap import mean_interval
from sparsify_vlm.analysis.causal import Latent, causal_scores, random_latents
from sparsify_vlm.analysis.contrasts import minus
from sparsify_vlm.analysis.decoders import Decoders
from sparsify_vlm.analysis.features import per_latent
from sparsify_vlm.analysis.tables import Estimate, Experiment, Table
from sparsify_vlm.analysis.tokens import ModelTokens
from sparsify_vlm.analysis.writes import all_writes
from sparsify_vlm.replacement import VLMReplacementModel

COLUMNS = (
    *("source", "latent", "chosen", "score", "ratio", "low", "high"),
    *("kl_without_cross", "kl_without_any", "n_tokens", "kl_of_rounding"),
)


def with_causal(
    features: Experiment,
    model: VLMReplacementModel,
    tokens: ModelTokens,
    decoders: Decoders,
    activity: Activity,
    n: int,
    seed: int = 0,
    quiet: bool = False,
) -> Experiment:
    """The experiment on features with the table "causal" of about `n` top and `n` random latents.

    Estimates causal_ratio.top, causal_ratio.random and causal_ratio.top-random are means over
    latents of Σ KL without cross writes / Σ KL without any. Latents whose removal changes
    predictions no more than rounding does have no ratio; a note says how many.
    """
    top = _in_turn(features.tables["top_features"], n)
    if not top:
        return features
    scores = _scores(decoders, activity)
    live = activity.alive()
    sources = sorted({s for s, _ in scores})
    drawn = random_latents(live, max(1, -(-n // len(sources))), seed)
    drawn = [one for one in drawn if one in scores and one not in top]
    table = causal_scores(model, [*top, *drawn], tokens, seed=seed, quiet=quiet)
    rows = [
        row
        | {"chosen": "top" if i < len(top) else "random"}
        | {"score": scores[row["source"], row["latent"]]}
        for i, row in enumerate(table.rows())
    ]
    found = Table.from_rows(rows, COLUMNS)
    means = {kind: _mean(found.where(chosen=kind)["ratio"], seed) for kind in ("top", "random")}
    estimates = {f"causal_ratio.{kind}": mean for kind, mean in means.items()}
    estimates["causal_ratio.top-random"] = minus(means["top"], means["random"])
    return replace(
        features,
        estimates={**features.estimates, **estimates},
        notes=[*features.notes, *_notes(found)],
        tables={
            **features.tables,
            "top_features": _joined(features.tables["top_features"], found),
            "causal": found,
        },
    )


def _in_turn(top: Table, n: int) -> list[Latent]:
    """The first latent of every layer, then the second of every layer, … `n` in all."""
    by_layer: dict[int, list[Latent]] = {}
    for row in top.rows():
        by_layer.setdefault(row["source"], []).append((row["source"], row["latent"]))
    ranked = [(rank, one) for own in by_layer.values() for rank, one in enumerate(own)]
    return [one for _, one in sorted(ranked)[:n]]


def _scores(decoders: Decoders, activity: Activity) -> dict[Latent, float]:
    """The cross-layer score of every live latent with several targets."""
    found: dict[Latent, float] = {}
    for writes in all_writes(decoders, None, activity):
        if len(writes.targets) > 1:
            places = writes.live.nonzero()[:, 0].tolist()
            values = per_latent(writes)["cross_score"].tolist()
            found |= {(writes.source, i): v for i, v in zip(places, values, strict=True)}
    return found


def _notes(table: Table) -> list[str]:
    """Why tested latents have no ratio."""
    missing = [row for row in table.rows() if row["ratio"] is None]
    silent = sum(row["n_tokens"] == 0 for row in missing)
    unseen = len(missing) - silent
    parts = [f"{silent} were not active on these samples"] * bool(silent)
    parts += [
        f"removing all writes of {unseen} changes predictions too little to tell from rounding "
        "in the model's arithmetic"
    ] * bool(unseen)
    if not parts:
        return []
    return [f"Of {len(table)} latents that were removed in the model, {' and '.join(parts)}."]


def _mean(ratios: Sequence[float | None], seed: int) -> Estimate:
    known = [ratio for ratio in ratios if ratio is not None]
    if not known:
        return Estimate(None)
    return mean_interval(known, over="latents", seed=seed).estimate()


def _joined(top: Table, causal: Table) -> Table:
    """`top` with the columns causal, causal_low and causal_high."""
    known = {(row["source"], row["latent"]): row for row in causal.rows()}
    names = {"causal": "ratio", "causal_low": "low", "causal_high": "high"}
    rows = [
        row
        | {
            new: known.get((row["source"], row["latent"]), {}).get(old)
            for new, old in names.items()
        }
        for row in top.rows()
    ]
    return Table.from_rows(rows, [*top.columns, *names])
