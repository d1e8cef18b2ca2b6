"""The four experiments as sections of the report: every number that such a study fills in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sparsify_vlm.analysis.contrasts import complement
from sparsify_vlm.analysis.results import Results
from sparsify_vlm.analysis.tables import Estimate
from sparsify_vlm.report.analysis import published, style
from sparsify_vlm.report.analysis.facts import Facts
from sparsify_vlm.report.analysis.page import Picture, Rows, Section
from sparsify_vlm.report.analysis.wording import (
    in_points,
    interval,
    listed,
    number,
    over,
    percent,
    verdict,
)

Form = Callable[[float | None], str]
NONE = "–"
LISTED = 24
"""Rows of the table of top latents, about."""


def weights(results: Results) -> Section:
    """Experiment 1."""
    facts = Facts(results)
    share, squared = "same_layer_share_mean_norm", "same_layer_share_squared_norm"

    def of(name: str, form: Form, gone: bool = False) -> list[str]:
        found = [facts.get(name, variant) for variant in ("plain", "scaled", "corrected")]
        return [_cell(complement(e) if gone and e is not None else e, form) for e in found]

    null = [percent(facts.pooled_null)] * 3
    own = published.SAME_LAYER_SHARE_MEAN_NORM
    own_squared = published.SAME_LAYER_SHARE_SQUARED_NORM
    rows = [
        ["Same-layer weight ratio, norms", *of(share, percent), percent(own)],
        ["Cross-layer weight ratio, norms", *of(share, percent, gone=True), percent(1 - own)],
        ["Same-layer ratio, squared norms", *of(squared, percent), percent(own_squared)],
        [
            "Cross-layer ratio, squared norms",
            *of(squared, percent, gone=True),
            percent(1 - own_squared),
        ],
        ["Same-layer ratio if all were alike", *null, percent(2 / (published.LAYERS + 1))],
        [
            "Mean norm of a same-layer connection",
            *of("mean_norm_same", number),
            number(published.MEAN_NORM_SAME),
        ],
        [
            "Mean norm of a cross-layer connection",
            *of("mean_norm_cross", number),
            number(published.MEAN_NORM_CROSS),
        ],
    ]
    tables = [
        Rows(
            ("", "plain", "divided by σ of the target", "corrected (gauge-free)", published.SOURCE),
            [[cell or NONE for cell in row] for row in rows],
            "Key findings. Intervals: 95 %, "
            f"{over(facts.get(share)) or over(facts.get(squared)) or 'where there are any'}.",
        )
    ]
    per_latent = facts.get("same_layer_share_per_latent", "corrected")
    text = ["Goal: how much decoder weight is in cross-layer against same-layer connections."]
    if per_latent is not None:
        text.append(
            f"Of a live latent's squared norm {interval(per_latent, percent)} on average is the "
            f"own layer's; latents that write alike to all targets would have "
            f"{percent(facts.latent_null)}."
        )
    if activity := _by_role(facts, ("energy_share_same", "block_share_same"), percent):
        names = ("tokens", "contribution energy E[a²]‖d‖²/σ²", "exact block share ⟨ŷ,ŷ⟩/‖ŷ‖²")
        tables.append(Rows(names, activity, "The own layer's share of what is written on tokens."))
    figures = [
        Picture("weight_heatmap", "From source layer (rows) to target layer (columns)."),
        Picture(
            "weight_distribution",
            "Every latent's share of its squared norm at its own layer. Shading: how many latents; "
            "orange: median; dashed: what writing alike to all targets would give.",
        ),
    ]
    return _section("Experiment 1: weights", results, "weights", text, tables, figures)


def _cell(estimate: Estimate | None, form: Form) -> str:
    return NONE if estimate is None else interval(estimate, form)


def _by_role(facts: Facts, names: Sequence[str], form: Form) -> list[list[str]]:
    """A row per role of the tokens that any of the estimates is there for."""
    roles = ["all", *(r for r in style.ROLE_NAMES if any(r in facts.roles(n) for n in names))]
    rows = [
        [style.ROLE_NAMES[role], *(_cell(facts.role(name, role), form) for name in names)]
        for role in roles
    ]
    return [row for row in rows if any(cell != NONE for cell in row[1:])]


def _section(
    title: str,
    results: Results,
    name: str,
    text: Sequence[str],
    tables: Sequence[Rows],
    figures: Sequence[Picture],
) -> Section:
    notes = results.experiments[name].notes
    return Section(title, text, tables, figures, notes=notes)


def ablation(results: Results) -> Section:
    """Experiment 2."""
    facts = Facts(results)
    full, cut = facts.arm("fvu", "full"), facts.arm("fvu", "same_only")
    difference = facts.difference("fvu", "same_only")
    relative = facts.arm("fvu_increase", "same_only")
    published_rise = in_points(Estimate(published.FVU_ABLATED - published.FVU_FULL))
    rows = [
        ["Full CLT FVU", _cell(full, percent), percent(published.FVU_FULL)],
        [
            "Ablated CLT FVU, cross writes zeroed",
            _cell(cut, percent),
            percent(published.FVU_ABLATED),
        ],
        ["FVU increase from ablation", in_points(difference), published_rise],
    ]
    if relative is not None:
        was = published.FVU_ABLATED / published.FVU_FULL - 1
        rows.append(["FVU increase, as a share of the full FVU", interval(relative), number(was)])
    found = over(full)
    caption = f"Key findings. Intervals: 95 %{', ' + found if found else ''}."
    tables = [Rows(("", "this CLT", published.SOURCE), rows, caption), _arms(facts)]
    if by_role := _roles_of_arms(facts):
        tables.append(by_role)
    text = ["Goal: what is lost without cross-layer writes, and how much of it is due to them."]
    figures = [
        Picture("fvu_comparison", "FVU of each target layer, on the model's own activations."),
        Picture(
            "delta_loss",
            "Cross-entropy added to the model's own. Left: every MLP replaced, each on the stream "
            "as it has become. Right: one MLP replaced, on the model's own stream.",
        ),
    ]
    return _section("Experiment 2: ablation", results, "ablation", text, tables, figures)


def _arm_names(facts: Facts) -> list[str]:
    names = [name.split(".") for name in facts.results.estimates()]
    return style.arm_order(part[1] for part in names if part[0] == "fvu" and len(part) == 2)


def _arms(facts: Facts) -> Rows:
    figures = (("delta_ce", number), ("kl", number), ("top1", percent))
    rows = []
    for arm in _arm_names(facts):
        change = NONE if arm == "full" else in_points(facts.difference("fvu", arm))
        others = [_cell(facts.arm(name, arm), form) for name, form in figures]
        rows.append([style.arm_name(arm), _cell(facts.arm("fvu", arm), percent), change, *others])
    header = ("arm", "FVU", "above the full CLT", "added CE, nats", "KL, nats", "same top token")
    return Rows(
        header,
        rows,
        "All arms. FVU on the model's own activations, mean over target layers; the last three "
        "with all layers replaced, scored on the tokens of the answer or of plain text.",
    )


def _roles_of_arms(facts: Facts) -> Rows | None:
    roles = facts.roles("fvu.full")
    if not roles:
        return None
    arms = [arm for arm in _arm_names(facts) if facts.roles(f"fvu.{arm}")]
    rows = [
        [style.arm_name(arm), *(_cell(facts.arm("fvu", arm, role), percent) for role in roles)]
        for arm in arms
    ]
    return Rows(("FVU", *(style.ROLE_NAMES[role] for role in roles)), rows, "By token role.")


def features(results: Results) -> Section:
    """Experiment 3."""
    facts = Facts(results)
    quantities: list[tuple[str, str, Form]] = [
        ("mean_cross_score", "Cross-layer score 1 − p(own)", number),
        ("mean_effective_targets", "Effective number of targets", number),
        ("mean_reach", "Reach, layers", number),
        ("mean_own_cosine", "Cosine of later decoders with the own one", number),
    ]
    kinds = ["all", *(k for k in ("energy", *style.ROLE_NAMES) if facts.role("mean_reach", k))]
    kinds = list(dict.fromkeys(kinds))
    rows = [
        [label, *(_cell(facts.role(name, kind), form) for kind in kinds)]
        for name, label, form in quantities
    ]
    heads = {"all": "every live latent alike", "energy": "weighted by activity"}
    header = ("mean over latents", *(heads.get(k) or style.ROLE_NAMES[k] for k in kinds))
    tables = [Rows(header, rows, "Key findings.")]
    if top := _top_table(facts):
        tables.append(top)
    dead = facts.get("dead_share")
    text = ["Goal: which latents rely most on cross-layer connections."]
    if dead is not None and dead.value is not None:
        text.append(f"{interval(dead, percent)} of the latents are dead and left out.")
    figures = [
        Picture("score_distribution", "Dashed: the score of writing alike to all targets."),
        Picture(
            "top_features",
            "Left: the largest scores of each source layer; dashed: writing alike to all targets. "
            "Right, with a model: KL of its predictions when one latent's cross-layer writes are "
            "removed, over that when all of its writes are (KL grows as the square of a small "
            "change, so one half of the writes gives about a quarter).",
        ),
    ]
    return _section("Experiment 3: features", results, "features", text, tables, figures)


def _top_table(facts: Facts) -> Rows | None:
    table = facts.results.table("top_features")
    if table is None:
        return None
    rows = table.rows()
    layers = sorted({row["source"] for row in rows})
    each = max(1, LISTED // len(layers))
    shown = []
    for layer in layers:
        own = sorted((r for r in rows if r["source"] == layer), key=lambda r: -r["score"])
        shown += [_top_row(facts, row) for row in own[:each]]
    header = ["Layer", "Feature", "Cross-layer score", "if alike", "effective targets", "reach"]
    return Rows(
        [*header, "cosine", "KL without cross / without any", "KL without any, nats", "label"],
        shown,
        "Top cross-layer features, by score within each source layer. A score is only high beside "
        "that of a latent which writes alike to all the targets its layer has (“if alike”).",
    )


def _top_row(facts: Facts, row: dict[str, Any]) -> list[str]:
    n = facts.targets[row["source"]] if row["source"] < len(facts.targets) else 0
    causal, size = NONE, None
    if row.get("causal") is not None:
        causal = interval(Estimate(row["causal"], row["causal_low"], row["causal_high"]))
    if (tested := facts.results.table("causal")) is not None:
        same = tested.where(source=row["source"], latent=row["latent"]).rows()
        size = same[0]["kl_without_any"] if same else None
    return [
        str(row["source"]),
        str(row["latent"]),
        number(row["score"]),
        number(1 - 1 / n) if n else NONE,
        *(number(row[name]) for name in ("effective_targets", "reach", "own_cosine")),
        causal,
        NONE if size is None else number(size),
        row.get("label") or "",
    ]


def distance(results: Results) -> Section:
    """Experiment 4."""
    facts = Facts(results)
    found = sorted({*facts.numbered("decay_factor_0_"), 1, 5})
    rows = []
    for d in found:
        cells = [
            _cell(facts.get(f"decay_factor_0_{d}", v), number)
            for v in ("plain", "scaled", "corrected")
        ]
        known = d in published.NORM_BY_DISTANCE
        was = number(published.decay_factor(d)) if known else NONE
        rows.append([f"Decay factor, distance 0 to {d}", *cells, was])
        same = [facts.role(name, "balanced") for name in _by_variant(f"decay_factor_0_{d}")]
        if any(e is not None and e.value is not None for e in same):
            label = f"Decay factor, 0 to {d}, of the source layers that have both"
            rows.append([label, *(_cell(e, number) for e in same), NONE])
    halves = [facts.get("half_life", v) for v in ("plain", "scaled", "corrected")]
    if any(one is not None for one in halves):
        rows.append(["Half-life, layers", *(_cell(h, number) for h in halves), published.HALF_LIFE])
    header = ("", "plain", "divided by σ of the target", "corrected (gauge-free)", published.SOURCE)
    tables = [Rows(header, rows, "Key findings.")]
    pattern = _pattern(facts)
    if (fits := facts.results.table("fits")) is not None:
        tables += _fits(fits.rows())
    text = [f"Goal: how connections vary with layer distance. Decay pattern: {pattern}."]
    figures = [
        Picture(
            "distance_decay",
            "Mean decoder norm by distance. Shaded: 95 %, source layers resampled. Balanced panel: "
            "the same source layers at every distance, so that no layer drops out on the way.",
        ),
        Picture(
            "per_layer_patterns",
            "A line per source layer: the mean norm at each distance over that at the nearest.",
        ),
        Picture("detailed_heatmap", "Mean norms of each source layer (rows) by distance."),
    ]
    return _section("Experiment 4: distance", results, "distance", text, tables, figures)


def _by_variant(name: str) -> list[str]:
    return [name, f"{name}.scaled", f"{name}.corrected"]


def _pattern(facts: Facts) -> str:
    """Falling, rising or flat by the plain and the gauge-free norm; and the best of the fits."""
    told = {"above": "rising", "below": "falling", "none": "no evidence of a change"}
    said = []
    for variant, name in (("plain", "plain norms"), ("corrected", "gauge-free norms")):
        factors = {
            d: facts.get(f"decay_factor_0_{d}", variant) for d in facts.numbered("decay_factor_0_")
        }
        known = {d: v for d, e in factors.items() if (v := verdict(e, 1.0)) in told}
        parts = [f"{told[v]} from 0 to {d}" for d, v in known.items()]
        said.append(f"{name} {listed(parts) if parts else 'not known with an interval'}")
    return "; ".join(said)


def _fits(rows: Sequence[dict[str, Any]]) -> list[Rows]:
    """The fits over the whole range, of all live latents alike."""
    wanted = {"scope": "whole", "weighting": "latents", "role": "all"}
    chosen = [row for row in rows if all(row.get(k, v) == v for k, v in wanted.items())]
    cells = []
    for row in chosen:
        behind = Estimate(row["behind_best"], row["behind_best_low"], row["behind_best_high"])
        cells.append(
            [
                row["variant"],
                row["panel"],
                row["model"],
                *(_parameter(row, name) for name in ("half_life", "exponent", "floor")),
                percent(row["held_out_error"]) if row["held_out_error"] is not None else NONE,
                _behind(behind),
            ]
        )
    first = ("norms", "sources", "form", "half-life", "exponent", "floor")
    caption = (
        "Fits of the decay. Error: root of squared deviation over squared norm, on latents that "
        "were not fitted to. A form is only told apart where its error lies behind the best one's."
    )
    header = (*first, "held-out error", "behind the best")
    return [Rows(header, cells, caption)] if cells else []


def _behind(e: Estimate) -> str:
    if e.value is None:
        return NONE
    return in_points(e) if e.value else "the best"


def _parameter(row: dict[str, Any], name: str) -> str:
    e = Estimate(row.get(name), row.get(f"{name}_low"), row.get(f"{name}_high"))
    return interval(e) if e.value is not None else NONE


SECTIONS: dict[str, Callable[[Results], Section]] = {
    "weights": weights,
    "ablation": ablation,
    "features": features,
    "distance": distance,
}


def everything(results: Results) -> Section:
    """Every estimate under its own name, as in results.json."""
    rows = [
        [
            name,
            *(NONE if v is None else f"{v:.6g}" for v in (one.value, one.low, one.high)),
            over(one),
        ]
        for name, one in results.estimates().items()
    ]
    header = ("name", "value", "low", "high", "interval over")
    table = Rows(header, rows, f"{len(rows)} estimates by their names in results.json", folded=True)
    return Section("All estimates", tables=[table])
