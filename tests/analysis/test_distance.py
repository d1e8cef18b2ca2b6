"""Decay of known form is found again, and published means give what was published."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from made_coders import LATENTS, coder, measured, regauged

from sparsify_vlm.analysis.distance import distance, distance_from_means

L = 12
LATENT = torch.arange(LATENTS, dtype=torch.float64)
PUBLISHED = ([0, 1, 5, 10, 25], [0.378, 0.196, 0.130, 0.108, 0.046])


def decays(s: int, t: int) -> torch.Tensor:
    """2^(−Δ/3), with latents and layers of different size."""
    return (1 + LATENT / 7) * (1 + 0.2 * s) * 2.0 ** (-(t - s) / 3)


def whole(experiment, **where) -> dict[str, dict]:
    """Fits over the whole range, by form."""
    rows = experiment.tables["fits"].where(scope="whole", weighting="latents", role="all", **where)
    return {row["model"]: row for row in rows.rows()}


def test_exact_decay():
    """A sum over layers of different size is no pure exponential; the balanced panel's is."""
    found = distance(coder(L, decays), resamples=60)
    for name in ("decay_factor_0_5.balanced", "decay_factor_0_5.corrected.balanced"):
        assert found.estimates[name].value == pytest.approx(2 ** (-5 / 3))
        assert found.estimates[name].low == pytest.approx(2 ** (-5 / 3))
    assert found.estimates["decay_factor_0_1.balanced"].value == pytest.approx(2 ** (-1 / 3))
    fits = whole(found, variant="corrected", panel="balanced")
    row = fits["exponential"]
    assert row["half_life"] == pytest.approx(3, rel=1e-6)
    assert (row["half_life_low"], row["half_life_high"]) == pytest.approx((3, 3), rel=1e-6)
    assert row["held_out_error"] < 1e-6 * fits["power"]["held_out_error"]
    assert fits["power"]["behind_best_low"] > 0.05
    assert fits["exponential+floor"]["floor"] == pytest.approx(0, abs=1e-8)
    assert found.estimates["half_life.corrected.balanced"].value == pytest.approx(3, rel=1e-6)
    notes = [note for note in found.notes if note.startswith("corrected norms, balanced")]
    assert any("exponential is closest" in note for note in notes)
    assert not any("not identifiable" in note for note in notes)


def test_panels():
    """Of all sources only the first reach far: their mean bends where no single one does."""
    clt = coder(L, lambda s, t: (1 + s) * 2.0 ** (-(t - s) / 3))
    found = distance(clt, resamples=60)
    table = found.tables["distance_decay"]
    every = table.where(variant="plain", weighting="latents", role="all", panel="all")
    assert every["distance"] == list(range(L))
    assert every["sources"] == list(range(L, 0, -1))
    expected = [np.mean([1 + s for s in range(L - d)]) * 2 ** (-d / 3) for d in range(L)]
    assert every["mean"] == pytest.approx(expected)
    factor = np.mean(range(1, L - 4)) / np.mean(range(1, L + 1)) * 2 ** (-5 / 3)
    assert found.estimates["decay_factor_0_5"].value == pytest.approx(factor)
    assert found.estimates["decay_factor_0_5.balanced"].value == pytest.approx(2 ** (-5 / 3))
    balanced = table.where(variant="plain", weighting="latents", role="all", panel="balanced")
    assert balanced["distance"] == list(range(7))  # the 6 first of 11 coders have 7 targets or more
    assert balanced["sources"] == [6] * 7
    assert balanced["mean"] == pytest.approx([3.5 * 2 ** (-d / 3) for d in range(7)])


def test_interval_is_over_sources():
    """Means over four sources at distance 0, sizes 1 … 4: 2.5, within the least and the largest."""
    found = distance(coder(4, lambda s, t: 1.0 + s), resamples=1000)
    first = found.tables["distance_decay"].where(
        distance=0, variant="plain", panel="all", weighting="latents", role="all"
    )
    assert first["mean"] == pytest.approx([2.5])
    assert 1 <= first["low"][0] < 1.5
    assert 3.5 < first["high"][0] <= 4


def test_patterns_of_single_layers():
    found = distance(coder(L, decays), resamples=60)
    heat = found.tables["detailed_heatmap"].where(variant="plain", source=2)
    mean = float((1 + LATENT / 7).mean()) * 1.4
    assert heat["distance"] == list(range(L - 2))
    assert heat["mean"] == pytest.approx([mean * 2 ** (-d / 3) for d in range(L - 2)])
    pattern = found.tables["per_layer_patterns"].where(variant="plain", source=2)
    assert pattern["mean"] == pytest.approx([2 ** (-d / 3) for d in range(L - 2)])


@pytest.mark.parametrize(("n_targets", "offset"), [(L, 0), (4, 1)])
def test_regauging(n_targets, offset):
    def norm(s: int, t: int) -> torch.Tensor:
        return (1 + LATENT / 7) * 2.0 ** (-(t - s) / (1 + LATENT % 5)) * (1 + 0.3 * s)

    clt = coder(L, norm, n_targets=n_targets, target_offset=offset)
    other = regauged(clt)
    before = distance(clt, activity=measured(clt), resamples=60)
    after = distance(other, activity=measured(other), resamples=60)
    moved = set()
    for a, b in zip(
        before.tables["distance_decay"].rows(), after.tables["distance_decay"].rows(), strict=True
    ):
        if a["mean"] is not None and b["mean"] != pytest.approx(a["mean"], rel=1e-6):
            moved.add((a["variant"], a["weighting"]))
    assert moved == {("plain", "latents"), ("scaled", "latents")}
    for name, estimate in before.estimates.items():
        if estimate.value is None:
            continue
        same = after.estimates[name].value == pytest.approx(estimate.value, rel=1e-6)
        free = ".corrected" in name or ".energy" in name
        assert same or not free, name
        assert free or not same, name
    roles = {(row["weighting"], row["role"]) for row in before.tables["distance_decay"].rows()}
    assert roles == {(w, r) for w in ("latents", "energy") for r in ("all", "image", "text")}


def test_energy_and_scale_by_definition():
    clt = coder(4, lambda s, t: (1 + LATENT) / (1 + t - s))
    activity = measured(clt)
    found = distance(clt, activity=activity, resamples=60)
    table = found.tables["distance_decay"]
    for role in ("all", "image"):
        expected = []
        for s in range(3):
            squares = (clt.W_dec[s][1].detach() ** 2).sum(1) / activity.sigma[s + 1] ** 2
            expected.append(float((activity.energy[role][s] * squares).mean().sqrt()))
        row = table.where(
            distance=1, variant="corrected", weighting="energy", role=role, panel="all"
        )
        assert row["mean"] == pytest.approx([np.mean(expected)])
    scaled = table.where(distance=1, variant="scaled", weighting="latents", role="all", panel="all")
    norms = [float((1 + LATENT).mean() / 2 / activity.sigma[s + 1]) for s in range(3)]
    assert scaled["mean"] == pytest.approx([np.mean(norms)])


def test_all_mass_on_the_own_layer():
    found = distance(coder(L, lambda s, t: float(s == t)), resamples=60)
    assert found.estimates["decay_factor_0_5"].value == 0
    assert found.estimates["half_life"].value is None
    assert all(row["half_life"] is None for row in whole(found).values())


def test_equal_mass_does_not_fall():
    found = distance(coder(L, lambda s, t: 1.0), resamples=60)
    assert found.estimates["decay_factor_0_5"].value == pytest.approx(1)
    assert found.estimates["half_life"].value is None
    assert any("does not fall" in note for note in found.notes)


def test_per_layer_transcoders():
    found = distance(coder(L, lambda s, t: 1.0, n_targets=1), resamples=60)
    assert found.tables["distance_decay"].where(panel="all")["distance"] == [0, 0]
    assert len(found.tables["fits"]) == 0
    assert found.estimates["decay_factor_0_1"].value is None
    assert any("one layer only" in note for note in found.notes)


def test_two_layers():
    found = distance(coder(2, lambda s, t: 1.0 if s == t else 0.5), resamples=60)
    assert found.estimates["decay_factor_0_1"].value == pytest.approx(0.5)
    assert found.estimates["decay_factor_0_5"].value is None


def test_published_means():
    """Norms at 0, 1, 5, 10, 25: 0.34 for 0 → 5; half-lives of 7 to 14 layers by range."""
    found = distance_from_means(*PUBLISHED)
    assert found.estimates["decay_factor_0_5"].value == pytest.approx(0.34, abs=0.005)
    assert found.estimates["decay_factor_0_1"].value == pytest.approx(0.196 / 0.378)
    parts = found.tables["fits"].where(scope="part").rows()
    half_lives = {(r["range_from"], r["range_to"]): r["half_life"] for r in parts}
    assert half_lives[1, 5] == pytest.approx(4 * math.log(2) / math.log(0.196 / 0.130))
    assert half_lives[10, 25] == pytest.approx(15 * math.log(2) / math.log(0.108 / 0.046))
    assert round(min(half_lives.values())) == 7
    assert round(max(half_lives.values())) == 14
    assert any("one half-life is not identifiable" in note for note in found.notes)
    assert any("6.8 layers" in note and "13.8 layers" in note for note in found.notes)
    fits = whole(found)
    assert fits["exponential"]["half_life_low"] < 5 < fits["exponential"]["half_life_high"]
    assert (
        fits["power"]["exponent_low"] < fits["power"]["exponent"] < fits["power"]["exponent_high"]
    )
    assert fits["power"]["error"] < fits["exponential"]["error"]


def test_means_of_one_half_life_raise_no_warning():
    x = np.array([0, 1, 5, 10, 25])
    found = distance_from_means(x, 0.4 * 2 ** (-x / 6))
    assert found.estimates["half_life"].value == pytest.approx(6, rel=1e-6)
    assert not any("not identifiable" in note for note in found.notes)


def test_means_must_be_a_curve():
    with pytest.raises(ValueError, match="ascending"):
        distance_from_means([0, 5, 1], [1.0, 0.5, 0.4])
    with pytest.raises(ValueError, match="ascending"):
        distance_from_means([0, 1], [1.0])
