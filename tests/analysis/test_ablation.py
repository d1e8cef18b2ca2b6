"""The arms of the ablation against dense float64 sums over all tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from made_up_tokens import D, F, K, L, MadeUp, array, random_clt, top_activations

from sparsify_vlm.analysis.ablation import Ablated, ablation
from sparsify_vlm.analysis.activity import activity
from sparsify_vlm.analysis.deletion import random_deletion, write_energies
from sparsify_vlm.analysis.role_contrasts import ablation_with_roles
from sparsify_vlm.analysis.tokens import ROLES
from sparsify_vlm.coders import Clt
from sparsify_vlm.errors import UserError
from sparsify_vlm.replacement.measures import LayerSums

Writes = dict[tuple[int, int], np.ndarray]


class Reference:
    """Everything a coder writes, as whole [T, D] tables in float64."""

    def __init__(self, clt: Clt, tokens: MadeUp) -> None:
        self.clt, self.offset = clt, clt.cfg.target_offset
        self.x, self.y = array(tokens.x), array(tokens.y)
        self.acts = {
            s: top_activations(clt, s, self.x[s]) for s in range(L - clt.cfg.target_offset)
        }
        self.latent: Writes = {}
        self.skip: Writes = {}
        for s in self.acts:
            for k, t in enumerate(clt.cfg.targets(s)):
                self.latent[s, t] = self.acts[s] @ array(clt.W_dec[s][k])
                if clt.W_skip is not None:
                    self.skip[s, t] = self.x[s] @ array(clt.W_skip[s][k]).T

    def y_hat(self, t: int, keep: Any, skip: bool = True) -> np.ndarray:
        """ŷ_t from the writes over the distances that `keep` wants."""
        out = np.tile(array(self.clt.b_dec[t]), (self.x.shape[1], 1))
        for (s, target), written in self.latent.items():
            if target == t and keep(t - s):
                out += written
                if skip and (s, t) in self.skip:
                    out += self.skip[s, t]
        return out

    def fvu(self, t: int, y_hat: np.ndarray, chosen: np.ndarray) -> float:
        y = self.y[t][chosen]
        return float(((y - y_hat[chosen]) ** 2).sum() / ((y - y.mean(0)) ** 2).sum())


def fvu_by(found: Ablated, arm: str, role: str) -> list[float]:
    return list(found.tables["fvu_comparison"].where(arm=arm, role=role)["fvu"])


@pytest.mark.parametrize("variant", [{}, {"target_offset": 1}, {"skip_connection": True}], ids=str)
def test_every_arm_that_keeps_some_writes(variant: dict[str, Any]) -> None:
    clt, tokens = random_clt(**variant), MadeUp()
    found = ablation(clt, tokens, reach=[1, 2], refitting=False, draws=1)
    ref, near = Reference(clt, tokens), clt.cfg.target_offset
    every = np.ones(len(tokens.sample), dtype=bool)
    keeps: dict[str, Any] = {
        "full": lambda distance: True,
        "same_only": lambda distance: distance == near,
        "cross_only": lambda distance: distance > near,
        "reach_1": lambda distance: distance <= 1,
        "reach_2": lambda distance: distance <= 2,
    }
    expected = {a: {t: ref.y_hat(t, k) for t in range(near, L)} for a, k in keeps.items()}
    expected["cross_mean"] = {
        t: same + (expected["full"][t] - same).mean(0) for t, same in expected["same_only"].items()
    }
    expected["mean"] = {t: np.tile(ref.y[t].mean(0), (len(every), 1)) for t in range(near, L)}
    expected["zero"] = {t: np.zeros_like(ref.y[t]) for t in range(near, L)}
    if "skip_connection" in variant:
        expected["no_skip"] = {
            t: ref.y_hat(t, lambda distance: True, skip=False) for t in range(near, L)
        }
    arms = set(found.tables["fvu_comparison"]["arm"])
    assert arms == {*expected, "random_deletion"}
    for arm, y_hat in expected.items():
        for role in ROLES:
            chosen = tokens.chosen(role)
            values = [ref.fvu(t, y_hat[t], chosen) for t in y_hat]
            assert fvu_by(found, arm, role) == pytest.approx(values, rel=1e-5), (arm, role)
            end = "" if role == "all" else f".{role}"
            assert found.estimates[f"fvu.{arm}{end}"].value == pytest.approx(np.mean(values))
    full, same = (found.estimates[f"fvu.{arm}"].value for arm in ("full", "same_only"))
    assert full is not None
    assert same is not None
    more = found.estimates["fvu_difference.same_only"]
    assert more.value == pytest.approx(same - full)
    assert found.estimates["fvu_increase.same_only"].value == pytest.approx(same / full - 1)
    assert (more.n, more.over) == (30, "samples")
    assert more.low is not None
    assert more.high is not None
    assert more.low < same - full < more.high
    assert found.estimates["fvu.mean"].value == pytest.approx(1)


def test_intervals_are_of_resampled_samples() -> None:
    """Against a bootstrap written out: whole samples drawn again, FVU of their tokens."""
    clt, tokens = random_clt(), MadeUp()
    found = ablation(clt, tokens, refitting=False, draws=0)
    ref, generator = Reference(clt, tokens), np.random.default_rng(3)
    values = []
    y_hat = [(ref.y_hat(t, lambda d: True), ref.y_hat(t, lambda d: d == 0)) for t in range(L)]
    rows = [np.flatnonzero(tokens.sample.numpy() == i) for i in range(30)]
    for _ in range(400):
        drawn = np.concatenate([rows[i] for i in generator.integers(0, 30, 30)])
        values.append(
            np.mean(
                [ref.fvu(t, y_hat[t][1], drawn) - ref.fvu(t, y_hat[t][0], drawn) for t in range(L)]
            )
        )
    one = found.estimates["fvu_difference.same_only"]
    assert one.low is not None
    assert one.high is not None
    low, high = np.quantile(values, [0.025, 0.975])
    # The denominators' means are fixed, and the interval is widened for 30 samples.
    assert one.high - one.low == pytest.approx(high - low, rel=0.25)
    assert abs(one.low - low) < 0.2 * (high - low)


@pytest.mark.parametrize("variant", [{}, {"target_offset": 1}, {"skip_connection": True}], ids=str)
@pytest.mark.parametrize("ridge", [1e-3, 0.3])
def test_refit_is_least_squares_on_the_other_half(variant: dict[str, Any], ridge: float) -> None:
    clt, tokens = random_clt(**variant), MadeUp(samples=60)
    found = ablation(clt, tokens, draws=0, ridge=[ridge])
    ref, near = Reference(clt, tokens), clt.cfg.target_offset
    odd = tokens.sample.numpy() % 2 == 1
    values = []
    for s in ref.acts:
        design = ref.acts[s]
        start = array(clt.W_dec[s][0])
        if clt.W_skip is not None:
            design = np.concatenate([design, ref.x[s]], 1)
            start = np.concatenate([start, array(clt.W_skip[s][0]).T])
        y_hat = np.zeros_like(ref.y[0])
        for fitted in (odd, ~odd):
            y_hat[~fitted] = ridge_fit(design, ref.y[s + near], fitted, ridge, start)[~fitted]
        values.append(ref.fvu(s + near, y_hat, np.ones_like(odd)))
    assert fvu_by(found, "refit", "all") == pytest.approx(values, rel=2e-5)
    full, same, refit = (
        found.estimates[f"fvu.{arm}"].value for arm in ("full", "same_only", "refit")
    )
    assert full is not None
    assert same is not None
    assert refit is not None
    assert found.estimates["refit_gain"].value == pytest.approx(1 - refit / full)
    recovered = (same - refit) / (same - full)
    assert found.estimates["refit_recovers"].value == pytest.approx(recovered)


def ridge_fit(
    design: np.ndarray, y: np.ndarray, rows: np.ndarray, ridge: float, start: np.ndarray
) -> np.ndarray:
    """ŷ of every row, fitted on `rows` by least squares with the penalty as extra rows, which pull
    to `start`."""
    mean_a, mean_y = design[rows].mean(0), y[rows].mean(0)
    a, b = design[rows] - mean_a, y[rows] - mean_y
    blocks = [slice(0, F), slice(F, design.shape[1])]
    penalty = np.zeros(design.shape[1])
    for block in blocks[: 1 + (design.shape[1] > F)]:
        penalty[block] = ridge * (a[:, block] ** 2).sum(0).mean()
    pull = np.diag(np.sqrt(penalty))
    more = np.concatenate([a, pull]), np.concatenate([b, pull @ start])
    W = np.linalg.lstsq(*more, rcond=None)[0]
    return (design - mean_a) @ W + mean_y


def test_refit_on_other_data_takes_all_of_them() -> None:
    clt, tokens, others = random_clt(), MadeUp(samples=20), MadeUp(samples=50, seed=9)
    found = ablation(clt, tokens, fit_data=others, draws=0, ridge=[0.01])
    here, there = Reference(clt, tokens), Reference(clt, others)
    values = []
    for s in range(L):
        design = np.concatenate([there.acts[s], here.acts[s]])
        y = np.concatenate([there.y[s], here.y[s]])
        fitted = np.arange(len(y)) < len(there.y[s])
        y_hat = ridge_fit(design, y, fitted, 0.01, array(clt.W_dec[s][0]))[~fitted]
        values.append(here.fvu(s, y_hat, np.ones(len(y_hat), dtype=bool)))
    assert fvu_by(found, "refit", "all") == pytest.approx(values, rel=1e-4)
    assert any("fitted on made up" in note for note in found.notes)


def test_of_several_ridges_the_best_on_the_other_half_is_taken() -> None:
    clt, tokens = random_clt(num_latents=40), MadeUp(samples=16)
    grid = [1e-4, 1e-1, 10.0]
    alone = [fvu_by(ablation(clt, tokens, draws=0, ridge=[r]), "refit", "all") for r in grid]
    best = fvu_by(ablation(clt, tokens, draws=0, ridge=grid), "refit", "all")
    assert best == pytest.approx(np.min(alone, axis=0).tolist(), rel=1e-6)
    assert len({int(i) for i in np.argmin(alone, axis=0)} - {0}) >= 1  # the choice matters


def test_random_encoders_are_those_that_training_starts_from() -> None:
    clt, tokens = random_clt(), MadeUp(samples=60)
    found = ablation(clt, tokens, draws=0, ridge=[0.01], seed=4)
    generator, x, y = torch.Generator().manual_seed(4), array(tokens.x), array(tokens.y)
    odd = tokens.sample.numpy() % 2 == 1
    values = []
    measured = activity(clt, tokens)
    k = round(float(np.mean([(measured.frequency["all"][s]).sum() for s in range(L)])))
    for t in range(L):
        W = torch.empty(F, D).uniform_(-(D**-0.5), D**-0.5, generator=generator).double().numpy()
        pre = (x[t] - x[t].mean(0)) @ W.T
        a = np.where(pre >= np.sort(pre, 1)[:, [-k]], np.maximum(pre, 0), 0)
        y_hat = np.zeros_like(y[t])
        for fitted in (odd, ~odd):
            y_hat[~fitted] = ridge_fit(a, y[t], fitted, 0.01, np.zeros((F, D)))[~fitted]
        values.append(((y[t] - y_hat) ** 2).sum() / ((y[t] - y[t].mean(0)) ** 2).sum())
    assert fvu_by(found, "random_init", "all") == pytest.approx(values, rel=1e-4)
    assert k <= K


def test_random_deletion_takes_the_cross_writes_energy_from_every_target() -> None:
    clt, tokens = random_clt(num_latents=200, k=20), MadeUp(samples=60)
    measured = activity(clt, tokens)
    energies = write_energies(clt, measured.energy["all"], measured.sigma)
    ref = Reference(clt, tokens)
    spread = ((ref.y - ref.y.mean(1, keepdims=True)) ** 2).sum(2).mean(1)
    masks = []
    for seed in (0, 1):
        deletion = random_deletion(clt, energies, seed)
        own_deleted = 0
        for t in range(L):
            gone = cross = 0.0
            for s in range(t + 1):
                norms = (array(clt.W_dec[s][t - s]) ** 2).sum(1)
                energy = (ref.acts[s] ** 2).mean(0) * norms / spread[t]
                cross += energy.sum() * (s < t)
                gone += energy[~deletion.kept[s, t - s].numpy()].sum()
            own_deleted += int((~deletion.kept[t, 0]).sum())
            assert gone <= cross * (1 + 1e-5)
            assert gone == pytest.approx(cross, rel=0.01)
        assert own_deleted > 50
        masks.append(torch.cat([mask for mask in deletion.kept.values()]))
    assert not torch.equal(*masks)

    found = ablation(clt, tokens, draws=2, refitting=False)
    for t in range(L):
        values = []
        for seed in (0, 1):
            kept = random_deletion(clt, energies, seed).kept
            y_hat = np.tile(array(clt.b_dec[t]), (len(tokens.sample), 1))
            for s in range(t + 1):
                y_hat += (ref.acts[s] * kept[s, t - s].numpy()) @ array(clt.W_dec[s][t - s])
            values.append(ref.fvu(t, y_hat, tokens.chosen("image")))
        one = fvu_by(found, "random_deletion", "image")[t]
        assert one == pytest.approx(np.mean(values), rel=1e-5)


def test_intervals_of_a_random_arm_cover_its_draws() -> None:
    """Student's interval of the mean of three draws, t(2) = 4.3027, and beside it that of samples,
    which a single draw has alone. Latents are few: draws differ more than samples do."""
    clt, tokens = random_clt(), MadeUp(samples=300)
    for t in range(L):
        clt.b_dec[t].copy_(tokens.y[t].mean(0))
    found = ablation(clt, tokens, draws=3, refitting=False)
    single = ablation(clt, tokens, draws=1, refitting=False).estimates
    measured, ref = activity(clt, tokens), Reference(clt, tokens)
    energies = write_energies(clt, measured.energy["all"], measured.sigma)
    every, values = np.ones(len(tokens.sample), dtype=bool), []
    for seed in range(3):
        kept = random_deletion(clt, energies, seed).kept
        fvu = []
        for t in range(L):
            y_hat = np.tile(array(clt.b_dec[t]), (len(every), 1))
            for s in range(t + 1):
                y_hat += (ref.acts[s] * kept[s, t - s].numpy()) @ array(clt.W_dec[s][t - s])
            fvu.append(ref.fvu(t, y_hat, every))
        values.append(np.mean(fvu))
    half = 4.3027 * np.std(values, ddof=1) / np.sqrt(3)
    one = found.estimates["fvu.random_deletion"]
    assert (one.value, one.over) == (pytest.approx(np.mean(values)), "samples and draws")
    for name in ("fvu.random_deletion", "fvu_contrast.same_only-random_deletion"):
        one, of_samples = found.estimates[name], single[name]
        assert one.low is not None
        assert one.high is not None
        assert of_samples.low is not None
        assert of_samples.high is not None
        assert of_samples.over == "samples"
        alone = (of_samples.high - of_samples.low) / 2
        assert alone < half
        assert (one.high - one.low) / 2 == pytest.approx(np.hypot(alone, half), rel=0.1)
    assert found.estimates["fvu.same_only"].over == "samples"


def test_arms_are_compared_on_the_same_samples() -> None:
    """Against a bootstrap written out, of arms whose errors rise and fall together."""
    clt, tokens = random_clt(), MadeUp(samples=60)
    plt = random_clt(n_targets=1)
    found = ablation(clt, tokens, plt=plt, refitting=False, draws=0)
    ref, other = Reference(clt, tokens), Reference(plt, tokens)
    errors = [
        ((r.y[t] - r.y_hat(t, lambda d: d == 0)) ** 2).sum(1)
        for r in (ref, other)
        for t in range(L)
    ]
    total = [((ref.y[t] - ref.y[t].mean(0)) ** 2).sum(1) for t in range(L)]
    rows = tokens.sample.numpy()
    sums = np.array([np.bincount(rows, e) for e in (*errors, *total)]).reshape(3, L, 60)
    generator, values = np.random.default_rng(5), []
    for _ in range(2000):
        drawn = sums[:, :, generator.integers(0, 60, 60)].sum(2)
        values.append(((drawn[0] - drawn[1]) / drawn[2]).mean())
    one = found.estimates["fvu_contrast.same_only-plt"]
    whole = sums.sum(2)
    assert one.value == pytest.approx(((whole[0] - whole[1]) / whole[2]).mean(), rel=1e-5)
    low, high = np.quantile(values, [0.025, 0.975])
    assert one.low == pytest.approx(low, abs=0.15 * (high - low))
    assert one.high == pytest.approx(high, abs=0.15 * (high - low))


def test_error_of_a_role_over_the_variance_of_all_tokens() -> None:
    """Image tokens that hardly vary: a small error is a large part of their own variance."""
    clt, tokens = random_clt(scale=0.1), MadeUp(samples=60)
    image = tokens.chosen("image")
    tokens.y[:, image] = 20 + 0.1 * (tokens.y[:, image] - 20)
    found = ablation(clt, tokens, refitting=False, draws=0)
    ref, values = Reference(clt, tokens), []
    for t in range(L):
        added = sum(
            sign * ((ref.y[t] - ref.y_hat(t, keep)) ** 2).sum(1)
            for sign, keep in ((1, lambda d: d == 0), (-1, lambda d: True))
        )
        variance = ((ref.y[t] - ref.y[t].mean(0)) ** 2).sum(1).mean()
        values.append([added[tokens.chosen(role)].mean() / variance for role in ROLES])
    for role, value in zip(ROLES, np.mean(values, 0), strict=True):
        if role != "all":
            one = found.estimates[f"error_difference.same_only.{role}"]
            assert one.value == pytest.approx(value, rel=1e-4)
            assert one.low is not None
            assert one.low < value
    apart = ablation_with_roles(found, activity(clt, tokens)).estimates
    difference = apart["error_difference.same_only.image-text"]
    own = apart["fvu_difference.same_only.image-text"]
    means = np.mean(values, 0)
    assert difference.value == pytest.approx(
        means[ROLES.index("image")] - means[ROLES.index("text")], rel=1e-3
    )
    assert own.value is not None
    assert difference.value is not None
    assert abs(own.value) > 5 * abs(difference.value)


def test_another_coder_beside_it() -> None:
    clt, tokens = random_clt(), MadeUp()
    plt = random_clt(seed=8, n_targets=1)
    found = ablation(clt, tokens, plt=plt, refitting=False, draws=0)
    ref = Reference(plt, tokens)
    values = [ref.fvu(t, ref.y_hat(t, lambda d: True), tokens.chosen("text")) for t in range(L)]
    assert fvu_by(found, "plt", "text") == pytest.approx(values, rel=1e-5)
    with pytest.raises(UserError, match="writes to 4 layers: give a per-layer coder"):
        ablation(clt, tokens, plt=random_clt())
    with pytest.raises(UserError, match="its input_site is resid_mid, not mlp_in"):
        ablation(clt, tokens, plt=random_clt(n_targets=1, input_site="resid_mid"))


def test_a_coder_without_cross_writes_has_nothing_to_lose() -> None:
    found = ablation(random_clt(n_targets=1), MadeUp(), draws=1)
    for arm in ("same_only", "cross_mean", "random_deletion"):
        assert fvu_by(found, arm, "all") == fvu_by(found, "full", "all")
    assert found.estimates["refit_recovers"].value is None
    assert any("no cross writes" in note for note in found.notes)


def test_undefined_figures_are_none_and_data_must_allow_the_rest() -> None:
    tokens = MadeUp()
    tokens.group[:] = 1
    found = ablation(random_clt(), tokens, draws=1)
    assert found.estimates["fvu.full.text"].value is None
    assert set(found.tables["fvu_comparison"].where(role="text_only")["fvu"]) == {None}
    assert any("no model" in note for note in found.notes)
    constant = MadeUp()
    constant.y[2] = 3.0
    found = ablation(random_clt(), constant, refitting=False)
    assert fvu_by(found, "full", "all")[2] is None
    assert found.estimates["fvu.full"].value is not None
    with pytest.raises(UserError, match="at least two samples"):
        ablation(random_clt(), MadeUp(samples=1), refitting=True)
    found = ablation(random_clt(), MadeUp(samples=1))
    assert "fvu.refit" not in found.estimates
    assert found.estimates["fvu.full"].low is None
    with pytest.raises(UserError, match=r"GiB.*--refit_gib"):
        ablation(random_clt(), MadeUp(), refitting=True, refit_gib=1e-7)
    found = ablation(random_clt(), MadeUp(), refit_gib=1e-7)
    assert "fvu.refit" not in found.estimates
    assert any("left out" in note for note in found.notes)


def test_layers_fitted_in_several_passes_are_the_same() -> None:
    clt, tokens = random_clt(), MadeUp()
    at_once = ablation(clt, tokens, draws=0)
    one_by_one = ablation(clt, tokens, draws=0, refit_gib=1.5 * 16 * F * (F + D) / 2**30)
    assert at_once.tables == one_by_one.tables


VARIANTS: list[dict[str, Any]] = [
    {"activation": "jumprelu", "skip_connection": True},
    {"activation": "batchtopk", "target_offset": 1},
    {"coalesce_topk": "per-layer", "topk_coalesced": True},
    {"normalize_io": True, "train_post_encoder": True, "skip_connection": True},
    {"post_encoder_scale": True, "per_source_tied": True, "divide_cross_layer": True},
    {"activation": "relu", "secondary_target_tied": True},
    {"n_targets": 1, "transcode": False, "input_site": "mlp_out"},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_kind_of_coder_as_evaluate_measures_it(variant: dict[str, Any]) -> None:
    clt, tokens = random_clt(**variant), MadeUp()
    for threshold in clt.threshold:
        threshold.clamp_(min=0.05)
    if not clt.cfg.transcode:
        tokens.x = tokens.y
    found = ablation(clt, tokens, draws=1, ridge=[1e-2, 1e9])
    sums = LayerSums(clt)
    for batch in tokens:
        sums.add(batch.x, batch.y, batch.group)
    near = clt.cfg.target_offset
    for arm, name in (("full", "full"), ("same_only", "same_layer_only")):
        values = sums.fvu(name)[0, near:].tolist()
        assert fvu_by(found, arm, "all") == pytest.approx(values, rel=1e-5)
    # A penalty without end leaves own decoders as they are, but for their bias, and but for what
    # the other sources' competition and biases of latents do to them.
    still = fvu_by(ablation(clt, tokens, draws=0, ridge=[1e9]), "refit", "all")
    if not (clt.cfg.topk_coalesced or clt.cfg.train_post_encoder):
        assert np.mean(still) <= np.mean(fvu_by(found, "same_only", "all")) * 1.02
    chosen = np.array(fvu_by(found, "refit", "all"))
    assert (chosen <= np.array(still) * (1 + 1e-6)).all()
