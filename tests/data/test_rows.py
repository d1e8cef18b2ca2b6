from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sparsify_vlm.data.config import DataConfig
from sparsify_vlm.data.images import BadSample
from sparsify_vlm.data.rows import Sample, Turn, recognise, to_sample
from sparsify_vlm.errors import UserError


def read(row: dict[str, Any], **flags: Any) -> Sample:
    columns = recognise(row.keys(), DataConfig(**flags), "rows.json")
    return to_sample(row, columns, "rows.json#0", Path("/data"))


def user(text: str, n_images: int = 0) -> Turn:
    return Turn("user", text, n_images)


def assistant(text: str) -> Turn:
    return Turn("assistant", text)


LLAVA = {
    "id": "000",
    "image": "coco/0.jpg",
    "conversations": [
        {"from": "human", "value": "What is this?\n<image>"},
        {"from": "gpt", "value": "A bus."},
        {"from": "human", "value": "Its colour?"},
        {"from": "gpt", "value": "Red."},
    ],
}
CAULDRON = {
    "images": [{"bytes": b"x", "path": None}],
    "texts": [
        {"user": "What is this?", "assistant": "A bus.", "source": "VQAv2"},
        {"user": "Its colour?", "assistant": "Red.", "source": "VQAv2"},
    ],
}
MESSAGES = {
    "images": ["0.jpg"],
    "messages": [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "A bus."}]},
    ],
}
TWO_TURNS = (user("What is this?", 1), assistant("A bus."), user("Its colour?"), assistant("Red."))
SHAPES: list[tuple[dict[str, Any], tuple[Turn, ...]]] = [
    (LLAVA, TWO_TURNS),
    (CAULDRON, TWO_TURNS),
    (MESSAGES, (Turn("system", "Be brief."), user("What is this?", 1), assistant("A bus."))),
    (
        {"image": "0.jpg", "question": "Colour?", "answer": "red"},
        (user("Colour?", 1), assistant("red")),
    ),
    (
        {"image": "0.jpg", "question": "How many?", "answer": 3},
        (user("How many?", 1), assistant("3")),
    ),
    (
        {"id": 1, "image": "AMBER_1.jpg", "query": "Describe this image."},
        (user("Describe this image.", 1),),
    ),
    ({"image": "0.jpg", "text": "A red bus."}, (user("", 1), assistant("A red bus."))),
    ({"image": "0.jpg", "caption": ["A bus.", "Red."]}, (user("", 1), assistant("A bus."))),
    ({"image": "0.jpg", "label": 3}, (user("", 1),)),
    ({"file_name": "0.jpg"}, (user("", 1),)),
    ({"question": "Colour?", "answer": "red"}, (user("Colour?"), assistant("red"))),
    ({"instruction": "Say red.", "response": "red"}, (user("Say red."), assistant("red"))),
    ({"image": ["0.jpg", "1.jpg"], "question": "Same?"}, (user("Same?", 2),)),
    ({"images": ["0.jpg", "1.jpg"], "question": "<image>a<image>?"}, (user("a?", 2),)),
]


@pytest.mark.parametrize(("row", "turns"), SHAPES)
def test_rows_are_known_by_their_columns(row: dict[str, Any], turns: tuple[Turn, ...]) -> None:
    sample = read(row)
    assert sample.turns == turns
    assert sum(turn.n_images for turn in turns) == len(sample.images)
    assert sample.kind == "chat"


def test_images_of_several_turns_stay_with_their_turn() -> None:
    turns = [
        {"from": "human", "value": "<image>\nThis?"},
        {"from": "gpt", "value": "A bus."},
        {"from": "human", "value": "<image> <image> Those?"},
        {"from": "gpt", "value": "Cars."},
    ]
    sample = read({"image": ["0.jpg", "1.jpg", "2.jpg"], "conversations": turns})
    assert [turn.n_images for turn in sample.turns] == [1, 0, 2, 0]
    assert [turn.text for turn in sample.turns] == ["This?", "A bus.", "Those?", "Cars."]


def test_paths_are_relative_to_the_file() -> None:
    assert read(LLAVA).images[0].path == "/data/coco/0.jpg"


def test_a_conversation_may_have_no_image() -> None:
    row = LLAVA | {"image": None, "conversations": LLAVA["conversations"][2:]}
    assert read(row).turns == TWO_TURNS[2:]


def test_of_ten_answers_the_most_frequent_is_taken() -> None:
    answers = [{"answer": a, "answer_id": i} for i, a in enumerate(["blue", "red", "red", "blue"])]
    row = {"image": "0.jpg", "question": "Colour?", "answers": answers}
    assert read(row).answer == "blue"  # the first of equals
    assert read(row | {"answers": [*answers, {"answer": "red"}]}).answer == "red"
    assert read(row | {"multiple_choice_answer": "green"}).answer == "green"


def test_the_answer_can_be_taken_off() -> None:
    sample = read(LLAVA)
    assert sample.answer == "Red."
    assert sample.without_answer().turns == TWO_TURNS[:-1]
    assert sample.without_answer().answer is None
    assert sample.without_answer().without_answer() == sample.without_answer()


def test_plain_text_and_tokens() -> None:
    assert read({"text": "Once.", "meta": 1}).text == "Once."
    assert read({"title": "T", "text": "Once.", "prompt": "?"}).kind == "text"
    assert read({"input_ids": [1, 2, 3], "text": "x"}).input_ids == (1, 2, 3)


def test_a_text_with_an_image_mark_is_a_whole_prompt() -> None:
    sample = read({"image": "0.jpg", "text": "USER: <image>\nWhat? ASSISTANT:"})
    assert sample.text == "USER: <image>\nWhat? ASSISTANT:"
    assert len(sample.images) == 1


def test_flags_name_columns() -> None:
    row = {"photo": "0.jpg", "q": "Colour?", "a": "red", "text": "noise", "question": "other"}
    flags = {"image_column": "photo", "question_column": "q", "answer_column": "a"}
    assert read(row, **flags).turns == (user("Colour?", 1), assistant("red"))
    assert read(row, text_column="text").text == "noise"
    assert (
        read(LLAVA | {"dialog": CAULDRON["texts"]}, conversations_column="dialog").turns
        == TWO_TURNS
    )


def test_the_question_type_is_kept() -> None:
    assert read({"question": "?", "answer": "1", "type": "count"}).type == "count"


def test_an_unknown_flag_lists_the_columns() -> None:
    with pytest.raises(UserError, match=r"--image_column photo.*rows\.json.*image, question"):
        recognise(["image", "question"], DataConfig(image_column="photo"), "rows.json")


def test_unknown_rows_say_how_to_name_their_columns() -> None:
    with pytest.raises(UserError, match=r"rows\.json.*columns bar, foo.*--question_column"):
        recognise(["foo", "bar"], DataConfig(), "rows.json")


BAD: list[tuple[dict[str, Any], str]] = [
    (LLAVA | {"conversations": [{"from": "narrator", "value": "x"}]}, "unknown speaker 'narrator'"),
    (LLAVA | {"conversations": []}, "expected a list of turns, one at least"),
    (LLAVA | {"image": ["0.jpg", "1.jpg"]}, "2 images but 1 <image> marks"),
    (LLAVA | {"image": None}, "0 images but 1 <image> marks"),
    (LLAVA | {"image": 5}, "int, not an image"),
    ({"image": None, "caption": "x"}, "holds no image"),
    ({"image": "0.jpg", "question": None}, "expected text, found NoneType"),
    ({"input_ids": []}, "no tokens"),
    (CAULDRON | {"texts": [{"user": 5, "assistant": "x"}]}, "expected text, found int"),
    (CAULDRON | {"texts": [{"user": "x", "assistant": None}]}, "expected text, found NoneType"),
    (LLAVA | {"conversations": [5]}, "not a conversation row"),
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_a_bad_row_is_named(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadSample, match=reason) as caught:
        read(row)
    assert str(caught.value).startswith("rows.json#0: ")
    assert "\n" not in str(caught.value)
