"""Coders with known answers: every statistic is its closed form, and re-gauging moves none of those
that are said to be free of it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from made_coders import D_MODEL, LATENTS, coder, measured, regauged

from sparsify_vlm.analysis.activity import activity
from sparsify_vlm.analysis.distance import distance
from sparsify_vlm.analysis.features import features
from sparsify_vlm.analysis.tokens import GROUPS, TokenBatch
from sparsify_vlm.analysis.weights import weights
from sparsify_vlm.errors import UserError

L = 6
SIGMA = [0.5, 1.0, 2.0, 3.0, 0.7, 5.0]
LATENT = torch.arange(LATENTS, dtype=torch.float64)


def value(experiment, name: str) -> float:
    return experiment.estimates[name].value


def uneven(s: int, t: int) -> torch.Tensor:
    """Latents of one layer spread their mass differently, and are of different size."""
    return (1 + LATENT / 7) * 2.0 ** (-(t - s) / (1 + LATENT % 5 + LATENT / 50)) * (1 + 0.3 * s)


def test_all_mass_on_the_own_layer():
    clt = coder(L, lambda s, t: float(s == t))
    w, f = weights(clt, SIGMA), features(clt, SIGMA)
    for name in ("mean_norm", "squared_norm"):
        for variant in ("", ".scaled", ".corrected"):
            assert value(w, f"same_layer_share_{name}{variant}") == pytest.approx(1)
    assert value(w, "same_layer_share_per_latent.corrected") == pytest.approx(1)
    assert value(w, "mean_norm_cross") == 0
    assert value(f, "mean_cross_score") == pytest.approx(0, abs=1e-12)
    assert value(f, "mean_effective_targets") == pytest.approx(1)
    assert value(f, "mean_reach") == pytest.approx(0, abs=1e-12)
    assert value(f, "mean_own_cosine") is None  # nothing is written elsewhere


def test_equal_mass_gives_the_uniform_null():
    clt = coder(L, lambda s, t: 0.3)
    w, f = weights(clt), features(clt)
    null = 2 / (L + 1)
    assert value(w, "uniform_null") == pytest.approx(null)
    for name in ("mean_norm", "squared_norm", "mean_norm.corrected", "squared_norm.corrected"):
        assert value(w, f"same_layer_share_{name}") == pytest.approx(null)
    harmonic = sum(1 / (L - s) for s in range(L)) / L
    assert value(w, "same_layer_share_per_latent") == pytest.approx(harmonic)
    assert value(w, "uniform_null.per_latent") == pytest.approx(harmonic)
    assert value(f, "mean_cross_score") == pytest.approx(1 - harmonic)
    assert value(f, "mean_cross_score.uniform") == pytest.approx(1 - harmonic)
    assert value(f, "mean_effective_targets") == pytest.approx((L + 1) / 2)
    assert value(f, "mean_effective_targets.uniform") == pytest.approx((L + 1) / 2)
    assert value(f, "mean_reach") == pytest.approx(sum((L - s - 1) / 2 for s in range(L)) / L)


def test_targets_of_different_scale():
    """Norms that follow the targets' scale are equal mass once they are divided by it."""
    clt = coder(L, lambda s, t: SIGMA[t])
    w, f = weights(clt, SIGMA), features(clt, SIGMA)
    null = 2 / (L + 1)
    for variant in ("scaled", "corrected"):
        assert value(w, f"same_layer_share_mean_norm.{variant}") == pytest.approx(null)
        assert value(w, f"same_layer_share_squared_norm.{variant}") == pytest.approx(null)
        assert value(w, f"mean_norm_same.{variant}") == pytest.approx(1)
        assert value(w, f"mean_norm_cross.{variant}") == pytest.approx(1)
    own = sum(SIGMA) / sum(SIGMA[t] * (t + 1) for t in range(L))
    assert value(w, "same_layer_share_mean_norm") == pytest.approx(own)
    squares = sum(a**2 for a in SIGMA) / sum(SIGMA[t] ** 2 * (t + 1) for t in range(L))
    assert value(w, "same_layer_share_squared_norm") == pytest.approx(squares)
    assert value(f, "mean_effective_targets") == pytest.approx((L + 1) / 2)
    assert value(features(clt), "mean_effective_targets") < (L + 1) / 2 - 0.1


def test_the_published_share():
    """Means of 0.378 per own and 0.125 per cross-layer connection of 26 layers: 19.5 %."""
    clt = coder(26, lambda s, t: 0.378 if s == t else 0.125)
    w = weights(clt, resamples=100)
    assert value(w, "same_layer_share_mean_norm") == pytest.approx(0.195, abs=5e-4)
    assert value(w, "mean_norm_same") == pytest.approx(0.378)
    assert value(w, "mean_norm_cross") == pytest.approx(0.125)
    assert value(w, "uniform_null") == pytest.approx(2 / 27)


def test_planted_latents_are_found():
    """Three latents of layer 1 write across layers, the others to their own; C = 1 − p(own)."""
    planted = {3: 2.0, 7: 1.0, 20: 0.5}

    def norm(s: int, t: int) -> torch.Tensor:
        sizes = torch.full((LATENTS,), 1.0 if s == t else 0.01)
        for latent, size in planted.items() if s == 1 and t == 4 else ():
            sizes[latent] = size
        return sizes

    found = features(coder(L, norm), top=4, labels={(1, 7): "bridges"})
    rows = found.tables["top_features"].where(source=1).rows()
    assert [row["latent"] for row in rows[:3]] == [3, 7, 20]
    for row in rows[:3]:
        far, near = planted[row["latent"]] ** 2, 1 + 3 * 0.01**2  # of layer 1: 1, then 2, 3, 5
        assert row["score"] == pytest.approx(1 - 1 / (far + near))
        reach = (3 * far + 0.01**2 * (1 + 2 + 4)) / (far + near)
        assert row["reach"] == pytest.approx(reach)
        entropy = 0.0
        for part in (1, far, *3 * [0.01**2]):
            entropy -= part / (far + near) * math.log(part / (far + near))
        assert row["effective_targets"] == pytest.approx(math.exp(entropy))
    assert [row["label"] for row in rows[:3]] == [None, "bridges", None]
    assert not found.tables["top_features"].where(source=L - 1).rows()  # nothing to rank there


def test_cosines():
    clt = coder(4, lambda s, t: 1.0)
    with torch.no_grad():
        for s in range(4):
            for k in range(1, 4 - s):
                sign = -1 if (s + k) == 3 else 1
                clt.W_dec[s][k].copy_(sign * (s + k) * clt.W_dec[s][0])
    # own cosines of layer 0: (1 + 1 − 1) / 3, of layer 1: (1 − 1) / 2, of layer 2: −1
    found = features(clt)
    by_layer = found.tables["per_latent_by_layer"]["mean_own_cosine"]
    assert by_layer[:3] == pytest.approx([1 / 3, 0, -1])
    assert by_layer[3] is None
    assert value(found, "mean_own_cosine") == pytest.approx((1 / 3 - 1) / 3)


def test_histograms_count_every_latent():
    clt = coder(L, lambda s, t: 1.0 if s == t else 0.5 if t == s + 1 else 0.0)
    w, f = weights(clt), features(clt)
    counts = w.tables["weight_distribution"].where(source=0, variant="corrected")
    assert dict(zip(counts["bin"], counts["count"], strict=True))[0.8] == LATENTS  # 1 / 1.25
    assert sum(counts["count"]) == LATENTS
    scores = f.tables["score_distribution"].where(source=0)
    assert dict(zip(scores["bin"], scores["count"], strict=True))[0.2] == LATENTS


@pytest.mark.parametrize("offset", [0, 1])
def test_regauging(offset):
    clt = coder(L, uneven, target_offset=offset)
    other = regauged(clt)
    data = measured(clt)
    again = measured(other)
    with_data = {
        "weights": (weights(clt, activity=data), weights(other, activity=again)),
        "features": (features(clt, activity=data), features(other, activity=again)),
    }
    for before, after in with_data.values():
        moved = {
            name
            for name, estimate in before.estimates.items()
            if estimate.value is not None
            and after.estimates[name].value != pytest.approx(estimate.value, rel=1e-6)
        }
        norms = ("same_layer_share_mean_norm", "same_layer_share_squared_norm", "mean_norm_same")
        depends = {
            f"{name}{end}" for name in (*norms, "mean_norm_cross") for end in ("", ".scaled")
        }
        assert moved == (depends & set(before.estimates))
    top, same = (found.tables["top_features"] for found in with_data["features"])
    assert top["latent"] == same["latent"]
    for name in ("score", "effective_targets", "reach", "own_cosine", "energy"):
        kept = [a for a in top[name] if a is not None]
        assert kept == pytest.approx([a for a in same[name] if a is not None], rel=1e-6)
    heat, warm = (
        found.tables["weight_heatmap"].where(variant="corrected") for found in with_data["weights"]
    )
    for name in ("mean_norm", "squared_share", "energy_share", "block_share"):
        assert heat[name] == pytest.approx(warm[name], rel=1e-6)


HAND_MADE = {
    "own layer": lambda s, t: float(s == t),
    "equal mass": lambda s, t: 0.3,
    "decay": lambda s, t: 2.0 ** (-(t - s) / 3),
    "planted": lambda s, t: torch.where((LATENT % 9).eq(s), 2.0, 1.0 if s == t else 0.01),
    "target scale": lambda s, t: SIGMA[t],
}


@pytest.mark.parametrize("norm", HAND_MADE.values(), ids=HAND_MADE)
def test_regauged_copies_of_the_hand_made_coders(norm):
    clt = coder(L, norm)
    other = regauged(clt)
    for experiment in (weights, features, distance):
        before, after = (experiment(one, SIGMA, resamples=50) for one in (clt, other))
        for name, estimate in before.estimates.items():
            if experiment is features or ".corrected" in name or "per_latent" in name:
                expected = [v for v in (estimate.value,) if v is not None]
                found = [v for v in (after.estimates[name].value,) if v is not None]
                assert found == pytest.approx(expected, rel=1e-6, abs=1e-9), name
        if experiment is weights:
            moved = value(after, "mean_norm_same") / value(before, "mean_norm_same")
            assert abs(moved - 1) > 0.1


def test_energy_and_block_shares_by_definition():
    clt = coder(L, uneven)
    data = measured(clt)
    w = weights(clt, activity=data)
    for role, name in (("all", ""), ("image", ".image"), ("text", ".text")):
        own = total = 0.0
        for s in range(L):
            for k, t in enumerate(clt.cfg.targets(s)):
                squares = (clt.W_dec[s][k].detach() ** 2).sum(1)
                energy = float((data.energy[role][s] * squares).sum() / data.sigma[t] ** 2)
                total += energy
                own += energy * (k == 0)
        assert value(w, f"energy_share_same{name}") == pytest.approx(own / total)
        diagonal = data.block_share[role].diagonal()
        assert value(w, f"block_share_same{name}") == pytest.approx(float(diagonal.mean()))
        f = features(clt, activity=data)
        weighting = "energy" if role == "all" else role
        assert value(f, f"mean_cross_score.{weighting}") == pytest.approx(1 - own / total)
    assert "energy_share_same.text_only" not in w.estimates  # no such tokens
    heat = w.tables["weight_heatmap"].where(variant="plain")
    assert sum(heat["energy_share"]) == pytest.approx(1)
    assert sum(heat["squared_share"]) == pytest.approx(1)
    into_last = [r["block_share"] for r in heat.rows() if r["target"] == L - 1]
    assert sum(into_last) == pytest.approx(1)


@pytest.mark.parametrize("offset", [0, 1])
@torch.no_grad()
def test_with_activity_measured_on_tokens(offset):
    """Of one image and one text-only sample: energy shares by role, from the tokens themselves."""
    clt = coder(L, uneven, target_offset=offset)
    group = torch.tensor([GROUPS.index("image")] * 5 + [GROUPS.index("text_only")] * 4)
    x = torch.randn(L, 9, D_MODEL, dtype=torch.float64)
    y = 1 + torch.randn(L, 9, D_MODEL, dtype=torch.float64)
    sample = torch.tensor([0] * 5 + [1] * 4)
    batch = TokenBatch(x, y, group.to(torch.uint8), sample, torch.arange(2))
    on_tokens = activity(clt, [batch])
    sigma2 = (y - y.mean(1, keepdim=True)).square().sum(2).mean(1)
    for role, rows in (("", slice(None)), (".image", slice(0, 5)), (".text_only", slice(5, 9))):
        own = total = 0.0
        for s in clt.cfg.source_layers():
            active = torch.relu(x[s, rows] @ clt.W_enc[s].T + clt.b_enc[s])
            for k, t in enumerate(clt.cfg.targets(s)):
                written = active[:, :, None] * clt.W_dec[s][k]  # [tokens, F, d]
                energy = float(written.square().sum() / len(active) / sigma2[t])
                total += energy
                own += energy * (k == 0)
        found = weights(clt, activity=on_tokens, resamples=50)
        assert value(found, f"energy_share_same{role}") == pytest.approx(own / total)
        assert f"block_share_same{role}" in found.estimates
    assert "energy_share_same.text" not in found.estimates
    assert value(features(clt, activity=on_tokens), "mean_cross_score.image") is not None
    assert distance(clt, activity=on_tokens, resamples=50).estimates["half_life.corrected.energy"]


def test_the_dead_are_left_out_and_counted():
    """Half of the latents write to their own layer only and never fire: they do not count."""

    def norm(s: int, t: int) -> torch.Tensor:
        return torch.where(LATENT % 2 == 0, 1.0, float(s == t))

    clt = coder(L, norm)
    data = measured(clt)
    for role in data.energy:
        data.energy[role][:, 1::2] = 0
        data.frequency[role][:, 1::2] = 0
    ones = replace(data, sigma=torch.ones(L))
    w, f = weights(clt, activity=ones), features(clt, activity=ones)
    assert value(w, "dead_share") == value(f, "dead_share") == 0.5
    assert value(w, "same_layer_share_squared_norm") == pytest.approx(2 / (L + 1))
    assert value(f, "mean_effective_targets") == pytest.approx((L + 1) / 2)
    assert all(row["latent"] % 2 == 0 for row in f.tables["top_features"].rows())
    assert f"{L * LATENTS // 2} of {L * LATENTS} latents are dead and left out." in w.notes
    assert f.tables["per_latent_by_layer"]["dead"] == [LATENTS // 2] * L


def test_without_data_the_dead_are_those_without_a_decoder():
    clt = coder(L, lambda s, t: torch.where(LATENT < 4, 0.0, 1.0))
    w, f = weights(clt), features(clt)
    assert value(f, "dead_share") == pytest.approx(4 / LATENTS)
    assert value(w, "mean_norm_same") == pytest.approx(1)
    assert "scaled" not in {row["variant"] for row in w.tables["weight_heatmap"].rows()}
    assert any("No data" in note for note in w.notes)


def test_a_layer_whose_latents_are_all_dead():
    clt = coder(4, lambda s, t: float(s != 1))
    w, f = weights(clt), features(clt)
    assert value(w, "mean_norm_same") == pytest.approx(1)
    assert w.tables["weight_heatmap"].where(source=1, target=1)["mean_norm"] == [None, None]
    assert f.tables["per_latent_by_layer"].where(source=1)["mean_score"] == [None]


def test_per_layer_transcoders_have_nothing_across():
    clt = coder(L, lambda s, t: 1.0, n_targets=1)
    w, f = weights(clt, SIGMA), features(clt, SIGMA)
    assert value(w, "same_layer_share_mean_norm") == pytest.approx(1)
    assert value(w, "uniform_null") == 1
    assert value(w, "mean_norm_cross") is None
    assert value(f, "mean_cross_score") == 0
    assert len(f.tables["top_features"]) == 0
    assert any("one layer only" in note for note in w.notes)


def test_fewer_targets_and_an_offset():
    """Two targets per coder, from the next layer on: 5 coders with 2, 2, 2, 2, 1 targets."""
    clt = coder(L, lambda s, t: 3.0 if t == s + 1 else 1.0, n_targets=2, target_offset=1)
    w, f = weights(clt), features(clt)
    assert value(w, "uniform_null") == pytest.approx(5 / 9)
    assert value(w, "same_layer_share_mean_norm") == pytest.approx(15 / 19)
    assert value(w, "same_layer_share_squared_norm") == pytest.approx(45 / 49)
    assert value(f, "mean_reach") == pytest.approx((4 * (0.9 + 2 * 0.1) + 1) / 5)
    pairs = w.tables["weight_heatmap"].where(variant="plain")
    assert list(zip(pairs["source"], pairs["target"], strict=True))[:3] == [(0, 1), (0, 2), (1, 2)]
    assert any("own" in note for note in w.notes)


def test_data_of_another_coder_is_refused():
    clt, other = coder(L, uneven), coder(4, uneven)
    with pytest.raises(UserError, match="4 layers of 24 latents, this coder has 6"):
        weights(clt, activity=measured(other))
    with pytest.raises(UserError, match="3 scales of targets for 6 layers"):
        weights(clt, sigma=[1.0, 1.0, 1.0])
    with pytest.raises(UserError, match=r"layers\.2\.mlp: y has no finite variance"):
        features(clt, sigma=[1.0, 1.0, 0.0, 1.0, 1.0, 1.0])


def test_a_coder_of_one_layer():
    clt = coder(1, lambda s, t: 1.0)
    w = weights(clt)
    assert value(w, "same_layer_share_mean_norm") == pytest.approx(1)
    assert w.estimates["same_layer_share_mean_norm"].low is None
    assert features(clt).tables["per_latent_by_layer"]["live"] == [LATENTS]
