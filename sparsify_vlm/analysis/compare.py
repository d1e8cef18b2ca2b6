"""`compare`: the numbers of two coders, or of two groups of coders trained from several seeds.

What is compared is what `analyze` stored. Between two coders the interval of a difference comes
from the two stored intervals, which hold for other samples or other source layers; between groups
it is Welch's over training seeds (`contrasts`). Curves against distance are relative to their own
value at the nearest distance, and with layers of different number also on relative depth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sparsify_vlm.analysis.contrasts import over_seeds, paired_difference, seeds_difference
from sparsify_vlm.analysis.results import Results
from sparsify_vlm.analysis.tables import Estimate, Table
from sparsify_vlm.errors import UserError

FORMAT, VERSION = "sparsify-vlm comparison", 1
ROLES = ("image", "text", "text_only")
SIDES = ("text", "vlm")


@dataclass(frozen=True)
class Contrast:
    """One quantity on both sides, and the vision-language model's less the text model's."""

    text: Estimate
    vlm: Estimate
    difference: Estimate


@dataclass(frozen=True)
class Comparison:
    """Two groups of analyses, quantity by quantity."""

    text: Sequence[Results]
    vlm: Sequence[Results]
    contrasts: Mapping[str, Contrast]
    """By the estimate's name; those that both sides have."""
    roles: Mapping[str, Mapping[str, Estimate]]
    """Within the vision-language model: name -> role or "image-text" -> estimate or difference."""
    tables: Mapping[str, Table] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def side(self, name: str) -> Sequence[Results]:
        """The analyses of "text" or "vlm"."""
        return self.text if name == "text" else self.vlm

    def layers(self, name: str) -> int:
        """Number of layers of a side's coders."""
        return int(self.side(name)[0].provenance["coder"]["n_layers"])


def compare_results(
    text: Sequence[Results], vlm: Sequence[Results], only: Sequence[str] = ()
) -> Comparison:
    """Compare analyses of text CLTs with analyses of VLM CLTs, one per training seed.

    Raises `UserError` if the coders of one side differ in their number of layers, or the two sides
    have no experiment in common.
    """
    text, vlm = [_only(one, only) for one in text], [_only(one, only) for one in vlm]
    for name, side in zip(SIDES, (text, vlm), strict=True):
        depths = {one.provenance["coder"]["n_layers"] for one in side}
        if len(depths) > 1:
            raise UserError(
                f"--{name}: coders of {' and '.join(map(str, sorted(depths)))} layers are not "
                "seeds of one another; compare them one by one"
            )
    a, b = [one.estimates() for one in text], [one.estimates() for one in vlm]
    shared = [name for name in a[0] if all(name in found for found in (*a, *b))]
    if not shared:
        raise UserError("the two have no experiment in common: run analyze alike on both")
    contrasts = {name: _contrast(a, b, name) for name in shared}
    roles = _roles(b)
    tables = {"contrasts": _contrast_table(contrasts), "curves": _curves(text, vlm)}
    if roles:
        tables["roles"] = _role_table(roles)
    return Comparison(text, vlm, contrasts, roles, tables, _notes(text, vlm))


def _only(results: Results, only: Sequence[str]) -> Results:
    kept = {n: e for n, e in results.experiments.items() if not only or n in only}
    return replace(results, experiments=kept)


Side = Sequence[Mapping[str, Estimate]]


def _contrast(text: Side, vlm: Side, name: str) -> Contrast:
    a, b = ([found[name] for found in side] for side in (text, vlm))
    return Contrast(over_seeds(a), over_seeds(b), seeds_difference(b, a))


def _roles(vlm: Side) -> dict[str, dict[str, Estimate]]:
    """Every quantity that is given for image tokens: by role, and image less each other role."""
    found = {}
    for name in vlm[0]:
        base, _, role = name.rpartition(".")
        if role != "image":
            continue
        by_role = {
            r: over_seeds([one.get(f"{base}.{r}") for one in vlm])
            for r in ROLES
            if any(f"{base}.{r}" in one for one in vlm)
        }
        for other in ROLES[1:]:
            if other in by_role:
                by_role[f"image-{other}"] = _role_difference(vlm, base, other)
        found[base] = by_role
    return found


def _role_difference(vlm: Side, base: str, other: str) -> Estimate:
    stated = [one.get(f"{base}.image-{other}") for one in vlm]
    if all(one is not None for one in stated):
        return over_seeds(stated)
    sides = ([one.get(f"{base}.{role}") for one in vlm] for role in ("image", other))
    return paired_difference(*sides)


def _contrast_table(contrasts: Mapping[str, Contrast]) -> Table:
    rows = []
    for name, one in contrasts.items():
        row: dict[str, Any] = {"name": name}
        for part in ("text", "vlm", "difference"):
            row |= _columns(part, getattr(one, part))
        rows.append(row | {"n": one.difference.n, "over": one.difference.over})
    return Table.from_rows(rows, list(rows[0]))


def _columns(part: str, e: Estimate) -> dict[str, float | None]:
    return {part: e.value, f"{part}_low": e.low, f"{part}_high": e.high}


def _role_table(roles: Mapping[str, Mapping[str, Estimate]]) -> Table:
    rows = [
        {"name": name, "role": role, "value": e.value, "low": e.low, "high": e.high}
        for name, by_role in roles.items()
        for role, e in by_role.items()
    ]
    return Table.from_rows(rows, ("name", "role", "value", "low", "high"))


CURVES = (
    "side",
    "variant",
    "weighting",
    "role",
    "distance",
    "relative_distance",
    "relative_mean",
    "low",
    "high",
)


def _curves(text: Sequence[Results], vlm: Sequence[Results]) -> Table:
    """Mean norms against distance, all source layers, over those at the nearest distance."""
    rows = []
    for name, side in zip(SIDES, (text, vlm), strict=True):
        tables = [table for one in side if (table := one.table("distance_decay")) is not None]
        if len(tables) < len(side):
            continue
        kinds = [(r["variant"], r["weighting"], r["role"]) for r in tables[0].rows()]
        layers = side[0].provenance["coder"]["n_layers"]
        for kind in dict.fromkeys(kinds):
            what = dict(zip(("variant", "weighting", "role"), kind, strict=True))
            curves = [table.where(panel="all", **what).rows() for table in tables]
            for distance, e in _relative(curves).items():
                rows.append(
                    {"side": name, **what, "distance": distance}
                    | {"relative_distance": distance / max(layers - 1, 1)}
                    | {"relative_mean": e.value, "low": e.low, "high": e.high}
                )
    return Table.from_rows(rows, CURVES)


def _relative(curves: Sequence[Sequence[Mapping[str, Any]]]) -> dict[int, Estimate]:
    """By distance. Of one curve the interval is the mean's own, divided by the same number."""
    found: dict[int, list[Estimate]] = {}
    for curve in curves:
        ordered = sorted(curve, key=lambda row: row["distance"])
        first = next((row["mean"] for row in ordered if row["mean"]), None)
        for row in ordered:
            mean, low, high = (
                None if row[k] is None or first is None else row[k] / first
                for k in ("mean", "low", "high")
            )
            found.setdefault(row["distance"], []).append(Estimate(mean, low, high, row["sources"]))
    return {d: over_seeds(e) for d, e in found.items() if len(e) == len(curves)}


def _notes(text: Sequence[Results], vlm: Sequence[Results]) -> list[str]:
    """What a reader must know of how comparable the two are."""
    a, b = (side[0].provenance["coder"] for side in (text, vlm))
    notes = []
    if a.get("model") and a.get("model") == b.get("model"):
        notes.append(
            f"Both are coders of {a['model']}: “text model” stands for the first of them here, "
            "“vision-language model” for the second."
        )
    if a["n_layers"] != b["n_layers"]:
        notes.append(
            f"The coders have {a['n_layers']} and {b['n_layers']} layers. A uniform coder's "
            "same-layer share, effective targets and reach depend on the number of layers, so "
            "differences in them are not differences in use; curves are also drawn on relative "
            "depth (distance / (L − 1))."
        )
    names = {"num_latents": "latents a layer", "k": "k", "activation": "activation"}
    names |= {"n_targets": "targets a layer", "input_site": "input site"}
    for key, what in names.items():
        if a.get(key) != b.get(key) and not (key == "n_targets" and a["n_layers"] != b["n_layers"]):
            notes.append(f"The coders differ in {what}: {a.get(key)} and {b.get(key)}.")
    if min(len(text), len(vlm)) == 1:
        notes.append(
            "One training seed on a side: intervals are over samples or source layers of these "
            "very coders, those over layers are wide as the layers of two models are taken as "
            "unrelated. Another seed may differ by more; give several with --text and --vlm."
        )
    if not any((one.provenance.get("data") or {}).get("tokens", {}).get("image") for one in vlm):
        notes.append("No image token was read on the vision-language side.")
    datas = [{(o.provenance.get("data") or {}).get("source") for o in s} for s in (text, vlm)]
    if datas[0] != datas[1]:
        notes.append("The two sides were measured on different tokens.")
    return notes
