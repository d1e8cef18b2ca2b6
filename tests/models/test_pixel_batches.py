"""Images taken at once come out as transformers' own steps give them, one image after the other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sparsify_vlm.models import load_model
from sparsify_vlm.models.pixel_batches import in_batches
from sparsify_vlm.models.processors import idle_steps

MEAN, STD = [0.48, 0.45, 0.4], [0.26, 0.27, 0.28]


@pytest.fixture
def processor() -> Any:
    """tiny-llava's, with other numbers for every channel."""
    made = load_model("tiny-llava").processor
    made.image_processor.image_mean, made.image_processor.image_std = MEAN, STD
    return made


def _images(*sizes: tuple[int, int], mode: str = "RGB") -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)
        for width, height in sizes
    ]


def _calls(steps: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that the step `name` is called with from now on."""
    shapes: list[tuple[int, ...]] = []
    step = getattr(steps, name)

    def counted(image: np.ndarray, *args: Any, **kwargs: Any) -> np.ndarray:
        shapes.append(image.shape)
        return np.asarray(step(image, *args, **kwargs))

    monkeypatch.setattr(steps, name, counted)
    return shapes


def test_a_batch_is_taken_at_once_with_the_same_bits(
    processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = _images(*[(48, 48)] * 5)
    off = idle_steps(processor, images)
    whole = processor.image_processor(images, return_tensors="pt", **off)["pixel_values"]
    quick = in_batches(processor).image_processor
    shapes = _calls(quick, "normalize", monkeypatch)
    found = quick(images, return_tensors="pt", **off)["pixel_values"]
    assert shapes == [(3, 5 * 48, 48)]
    assert found.is_contiguous()
    assert torch.equal(found, whole)
    assert found.dtype == whole.dtype
    values = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).double() / 255
    mean, std = (torch.tensor(v).double()[:, None, None] for v in (MEAN, STD))
    assert torch.allclose(found.double(), (values - mean) / std, atol=1e-6)


@pytest.mark.parametrize(
    ("images", "steps"),
    [
        (_images((48, 48), (48, 48)), {}),
        (_images((30, 48), (90, 20)), {}),
        (_images((30, 48), (30, 48)), {"do_resize": False}),
        (_images((48, 48), (48, 48), mode="L"), {}),
        (_images((48, 48), (48, 48)), {"do_rescale": False, "do_resize": False}),
        (_images((20, 10), (20, 10)), {"do_normalize": False, "do_resize": False}),
        (_images((20, 10), (20, 10)), {"do_resize": False, "do_center_crop": False}),
    ],
)
def test_whatever_has_to_be_done_the_pixels_are_the_same(
    processor: Any, images: list[Image.Image], steps: dict[str, bool]
) -> None:
    whole = processor.image_processor(images, return_tensors="pt", **steps)["pixel_values"]
    found = in_batches(processor).image_processor(images, return_tensors="pt", **steps)
    assert torch.equal(found["pixel_values"], whole)


def test_nested_images_and_text_go_through_the_processor(processor: Any) -> None:
    images = _images(*[(48, 48)] * 2)
    text = ["USER: <image>\nhow many?", "<image> what?"]
    given = {"text": text, "images": [[i] for i in images], "padding": True, "return_tensors": "pt"}
    off = idle_steps(processor, images)
    whole, found = processor(**given, **off), in_batches(processor)(**given, **off)
    assert whole.keys() == found.keys()
    assert all(torch.equal(whole[key], found[key]) for key in whole)


def test_processors_with_steps_of_their_own_are_left_alone(processor: Any) -> None:
    class Own(type(processor.image_processor)):  # type: ignore[misc]
        def normalize(self, image: np.ndarray, *_: Any, **__: Any) -> np.ndarray:
            return image

    processor.image_processor.__class__ = Own
    assert in_batches(processor) is processor
    tokenizer = processor.tokenizer
    assert in_batches(tokenizer) is tokenizer
