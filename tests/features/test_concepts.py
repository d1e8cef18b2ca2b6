from __future__ import annotations

import numpy as np
import pytest

from sparsify_vlm.features.concepts import Firings, best_latent


def planted(seed: int = 0, n_patches: int = 4000, num_latents: int = 50) -> tuple[Firings, Firings]:
    """Noise, but latent 7 of the second layer fires on 80 % of the first 1000 patches."""
    rng = np.random.default_rng(seed)
    layers = []
    for layer in range(2):
        active = rng.random((n_patches, num_latents)) < 0.05
        if layer == 1:
            active[:, 7] = False
            active[:1000, 7] = rng.random(1000) < 0.8
        patch, latent = np.nonzero(active)
        layers.append(Firings(patch, latent, rng.random(len(patch), np.float32) + 0.1, num_latents))
    return layers[0], layers[1]


def test_a_planted_latent_is_found_and_scored_on_the_other_half() -> None:
    first, second = planted()
    positive = np.arange(4000) < 1000
    chosen_on = np.arange(4000) % 2 == 0
    found = best_latent("red", positive, {3: first, 5: second}, chosen_on)
    assert (found.layer, found.latent) == (5, 7)
    fires = second.activations(7, 4000)[~chosen_on] > 0
    truth = positive[~chosen_on]
    assert found.precision == pytest.approx((fires & truth).sum() / fires.sum())
    assert found.recall == pytest.approx((fires & truth).sum() / truth.sum())
    assert found.f1 == pytest.approx(
        2 * found.precision * found.recall / (found.precision + found.recall)
    )
    assert found.always == pytest.approx(2 * 500 / (2000 + 500))


def test_noise_scores_no_better_than_chance_on_the_other_half() -> None:
    first, _ = planted(seed=3)
    positive = np.random.default_rng(1).random(4000) < 0.25
    found = best_latent("nothing", positive, {0: first}, np.arange(4000) % 2 == 0)
    assert found.precision == pytest.approx(0.25, abs=0.1)


def test_a_concept_that_is_nowhere_is_refused() -> None:
    first, _ = planted()
    with pytest.raises(ValueError, match="no patch shows pink"):
        best_latent("pink", np.zeros(4000, bool), {0: first}, np.arange(4000) % 2 == 0)
