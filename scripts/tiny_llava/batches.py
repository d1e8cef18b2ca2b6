"""Packed training batches: one prefix (a scene told or seen) shared by several questions.

A row is [prefix | question 1 | question 2 | …]. A question attends to the prefix and to itself and
its positions continue the prefix, so every question sees exactly what it would see alone, at a
fraction of the cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from sparsify_vlm.data.shapes import Question, Scene, ask, describe, draw_scene, render_array
from tiny_llava.architecture import (
    ASSISTANT,
    BOS,
    EOS,
    IMAGE,
    IMAGE_MEAN,
    IMAGE_STD,
    NEWLINE,
    PAD,
    USER,
    build_tokenizer,
    llava_config,
    vocabulary,
)

IDS = {word: i for i, word in enumerate(vocabulary())}
_TOKENIZER = build_tokenizer()
_N_IMAGE_TOKENS = llava_config().image_seq_length
_IGNORE = -100


@dataclass
class Batch:
    """Packed rows; B rows of S tokens.

    ids, positions, labels: int64 [B, S] (label −100: none); allowed: bool [B, 1, S, S], who attends
    to whom; is_answer: bool [B, S], where the label belongs to an answer; asked: the questions in
    the order of `is_answer`'s true entries (two per question: the answer and the end of sequence);
    pixels: float [B, 3, 48, 48] or None.
    """

    ids: Tensor
    positions: Tensor
    labels: Tensor
    allowed: Tensor
    is_answer: Tensor
    asked: list[Question]
    pixels: Tensor | None = None
    scenes: tuple[Scene, ...] = ()

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        moved = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return Batch(**{**vars(self), **moved})


@lru_cache(maxsize=50_000)
def tokens(text: str) -> tuple[int, ...]:
    """Token ids of `text`, without BOS."""
    return tuple(_TOKENIZER(text, add_special_tokens=False)["input_ids"])


@dataclass
class _Row:
    prefix: list[int]
    said: list[list[int]]  # each question's ids up to and including the end of sequence
    asked: list[Question] = field(default_factory=list)


def lists_batch(rng: np.random.Generator, rows: int) -> Batch:
    """Random word lists said twice: makes the heads that look a word up and read its neighbour."""
    words = np.arange(IDS["what"], len(IDS))
    packed = []
    for _ in range(rows):
        said = rng.choice(words, size=int(rng.integers(10, 30))).tolist()
        packed.append(_Row([IDS[BOS], IDS[USER], *said], [said]))
    return _pack(packed, answer_from=2)


def questions_batch(
    rng: np.random.Generator,
    rows: int,
    split: str,
    types: Sequence[str],
    questions: int,
    *,
    seen: bool,
    wrong_image: bool = False,
) -> Batch:
    """`rows` scenes of `split` with `questions` questions each, told in words or `seen`.

    With `wrong_image` each scene's questions come with the next row's image.
    """
    scenes = [draw_scene(rng, split) for _ in range(rows)]
    batch = _pack([_questions_row(scene, types, questions, rng, seen) for scene in scenes])
    batch.scenes = tuple(scenes)
    if seen:
        shown = scenes[1:] + scenes[:1] if wrong_image else scenes
        batch.pixels = pixel_values(shown)
    return batch


def pixel_values(scenes: Sequence[Scene]) -> Tensor:
    """What the processor gives for the scenes' images: float32 [B, 3, 48, 48]."""
    pixels = torch.from_numpy(np.stack([render_array(scene) for scene in scenes]))
    mean, std = torch.tensor(IMAGE_MEAN), torch.tensor(IMAGE_STD)
    return ((pixels / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def _prefix(scene: Scene, seen: bool) -> list[int]:
    if seen:
        return [IDS[BOS], IDS[USER], *[IDS[IMAGE]] * _N_IMAGE_TOKENS, IDS[NEWLINE]]
    return [IDS[BOS], IDS[USER], *tokens(describe(scene))]


def _questions_row(
    scene: Scene, types: Sequence[str], count: int, rng: np.random.Generator, seen: bool
) -> _Row:
    """Up to `count` questions, types in turn; a type the scene does not admit is left out."""
    row = _Row(_prefix(scene, seen), [])
    start = int(rng.integers(len(types)))
    for i in range(count):
        question = ask(scene, types[(start + i) % len(types)], rng)
        if question is not None:
            answered = tokens(f"{question.text} {ASSISTANT} {question.answer}")
            row.said.append([*answered, IDS[EOS]])
            row.asked.append(question)
    return row


def _pack(rows: list[_Row], answer_from: int = -2) -> Batch:
    """Lay the rows out; the answer of a question is its tokens from `answer_from` on."""
    length = max(len(r.prefix) + sum(len(said) - 1 for said in r.said) for r in rows)
    shape = (len(rows), length)
    ids = np.full(shape, IDS[PAD])
    positions, labels = np.zeros(shape, dtype=np.int64), np.full(shape, _IGNORE)
    segment, is_answer = np.full(shape, -1), np.zeros(shape, dtype=bool)
    for b, row in enumerate(rows):
        end = len(row.prefix)
        ids[b, :end], positions[b, :end], segment[b, :end] = row.prefix, np.arange(end), 0
        labels[b, : end - 1] = row.prefix[1:]
        if row.said:
            labels[b, end - 1] = row.said[0][0]
        for number, said in enumerate(row.said, 1):
            start, end = end, end + len(said) - 1
            ids[b, start:end], labels[b, start:end] = said[:-1], said[1:]
            positions[b, start:end] = len(row.prefix) + np.arange(len(said) - 1)
            segment[b, start:end] = number
            first = end - 2 if answer_from < 0 else start + answer_from
            is_answer[b, first:end] = True
    labels[labels == IDS[IMAGE]] = _IGNORE
    return Batch(
        *map(torch.from_numpy, (ids, positions, labels)),
        allowed=_allowed(torch.from_numpy(segment)),
        is_answer=torch.from_numpy(is_answer),
        asked=[question for row in rows for question in row.asked],
    )


def _allowed(segment: Tensor) -> Tensor:
    """bool [B, 1, S, S]: causal, within the own segment or to the prefix (segment 0)."""
    query, key = segment[:, :, None], segment[:, None, :]
    causal = torch.ones(segment.shape[1], segment.shape[1], dtype=torch.bool).tril()
    return (causal & ((key == query) | (key == 0)))[:, None]
