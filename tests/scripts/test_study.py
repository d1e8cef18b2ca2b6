"""The study's steps, its recipes, and the page: sentences that say what the intervals allow."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from PIL import Image

from sparsify_vlm.analysis.results import Results
from sparsify_vlm.analysis.tables import Estimate

ROOT = Path(__file__).parents[2]
CUT, FVU = "fvu_difference.same_only", "fvu.full"


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    folders = [str(ROOT / "scripts"), str(ROOT / "tests" / "report")]
    sys.path[:0] = folders
    try:
        names = ("study", "study_page", "study_claims", "study_rows", "made_up_analysis")
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        for folder in folders:
            sys.path.remove(folder)


def changed(results: Results, values: dict[str, float]) -> Results:
    """The same with other values of some of the ablation's estimates."""
    ablation = results.experiments["ablation"]
    estimates = dict(ablation.estimates) | {n: Estimate(v) for n, v in values.items()}
    experiments = dict(results.experiments)
    experiments["ablation"] = replace(ablation, estimates=estimates)
    return replace(results, experiments=experiments)


def groups(
    script: Any, warm_cut: list[float], llm_cut: list[float], vlm_warm: list[float] | None = None
) -> Any:
    """Three seeds of each; only the cost of the cut differs between the groups."""
    base = script.made_up_analysis.results()
    cuts = {
        ("llm", "clt"): llm_cut,
        ("vlm", "clt"): [0.40, 0.41, 0.42],
        ("llm", "long"): llm_cut,
        ("vlm", "long"): [0.40, 0.41, 0.42],
        ("llm", "warm"): warm_cut,
        ("vlm", "warm"): vlm_warm or warm_cut,
    }
    return {
        key: [changed(base, {CUT: v, FVU: 0.02 + v / 1000}) for v in values]
        for key, values in cuts.items()
    }


def claims(script: Any, **cuts: list[float]) -> list[str]:
    found = groups(script, **cuts)
    compared = {
        arm: script.study_page.compare_results(found["llm", arm], found["vlm", arm])
        for arm in script.study_rows.ARMS
    }
    said = script.study_claims
    return [*said.in_short(found, compared), *said.one_by_one(found, compared)]


def test_recipes_differ_in_the_activations_only() -> None:
    llm, vlm = (
        yaml.safe_load((ROOT / "configs" / f"study_{name}.yaml").read_text())
        for name in ("llm", "vlm")
    )
    different = {key for key in llm.keys() | vlm.keys() if llm.get(key) != vlm.get(key)}
    assert different == {"activations", "run_name"}
    train, heldout = (
        yaml.safe_load((ROOT / "configs" / f"study_{name}.yaml").read_text())["streams"]
        for name in ("mix", "heldout")
    )
    assert [stream | {"split": "heldout"} for stream in train] == heldout


@pytest.mark.parametrize(
    ("warm_cut", "words"),
    [
        ([0.10, 0.11, 0.12], "The same cut costs less"),
        ([0.70, 0.71, 0.73], "The same cut costs more"),
        ([0.20, 0.41, 0.60], "there is no evidence that the cut costs"),
    ],
)
def test_what_training_changes(script: Any, warm_cut: list[float], words: str) -> None:
    said = claims(script, warm_cut=warm_cut, llm_cut=[0.40, 0.41, 0.42])
    assert sum(words in sentence for sentence in said) == 2  # one of each model


LESS, MORE = [0.10, 0.11, 0.12], [0.80, 0.81, 0.82]
SAME, WIDE = [0.40, 0.41, 0.42], [0.20, 0.41, 0.62]


@pytest.mark.parametrize(
    ("llm_cut", "llm_warm", "words"),
    [
        (LESS, LESS, "is higher in tiny-llava than in tiny-llama in all kinds of CLTs"),
        (MORE, MORE, "is lower in tiny-llava than in tiny-llama in all kinds of CLTs"),
        (
            LESS,
            MORE,
            "is in some CLTs higher, in others lower in tiny-llava than in tiny-llama, by how",
        ),
        (WIDE, WIDE, "is not known to be higher or lower in tiny-llava"),
        (WIDE, LESS, "is higher in tiny-llava than in tiny-llama in CLTs started from per-layer"),
    ],
)
def test_what_differs_between_the_models(
    script: Any, llm_cut: list[float], llm_warm: list[float], words: str
) -> None:
    """A difference that turns with the training of the coders is told as such."""
    said = claims(script, warm_cut=llm_warm, llm_cut=llm_cut, vlm_warm=SAME)
    [sentence] = [s for s in said if s.startswith("The FVU added by zeroing")]
    assert words in sentence
    for name in ("from zero", "from zero, twice as long", "from the PLT"):
        assert f" {name} " in sentence
    [counted] = [s for s in said if s.startswith("Of the ")]
    turned = (llm_cut, llm_warm) == (LESS, MORE)
    assert f"{int(turned)} in one direction or the other" in counted
    assert f"{int('all kinds' in words)} differ in the same direction" in counted


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([0.04, 0.05, 0.06], "more in CLTs"),
        ([-0.04, -0.05, -0.06], "less in CLTs"),
        ([-0.05, 0.0, 0.06], "no evidence of a difference"),
    ],
)
def test_image_tokens_beside_those_of_clip(script: Any, values: list[float], words: str) -> None:
    """Both kinds of text are told, also where they do not agree."""
    difference = script.study_page.over_seeds([Estimate(v) for v in values])
    other = script.study_page.over_seeds([Estimate(v) for v in (0.2, 0.21, 0.22)])
    roles = {"block_share_same": {"image-text_only": difference, "image-text": other}}
    said = script.study_claims.beside_clip({"clt": SimpleNamespace(roles=roles)})
    first, second = said.partition("beside text without image")[2].split("beside text after")
    assert words in first
    assert "more in CLTs trained from zero (21.0 [18.5, 23.5] points)" in second


def test_how_many_differences_chance_would_make(script: Any) -> None:
    """Three ways of training, of which two differ clearly in the one quantity looked at."""
    found = groups(script, SAME, LESS)
    said = script.study_claims.chance(found, [CUT])
    assert "of the 3 differences" in said
    assert "2 have an interval without 0" in said
    assert "about 0 would be expected" in said


def test_page_has_every_number_and_picture(script: Any, tmp_path: Path) -> None:
    found, folders = groups(script, [0.1, 0.12, 0.11], [0.3, 0.3, 0.31]), {}
    for (model, arm), seeds in found.items():
        folders[model, arm] = [tmp_path / f"{model}-{arm}-{n}" for n in range(len(seeds))]
        for folder, results in zip(folders[model, arm], seeds, strict=True):
            results.save(folder)
            (folder / "figures").mkdir()
            Image.new("RGB", (4, 4), "red").save(folder / "figures" / "distance_decay.png")
    comparisons = {arm: tmp_path / f"{arm}.comparison" for arm in ("clt", "warm", "long")}
    for folder in comparisons.values():
        (folder / "figures").mkdir(parents=True)
        Image.new("RGB", (4, 4), "blue").save(folder / "figures" / "shares.png")
    page = tmp_path / "docs" / "study.md"
    script.study_page.write_page(page, comparisons=comparisons, analyses=folders)
    text = page.read_text()
    # seeds .30, .30, .31: mean .30333, standard error .01 / 3, t(2) = 4.303
    assert "30.3 % [28.9, 31.8]" in text
    pictures = {path.name for path in (page.parent / "study").iterdir()}
    assert {"llm_distance_decay.png", "vlm_distance_decay.png", "clt_shares.png"} <= pictures
    for name in ("llm_distance_decay", "clt_shares"):
        assert f"(study/{name}.png)" in text
    assert "undefined" not in text.partition("All arms")[0]


def test_a_step_is_skipped_when_its_result_is_there(script: Any, tmp_path: Path) -> None:
    study = script.study.Study(tmp_path, [0], 1, 1, 1, jobs=1)
    (tmp_path / "coder").mkdir()
    (tmp_path / "coder" / "clt.json").write_text("{}")
    script.study.run(study, tmp_path / "coder", "clt.json", ["no-such-command"])
    assert not (tmp_path / "coder.log").exists()


def test_a_step_that_fails_says_what_it_said(script: Any, tmp_path: Path) -> None:
    study = script.study.Study(tmp_path, [0], 1, 1, 1, jobs=1)
    with pytest.raises(script.study.StepFailed, match=r"coder: error: unknown command.*coder.log"):
        script.study.run(study, tmp_path / "coder", "clt.json", ["no-such-command"])
    assert (tmp_path / "coder.log").read_text().startswith("$ sparsify-vlm no-such-command\n")
