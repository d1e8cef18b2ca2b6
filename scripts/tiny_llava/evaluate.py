"""What the pair can do: accuracy by question type, controls, and where the answer comes from."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import torch
from torch import nn

from sparsify_vlm.data.shapes import (
    GRID,
    PATCH_GRID,
    QUESTION_TYPES,
    ask,
    cell_patches,
    draw_scene,
)
from tiny_llava.batches import Batch, questions_batch
from tiny_llava.model import exact_match, final_hidden, image_features

_ROWS = 100


def accuracy(
    model: nn.Module, seed: int, scenes: int, *, seen: bool, wrong_image: bool = False
) -> dict[str, float]:
    """Exact match by question type on held-out scenes, four questions each.

    With `wrong_image` each question comes with another scene's image.
    """
    rng = np.random.default_rng([seed, 2])
    asked, right = Counter[str](), Counter[str]()
    device = next(model.parameters()).device
    for _ in range(0, scenes, _ROWS):
        batch = questions_batch(
            rng, _ROWS, "heldout", QUESTION_TYPES, 4, seen=seen, wrong_image=wrong_image
        )
        matches = exact_match(model, batch.to(device))
        asked.update(q.type for q in batch.asked)
        right.update(q.type for q, ok in zip(batch.asked, matches, strict=True) if ok)
    return {kind: right[kind] / asked[kind] for kind in QUESTION_TYPES}


def question_prior(seed: int, scenes: int) -> dict[str, float]:
    """The best accuracy by question type of one who knows held-out questions but sees no scene.

    For each wording the commonest answer among the held-out questions is given.
    """
    rng = np.random.default_rng([seed, 4])
    answers: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for _ in range(scenes):
        scene = draw_scene(rng, "heldout")
        for kind in QUESTION_TYPES:
            question = ask(scene, kind, rng)
            if question is not None:
                answers[kind, question.text][question.answer] += 1
    best, asked = Counter[str](), Counter[str]()
    for (kind, _), counts in answers.items():
        best[kind] += max(counts.values())
        asked[kind] += counts.total()
    return {kind: best[kind] / asked[kind] for kind in QUESTION_TYPES}


@torch.no_grad()
def locality(model: nn.Module, seed: int, scenes: int) -> dict[str, float]:
    """Share of colour and shape questions whose answer is hurt most at the asked object's cell.

    Each of the nine cells in turn has its four image tokens replaced by the mean image token; the
    hurt is the loss of the right answer's log-probability.
    """
    rng = np.random.default_rng([seed, 3])
    device = next(model.parameters()).device
    hits: dict[str, list[bool]] = {"colour": [], "shape": []}
    for _ in range(0, scenes, _ROWS):
        for kind in hits:
            batch = questions_batch(rng, _ROWS, "heldout", (kind,), 1, seen=True)
            hits[kind] += _hurt_most_at_asked(model, batch.to(device))
    return {kind: float(np.mean(found)) for kind, found in hits.items()}


def _hurt_most_at_asked(model: nn.Module, batch: Batch) -> list[bool]:
    features = image_features(model, batch.pixels)
    mean = features.mean((0, 1))
    answer = batch.is_answer.clone()
    answer[:, 1:] &= ~batch.is_answer[:, :-1]  # the answer's word, not the end after it
    scores = []
    for cell in range(GRID * GRID):
        blanked = features.clone()
        blanked[:, [row * PATCH_GRID + column for row, column in cell_patches(cell)]] = mean
        logits = model.lm_head(final_hidden(model, batch, blanked)[answer])
        right = batch.labels[answer][:, None]
        scores.append(logits.log_softmax(-1).gather(1, right)[:, 0])
    hurt_most = torch.stack(scores).argmin(0).tolist()
    rows = answer.nonzero()[:, 0].tolist()  # rows whose scene admitted the question
    cells = [
        batch.scenes[row].objects[question.asked[0]].cell
        for row, question in zip(rows, batch.asked, strict=True)
    ]
    return [a == b for a, b in zip(hurt_most, cells, strict=True)]
