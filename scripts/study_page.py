"""The page of the study of cross-layer writes, made from what `analyze` wrote.

Every sentence that holds a number, and every claim, comes from the estimates and their intervals;
the prose around them says what was done and what cannot be concluded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

from PIL import Image

from sparsify_vlm.analysis.compare import Comparison, compare_results
from sparsify_vlm.analysis.contrasts import over_seeds, paired_difference, seeds_difference
from sparsify_vlm.analysis.results import Results
from sparsify_vlm.analysis.tables import Estimate
from sparsify_vlm.report.analysis.comparison_report import BY_ROLE_WORDS, conclusions
from sparsify_vlm.report.analysis.page import Page, Picture, Rows, Section, write_markdown
from sparsify_vlm.report.analysis.wording import (
    in_points,
    interval,
    number,
    percent,
    verdict,
)

FIGURES = "study"
"""Folder of the pictures, beside the page."""
NAMES = {"llm": "tiny-llama", "vlm": "tiny-llava"}
ARMS = {
    "clt": "trained from zero",
    "warm": "started from per-layer transcoders",
    "long": "trained from zero for twice as long",
}
SHARES = {
    "same_layer_share_per_latent.corrected": "Own layer's share of a latent's squared norm",
    "same_layer_share_mean_norm": "… of mean norms, plain",
    "same_layer_share_squared_norm": "… of squared norms, plain",
    "same_layer_share_squared_norm.corrected": "… of squared norms, gauge-free",
    "energy_share_same": "… of contribution energy",
    "block_share_same": "Own layer's exact block share",
}
USE = {
    "mean_effective_targets": "Effective number of targets",
    "mean_effective_targets.energy": "… weighted by activity",
    "mean_reach": "Reach, layers",
    "mean_reach.energy": "… weighted by activity",
    "mean_own_cosine": "Cosine of later decoders with the own one",
    "decay_factor_0_5": "Norm at distance 5 over that at 0, plain",
    "decay_factor_0_5.corrected": "… gauge-free",
}
COSTS = {
    "fvu.full": "FVU of the whole coder",
    "fvu_difference.same_only": "FVU added: cross writes zeroed",
    "fvu_difference.cross_mean": "FVU added: cross writes at their mean",
    "fvu_difference.refit": "FVU added: own-layer decoders refitted",
    "fvu_difference.random_deletion": "FVU added: as much energy deleted at random",
    "fvu_difference.plt": "FVU of per-layer transcoders above the CLT's",
}
PREDICTIONS = {
    "kl.full": "KL of the whole coder, nats",
    "kl.same_only": "KL: cross writes zeroed",
    "kl.refit": "KL: own-layer decoders refitted",
    "kl.plt": "KL: per-layer transcoders",
}
ROWS = {
    **dict.fromkeys(SHARES, percent),
    **dict.fromkeys(USE, number),
    **dict.fromkeys(COSTS, percent),
    **dict.fromkeys(PREDICTIONS, number),
}
LABELS = SHARES | USE | COSTS | PREDICTIONS
FVU, CUT, REFIT = "fvu.full", "fvu_difference.same_only", "fvu_difference.refit"
ROLES = {"image": "image tokens", "text": "text after an image", "text_only": "text without image"}

Group = Sequence[Results]
Groups = Mapping[tuple[str, str], Group]
"""By model and arm; one analysis per seed."""


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
            _models(groups, found["clt"], pictures),
            _training(groups, pictures),
            _controls(groups),
            _roles(groups, found, pictures),
            _figures(pictures),
            Section("What this does not show", points=LIMITS),
        ],
    )


LIMITS = (
    "Two models of a million weights, one recipe, one kind of scene. Nothing here says how large "
    "any of these numbers is in a model of billions of weights; what carries over is which numbers "
    "move with the training of the coder and which do not.",
    "The intervals are over training seeds of the coders. The two models are one of each kind: a "
    "difference between them is a difference between these two, whatever its interval.",
    "The vision-language model was tuned from the text model. Both coders saw equally many tokens; "
    "half of the samples of the vision-language model's are scenes told in words, as all of the "
    "text model's are, so that *text without image* is the same text in both.",
    "Both models answer nearly without doubt, so cross-entropy and KL are small where the answer "
    "does not change.",
    "No correction is made for the number of quantities looked at.",
)


def in_short(groups: Groups, found: Mapping[str, Comparison]) -> list[str]:
    """The claims that the intervals allow."""
    points = []
    for model, name in NAMES.items():
        zero = groups[model, "clt"]
        cut, refit = (_mean(zero, key) for key in (CUT, REFIT))
        if verdict(cut) == "above":
            points.append(
                f"In {name} zeroing the cross-layer writes of a CLT {ARMS['clt']} adds "
                f"{in_points(cut)} of FVU to {interval(_mean(zero, FVU), percent)}; with the own "
                f"layer's decoders refitted, {in_points(refit)} are left."
            )
        points.append(_path_of_training(groups, model))
    wanted = ("block share", "share of a latent", "reach", "added by zeroing", "refitting")
    between = _sentences(found["clt"])[0]
    points += [s for s in between if any(word in s.partition(":")[0] for word in wanted)]
    return [point for point in points if point]


def _path_of_training(groups: Groups, model: str) -> str:
    """Whether the cost of the cut is the coder's or the model's: two ways to train on it."""
    long, warm = groups[model, "long"], groups[model, "warm"]
    cost, quality = (_paired(warm, long, name) for name in (CUT, FVU))
    said = {"below": "costs less", "above": "costs more"}.get(verdict(cost))
    if said is None:
        return (
            f"In {NAMES[model]} there is no evidence that the cut costs a CLT {ARMS['warm']} more "
            f"or less than one {ARMS['long']} (difference {in_points(cost)})."
        )
    levels = " against ".join(in_points(_mean(group, CUT)) for group in (warm, long))
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


def _setting(groups: Groups) -> Section:
    rows = []
    for (model, arm), group in groups.items():
        coder, data = (group[0].provenance[key] for key in ("coder", "data"))
        tokens = ", ".join(
            f"{n:,} {role.replace('_', ' ')}" for role, n in data["tokens"].items() if n
        )
        shape = f"{coder['n_layers']} × {coder['num_latents']}, k = {coder['k']}"
        rows.append([f"{NAMES[model]}, {ARMS[arm]}", shape, str(len(group)), tokens])
    return Section(
        "What was done",
        text=[
            "`configs/study_llm.yaml` and `configs/study_vlm.yaml` train a CLT on tiny-llama, "
            "which reads scenes told in words, and on tiny-llava, which sees and reads them; the "
            "files differ in the activations only. For each seed there are per-layer transcoders "
            "(PLT), a CLT from zero, a CLT that starts from the PLT, and a CLT from zero with as "
            "many steps as those two together. Every CLT went through `sparsify-vlm analyze` on "
            "held-out scenes; own-layer decoders were refitted on the training activations."
        ],
        tables=[Rows(("coder", "layers × latents", "seeds", "held-out tokens"), rows)],
    )


def _models(groups: Groups, found: Comparison, pictures: Sequence[str]) -> Section:
    rows = []
    for name, form in ROWS.items():
        if name not in found.contrasts:
            continue
        one = found.contrasts[name]
        size = in_points(one.difference) if form is percent else interval(one.difference, form)
        rows.append([LABELS[name], interval(one.text, form), interval(one.vlm, form), size])
    header = ("", "tiny-llama", "tiny-llava", "difference")
    names = [f"clt_{name}" for name in ("shares", "decay_curves", "use", "ablation_cost")]
    return Section(
        "Text model and vision-language model",
        tables=[Rows(header, rows, f"CLTs {ARMS['clt']}. 95 % intervals over seeds.")],
        figures=_shown(names, pictures, f"CLTs {ARMS['clt']}; means with 95 % intervals."),
        points=_sentences(found)[0],
    )


def _training(groups: Groups, pictures: Sequence[str]) -> Section:
    tables = []
    for model, name in NAMES.items():
        arms = [groups[model, arm] for arm in ("clt", "long", "warm")]
        rows = []
        for key, form in ROWS.items():
            if any(one.estimate(key) is None for group in arms for one in group):
                continue
            change = _paired(arms[2], arms[1], key)
            size = in_points(change) if form is percent else interval(change, form)
            rows.append([LABELS[key], *(interval(_mean(group, key), form) for group in arms), size])
        header = (
            "",
            "from zero",
            "from zero, twice as long",
            "from the PLT",
            "last two: difference",
        )
        tables.append(Rows(header, rows, f"{name}. Differences are of the same seed."))
    names = [
        f"{arm}_{figure}" for figure in ("shares", "ablation_cost") for arm in ("long", "warm")
    ]
    return Section(
        "Two ways to train the same coder",
        text=[
            "A CLT can compute the same ŷ with much or little of it in its cross-layer writes. A "
            "coder that starts from per-layer transcoders begins with all of its writes at the own "
            "layer and moves only what lowers the loss."
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
    short = {"clt": "zero", "long": "zero, long", "warm": "from PLT"}
    header = ("arm", *(f"{NAMES[model]}, {short[arm]}" for model, arm in groups))
    tables = []
    for what, form, caption in (
        ("fvu", percent, "FVU, mean over layers"),
        ("kl", number, "KL with all MLPs replaced, nats"),
    ):
        rows = [
            [
                name.replace("_", " "),
                *(interval(_mean(group, f"{what}.{name}"), form) for group in groups.values()),
            ]
            for name in names
        ]
        tables.append(Rows(header, rows, caption))
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
        figures=_shown(["clt_roles"], pictures, f"CLTs {ARMS['clt']}; dotted: tiny-llama."),
        points=_sentences(found["clt"])[1],
    )


def _by_role(groups: Groups, arm: str, found: Comparison) -> list[list[str]]:
    rows = []
    for name, label in BY_ROLE_WORDS.items():
        by_role = found.roles.get(name)
        if not by_role:
            continue
        form = percent if "share" in name or name.startswith("fvu") else number
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


def beside_clip(found: Mapping[str, Comparison]) -> str:
    """Whether image tokens lean on their own layer's coder, as patches were found to in CLIP."""
    words = {
        "above": "image tokens lean on it more than text without an image does",
        "below": "image tokens lean on it less than text without an image does",
        "none": "there is no evidence of a difference between image tokens and text without image",
    }
    said = []
    for arm, one in found.items():
        difference = one.roles.get("block_share_same", {}).get("image-text_only")
        if text := words.get(verdict(difference)):
            said.append(f"in CLTs {ARMS[arm]} {text} ({in_points(difference)})")
    return (
        "In CLTs of CLIP's own tower patches were seen to draw on the coder of their own layer and "
        "[CLS] on those of many (Chatzoudis et al. 2026, arXiv:2604.13304). In the language model "
        f"looked at here, by the own layer's exact block share, {'; '.join(said)}."
    )


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


def _sentences(found: Comparison) -> tuple[list[str], list[str]]:
    """What is concluded between the models, and within the second by the kind of token."""
    said = conclusions(found)
    kinds = tuple(ROLES.values())
    within = [s for s in said if any(kind in s for kind in kinds)]
    return [s for s in said if s not in within], within


def _mean(group: Group, name: str) -> Estimate:
    return over_seeds([one.estimate(name) for one in group])


def _paired(a: Group, b: Group, name: str) -> Estimate:
    """a − b, of coders of the same seed."""
    return paired_difference(*([one.estimate(name) for one in group] for group in (a, b)))


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
