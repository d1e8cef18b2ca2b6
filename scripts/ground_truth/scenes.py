"""Held-out scenes with two objects or more, their questions, and what the plain model says."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsify_vlm import VLMReplacementModel
from sparsify_vlm.data.encoding import encode
from sparsify_vlm.data.images import ImageRef
from sparsify_vlm.data.rows import Sample, Turn
from sparsify_vlm.data.shapes import COLOURS, Scene, ShapesDataset, render


@dataclass
class Case:
    """A scene with its question, as the model takes it."""

    scene: Scene
    question: str
    asked: int
    inputs: dict[str, Tensor]

    @property
    def colour(self) -> str:
        """The right answer."""
        return self.scene.objects[self.asked].colour

    @property
    def cell(self) -> int:
        """Where the right answer is."""
        return self.scene.objects[self.asked].cell


class Scenes:
    """The model, its scenes and what it says of them."""

    def __init__(self, model: VLMReplacementModel, seed: int) -> None:
        self.model, self.loaded = model, model.loaded
        self.random = random.Random(seed)
        self.tokens = {c: self._token(c) for c in COLOURS}
        self.seen: Counter[str] = Counter()
        self.rows = ShapesDataset("heldout", 10_000, types=("colour",))
        self.rgb = {o.colour: o.rgb for i in range(50) for o in self.rows.scene(i).objects}

    def _token(self, word: str) -> int:
        (id,) = self.loaded.tokenizer.encode(word, add_special_tokens=False)
        return id

    def case(self, scene: Scene, question: str, asked: int) -> Case:
        image = ImageRef("scene", image=render(scene))
        sample = Sample("scene", (Turn("user", question, 1),), (image,))
        return Case(
            scene, question, asked, encode(self.loaded, [sample], 256, with_answer=False).inputs
        )

    def cases(self) -> Iterator[Case]:
        """Scenes of two objects or more whose question is answered rightly."""
        for i in range(len(self.rows)):
            scene, question = self.rows.scene(i), self.rows.question(i)
            if len(scene.objects) < 2:
                continue
            self.seen["asked"] += 1
            case = self.case(scene, question.text, question.asked[0])
            if self.says(self.logits(case.inputs)) == case.colour:
                self.seen["right"] += 1
                yield case

    def recoloured(self, case: Case) -> Case | None:
        """The scene with the asked object in a colour that is not there; None where the model does
        not see it so."""
        there = {o.colour for o in case.scene.objects}
        colour = self.random.choice([c for c in COLOURS if c not in there])
        objects = list(case.scene.objects)
        objects[case.asked] = replace(objects[case.asked], colour=colour, rgb=self.rgb[colour])
        other = self.case(replace(case.scene, objects=tuple(objects)), case.question, case.asked)
        return other if self.says(self.logits(other.inputs)) == colour else None

    @torch.no_grad()
    def logits(self, inputs: dict[str, Tensor]) -> Tensor:
        logits: Tensor = self.loaded.forward(inputs).logits[0, -1]
        return logits

    def says(self, logits: Tensor) -> str:
        return str(self.loaded.tokenizer.decode([int(logits.argmax())])).strip()

    @torch.no_grad()
    def embedded(self, inputs: dict[str, Tensor]) -> Tensor:
        """What the first layer reads [S, d]."""
        out = self.loaded.model(**inputs, use_cache=False, output_hidden_states=True)
        states: Tensor = out.hidden_states[0][0]
        return states
