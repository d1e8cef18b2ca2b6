"""Greedy answers of the model and of its spliced versions, compared with the reference as ids."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sparsify_vlm.replacement.ablation import Ablation
from sparsify_vlm.replacement.measures import AnswerCounts

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch import Tensor

    from sparsify_vlm.data import EncodedBatch, Sample
    from sparsify_vlm.models import LoadedModel
    from sparsify_vlm.replacement.model import VLMReplacementModel

References = dict[str, tuple[int, ...]]
"""Token ids of the reference answer by sample id, without special tokens."""


def reference_answers(loaded: LoadedModel, batch: EncodedBatch, limit: int) -> References:
    """The references of a batch's samples that have at most `limit` tokens, EOS included."""
    mask = batch.answer_mask
    if mask is None or limit == 0:
        return {}
    special = set(loaded.tokenizer.all_special_ids)
    found: References = {}
    for id, row, ids in zip(batch.ids, mask, batch.inputs["input_ids"], strict=True):
        answer = tuple(token for token in ids[row].tolist() if token not in special)
        if answer and len(answer) < limit:
            found[id] = answer
    return found


def answer_samples(
    model: VLMReplacementModel,
    batch: EncodedBatch,
    references: References,
    arms: Mapping[str, Ablation | None],
    counts: AnswerCounts,
) -> list[dict[str, Any]]:
    """Let the model and every arm answer a batch (padded on the left), and count who is right.

    Returns a line per sample with a reference: id, type, question, truth, and by arm (`model` is
    the model itself) the answer's text (None: it did not end) and whether it is right.
    """
    asked = [row for row, id in enumerate(batch.ids) if id in references]
    if not asked:
        return []
    longest = max(len(references[batch.ids[row]]) for row in asked)
    # One more for EOS: an answer that goes on is wrong however it goes on.
    options = generation_options(model.loaded, longest + 1)
    with torch.no_grad():
        own = model.loaded.model.generate(**model.loaded.to_device(batch.inputs), **options)
    spliced = {
        arm: model.generate(ablate, **batch.inputs, **options) for arm, ablate in arms.items()
    }
    lines = []
    for row in asked:
        want = references[batch.ids[row]]
        given = {
            arm: _answer(model.loaded, batch, ids[row], options["eos_token_id"])
            for arm, ids in {"model": own, **spliced}.items()
        }
        right = {arm: ids == want for arm, ids in given.items()}
        counts.add(batch.samples[row].type, right["model"], {arm: right[arm] for arm in spliced})
        lines.append(_line(model.loaded, batch.samples[row], want, given) | {"right": right})
    return lines


def _line(
    loaded: LoadedModel,
    sample: Sample,
    want: tuple[int, ...],
    given: Mapping[str, tuple[int, ...] | None],
) -> dict[str, Any]:
    def text(ids: tuple[int, ...] | None) -> str | None:
        return None if ids is None else loaded.tokenizer.decode(ids).strip()

    questions = [turn.text.strip() for turn in sample.turns if turn.role == "user"]
    return {
        "id": sample.id,
        "type": sample.type,
        "question": questions[-1] if questions else None,
        "truth": text(want),
        "answers": {arm: text(ids) for arm, ids in given.items()},
    }


def generation_options(loaded: LoadedModel, max_new_tokens: int) -> dict[str, Any]:
    """Arguments of `generate` for greedy answers that end at EOS."""
    ends = end_ids(loaded)
    pad = loaded.tokenizer.pad_token_id
    return {
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        "num_beams": 1,
        "eos_token_id": ends,
        "pad_token_id": ends[0] if pad is None else pad,
    }


def end_ids(loaded: LoadedModel) -> list[int]:
    """The ids that end an answer: the model's own and the tokenizer's EOS."""
    own = loaded.model.generation_config.eos_token_id
    ids = {loaded.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    return sorted(i for i in ids if i is not None)


def _answer(
    loaded: LoadedModel, batch: EncodedBatch, ids: Tensor, ends: Collection[int]
) -> tuple[int, ...] | None:
    """The new tokens up to EOS without special ones; None if the answer does not end."""
    new = ids[batch.inputs["input_ids"].shape[1] :].tolist()
    stop = next((i for i, token in enumerate(new) if token in ends), None)
    if stop is None:
        return None
    special = set(loaded.tokenizer.all_special_ids)
    return tuple(token for token in new[:stop] if token not in special)
