"""Which patch of its picture every pixel that a vision tower reads belongs to.

Patches are the tower's own, counted over the picture as a person sees it: where several image
tokens' patches are merged (Qwen-VL, Gemma 3, InternVL) there are more of them than image tokens.
Where a picture is read in pieces (tiles, and the whole of it seen small) each piece's pixels are
put where they lie in the picture; the grid is that of the finest piece. The layouts are those of
transformers 5's processors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sparsify_vlm.errors import UserError
from sparsify_vlm.models.patches import ImageLayout, Inputs, anyres_grid, image_sizes

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PixelGrid:
    """Patches of a batch's pictures, one picture after the other, row by row.

    Attributes:
        sizes: (rows, columns) of every picture.
        cells: the patch of every pixel, -1 for what is no part of a picture (padding); int64, of
            the pixels' shape without their channels.
    """

    sizes: list[tuple[int, int]]
    cells: Tensor

    @property
    def n_patches(self) -> int:
        """Patches of all pictures together."""
        return sum(rows * columns for rows, columns in self.sizes)

    def sums(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of `values`, of the pixels' shape, by patch [n_patches], and of what is in none."""
        channels = (
            -1 if values.ndim == 2 else -3
        )  # flattened patches [n, values], or [..., 3, H, W]
        by_pixel = values.sum(channels).flatten()
        out = by_pixel.new_zeros(self.n_patches + 1)
        out.index_add_(0, self.cells.flatten().to(out.device) + 1, by_pixel)
        return out[1:], out[0]


def pixel_grid(layout: ImageLayout, inputs: Inputs) -> PixelGrid:
    """The patches of a processor's batch of one prompt.

    Raises `UserError` where there is no picture, or its pixels have no known places.
    """
    kind = layout.config.model_type
    pixels = inputs.get("pixel_values")
    if pixels is None:
        raise UserError("the prompt has no picture (pixel_values) to attribute to")
    if kind not in _FAMILIES:
        raise UserError(
            f"where the pixels of {kind} models lie in their picture is not known; it is for "
            f"{', '.join(sorted(_FAMILIES))}"
        )
    placed = _FAMILIES[kind](layout, inputs, pixels)
    first, cells = 0, []
    for piece, (rows, columns) in zip(placed.pieces, placed.sizes, strict=True):
        cells.append(torch.where(piece >= 0, piece + first, piece))
        first += rows * columns
    joined = torch.cat([piece.reshape(-1, *placed.shape[1:]) for piece in cells])
    return PixelGrid(placed.sizes, joined.reshape(placed.shape))


@dataclass
class _Placed:
    """sizes of the pictures, the pixels of each with their patch within it, and the shape of all
    pixels without channels, along whose first axis the pictures' follow one another."""

    sizes: list[tuple[int, int]]
    pieces: list[Tensor]
    shape: tuple[int, ...]


def _block(
    height: int,
    width: int,
    size: tuple[int, int],
    step: tuple[float, float],
    start: tuple[float, float] = (0.0, 0.0),
) -> Tensor:
    """Patches [height, width] of pixels of which `step` (down, across) make a patch of the picture
    with `size` patches, the first pixel `start` patches from its corner; -1 beyond it."""
    (rows, columns), (down, across) = size, step
    row = ((torch.arange(height) + 0.5) / down + start[0]).floor().long()[:, None]
    column = ((torch.arange(width) + 0.5) / across + start[1]).floor().long()[None]
    inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
    return torch.where(inside, row * columns + column, -1)


def _patch_size(config: Any) -> tuple[int, int]:
    size = config.vision_config.patch_size
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _single(layout: ImageLayout, inputs: Inputs, pixels: Tensor) -> _Placed:
    """One picture after the other [n, 3, H, W], padded at their ends where they differ in size."""
    (down, across), (H, W) = _patch_size(layout.config), pixels.shape[-2:]
    shown = image_sizes(inputs) or [(H, W)] * len(pixels)
    sizes = [(height // down, width // across) for height, width in shown]
    pieces = [_block(H, W, size, (down, across)) for size in sizes]
    return _Placed(sizes, pieces, (len(pixels), H, W))


def _internvl(layout: ImageLayout, inputs: Inputs, pixels: Tensor) -> _Placed:
    if len(pixels) != int(layout.images(inputs).max()) + 1:
        raise UserError(
            "the batch does not tell how an InternVL picture was cut into tiles: show it in one "
            "(a smaller picture, or crop_to_patches false in its processor)"
        )
    return _single(layout, inputs, pixels)


def _anyres(layout: ImageLayout, inputs: Inputs, pixels: Tensor) -> _Placed:
    """LLaVA-NeXT and OneVision: [n, pieces, 3, s, s], the whole picture squeezed into a square,
    then tiles of it scaled to fit their grid and padded on two sides."""
    sizes, pieces, (n_pieces, side) = [], [], (pixels.shape[1], pixels.shape[-1])
    counts = inputs.get("batch_num_images")
    alone = counts is None or all(int(n) == 1 for n in counts)
    for height, width in image_sizes(inputs):
        if not alone:  # of several pictures in one sample only the squares are read
            square = side // _patch_size(layout.config)[0]
            sizes.append((square, square))
            tiles = torch.full((n_pieces - 1, side, side), -1)
        else:
            sizes.append(anyres_grid(layout.config, (height, width)))
            tiles = _tiles(layout.config, (height, width), sizes[-1], side)
        rows, columns = sizes[-1]
        whole = _block(side, side, (rows, columns), (side / rows, side / columns))
        piece = torch.cat([whole[None], tiles])
        missing = torch.full((n_pieces - len(piece), side, side), -1)
        pieces.append(torch.cat([piece, missing])[None])
    return _Placed(sizes, pieces, (len(pixels), n_pieces, side, side))


def _tiles(config: Any, image: tuple[int, int], size: tuple[int, int], side: int) -> Tensor:
    """[tiles, side, side] of one picture of `image` pixels. Formula: transformers'
    `get_patch_output_size` and its padding."""
    from transformers.image_processing_utils import select_best_resolution

    best = select_best_resolution(image, config.image_grid_pinpoints)
    scale = min(best[0] / image[0], best[1] / image[1])
    if best[1] / image[1] < best[0] / image[0]:
        filled = (min(math.ceil(image[0] * scale), best[0]), best[1])
    else:
        filled = (best[0], min(math.ceil(image[1] * scale), best[1]))
    padded = [(b - f) // 2 for b, f in zip(best, filled, strict=True)]
    step = (filled[0] / size[0], filled[1] / size[1])
    return torch.stack(
        [
            _block(
                side, side, size, step, ((top - padded[0]) / step[0], (left - padded[1]) / step[1])
            )
            for top in range(0, best[0], side)
            for left in range(0, best[1], side)
        ]
    )


def _idefics(layout: ImageLayout, inputs: Inputs, pixels: Tensor) -> _Placed:
    """Idefics3 and SmolVLM: [1, tiles, 3, s, s], tiles row by row, then the whole seen small."""
    H, W = pixels.shape[-2:]
    down, across = _patch_size(layout.config)
    sizes, pieces = [], []
    for places in layout.tile_places(inputs):
        rows, columns = (1 + max((p[i] for p in places if p), default=0) for i in (0, 1))
        size = (rows * H // down, columns * W // across)
        sizes.append(size)
        pieces.append(
            torch.stack(
                [
                    _block(H, W, size, (H / size[0], W / size[1]))
                    if place is None
                    else _block(
                        H, W, size, (down, across), (place[0] * H / down, place[1] * W / across)
                    )
                    for place in places
                ]
            )
        )
    return _Placed(sizes, pieces, (sum(len(piece) for piece in pieces), H, W))


def _merged(layout: ImageLayout, inputs: Inputs, pixels: Tensor) -> _Placed:
    """Qwen-VL and GLM-V: flattened patches [n, values], those that become one token together."""
    merge = layout.config.vision_config.spatial_merge_size
    sizes, pieces = [], []
    for time, rows, columns in inputs["image_grid_thw"].tolist():
        cells = torch.arange(rows * columns).view(rows // merge, merge, columns // merge, merge)
        sizes.append((rows, columns))
        pieces.append(cells.transpose(1, 2).flatten().repeat(time))
    return _Placed(sizes, pieces, (len(pixels),))


_FAMILIES: dict[str, Callable[[ImageLayout, Inputs, Tensor], _Placed]] = {
    "internvl": _internvl,
    "llava_next": _anyres,
    "llava_onevision": _anyres,
    "idefics3": _idefics,
    "smolvlm": _idefics,
}
_FAMILIES |= dict.fromkeys(("llava", "mistral3", "gemma3", "paligemma"), _single)
_FAMILIES |= dict.fromkeys(
    ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "glm4v", "glm4v_moe"), _merged
)
