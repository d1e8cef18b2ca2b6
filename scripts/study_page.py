"""The page of the study of cross-layer writes, made from what `analyze` wrote.

Every sentence that holds a number, and every claim, comes from the estimates and their intervals;
the prose around them says what was done and what cannot be concluded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

from PIL import Image
from study_claims import beside_clip, chance, in_short, one_by_one
from study_rows import (
    ARMS,
    NAMES,
    OF_PLT,
    ROLES,
    ROWS,
    SHORT,
    Groups,
    alike,
    between,
    mean,
    paired,
    size,
    there,
)

from sparsify_vlm.analysis.compare import Comparison, compare_results
from sparsify_vlm.analysis.contrasts import over_seeds, seeds_difference
from sparsify_vlm.analysis.results import Results
from sparsify_vlm.analysis.tables import Estimate
from sparsify_vlm.report.analysis import published
from sparsify_vlm.report.analysis.comparison_report import (
    BY_ROLE_WORDS,
    is_share,
)
from sparsify_vlm.report.analysis.page import Page, Picture, Rows, Section, write_markdown
from sparsify_vlm.report.analysis.wording import in_points, interval, number, percent

FIGURES = "study"
"""Folder of the pictures, beside the page."""
SEEDS = (
    "95 % intervals: Student's t over the seeds; where a number is measured on samples, with what "
    "other samples would change added in quadrature."
)
NONE = "–"


def write_page(
    path: Path,
    *,
    comparisons: Mapping[str, Path],
    analyses: Mapping[tuple[str, str], Sequence[Path]],
) -> None:
    """Write the page to `path` and its pictures into a folder beside it.

    Args:
        comparisons: by arm, what `compare` wrote, for its figures.
        analyses: by model and arm, what `analyze` wrote, one folder per seed.
    """
    groups = {key: [Results.load(folder) for folder in found] for key, found in analyses.items()}
    pictures = _pictures(comparisons, {key: found[0] for key, found in analyses.items()})
    folder = path.parent / FIGURES
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in pictures.items():
        (folder / f"{name}.png").write_bytes(content)
    write_markdown(build(groups, list(pictures)), pictures, path, FIGURES)


def build(groups: Groups, pictures: Sequence[str]) -> Page:
    """The page of all analyses; `pictures` are those there are."""
    found = {arm: compare_results(groups["llm", arm], groups["vlm", arm]) for arm in ARMS}
    return Page(
        "Cross-layer writes in a text model and in a vision-language model",
        "How large a part of a cross-layer transcoder (CLT) are its writes to later layers, what "
        "are they for, and are they different in a model that sees? Written by `make study`; "
        "[analysis](analysis.md) and [the ablations](analysis_ablation.md) define every number.",
        [
            Section("In short", points=in_short(groups, found)),
            _setting(groups),
            _models(groups, pictures),
            _training(groups, pictures),
            _controls(groups),
            _roles(groups, found, pictures),
            Section("What differs, one by one", points=one_by_one(groups, found)),
            _figures(pictures),
            Section("What this does not show", points=[*LIMITS, chance(groups, list(ROWS))]),
        ],
    )


LIMITS = (
    "Two models of a million weights, one recipe, one kind of scene. Nothing here says how large "
    "any of these numbers is in a model of billions of weights; what carries over is which numbers "
    "move with the training of the coder and which do not.",
    "The intervals are over training seeds of the coders, and over held-out samples where numbers "
    "are measured on them. The two models are one of each kind: a difference between them is a "
    "difference between these two, whatever its interval. Student's t of three seeds assumes that "
    "they scatter normally, and its interval of a number that cannot be negative may go below 0.",
    "The vision-language model was tuned from the text model. Half of the samples of its coders "
    "are scenes told in words, as all of the text model's are, so that *text without image* is the "
    "same kind of text in both. But its coders share the same number of latents, and of training "
    "tokens, between images and text: a difference on text may come from that, and not from what "
    "the model does.",
    "FVU on tokens of one kind is relative to how much y varies among these: a higher one is a "
    "larger part of their own variance, not a larger error. Errors over the variance of all tokens "
    "have one ruler, under which tokens that vary much count more.",
    "A coder that starts from per-layer transcoders has two schedules of the learning rate one "
    "after the other, one trained for twice as long has a single one. The per-layer transcoders "
    "that every CLT is held against took as many steps as a CLT from zero.",
    "A single latent changes predictions by little. A ratio of two such changes is told where the "
    "larger one stands out from rounding, and says nothing of how much the latent matters.",
    "Both models answer nearly without doubt, so cross-entropy and KL are small where the answer "
    "does not change.",
)


def _setting(groups: Groups) -> Section:
    rows = []
    for (model, arm), group in groups.items():
        coder, data = (group[0].provenance[key] for key in ("coder", "data"))
        tokens = ", ".join(
            f"{n:,} {role.replace('_', ' ')}" for role, n in data["tokens"].items() if n
        )
        shape = f"{coder['n_layers']} × {coder['num_latents']}, k = {coder['k']}"
        seen = coder["training"].get("tokens")
        trained = NONE if seen is None else f"{seen:,}"
        rows.append([f"{NAMES[model]}, {ARMS[arm]}", shape, str(len(group)), trained, tokens])
    header = ("coder", "layers × latents", "seeds", "tokens trained on", "held-out tokens")
    return Section(
        "What was done",
        text=[
            "`configs/study_llm.yaml` and `configs/study_vlm.yaml` train a CLT on tiny-llama, "
            "which reads scenes told in words, and on tiny-llava, which sees and reads them; the "
            "files differ in the activations only. For each seed there are per-layer transcoders "
            "(PLT), a CLT from zero, a CLT that starts from the PLT, and a CLT from zero with as "
            "many steps as those two together. Every CLT went through `sparsify-vlm analyze` on "
            "held-out scenes; own-layer decoders were refitted on the training activations. A "
            "coder that starts from another has seen that one's tokens too. What is drawn at "
            "random (deletions, random encoders, latents) is drawn anew for every seed."
        ],
        tables=[Rows(header, rows)],
    )


def _models(groups: Groups, pictures: Sequence[str]) -> Section:
    sides = [groups[model, "clt"] for model in NAMES]
    every, rows = list(groups.values()), []
    for name, quantity in ROWS.items():
        if not there(name, *every):
            continue
        was = quantity.published
        levels = [interval(mean(side, name), quantity.form) for side in sides]
        apart = [size(between(groups, arm, name), quantity.form) for arm in ARMS]
        stated = NONE if was is None else quantity.form(was)
        rows.append([quantity.label, alike(sides, name) or NONE, *levels, *apart, stated])
    header = (
        *("", "writing alike", "tiny-llama", "tiny-llava"),
        *("difference", "… trained for twice as long", "… started from PLT", published.SOURCE),
    )
    names = [f"clt_{name}" for name in ("shares", "decay_curves", "use", "ablation_cost")]
    caption = (
        f"CLTs {ARMS['clt']}, and the difference (tiny-llava less tiny-llama) in those of the "
        f"other two kinds. {SEEDS} “Writing alike”: what latents would give that write the same to "
        "all their targets. KL, cross-entropy and top token: all MLPs replaced, over the tokens of "
        "the answers."
    )
    return Section(
        "Text model and vision-language model",
        tables=[Rows(header, rows, caption), *_forms(groups)],
        figures=_shown(names, pictures, f"CLTs {ARMS['clt']}; means with 95 % intervals."),
    )


def _forms(groups: Groups) -> list[Rows]:
    """The forms of the decay that were fitted, in CLTs from zero."""
    wanted = {"scope": "whole", "weighting": "latents", "role": "all", "panel": "balanced"}
    rows = []
    for model, name in NAMES.items():
        tables = [one.table("fits") for one in groups[model, "clt"]]
        for variant, label in (("plain", "plain"), ("corrected", "gauge-free")):
            fits = [t.where(variant=variant, **wanted).rows() for t in tables if t is not None]
            if len(fits) < len(tables) or not all(fits):
                continue
            by_form = [{row["model"]: row["held_out_error"] for row in seed} for seed in fits]
            errors = [over_seeds([Estimate(seed[form]) for seed in by_form]) for form in by_form[0]]
            rows.append([f"{name}, {label} norms", *(interval(e, percent) for e in errors)])
            forms = list(by_form[0])
    if not rows:
        return []
    caption = (
        "Forms of the decay with distance, fitted to the source layers that have every distance of "
        "the panel: error on latents that were not fitted to, as a share of the norm. Intervals "
        "over seeds."
    )
    return [Rows(("", *forms), rows, caption)]


def _training(groups: Groups, pictures: Sequence[str]) -> Section:
    tables = []
    for model, name in NAMES.items():
        arms = [groups[model, arm] for arm in ("clt", "long", "warm")]
        rows = []
        for key, quantity in ROWS.items():
            if not there(key, *arms):
                continue
            change = NONE if key in OF_PLT else size(paired(arms[2], arms[1], key), quantity.form)
            levels = (interval(mean(group, key), quantity.form) for group in arms)
            rows.append([quantity.label, *levels, change])
        header = ("", *(SHORT[arm] for arm in ("clt", "long", "warm")), "last two: difference")
        tables.append(Rows(header, rows, f"{name}. Differences are of the same seed. {SEEDS}"))
    names = [
        f"{arm}_{figure}" for figure in ("shares", "ablation_cost") for arm in ("long", "warm")
    ]
    return Section(
        "Two ways to train the same coder",
        text=[
            "A CLT can compute the same ŷ with much or little of it in its cross-layer writes. A "
            "coder that starts from per-layer transcoders begins with all of its writes at the own "
            "layer, and training has to move them from there."
        ],
        tables=tables,
        figures=[
            picture for n in names for picture in _shown([n], pictures, f"CLTs {ARMS[n[:4]]}.")
        ],
    )


def _controls(groups: Groups) -> Section:
    names = [
        name.removeprefix("fvu.")
        for name in groups["vlm", "clt"][0].estimates()
        if name.startswith("fvu.") and name.count(".") == 1
    ]
    header = ("arm", *(f"{NAMES[model]}, {SHORT[arm]}" for model, arm in groups))
    tables = []
    for what, form, caption in (
        ("fvu", percent, "FVU on clean inputs, mean over layers"),
        ("kl", number, "KL with all MLPs replaced, nats per scored token"),
    ):
        rows = [
            [
                name.replace("_", " "),
                *(interval(mean(group, f"{what}.{name}"), form) for group in groups.values()),
            ]
            for name in names
        ]
        tables.append(Rows(header, rows, f"{caption}. {SEEDS}"))
    return Section("All arms of the ablation", tables=tables)


def _roles(groups: Groups, found: Mapping[str, Comparison], pictures: Sequence[str]) -> Section:
    header = (
        *("", *ROLES.values()),
        *("image − text after", "image − text without"),
        "text without image: tiny-llava − tiny-llama",
    )
    tables = [
        Rows(header, _by_role(groups, arm, one), f"CLTs of tiny-llava {ARMS[arm]}.")
        for arm, one in found.items()
    ]
    return Section(
        "Within the vision-language model, by the kind of token",
        text=[beside_clip(found)],
        tables=tables,
        figures=[
            picture
            for arm in ("clt", "warm")
            for picture in _shown(
                [f"{arm}_roles"], pictures, f"CLTs {ARMS[arm]}; dotted: tiny-llama."
            )
        ],
    )


def _by_role(groups: Groups, arm: str, found: Comparison) -> list[list[str]]:
    rows = []
    for name, label in BY_ROLE_WORDS.items():
        by_role = found.roles.get(name)
        if not by_role:
            continue
        form = percent if is_share(name) else number
        show = in_points if form is percent else interval
        models = ([one.estimate(f"{name}.text_only") for one in groups[m, arm]] for m in NAMES)
        llm, vlm = models
        rows.append(
            [
                label,
                *(interval(by_role.get(role), form) for role in ROLES),
                *(show(by_role.get(f"image-{role}")) for role in ("text", "text_only")),
                show(seeds_difference(vlm, llm)),
            ]
        )
    return rows


def _figures(pictures: Sequence[str]) -> Section:
    own = [name for name in pictures if name.startswith(tuple(NAMES))]
    return Section(
        "The figures of each model",
        text=["Of the CLTs trained from zero, first seed."],
        figures=[
            Picture(name, f"{NAMES[name[:3]]}: {name[4:].replace('_', ' ')}.") for name in own
        ],
    )


def _shown(names: Sequence[str], pictures: Sequence[str], caption: str) -> list[Picture]:
    return [Picture(name, caption) for name in names if name in pictures]


def _pictures(
    comparisons: Mapping[str, Path], firsts: Mapping[tuple[str, str], Path]
) -> dict[str, bytes]:
    folders = {arm: folder / "figures" for arm, folder in comparisons.items()}
    folders |= {
        model: folder / "figures" for (model, arm), folder in firsts.items() if arm == "clt"
    }
    return {
        f"{name}_{file.stem}": _smaller(file)
        for name, folder in folders.items()
        for file in sorted(folder.glob("*.png"))
    }


def _smaller(file: Path) -> bytes:
    """The picture with 128 colours: less than half the size, and alike to the eye."""
    out = BytesIO()
    with Image.open(file) as picture:
        picture.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(
            out, "PNG", optimize=True
        )
    return out.getvalue()
