"""Each rule by which a number becomes a sentence: effect up, down, none, unknown, undefined."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from sparsify_vlm.analysis.tables import Estimate
from sparsify_vlm.report.analysis import sentences
from sparsify_vlm.report.analysis.wording import (
    in_points,
    interval,
    listed,
    number,
    percent,
    verdict,
)

UP = Estimate(0.3, 0.2, 0.4)
DOWN = Estimate(-0.3, -0.4, -0.2)
FLAT = Estimate(0.1, -0.1, 0.3)
BARE = Estimate(0.3)
CASES = {"up": UP, "down": DOWN, "none": FLAT, "unknown": BARE, "undefined": Estimate(None)}
CLAIMS = re.compile(
    r"\b(more|less|rises?|falls?|higher|lower|worse|better|larger|smaller|grow|costs)\b"
)


def shifted(e: Estimate, by: float) -> Estimate:
    ends = [None if v is None else v + by for v in (e.value, e.low, e.high)]
    return Estimate(*ends)


def case(name: str, null: float = 0.0) -> Estimate:
    return shifted(CASES[name], null)


@pytest.mark.parametrize(
    ("estimate", "null", "expected"),
    [
        (UP, 0.0, "above"),
        (DOWN, 0.0, "below"),
        (FLAT, 0.0, "none"),
        (Estimate(0.1, 0.0, 0.2), 0.0, "none"),  # an end on the null is no evidence
        (BARE, 0.0, "unknown"),
        (Estimate(0.1, None, 0.2), 0.0, "unknown"),
        (Estimate(None), 0.0, "undefined"),
        (None, 0.0, "undefined"),
        (UP, 0.5, "below"),
        (UP, 0.25, "none"),
    ],
)
def test_verdict(estimate: Estimate | None, null: float, expected: str) -> None:
    assert verdict(estimate, null) == expected


RULES: Mapping[str, tuple[Callable[[Estimate], str], float, Mapping[str, str]]] = {
    "own_share": (
        lambda e: sentences.own_share("Of it", e, 0.5),
        0.5,
        {"up": "more than the 50.0 %", "down": "less than the 50.0 %", "none": "no evidence"},
    ),
    "ablated": (
        lambda e: sentences.ablated("With none", Estimate(0.2), Estimate(0.5), e),
        0.0,
        {"up": "rises from 20.0 % to 50.0 %", "down": "falls", "none": "no evidence that FVU"},
    ),
    "loss": (
        lambda e: sentences.loss("So", e),
        0.0,
        {"up": "is higher by 0.300", "down": "is lower by -0.300", "none": "no evidence"},
    ),
    "refitted": (
        sentences.refitted,
        0.0,
        {"up": "was not made up", "down": "better than the full CLT", "none": "no evidence"},
    ),
    "beside_random": (
        sentences.beside_random,
        0.0,
        {"up": "at random costs less", "down": "at random costs more", "none": "no evidence"},
    ),
    "beside_plt": (
        sentences.beside_plt,
        0.0,
        {"up": "worse than the CLT, by", "down": "what the cut costs", "none": "no evidence"},
    ),
    "cut_beside_plt": (
        sentences.cut_beside_plt,
        0.0,
        {"up": "costs more than", "down": "costs less than", "none": "no evidence"},
    ),
    "direction": (
        sentences.direction,
        0.0,
        {"up": "partly the way", "down": "partly against", "none": "no evidence"},
    ),
    "score_tells": (
        sentences.score_tells,
        0.0,
        {"up": "do act more", "down": "the weights misleads", "none": "no evidence"},
    ),
    "decay": (
        lambda e: sentences.decay("Norms", 5, e),
        1.0,
        {"up": "grow with distance", "down": "fall with distance", "none": "no evidence"},
    ),
    "roles_differ": (
        lambda e: sentences.roles_differ("The share", "image tokens", "text", e),
        0.0,
        {"up": "is larger on image tokens", "down": "is smaller on image", "none": "no evidence"},
    ),
    "models_differ": (
        lambda e: sentences.models_differ("The share", "1", "2", e, "1"),
        0.0,
        {"up": "is higher in the vision", "down": "is lower in the vision", "none": "no evidence"},
    ),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("effect", ["up", "down", "none"])
def test_an_effect_is_named_as_its_interval_allows(rule: str, effect: str) -> None:
    tell, null, expected = RULES[rule]
    text = tell(case(effect, null))
    assert expected[effect] in text
    others = [words for kind, words in expected.items() if kind != effect]
    assert not any(words in text for words in others)
    assert text.endswith((".", ")"))


@pytest.mark.parametrize("rule", RULES)
def test_without_an_interval_nothing_is_claimed(rule: str) -> None:
    tell, null, expected = RULES[rule]
    text = tell(case("unknown", null))
    assert sentences.NO_CLAIM in text
    assert not any(words in text for words in expected.values())
    assert not CLAIMS.search(text.replace("all layers", "")), text


@pytest.mark.parametrize("rule", RULES)
def test_what_is_undefined_is_not_claimed(rule: str) -> None:
    tell, null, expected = RULES[rule]
    text = tell(case("undefined", null))
    assert text == "" or "undefined" in text
    assert not any(words in text for words in expected.values())


def test_a_refit_worse_than_the_cut_says_nothing() -> None:
    text = sentences.refitted(UP, Estimate(-1.0, -1.5, -0.5))
    assert "too few tokens" in text
    assert "was not made up" not in text
    assert "0 % of the rise" not in text
    assert "(80.0 % of the rise taken away)" in sentences.refitted(UP, Estimate(0.8))


def test_a_coder_no_better_than_the_mean_is_said_to_be_so() -> None:
    assert "FVU 120.0 %" in sentences.no_better_than_the_mean(Estimate(1.2))
    for good in (Estimate(0.9, 0.8, 1.1), Estimate(None), None):
        assert sentences.no_better_than_the_mean(good) == ""


def test_a_refit_is_not_compared_where_it_failed() -> None:
    cut, refit = Estimate(0.4, 0.3, 0.5), Estimate(0.6, 0.5, 0.7)
    text = sentences.worse_than_the_cut(cut, refit, " on image tokens")
    assert "worse on image tokens than the cut" in text
    assert "60.0 [50.0, 70.0] points, by the cut 40.0" in text
    assert sentences.worse_than_the_cut(refit, cut) == ""
    assert sentences.worse_than_the_cut(None, cut) == ""
    assert sentences.worse_than_the_cut(cut, Estimate(None)) == ""


@pytest.mark.parametrize(
    ("plain", "corrected", "words"),
    [
        ("above", "above", "agree"),
        ("below", "below", "agree"),
        ("above", "below", "disagree"),
        (
            "above",
            "none",
            "Only one of the two is evidence about it: plain norms say “more”",
        ),
        ("none", "below", "plain norms say “no evidence”, the gauge-free number “less”"),
        ("none", "none", "Neither"),
    ],
)
def test_plain_beside_corrected(plain: Any, corrected: Any, words: str) -> None:
    assert words in sentences.agreement(plain, corrected, "it")


@pytest.mark.parametrize("missing", ["unknown", "undefined"])
def test_no_agreement_with_what_is_not_known(missing: Any) -> None:
    assert sentences.agreement("above", missing, "it") == ""
    assert sentences.agreement(missing, "above", "it") == ""


def test_spread() -> None:
    text = sentences.spread(Estimate(2.5, 2.0, 3.0), Estimate(1.0), 4.5)
    assert "2.50 [2.00, 3.00] layers of the 4.50 open to it" in text
    assert "mean distance of 1.00 layers" in text
    assert sentences.spread(Estimate(None), None, None) == ""


def test_numbers_as_text() -> None:
    assert [percent(v) for v in (0.195, 0.0012, 0.0, -0.04, None)] == [
        *("19.5 %", "0.12 %", "0 %", "-4.0 %", "undefined")
    ]
    small = (0.008, 0.0095, 0.00948, 0.00996, 0.0105)
    assert [percent(v) for v in small] == ["0.80 %", "0.95 %", "0.95 %", "1.0 %", "1.1 %"]
    assert [number(v) for v in (0.344, 0.0, 12.345, 0.00051, 123456.0, None)] == [
        *("0.344", "0.000", "12.35", "0.00051", "1.23e+05", "undefined")
    ]
    assert interval(Estimate(0.15, 0.1, 0.2), percent) == "15.0 % [10.0, 20.0]"
    assert interval(Estimate(0.15), percent) == "15.0 %"
    assert in_points(Estimate(-0.15, -0.2, -0.1)) == "-15.0 [-20.0, -10.0] points"
    assert in_points(None) == "undefined"
    assert listed(["a", "b", "c"]) == "a, b and c"
