"""Reports of analyze and compare from invented results: every number, every figure, no network."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import made_up_analysis as made_up
import pytest
from PIL import Image

from sparsify_vlm.analysis.compare import compare_results
from sparsify_vlm.analysis.results import Results
from sparsify_vlm.analysis.tables import Estimate, Experiment, Table
from sparsify_vlm.errors import UserError
from sparsify_vlm.report.analysis.analysis_report import (
    FIGURES,
    build,
    write_figures,
    write_report,
)
from sparsify_vlm.report.analysis.comparison_figures import FIGURES as COMPARISON_FIGURES
from sparsify_vlm.report.analysis.comparison_report import build as build_comparison
from sparsify_vlm.report.analysis.comparison_report import write_comparison
from sparsify_vlm.report.analysis.page import write_markdown
from sparsify_vlm.report.analysis.wording import interval, number, percent

STUDY_FIGURES = {
    *("weight_heatmap", "weight_distribution", "fvu_comparison", "delta_loss"),
    *("score_distribution", "top_features", "distance_decay", "per_layer_patterns"),
    "detailed_heatmap",
}
WITHOUT_DATA = STUDY_FIGURES - {"fvu_comparison", "delta_loss"}


class Page(HTMLParser):
    """What a page would fetch, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [v or "" for n, v in attrs if n in ("src", "href", "xlink:href", "srcset")]
        assert tag not in ("script", "iframe", "object", "embed")

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What analyze leaves."""
    place = tmp_path_factory.mktemp("analysis")
    results = made_up.results()
    results.save(place)
    write_report(results, place)
    return place


def test_every_estimate_of_results_json_is_in_both_reports(folder: Path) -> None:
    stored = json.loads((folder / "results.json").read_text())
    html = Page((folder / "report.html").read_text()).text
    markdown = (folder / "report.md").read_text()
    rows = {
        cells[1]: cells[2:5]
        for line in markdown.splitlines()
        if len(cells := [cell.strip() for cell in line.split("|")]) >= 6
    }
    count = 0
    for experiment in stored["experiments"].values():
        for name, e in experiment["estimates"].items():
            shown = rows[name]
            for text, value in zip(shown, (e["value"], e["low"], e["high"]), strict=True):
                known = None if text == "–" else float(text)
                assert known == (None if value is None else pytest.approx(value, rel=1e-5))
                assert text in html
            count += 1
    assert count > 200


def test_what_a_study_fills_in_is_filled_in(folder: Path) -> None:
    """The key findings of the template, from the stored numbers alone."""
    results = Results.load(folder)

    def shown(name: str, form: object = percent) -> str:
        return interval(results.estimate(name), form)  # type: ignore[arg-type]

    text = (folder / "report.md").read_text()
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if "|" in line}
    share = results.estimate("same_layer_share_mean_norm")
    assert share is not None
    assert share.value is not None
    assert shown("same_layer_share_mean_norm") in lines["Same-layer weight ratio, norms"]
    assert percent(1 - share.value) in lines["Cross-layer weight ratio, norms"]
    assert shown("same_layer_share_mean_norm.corrected") in lines["Same-layer weight ratio, norms"]
    assert shown("fvu.full") in lines["Full CLT FVU"]
    assert shown("fvu.same_only") in lines["Ablated CLT FVU, cross writes zeroed"]
    assert "15.0 [14.0, 16.0] points" in lines["FVU increase from ablation"]
    assert shown("decay_factor_0_5", number) in lines["Decay factor, distance 0 to 5"]
    assert re.search(r"\| 0 \| 0 \| 0\.950 \| 0\.833 \|.*red &lt;b>patches", text)
    for published in ("19.5 %", "38.5 %", "0.378", "0.125", "0.344", "28.7 %", "43.7 %", "80.5 %"):
        assert published in text
    assert "TO BE FILLED" not in text
    headings = re.findall(r"^## (.+)", text, re.MULTILINE)
    assert headings[4:6] == ["Conclusions", "Implications for circuit analysis"]


def figures_of(folder: Path) -> Iterator[tuple[str, Image.Image]]:
    for file in sorted((folder / "figures").iterdir()):
        with Image.open(file) as image:
            yield file.stem, image.convert("L")


def test_figures_are_there_and_show_something(folder: Path) -> None:
    found = dict(figures_of(folder))
    assert set(found) == set(FIGURES) == STUDY_FIGURES
    for name, image in found.items():
        assert image.width >= 600, name
        assert image.height >= 400, name
        dark = sum(image.histogram()[:128]) / (image.width * image.height)
        assert dark > 0.002, name


def test_roles_without_tokens_have_no_panel() -> None:
    results = made_up.results()
    experiment = results.experiments["ablation"]
    empty = {"fvu": None, "low": None, "high": None}
    rows = [
        row | (empty if row["role"] == "text_only" else {})
        for row in experiment.tables["fvu_comparison"].rows()
    ]
    tables = {**experiment.tables, "fvu_comparison": Table.from_rows(rows, list(rows[0]))}
    changed = {**results.experiments, "ablation": replace(experiment, tables=tables)}
    figure = FIGURES["fvu_comparison"](Results(changed, results.provenance))
    assert figure is not None
    shown = [axes.get_title() for axes in figure.axes if axes.get_visible()]
    assert shown == ["all tokens", "image tokens", "text after an image"]


@pytest.mark.parametrize("file", ["report.html"])
def test_the_page_fetches_nothing(folder: Path, file: str) -> None:
    text = (folder / file).read_text()
    page = Page(text)
    assert sum(source.startswith("data:image/png") for source in page.sources) == len(STUDY_FIGURES)
    assert all(source.startswith("data:") for source in page.sources)
    assert not re.search(r"url\(|@import|https?://", text)
    assert "<b>patches" not in text  # labels are data, not markup


def test_tables_come_back_as_they_were(folder: Path) -> None:
    before, after = made_up.results(), Results.load(folder)
    assert after.estimates() == before.estimates()
    assert after.provenance == before.provenance
    for name in ("fvu_comparison", "top_features", "distance_decay", "weight_heatmap"):
        one, other = before.table(name), after.table(name)
        assert one is not None
        assert other is not None
        assert one.rows() == other.rows()
        lines = (folder / "data" / f"{name}.csv").read_text().splitlines()
        assert len(lines) == len(one) + 1
        assert lines[0].split(",") == list(one.columns)


@pytest.mark.parametrize(("layers", "data"), [(1, True), (26, False)])
def test_any_depth_with_and_without_data(layers: int, data: bool, tmp_path: Path) -> None:
    results = made_up.results(layers, data)
    results.save(tmp_path)
    write_report(Results.load(tmp_path), tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert ("This is an analysis of the weights alone" in text) is not data
    assert ("## Experiment 2" in text) is data
    drawn = {name for name, _ in figures_of(tmp_path)}
    expected = STUDY_FIGURES if data else WITHOUT_DATA
    assert drawn == (expected - {"top_features"} if layers == 1 else expected)


def test_a_per_layer_coder_has_nothing_to_cut(tmp_path: Path) -> None:
    results = made_up.results(1)
    assert results.provenance["coder"]["targets"] == [1]
    write_markdown(build(results), {}, tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    assert "there are no cross-layer connections to measure" in text
    assert "rises from" not in text


def emptied(results: Results, width: bool) -> Results:
    """The same with every number undefined, or only without intervals."""

    def less(e: Estimate) -> Estimate:
        return Estimate(None) if width else Estimate(e.value)

    def hollow(name: str, table: Table) -> Table:
        keys = ("source", "target", "distance", "layer", "latent", "bin", "count", "score")
        kept = (*keys, "sources", "n_tokens", "live", "dead")
        columns = {
            key: column if key in kept or isinstance(column[0], str) else [None] * len(column)
            for key, column in table.columns.items()
        }
        return Table(columns)

    return replace(
        results,
        experiments={
            n: Experiment(
                n,
                {k: less(e) for k, e in x.estimates.items()},
                {k: hollow(k, t) for k, t in x.tables.items()} if width else x.tables,
            )
            for n, x in results.experiments.items()
        },
    )


@pytest.mark.parametrize("undefined", [True, False])
def test_undefined_numbers_and_missing_intervals_are_said(undefined: bool, tmp_path: Path) -> None:
    results = emptied(made_up.results(), undefined)
    results.save(tmp_path)
    again = Results.load(tmp_path)
    page = build(again)
    write_markdown(page, {}, tmp_path / "report.md")
    if undefined:
        assert write_figures(FIGURES, again, tmp_path)
    text = (tmp_path / "report.md").read_text()
    conclusions = text[text.index("## Conclusions") : text.index("## All estimates")]
    assert ("undefined" if undefined else "nothing is claimed") in conclusions
    for claim in ("rises", "falls", "was not made up", "reconstruct worse", "more than the"):
        assert claim not in conclusions, claim
    assert "nan" not in text.lower().split()


def test_another_runs_figures_and_tables_do_not_stay(tmp_path: Path) -> None:
    some = {name: FIGURES[name] for name in ("delta_loss", "per_layer_patterns")}
    for data in (True, False):
        results = made_up.results(3, data=data)
        results.save(tmp_path)
        write_figures(some, results, tmp_path)
    assert {name for name, _ in figures_of(tmp_path)} == {"per_layer_patterns"}
    assert not (tmp_path / "data" / "delta_loss.csv").exists()
    assert (tmp_path / "data" / "distance_decay.csv").exists()


# ---- compare


def higher(results: Results, name: str, by: float) -> Results:
    """The same with one estimate moved."""
    experiments = {}
    for key, experiment in results.experiments.items():
        values = dict(experiment.estimates)
        if name in values:
            e = values[name]
            assert e.value is not None
            values[name] = made_up.estimate(e.value + by, 0.01)
        experiments[key] = replace(experiment, estimates=values)
    return replace(results, experiments=experiments)


def test_a_comparison_names_what_differs_and_nothing_else(tmp_path: Path) -> None:
    text = made_up.results(roles=("all", "text_only"))
    vlm = higher(made_up.results(), "block_share_same", 0.1)
    write_comparison(compare_results([text], [vlm]), tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    claims = re.findall(r"[^\n]* is (?:higher|lower) in the vision-language model", page.text)
    assert claims == ["The own layer's block share is higher in the vision-language model"]
    assert "difference 10.0 [8.6, 11.4] points" in page.text
    assert "The reach: no evidence of a difference" in page.text
    assert "One training seed on a side" in page.text
    assert all(source.startswith("data:") for source in page.sources)
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["contrasts"]["block_share_same"]["difference"]["value"] == pytest.approx(0.1)
    assert {name for name, _ in figures_of(tmp_path)} == set(COMPARISON_FIGURES)


def test_a_comparison_of_seeds_has_the_spread_of_seeds(tmp_path: Path) -> None:
    def seeds(base: float) -> list[Results]:
        plain = made_up.results()
        return [higher(plain, "block_share_same", base + s) for s in (-0.01, 0.0, 0.01)]

    found = compare_results(seeds(0.0), seeds(0.2))
    one = found.contrasts["block_share_same"]
    assert one.difference.over == "seeds, and over samples"
    assert one.difference.value == pytest.approx(0.2)
    # Welch at 4 degrees of freedom: 2.776445 · sqrt(2 · 0.01² / 3); either side's samples: 0.01
    half = math.hypot(2.776445 * (2e-4 / 3) ** 0.5, 0.01, 0.01)
    assert one.difference.low == pytest.approx(0.2 - half, abs=1e-6)
    write_markdown(build_comparison(found), {}, tmp_path / "report.md")
    assert "One training seed" not in (tmp_path / "report.md").read_text()


def test_every_share_has_its_own_null(tmp_path: Path) -> None:
    """Writing alike to all targets: 2/7 of all pairs of 6 layers, but the mean of 1/6, 1/5 … 1 for
    a latent."""
    found = compare_results([made_up.results()], [made_up.results()])
    figure = COMPARISON_FIGURES["shares"](found)
    assert figure is not None
    (axes,) = figure.axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    bars = {}
    for lines in axes.collections:
        for (x, low), (other, high) in lines.get_segments():
            if x == other:
                bars.setdefault(names[round((low + high) / 2)], set()).add(round(x, 6))
    assert bars["norms, plain"] == {round(2 / 7, 6)}
    assert bars["per latent"] == {round(sum(1 / n for n in range(1, 7)) / 6, 6)}
    assert "exact block share" not in bars  # its null is not among these results


def test_two_coders_of_one_model_are_said_to_be_so() -> None:
    same = compare_results([made_up.results()], [made_up.results()])
    assert "Both are coders of tiny-llava" in " ".join(same.notes)
    text = made_up.results()
    coder = {**text.provenance["coder"], "model": "tiny-llama"}
    other = replace(text, provenance={**text.provenance, "coder": coder})
    assert "Both are" not in " ".join(compare_results([other], [made_up.results()]).notes)


def test_different_depth_is_compared_and_said(tmp_path: Path) -> None:
    found = compare_results([made_up.results(4)], [made_up.results(6)])
    write_figures({"decay_curves": COMPARISON_FIGURES["decay_curves"]}, found, tmp_path)
    write_markdown(build_comparison(found), {}, tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    assert "The coders have 4 and 6 layers" in text
    relative = [r["relative_distance"] for r in found.tables["curves"].where(side="text").rows()]
    assert max(relative) == 1.0


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(UserError, match=r"--vlm: coders of 4 and 6 layers are not seeds"):
        compare_results([made_up.results()], [made_up.results(4), made_up.results(6)])
    with pytest.raises(UserError, match="no experiment in common"):
        compare_results([made_up.results(data=False)], [made_up.results()], ["ablation"])
