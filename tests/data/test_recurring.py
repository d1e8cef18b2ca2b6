"""Prompts that come again get the inputs that the processor itself gives for the batch."""

from __future__ import annotations

import families
import pytest
import torch
from PIL import Image

from sparsify_vlm.data import recurring
from sparsify_vlm.data.prompts import Prompt, Prompter
from sparsify_vlm.models import LoadedModel, load_model

ASKED = ["what colour is the circle?", "how many?", "is there a red cross?"]


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load_model("tiny-llava")


def batch(*rows: tuple[int, int, int]) -> tuple[list[Prompt], list[list[Image.Image]]]:
    """Rows (question, images, side of the images)."""
    prompts = [Prompt("<image>\n" * n + ASKED[question]) for question, n, _ in rows]
    shown = [
        [families.picture(side, side, 10 * i + j) for j in range(n)]
        for i, (_, n, side) in enumerate(rows)
    ]
    return prompts, shown


BATCHES = [
    batch((0, 1, 48), (1, 1, 48), (0, 1, 48)),
    batch((1, 1, 48), (1, 1, 48)),  # nothing new, and a shorter row than before
    batch((2, 1, 48), (0, 1, 48), (1, 2, 48), (1, 1, 30)),
    batch((1, 1, 30), (1, 2, 48)),
]


def agree(prompter: Prompter, loaded: LoadedModel, adds: bool = True) -> None:
    assert prompter.recurring is not None
    for prompts, shown in BATCHES:
        ours = prompter.recurring(prompts, shown, adds)
        theirs = loaded.processor(
            text=[prompt.text for prompt in prompts],
            images=shown,
            padding=True,
            padding_side="right",
            return_tensors="pt",
            add_special_tokens=adds,
        )
        assert list(ours) == list(theirs)
        for name, value in theirs.items():
            assert torch.equal(ours[name], value), name
            assert ours[name].dtype == value.dtype
            assert ours[name].is_contiguous()


def test_the_batch_is_the_processors_own(tiny: LoadedModel) -> None:
    prompter = Prompter.of(tiny)
    agree(prompter, tiny)
    agree(prompter, tiny, adds=False)  # not what was remembered with special tokens
    agree(prompter, tiny)


def test_a_full_memory_changes_nothing(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recurring, "REMEMBERED", 2)
    agree(Prompter.of(tiny), tiny)


def test_known_prompts_are_not_tokenised_again(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    whole = Prompter.whole

    def counted(self: Prompter, prompts: list[Prompt], *rest: object) -> object:
        asked.append([prompt.text for prompt in prompts])
        return whole(self, prompts, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Prompter, "whole", counted)
    prompter = Prompter.of(tiny)
    assert prompter.recurring is not None
    for prompts, shown in BATCHES[:3]:
        prompter.recurring(prompts, shown, True)
    one, two = "<image>\n", "<image>\n<image>\n"
    assert asked == [
        [one + ASKED[0], one + ASKED[1]],
        [one + ASKED[2], two + ASKED[1], one + ASKED[1]],
    ]


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl", "gemma3"])
def test_other_processors_see_every_prompt(family: str) -> None:
    assert Prompter.of(families.shared(family)).recurring is None
