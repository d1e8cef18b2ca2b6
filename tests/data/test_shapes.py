"""The shapes scenes: answers, ground truth and splits, checked against pixels and plain parsing."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from sparsify_vlm.data.shapes import (
    ANSWERS,
    GRID,
    QUESTION_TYPES,
    ShapesDataset,
    cell_patches,
    draw_scene,
    object_mask,
    object_patches,
    render_array,
)
from sparsify_vlm.errors import UserError

_NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
_PLACES = {
    f"{row} {column}".strip(): (r, c)
    for r, row in enumerate(("top", "", "bottom"))
    for c, column in enumerate(("left", "", "right"))
} | {"center": (1, 1)}


def _kinds(row):
    return [(o.colour, o.shape) for o in row["scene"].objects]


def _independent_answer(question: str, kinds: list[tuple[str, str]]) -> str:
    """The answer worked out from the question's words alone."""
    if match := re.fullmatch(r"what colour is the (\w+)\?", question):
        (colour,) = [c for c, s in kinds if s == match[1]]
        return colour
    if match := re.fullmatch(r"what shape is the (\w+) one\?", question):
        (shape,) = [s for c, s in kinds if c == match[1]]
        return shape
    if question == "how many shapes are there?":
        return _NUMBERS[len(kinds)]
    match = re.fullmatch(r"is there an? (\w+) (\w+)\?", question)
    return "yes" if (match[1], match[2]) in kinds else "no"


@pytest.fixture(scope="module")
def rows():
    return list(ShapesDataset("heldout", 400, seed=3))


def test_answers_follow_from_the_scene(rows):
    for row in rows:
        assert row["answer"] == _independent_answer(row["question"], _kinds(row))
        assert row["answer"] in ANSWERS[row["type"]]


def test_a_row_depends_on_split_seed_and_index_alone():
    one, other = ShapesDataset("train", 50, seed=1), ShapesDataset("train", 9, seed=1)
    late_first = [other[i] for i in reversed(range(9))][::-1]
    for row, again in zip((one[i] for i in range(9)), late_first, strict=True):
        assert (row["scene"], row["question"], row["id"]) == (
            again["scene"],
            again["question"],
            again["id"],
        )
        assert row["image"].tobytes() == again["image"].tobytes()
    reseeded = ShapesDataset("train", 9, seed=2)
    assert [r["scene"] for r in reseeded] != [r["scene"] for r in other]


def test_splits_share_no_multiset_of_kinds(rows):
    held_out = {tuple(sorted(_kinds(row))) for row in rows}
    trained = {tuple(sorted(_kinds(row))) for row in ShapesDataset("train", 2000, text_only=True)}
    assert not held_out & trained


def test_types_take_turns_and_answers_are_balanced():
    rows = list(ShapesDataset("train", 4000, text_only=True))
    assert Counter(row["type"] for row in rows) == dict.fromkeys(QUESTION_TYPES, 1000)
    for kind in QUESTION_TYPES:
        shares = Counter(row["answer"] for row in rows if row["type"] == kind)
        uniform = 1 / len(ANSWERS[kind])
        for answer in ANSWERS[kind]:  # five standard errors
            spread = 5 * (uniform * (1 - uniform) / 1000) ** 0.5
            assert shares[answer] / 1000 == pytest.approx(uniform, abs=spread), (kind, answer)


def test_half_of_the_no_questions_recombine_what_is_there():
    rows = [r for r in ShapesDataset("train", 3000, text_only=True) if r["answer"] == "no"]
    recombined = 0
    for row in rows:
        _, colour, shape = row["question"].rstrip("?").rsplit(" ", 2)
        recombined += any(c == colour for c, _ in _kinds(row)) and any(
            s == shape for _, s in _kinds(row)
        )
    assert 0.3 < recombined / len(rows) < 0.7


def test_masks_are_where_the_pixels_are_coloured():
    rng = np.random.default_rng(0)
    for _ in range(100):
        scene = draw_scene(rng, "train")
        pixels = render_array(scene).astype(int)
        saturation = pixels.max(-1) - pixels.min(-1)
        inside = np.zeros_like(saturation, dtype=bool)
        for item in scene.objects:
            mask, cell = object_mask(item), np.s_[16 * item.row :, 16 * item.column :]
            half_covered = saturation[cell][:16, :16] > (max(item.rgb) - min(item.rgb)) / 2
            wrong = half_covered != mask[cell][:16, :16]
            assert wrong.sum() <= 0.1 * mask.sum()  # pixel noise at the edge only
            assert not (inside & mask).any()  # objects never overlap
            inside |= mask
        assert (saturation[inside] > 45).all()
        assert (saturation[~inside] < 125).all()


def test_patches_hold_the_object_and_lie_in_its_cell():
    rng = np.random.default_rng(1)
    for _ in range(100):
        for item in draw_scene(rng, "heldout").objects:
            patches = set(object_patches(item))
            expected = {(y // 8, x // 8) for y, x in np.argwhere(object_mask(item)).tolist()}
            assert patches == expected
            assert patches <= set(cell_patches(item.cell))
            assert (item.row, item.column) == divmod(item.cell, GRID)


def test_cells_tile_the_patch_grid():
    tiles = [patch for cell in range(9) for patch in cell_patches(cell)]
    assert sorted(tiles) == [(r, c) for r in range(6) for c in range(6)]
    assert cell_patches(5) == ((2, 4), (2, 5), (3, 4), (3, 5))


def test_asked_objects_are_those_of_the_question(rows):
    data = ShapesDataset("heldout", 400, seed=3)
    for index in range(100):
        row, asked = rows[index], data.question(index).asked
        kinds = _kinds(row)
        if row["type"] == "count":
            assert asked == tuple(range(len(kinds)))
        elif row["type"] == "existence":
            assert bool(asked) == (row["answer"] == "yes")
        else:
            (one,) = asked
            assert row["answer"] in kinds[one]
        if row["type"] != "count":
            words = set(row["question"].rstrip("?").split())
            assert all(words & set(kinds[i]) for i in asked)


def test_the_told_scene_says_what_is_where():
    seen, told = (
        ShapesDataset("heldout", 60, seed=5),
        ShapesDataset("heldout", 60, seed=5, text_only=True),
    )
    for row, in_words in zip(seen, told, strict=True):
        assert "image" not in in_words
        description, question = re.fullmatch(
            r"there is (.*)\. ([^.]*\?)", in_words["question"]
        ).groups()
        assert question == row["question"]
        found = []
        for part in description.split(", "):
            colour, shape, place = re.fullmatch(r"an? (\w+) (\w+) at the (.+)", part).groups()
            found.append((colour, shape, *_PLACES[place]))
        assert found == [(o.colour, o.shape, o.row, o.column) for o in row["scene"].objects]


def test_every_object_shows_its_named_colour():
    names = {
        "red": (214, 40, 40),
        "green": (44, 160, 60),
        "blue": (36, 84, 205),
        "yellow": (240, 205, 24),
        "purple": (140, 55, 190),
        "orange": (245, 130, 30),
    }
    rng = np.random.default_rng(2)
    for _ in range(100):
        scene = draw_scene(rng, "train")
        pixels = render_array(scene).astype(float)
        for item in scene.objects:
            shown = np.median(pixels[object_mask(item)], axis=0)
            nearest = min(names, key=lambda name: np.abs(shown - names[name]).sum())
            assert nearest == item.colour


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"split": "test"}, "train, heldout"),
        ({"size": -1}, "-1 rows"),
        ({"types": ("position",)}, "position"),
        ({"types": ()}, "questions"),
    ],
)
def test_what_it_cannot_give_is_one_clear_line(arguments, said):
    with pytest.raises(UserError, match=said):
        ShapesDataset(**arguments)


def test_rows_outside_the_data_set_are_an_index_error():
    data = ShapesDataset("train", 3)
    assert len(list(data)) == 3
    for index in (3, -1):
        with pytest.raises(IndexError):
            data[index]


def test_scenes_need_neither_torch_nor_transformers():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None;"
        "import sparsify_vlm.data.shapes as s; print(s.ShapesDataset('train', 1)[0]['answer'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
