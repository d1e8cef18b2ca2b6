"""Questions about a scene, their answers, and which objects each is about."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparsify_vlm.data.shapes_scenes import COLOURS, SHAPES, Scene, article

QUESTION_TYPES = ("colour", "shape", "count", "existence")
NUMBERS = ("one", "two", "three", "four")
ANSWERS = {"colour": COLOURS, "shape": SHAPES, "count": NUMBERS, "existence": ("yes", "no")}
"""Every possible answer by question type; each is one token of the embedded pair."""


@dataclass(frozen=True)
class Question:
    """A question, its answer, and the indices into `scene.objects` of what it asks about.

    `asked` is the one object for colour and shape, every object for count, the objects that match
    for existence (none when the answer is no).
    """

    type: str
    text: str
    answer: str
    asked: tuple[int, ...]


def ask(scene: Scene, question_type: str, rng: np.random.Generator) -> Question | None:
    """A question of `question_type` about `scene`; None when the scene admits none.

    A colour question needs a shape that occurs once, a shape question a colour that occurs once.
    """
    return _ASK[question_type](scene, rng)


def _once(words: list[str], rng: np.random.Generator) -> int | None:
    """Index of a word that occurs once among `words`, drawn uniformly; None without one."""
    single = [i for i, word in enumerate(words) if words.count(word) == 1]
    return single[int(rng.integers(len(single)))] if single else None


def _colour(scene: Scene, rng: np.random.Generator) -> Question | None:
    asked = _once([o.shape for o in scene.objects], rng)
    if asked is None:
        return None
    target = scene.objects[asked]
    return Question("colour", f"what colour is the {target.shape}?", target.colour, (asked,))


def _shape(scene: Scene, rng: np.random.Generator) -> Question | None:
    asked = _once([o.colour for o in scene.objects], rng)
    if asked is None:
        return None
    target = scene.objects[asked]
    return Question("shape", f"what shape is the {target.colour} one?", target.shape, (asked,))


def _count(scene: Scene, rng: np.random.Generator) -> Question:
    n = len(scene.objects)
    return Question("count", "how many shapes are there?", NUMBERS[n - 1], tuple(range(n)))


def _existence(scene: Scene, rng: np.random.Generator) -> Question:
    """Yes and no equally often; half of the no's recombine a colour and a shape that are there."""
    if rng.random() < 0.5:
        target = scene.objects[int(rng.integers(len(scene.objects)))]
        return _is_there(scene, target.colour, target.shape)
    present = set(scene.kinds)
    swaps = [
        (a.colour, b.shape)
        for a in scene.objects
        for b in scene.objects
        if (a.colour, b.shape) not in present
    ]
    if swaps and rng.random() < 0.5:
        return _is_there(scene, *swaps[int(rng.integers(len(swaps)))])
    while True:
        kind = COLOURS[int(rng.integers(len(COLOURS)))], SHAPES[int(rng.integers(len(SHAPES)))]
        if kind not in present:
            return _is_there(scene, *kind)


def _is_there(scene: Scene, colour: str, shape: str) -> Question:
    asked = tuple(i for i, o in enumerate(scene.objects) if (o.colour, o.shape) == (colour, shape))
    text = f"is there {article(colour)} {colour} {shape}?"
    return Question("existence", text, "yes" if asked else "no", asked)


_ASK = {"colour": _colour, "shape": _shape, "count": _count, "existence": _existence}
