"""`compare`'s report: figures, report.html and report.md, and results.json with the differences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from sparsify_vlm.analysis.compare import FORMAT, VERSION, Comparison
from sparsify_vlm.analysis.results import DATA, RESULTS, Results, save_tables
from sparsify_vlm.analysis.tables import Estimate
from sparsify_vlm.files import write_json
from sparsify_vlm.report.analysis import sentences, style
from sparsify_vlm.report.analysis.analysis_report import tokens_text, write_figures
from sparsify_vlm.report.analysis.comparison_figures import FIGURES
from sparsify_vlm.report.analysis.page import (
    Page,
    Picture,
    Rows,
    Section,
    write_html,
    write_markdown,
)
from sparsify_vlm.report.analysis.sections import NONE
from sparsify_vlm.report.analysis.wording import (
    in_points,
    interval,
    number,
    over,
    percent,
)

Form = Callable[[float | None], str]
HEADLINES: dict[str, tuple[str, Form]] = {
    "same_layer_share_mean_norm": ("The same-layer share of plain norms", percent),
    "same_layer_share_squared_norm": ("The same-layer share of plain squared norms", percent),
    "same_layer_share_squared_norm.corrected": (
        "The same-layer share of gauge-free squared norms",
        percent,
    ),
    "same_layer_share_per_latent.corrected": ("The same-layer share of a latent", percent),
    "energy_share_same": ("The same-layer share of contribution energy", percent),
    "block_share_same": ("The own layer's block share", percent),
    "mean_effective_targets": ("The effective number of targets", number),
    "mean_effective_targets.energy": (
        "The effective number of targets weighted by activity",
        number,
    ),
    "mean_reach": ("The reach", number),
    "mean_reach.energy": ("The reach weighted by activity", number),
    "decay_factor_0_5": ("The decay factor of plain norms from 0 to 5", number),
    "decay_factor_0_5.corrected": ("The decay factor of gauge-free norms from 0 to 5", number),
    "fvu.full": ("The FVU of the full CLT", percent),
    "fvu_difference.same_only": ("The FVU added by zeroing cross-layer writes", percent),
    "fvu_difference.cross_mean": ("The FVU added by holding them at their means", percent),
    "fvu_difference.refit": (
        "The FVU added by cutting them and refitting same-layer decoders",
        percent,
    ),
    "fvu_difference.plt": ("The FVU of per-layer transcoders above the CLT's", percent),
    "delta_ce_difference.same_only": ("The cross-entropy added by zeroing them (nats)", number),
    "kl.full": ("The KL of the model with the full CLT (nats)", number),
}
USE = (
    "Means with 95 % intervals of the cross-layer score (0 to 1), the effective number of targets "
    "and the reach in layers. What writing alike to all targets would give depends on the number "
    "of layers."
)
CUT, REFIT = "fvu_difference.same_only", "fvu_difference.refit"
BY_ROLE_WORDS = {
    "block_share_same": "The own layer's block share",
    "energy_share_same": "The own layer's share of contribution energy",
    "mean_effective_targets": "The effective number of targets",
    "mean_reach": "The reach",
    "fvu_difference.same_only": "The FVU added by cutting cross-layer writes",
    "fvu_difference.refit": "The FVU added by cutting them and refitting same-layer decoders",
    "error_difference.same_only": (
        "The error added by cutting cross-layer writes, over the variance of all tokens"
    ),
    "error_difference.refit": (
        "The error added by cutting them and refitting, over the variance of all tokens"
    ),
}
OF_TOKENS = (
    "FVU on tokens of a kind is relative to how much y varies among them. The error over the "
    "variance of all tokens has the same ruler for every kind: where the two differ, so do the "
    "variances."
)
HOW_TO_READ = (
    "A difference is the vision-language model's number less the text model's. A direction is "
    "named where its 95 % interval lies on one side of zero; “no evidence” is said where it does "
    "not, which is no evidence of equality: the interval says how large a difference may still be. "
    "No correction is made for the number of quantities compared: of twenty without any difference "
    "one may be expected to seem to have one."
)


def write_comparison(found: Comparison, folder: Path) -> Path:
    """Write data, figures, report.html and report.md; returns the HTML file."""
    save_tables(found.tables, folder / DATA)
    write_json(folder / RESULTS, as_json(found))
    pictures = write_figures(FIGURES, found, folder)
    page = build(found)
    write_html(page, pictures, folder / "report.html")
    write_markdown(page, pictures, folder / "report.md")
    return folder / "report.html"


def as_json(found: Comparison) -> dict[str, object]:
    """The content of results.json."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "text": [dict(one.provenance) for one in found.text],
        "vlm": [dict(one.provenance) for one in found.vlm],
        "contrasts": {name: asdict(one) for name, one in found.contrasts.items()},
        "roles": {
            name: {role: asdict(e) for role, e in by_role.items()}
            for name, by_role in found.roles.items()
        },
        "notes": list(found.notes),
        "tables": sorted(found.tables),
    }


def build(found: Comparison) -> Page:
    """The report of two groups of coders."""
    sections = [
        Section("Conclusions", points=conclusions(found), notes=[HOW_TO_READ, *found.notes]),
        Section("The numbers", tables=[_headlines(found)]),
        Section(
            "Weights",
            figures=[
                Picture("shares", "Large marks: means with 95 % intervals; small dots: seeds."),
                Picture(
                    "decay_curves",
                    "Mean decoder norm by distance, over that at the nearest distance. Shaded: "
                    "95 %, over seeds; with one seed that of the mean norm over source layers.",
                ),
            ],
        ),
        Section("Latents", figures=[Picture("use", USE)]),
        Section("Ablation", figures=[Picture("ablation_cost", "Every arm less the full CLT.")]),
    ]
    if found.roles:
        text = "Within the vision-language model, by the kind of token; dotted: the text model."
        sections.append(
            Section(
                "Token roles",
                tables=[_role_rows(found)],
                figures=[Picture("roles", text)],
                notes=[OF_TOKENS],
            )
        )
    sections.append(Section("All estimates", tables=[_everything(found)]))
    return Page(
        "Cross-layer connections: a text model and a vision-language model",
        "The same numbers for cross-layer transcoders of both, and their differences.",
        sections,
        _facts(found),
    )


def _facts(found: Comparison) -> list[tuple[str, str]]:
    rows = []
    for side, name in (("text", "Text model"), ("vlm", "Vision-language model")):
        for one in found.side(side):
            coder = one.provenance["coder"]
            rows.append(
                (name, f"{coder['path']}, a CLT of {coder.get('model') or 'no stated model'}")
            )
        first: Results = found.side(side)[0]
        rows.append((f"{name}'s tokens", tokens_text(first.provenance.get("data"))))
    return rows


def conclusions(found: Comparison) -> list[str]:
    """A sentence per quantity, between the models and then between roles within the second."""
    between = [_between(found, name) for name in HEADLINES if name in found.contrasts]
    within = [
        _within(found, name, other)
        for name in BY_ROLE_WORDS
        for other in ("text", "text_only")
        if f"image-{other}" in found.roles.get(name, {})
    ]
    return [sentence for sentence in (*between, *within) if sentence]


def _between(found: Comparison, name: str) -> str:
    label, form = HEADLINES[name]
    one = found.contrasts[name]
    cut = found.contrasts.get(CUT)
    if name == REFIT and cut is not None:
        for side in ("text", "vlm"):
            if worse := sentences.worse_than_the_cut(getattr(cut, side), getattr(one, side)):
                return worse
    size = in_points(one.difference) if form is percent else interval(one.difference, form)
    levels = interval(one.text, form), interval(one.vlm, form)
    return sentences.models_differ(label, *levels, one.difference, size)


def _within(found: Comparison, name: str, other: str) -> str:
    by_role, cut = found.roles[name], found.roles.get(CUT, {})
    if name == REFIT:
        for role in ("image", other):
            where = f" on {style.ROLE_NAMES[role]} of the vision-language model"
            text = sentences.worse_than_the_cut(cut.get(role), by_role.get(role), where)
            if text:
                return text if other == "text" else ""
    what = f"{BY_ROLE_WORDS[name]} in the vision-language model"
    names = style.ROLE_NAMES["image"], style.ROLE_NAMES[other]
    return sentences.roles_differ(what, *names, by_role[f"image-{other}"], is_share(name))


def is_share(name: str) -> bool:
    """Whether an estimate of BY_ROLE_WORDS is told in percent."""
    return "share" in name or name.startswith(("fvu", "error"))


def _headlines(found: Comparison) -> Rows:
    rows = []
    for name, (label, form) in HEADLINES.items():
        if one := found.contrasts.get(name):
            size = in_points(one.difference) if form is percent else interval(one.difference, form)
            cells = (interval(one.text, form), interval(one.vlm, form), size)
            rows.append([label, *cells, over(one.difference) or NONE])
    header = ("", "text model", "vision-language model", "difference", "interval over")
    return Rows(header, rows, "95 % intervals.")


def _role_rows(found: Comparison) -> Rows:
    kinds = ["image", "text", "text_only", "image-text", "image-text_only"]
    rows = []
    for name, label in BY_ROLE_WORDS.items():
        if by_role := found.roles.get(name):
            rows.append([label, *(_of_role(by_role, k, is_share(name)) for k in kinds)])
    heads = [style.ROLE_NAMES[role] for role in kinds[:3]]
    return Rows(("", *heads, "image less text after it", "image less text without"), rows)


def _of_role(by_role: Mapping[str, Estimate], kind: str, shares: bool) -> str:
    e = by_role.get(kind)
    if e is None:
        return NONE
    if shares and kind.startswith("image-"):
        return in_points(e)
    return interval(e, percent if shares else number)


def _everything(found: Comparison) -> Rows:
    def cells(e: Estimate) -> Sequence[str]:
        return [NONE if v is None else f"{v:.6g}" for v in (e.value, e.low, e.high)]

    rows = [
        [name, *cells(one.text), *cells(one.vlm), *cells(one.difference)]
        for name, one in found.contrasts.items()
    ]
    heads = [
        f"{part}{end}" for part in ("text", "vlm", "difference") for end in ("", " low", " high")
    ]
    caption = f"{len(rows)} estimates that both have"
    return Rows(("name", *heads), rows, caption, folded=True)
