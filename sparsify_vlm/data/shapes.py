"""The embedded data set: scenes with questions whose answers, objects and patches are known.

Row `i` is a function of (split, seed, i) alone, so any row can be made without the others, in any
process. Needs numpy and Pillow only.

    rows = ShapesDataset("heldout", 100)
    rows[0]["question"]                                  # "what colour is the circle?"
    scene, asked = rows[0]["scene"], rows.question(0).asked
    [object_patches(scene.objects[i]) for i in asked]    # where the answer is in the image
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sparsify_vlm.data.shapes_questions import ANSWERS, QUESTION_TYPES, Question, ask
from sparsify_vlm.data.shapes_render import (
    cell_patches,
    object_mask,
    object_patches,
    render,
    render_array,
)
from sparsify_vlm.data.shapes_scenes import (
    COLOURS,
    GRID,
    IMAGE_SIZE,
    PATCH,
    PATCH_GRID,
    SHAPES,
    SPLITS,
    Scene,
    SceneObject,
    describe,
    draw_scene,
    is_held_out,
)
from sparsify_vlm.errors import UserError

__all__ = [
    "ANSWERS",
    "COLOURS",
    "GRID",
    "IMAGE_SIZE",
    "PATCH",
    "PATCH_GRID",
    "QUESTION_TYPES",
    "SHAPES",
    "Question",
    "Scene",
    "SceneObject",
    "ShapesDataset",
    "ask",
    "cell_patches",
    "describe",
    "draw_scene",
    "is_held_out",
    "object_mask",
    "object_patches",
    "render",
    "render_array",
]


class ShapesDataset:
    """Scenes with one question each; question types take turns.

    Args:
        split: "train" or "heldout" (multisets of (colour, shape) that training never sees).
        size: number of rows.
        seed: another seed gives other rows of the same split.
        text_only: tell the scene in words before the question instead of showing an image.
        types: the question types to ask; by default those the embedded pair masters.

    Raises:
        UserError: for an unknown split or question type, or a negative size.
    """

    def __init__(
        self,
        split: str = "train",
        size: int = 10_000,
        seed: int = 0,
        text_only: bool = False,
        types: Sequence[str] = QUESTION_TYPES,
    ) -> None:
        if split not in SPLITS:
            raise UserError(f"shapes has the splits {', '.join(SPLITS)}; there is no {split!r}")
        if unknown := [t for t in types if t not in QUESTION_TYPES] or not types:
            raise UserError(f"shapes asks {', '.join(QUESTION_TYPES)} questions; not {unknown}")
        if size < 0:
            raise UserError(f"shapes cannot have {size} rows; give a size of 0 or more")
        self.split, self.size, self.seed = split, size, seed
        self.text_only, self.types = text_only, tuple(types)

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(self.size))

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row `index`: image (PIL, absent when text_only), question, answer, type, scene, id."""
        scene, question = self._draw(index)
        row: dict[str, Any] = {} if self.text_only else {"image": render(scene)}
        told = f"{describe(scene)} " if self.text_only else ""
        return row | {
            "question": told + question.text,
            "answer": question.answer,
            "type": question.type,
            "scene": scene,
            "id": f"shapes-{self.split}-{self.seed}-{index}",
        }

    def scene(self, index: int) -> Scene:
        """The scene of row `index`, without rendering it."""
        return self._draw(index)[0]

    def question(self, index: int) -> Question:
        """The question of row `index`, with the indices of the objects it asks about."""
        return self._draw(index)[1]

    def _draw(self, index: int) -> tuple[Scene, Question]:
        if not 0 <= index < self.size:
            raise IndexError(f"row {index} of {self.size}")
        rng = np.random.default_rng([SPLITS.index(self.split), self.seed, index])
        question_type = self.types[index % len(self.types)]
        while True:
            scene = draw_scene(rng, self.split)
            question = ask(scene, question_type, rng)
            if question is not None:
                return scene, question
