"""Which latent stands for which known thing: latents scored against a ground truth of patches.

For a concept c with positive patches P_c and a latent i that fires (activation > 0) on patches A_i:

    precision = |A_i ∩ P_c| / |A_i|,   recall = |A_i ∩ P_c| / |P_c|
    F1 = 2 |A_i ∩ P_c| / (|A_i| + |P_c|)

The best latent per concept is chosen on one half of the samples and scored on the other, since the
maximum over thousands of latents would flatter any coder. A latent that always fires has
F1 = 2 |P_c| / (N + |P_c|), the floor to compare with.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Firings:
    """Active latents of one source layer on image patches, one entry per active latent.

    patch [n] index of the patch among all patches (sample-major), latent [n], value [n] > 0.
    """

    patch: NDArray[np.int64]
    latent: NDArray[np.int64]
    value: NDArray[np.float32]
    num_latents: int

    def only(self, patches: NDArray[np.bool_]) -> Firings:
        """The entries on patches where `patches` [all patches] is true."""
        kept = patches[self.patch]
        return Firings(self.patch[kept], self.latent[kept], self.value[kept], self.num_latents)

    def activations(self, latent: int, n_patches: int) -> NDArray[np.float32]:
        """Activation of `latent` on every patch, [n_patches]."""
        out = np.zeros(n_patches, np.float32)
        mine = self.latent == latent
        out[self.patch[mine]] = self.value[mine]
        return out


@dataclass(frozen=True)
class ConceptLatent:
    """The latent that stands best for a concept; scores are from samples it was not chosen on."""

    concept: str
    layer: int
    latent: int
    precision: float
    recall: float
    f1: float
    always: float
    """F1 of a latent that fires everywhere."""


def _counts(
    firings: Firings, positive: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Per latent: patches it fires on, and those of them that are positive; both [num_latents]."""
    fires = np.bincount(firings.latent, minlength=firings.num_latents)
    hits = np.bincount(firings.latent[positive[firings.patch]], minlength=firings.num_latents)
    return fires, hits


def best_latent(
    concept: str,
    positive: NDArray[np.bool_],
    layers: dict[int, Firings],
    chosen_on: NDArray[np.bool_],
) -> ConceptLatent:
    """The latent of any layer with the highest F1 for one concept.

    Args:
        positive: [n_patches], where the concept is.
        layers: source layer -> its firings over the same patches.
        chosen_on: [n_patches], the patches to choose on; scores are taken on all others.

    Raises:
        ValueError: when either half holds no positive patch.
    """
    scored_on = ~chosen_on
    if not (positive & chosen_on).any() or not (positive & scored_on).any():
        raise ValueError(f"no patch shows {concept} in one of the halves")
    best, best_f1 = (-1, -1), -1.0
    for layer, firings in layers.items():
        fires, hits = _counts(firings.only(chosen_on), positive)
        f1 = 2 * hits / (fires + (positive & chosen_on).sum())
        if f1.max() > best_f1:
            best, best_f1 = (layer, int(f1.argmax())), float(f1.max())
    layer, latent = best
    fires, hits = _counts(layers[layer].only(scored_on), positive)
    n_positive, n = int((positive & scored_on).sum()), int(scored_on.sum())
    return ConceptLatent(
        concept,
        layer,
        latent,
        precision=float(hits[latent] / max(fires[latent], 1)),
        recall=float(hits[latent] / n_positive),
        f1=float(2 * hits[latent] / (fires[latent] + n_positive)),
        always=2 * n_positive / (n + n_positive),
    )
