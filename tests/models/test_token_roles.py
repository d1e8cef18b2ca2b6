"""Token roles, and where in its image each image token lies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, TEXTS, VLMS, example, picture, shared
from PIL import Image
from torch import Tensor

from sparsify_vlm.errors import UserError
from sparsify_vlm.models import ROLE_NAMES, LoadedModel, Role
from sparsify_vlm.models.patches import _FAMILIES as FAMILIES_WITH_GRID
from sparsify_vlm.models.patches import unpadded_grid
from sparsify_vlm.models.roles import image_token_id

MARKS = {Role.PAD: ".", Role.IMAGE: "i", Role.TEXT: "t", Role.SPECIAL: "s"}


def told(loaded: LoadedModel, inputs: dict[str, Any]) -> list[str]:
    """One letter per token and row."""
    return ["".join(MARKS[Role(r)] for r in row) for row in loaded.stack.roles(inputs).tolist()]


def cells(loaded: LoadedModel, inputs: dict[str, Any], row: int) -> list[tuple[int, int]]:
    """Patches of one sample's image tokens, in order."""
    patches = loaded.stack.patches(inputs)[row]
    image = loaded.stack.roles(inputs)[row] == Role.IMAGE
    assert (patches[~image] == -1).all()
    return [(int(r), int(c)) for r, c in patches[image]]


def full(rows: int, cols: int) -> list[tuple[int, int]]:
    """Every cell of a grid, row by row."""
    return [(r, c) for r in range(rows) for c in range(cols)]


def with_newlines(rows: int, cols: int) -> list[tuple[int, int]]:
    """A grid with a token that is no patch after every row."""
    return [cell for r in range(rows) for cell in [*((r, c) for c in range(cols)), (-1, -1)]]


NONE = (-1, -1)
TEXT_1, TEXT_2 = 13, 5  # words of the two prompts of `example`

# Two pictures, 40 × 24 and 24 × 32 (width × height), by hand from each processor's rules.
EXPECTED: dict[str, tuple[list[str], list[list[tuple[int, int]]]]] = {
    # 32 × 32, patches of 8: 4 × 4.
    "llava": (["s" + "i" * 16, "s" + "i" * 16], [full(4, 4)] * 2),
    # 4 × 4 thumbnail. 40 × 24 fits 64 × 32 as 53 × 32: 6.7 of 8 columns, cut to 6. 24 × 32 fits
    # 64 × 32 as it is: 3 of 8 columns, cut to 4.
    "llava_next": (
        ["s" + "i" * 16 + "i" * 4 * 7, "s" + "i" * 16 + "i" * 4 * 5],
        [[NONE] * 16 + with_newlines(4, 6), [NONE] * 16 + with_newlines(4, 4)],
    ),
    "llava_onevision": (
        ["i" * 16 + "i" * 4 * 7, "i" * 16 + "i" * 4 * 5],
        [[NONE] * 16 + with_newlines(4, 6), [NONE] * 16 + with_newlines(4, 4)],
    ),
    # Patches of 4 merged 2 × 2: 40 × 24 gives 5 columns and 3 rows, 24 × 32 gives 3 and 4.
    "qwen2_5_vl": (["s" + "i" * 15 + "s", "s" + "i" * 12 + "s"], [full(3, 5), full(4, 3)]),
    "qwen3_vl": (["s" + "i" * 15 + "s", "s" + "i" * 12 + "s"], [full(3, 5), full(4, 3)]),
    # The same.
    "glm4v": (["s" + "i" * 15 + "s", "s" + "i" * 12 + "s"], [full(3, 5), full(4, 3)]),
    # 16 patches averaged to 4; two newlines of text on either side.
    "gemma3": (["stt" + "siiiis" + "tt"] * 2, [full(2, 2)] * 2),
    # BOS stands behind the image, a newline behind the text.
    "paligemma": (["i" * 16 + "s"] * 2, [full(4, 4)] * 2),
    "paligemma2": (["i" * 16 + "s"] * 2, [full(4, 4)] * 2),
    # Two tiles and a thumbnail of 2 × 2 each: no place known; one tile.
    "internvl": (["s" + "i" * 12 + "s", "s" + "i" * 4 + "s"], [[NONE] * 12, full(2, 2)]),
    "mistral3": (["s" + "iiiiis" * 3, "s" + "iiis" * 4], [full(3, 5), full(4, 3)]),
    "pixtral": (["s" + "iiiiis" * 3, "s" + "iiis" * 4], [full(3, 5), full(4, 3)]),
}
# 64 × 64 cut into 2 × 2 tiles of 2 × 2 tokens, then the whole image as 2 × 2.
_TILED = [
    (r + 2 * tile_r, c + 2 * tile_c) for tile_r, tile_c in full(2, 2) for r, c in full(2, 2)
] + [NONE] * 4
_ROW = "ssiiii" * 2 + "t"
EXPECTED |= dict.fromkeys(
    ["smolvlm", "idefics3"], (["s" + _ROW * 2 + "t" + "ssiiiis"] * 2, [_TILED] * 2)
)


@pytest.mark.parametrize("name", VLMS)
def test_roles_and_patches_by_hand(name: str) -> None:
    loaded = shared(name)
    inputs = example(loaded)
    fronts, grids = EXPECTED[name]
    tail = "t" if name.startswith("paligemma") else ""
    rows = [f + "t" * n + tail for f, n in zip(fronts, (TEXT_1, TEXT_2), strict=True)]
    width = len(rows[0])
    assert told(loaded, inputs) == [row.ljust(width, ".") for row in rows]
    assert [cells(loaded, inputs, row) for row in (0, 1)] == grids
    images = loaded.stack.images(inputs)
    assert ((images == 0) == (loaded.stack.roles(inputs) == Role.IMAGE)).all()


@pytest.mark.parametrize("name", VLMS)
def test_padding_side_does_not_matter(name: str) -> None:
    loaded = shared(name)
    right, left = example(loaded), example(loaded, side="left")
    assert [row.strip(".") for row in told(loaded, left)] == [
        row.strip(".") for row in told(loaded, right)
    ]
    for row in (0, 1):
        assert cells(loaded, left, row) == cells(loaded, right, row)


@pytest.mark.parametrize("name", TEXTS)
def test_text_models_have_no_image_tokens(name: str) -> None:
    loaded = shared(name)
    assert told(loaded, example(loaded)) == ["s" + "t" * 13, "s" + "t" * 5 + "." * 8]
    assert (loaded.stack.patches(example(loaded)) == -1).all()
    assert (loaded.stack.images(example(loaded)) == -1).all()


def embeddings(loaded: LoadedModel, inputs: dict[str, Any]) -> Tensor:
    """What enters the decoder, [B, S, d]."""
    held: list[Tensor] = []
    hook = loaded.model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: held.append(kwargs["inputs_embeds"].clone()), with_kwargs=True
    )
    loaded.forward(inputs)
    hook.remove()
    return held[0]


SIDES = {"llava": 32, "llava_next": 64, "llava_onevision": 64, "qwen2_5_vl": 32, "qwen3_vl": 32}
SIDES |= {"gemma3": 32, "paligemma": 32, "internvl": 32, "smolvlm": 64, "mistral3": 40}


@pytest.mark.parametrize("name", SIDES)
def test_changing_a_patch_changes_its_token_most(name: str) -> None:
    """An intervention: repaint one cell of the picture; the token said to show it moves most."""
    loaded = shared(name)
    side = SIDES[name]
    base = np.asarray(picture(side, side, seed=3))

    def batch(pixels: Any) -> dict[str, Any]:
        prompt = [f"{FAMILIES[name].image} what is the thing ?"]
        options: dict[str, Any] = {"return_tensors": "pt"}
        return dict(loaded.processor(images=[[Image.fromarray(pixels)]], text=prompt, **options))

    inputs = batch(base)
    before = embeddings(loaded, inputs)[0]
    patches = loaded.stack.patches(inputs)[0]
    rows, cols = (patches.max(0).values + 1).tolist()
    placed = (patches[:, 0] >= 0).nonzero()[:, 0]
    assert len(placed) == rows * cols
    hits = []
    for row, col in full(rows, cols):
        changed = base.copy()
        changed[
            row * side // rows : (row + 1) * side // rows,
            col * side // cols : (col + 1) * side // cols,
        ] = 255
        moved = (embeddings(loaded, batch(changed))[0] - before).norm(dim=-1)
        best = placed[moved[placed].argmax()]
        hits.append(patches[best].tolist() == [row, col])
    assert np.mean(hits) >= 0.9


def test_two_images_in_one_sample() -> None:
    loaded = shared("qwen2_5_vl")
    image = FAMILIES["qwen2_5_vl"].image
    inputs = loaded.processor(
        images=[[picture(24, 16), picture(16, 24)], [picture(16, 16)]],
        text=[f"{image} {image} red", f"{image} red"],
        padding=True,
        return_tensors="pt",
        padding_side="right",
    )
    assert told(loaded, inputs) == ["s" + "i" * 6 + "ss" + "i" * 6 + "st", "siiiist" + "." * 10]
    images = loaded.stack.images(inputs)
    assert images[0].tolist() == [-1, *[0] * 6, -1, -1, *[1] * 6, -1, -1]
    assert images[1].tolist() == [-1, 0, 0, 0, 0, -1, -1] + [-1] * 10
    assert cells(loaded, inputs, 0) == full(2, 3) + full(3, 2)


def test_two_images_in_one_onevision_sample() -> None:
    """Several images of a sample are one square each, with one newline token."""
    loaded = shared("llava_onevision")
    inputs = loaded.processor(
        images=[[picture(24, 16), picture(16, 24)], [picture(32, 32)]],
        text=["<image> <image> red", "<image> red"],
        padding=True,
        return_tensors="pt",
        padding_side="right",
    )
    loaded.forward(inputs)
    assert cells(loaded, inputs, 0) == [*full(4, 4), NONE] * 2
    assert cells(loaded, inputs, 1) == [NONE] * 16 + with_newlines(4, 4)
    images = loaded.stack.images(inputs)[0]
    assert images[images >= 0].tolist() == [0] * 17 + [1] * 17


def test_two_tiled_images_in_one_sample() -> None:
    loaded = shared("smolvlm")
    inputs = loaded.processor(
        images=[[picture(64, 64), picture(64, 64)]],
        text=["<image> red <image>"],
        return_tensors="pt",
    )
    assert cells(loaded, inputs, 0) == _TILED * 2
    images = loaded.stack.images(inputs)
    assert images[images >= 0].tolist() == [0] * 20 + [1] * 20


def test_untiled_image_has_its_grid() -> None:
    loaded = shared("smolvlm")
    inputs = loaded.processor(
        images=[[picture(64, 64)]], text=["<image>"], return_tensors="pt", do_image_splitting=False
    )
    assert cells(loaded, inputs, 0) == full(2, 2)


def test_onevision_shrinks_a_large_grid() -> None:
    """96 × 96 is a 12 × 12 grid; `anyres_max_2` allows 32 cells, hence 5 × 5."""
    loaded = shared("llava_onevision")
    inputs = loaded.processor(images=[[picture(96, 96)]], text=["<image> red"], return_tensors="pt")
    loaded.forward(inputs)
    assert cells(loaded, inputs, 0) == [NONE] * 16 + with_newlines(5, 5)


@pytest.mark.parametrize(
    ("image", "rows", "cols", "expected"),
    [
        ((24, 40), 4, 8, (4, 6)),  # 40 · 4/24 = 6.67 columns of 8, cut to 6
        ((32, 24), 8, 4, (6, 4)),  # 32 · 4/24 = 5.33 rows of 8, cut to 6
        ((100, 100), 4, 4, (4, 4)),
        ((100, 400), 24, 48, (12, 48)),
    ],
)
def test_unpadding(image: tuple[int, int], rows: int, cols: int, expected: tuple[int, int]) -> None:
    assert unpadded_grid(image, rows, cols) == expected


@pytest.mark.parametrize("name", VLMS)
def test_cut_image_tokens_are_refused_before_the_model_runs(name: str) -> None:
    loaded = shared(name)
    inputs = example(loaded)
    length = 1 + int((loaded.stack.roles(inputs)[0] == Role.IMAGE).nonzero().max())
    per_token = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
    cut = {k: v[:, : length - 1] if k in per_token else v for k, v in inputs.items()}
    with pytest.raises(UserError, match=r"image tokens.*cut off.*ctx_len") as caught:
        loaded.forward(cut)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="image tokens"):
        loaded.stack.patches(cut)


def test_family_without_a_known_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """No patches then, and the model's own check of the number of image tokens in one line."""
    loaded = shared("llava")
    inputs = example(loaded)
    monkeypatch.delitem(FAMILIES_WITH_GRID, "llava")
    assert (loaded.stack.patches(inputs) == -1).all()
    cut = {k: v if k == "pixel_values" else v[:, :12] for k, v in inputs.items()}
    with pytest.raises(UserError, match="image tokens were cut off or added") as caught:
        loaded.forward(cut)
    assert "\n" not in str(caught.value)


def test_image_tokens_without_an_image_are_refused() -> None:
    loaded = shared("llava")
    inputs = {k: v for k, v in example(loaded).items() if k != "pixel_values"}
    with pytest.raises(UserError, match="32 image tokens, its images make 0"):
        loaded.forward(inputs)


def test_wrong_attention_mask_is_refused() -> None:
    loaded = shared("llama")
    inputs = example(loaded)
    inputs["attention_mask"] = inputs["attention_mask"][:, 1:]
    with pytest.raises(UserError, match=r"attention_mask has shape \(2, 13\)"):
        loaded.stack.roles(inputs)


def test_image_token_id_under_both_names() -> None:
    class Config:
        pass

    new, old, text = Config(), Config(), Config()
    new.image_token_id = 7  # type: ignore[attr-defined]
    old.image_token_index = 8  # type: ignore[attr-defined]
    assert [image_token_id(c) for c in (new, old, text)] == [7, 8, None]


def test_unknown_words_are_text_and_names_are_the_files() -> None:
    loaded = shared("llama")
    ids = torch.tensor([[loaded.tokenizer.bos_token_id, loaded.tokenizer.unk_token_id]])
    assert told(loaded, {"input_ids": ids}) == ["st"]
    assert ROLE_NAMES == {"pad": 0, "image": 1, "text": 2, "special": 3}
