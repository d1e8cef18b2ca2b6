"""The latents of a coder that stand for the colours and shapes of the embedded scenes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sparsify_vlm.data.shapes import COLOURS, PATCH_GRID, SHAPES, ShapesDataset, object_patches
from sparsify_vlm.features.concepts import ConceptLatent, Firings, best_latent

if TYPE_CHECKING:
    from collections.abc import Sequence

PATCHES = PATCH_GRID * PATCH_GRID
"""Patches of one scene."""


@dataclass(frozen=True)
class ConceptExamples:
    """A concept's latent and the scenes in which it fires most."""

    latent: ConceptLatent
    top: float
    """Its largest activation on any patch."""
    examples: list[tuple[int, NDArray[np.float32]]]
    """(row of the dataset, activation per patch [6, 6]), strongest first."""


def patch_truth(rows: ShapesDataset) -> dict[str, NDArray[np.bool_]]:
    """For each colour and shape, which patches hold a pixel of it: bool [len(rows) · 36]."""
    truth = {name: np.zeros((len(rows), PATCH_GRID, PATCH_GRID), bool) for name in COLOURS + SHAPES}
    for i in range(len(rows)):
        for item in rows.scene(i).objects:
            row, column = zip(*object_patches(item), strict=True)
            for name in (item.colour, item.shape):
                truth[name][i, row, column] = True
    return {name: patches.reshape(-1) for name, patches in truth.items()}


def concept_latents(
    layers: dict[int, Firings],
    rows: ShapesDataset,
    concepts: Sequence[str] = COLOURS + SHAPES,
    n_examples: int = 5,
) -> list[ConceptExamples]:
    """The best latent for each concept, chosen on even rows and scored on odd ones.

    Args:
        layers: source layer -> firings on all rows, as `image_firings` numbers the patches.
        n_examples: scenes to show, taken from the odd rows too, one latent's strongest first.
    """
    truth = patch_truth(rows)
    even = np.repeat(np.arange(len(rows)) % 2 == 0, PATCHES)
    found = []
    for concept in concepts:
        latent = best_latent(concept, truth[concept], layers, even)
        activations = layers[latent.layer].activations(latent.latent, len(even))
        grids = activations.reshape(len(rows), PATCH_GRID, PATCH_GRID)
        peaks = grids.max((1, 2))
        peaks[::2] = -1.0
        strongest = np.argsort(-peaks, kind="stable")[:n_examples]
        examples = [(int(i), grids[i]) for i in strongest]
        found.append(ConceptExamples(latent, float(activations.max()), examples))
    return found
