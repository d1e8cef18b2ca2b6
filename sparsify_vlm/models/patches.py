"""Where in its image each image token lies.

A decoder sees an image as a run of image tokens. Which patch of the picture each stands for depends
on the family: one grid (LLaVA, Gemma 3, PaliGemma), a grid of merged patches (Qwen-VL, Mistral 3),
a thumbnail followed by a finer grid with a newline token per row (LLaVA-NeXT, LLaVA-OneVision), or
tiles (SmolVLM, InternVL). The grids follow the packing in the models of transformers 5.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from sparsify_vlm.errors import UserError
from sparsify_vlm.models.roles import attended

if TYPE_CHECKING:
    from torch import Tensor

Inputs = Mapping[str, Any]


def grid(rows: int, cols: int) -> Tensor:
    """(row, column) of every cell of a grid, row by row, int16 [rows * cols, 2]."""
    return torch.cartesian_prod(torch.arange(rows), torch.arange(cols)).view(-1, 2).short()


def nowhere(n: int) -> Tensor:
    """`n` tokens that stand for no patch, int16 [n, 2] of -1."""
    return torch.full((n, 2), -1, dtype=torch.int16)


def grid_with_newlines(rows: int, cols: int) -> Tensor:
    """A grid whose every row is followed by one newline token, int16 [rows * (cols + 1), 2]."""
    cells = torch.full((rows, cols + 1, 2), -1, dtype=torch.int16)
    cells[:, :cols] = grid(rows, cols).view(rows, cols, 2)
    return cells.view(-1, 2)


def unpadded_grid(image: tuple[int, int], rows: int, cols: int) -> tuple[int, int]:
    """Rows and columns of a [rows, cols] feature map that remain when the padding is cut off.

    `image` is (height, width): the image was scaled to fit the map, keeping its aspect ratio, and
    padded on two sides. Formula: LLaVA-NeXT's `unpad_image`.
    """
    height, width = image
    if width / height > cols / rows:
        content = int(round(height * (cols / width), 7))
        return rows - 2 * ((rows - content) // 2), cols
    content = int(round(width * (rows / height), 7))
    return rows, cols - 2 * ((cols - content) // 2)


def _side(vision: Any) -> int:
    """Patches along one side of the vision tower's square input."""
    sizes = [vision.image_size, vision.patch_size]
    image, patch = (s[0] if isinstance(s, (list, tuple)) else s for s in sizes)
    return image // patch


def _square(cells: int) -> Tensor:
    side = math.isqrt(cells)
    return grid(side, side) if side * side == cells else nowhere(cells)


def _images(inputs: Inputs) -> int:
    """Number of images (or tiles), the first dimension of the pixels."""
    pixels = inputs.get("pixel_values")
    return 0 if pixels is None else len(pixels)


def image_sizes(inputs: Inputs) -> list[tuple[int, int]]:
    """(height, width) of every picture, where the batch says so."""
    sizes = inputs.get("image_sizes")
    if sizes is None:
        return []
    rows = sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes
    return [(int(height), int(width)) for height, width in rows]


def _clip(config: Any, inputs: Inputs) -> list[Tensor]:
    if "image_sizes" in inputs:  # a Pixtral tower
        return _pixtral(config, inputs)
    cells = grid(*[_side(config.vision_config)] * 2)
    if config.vision_feature_select_strategy == "full":  # the CLS token stays
        cells = torch.cat([nowhere(1), cells])
    return [cells] * _images(inputs)


def _pixtral(config: Any, inputs: Inputs) -> list[Tensor]:
    patch = config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1)
    return [grid(height // patch, width // patch) for height, width in image_sizes(inputs)]


def anyres_grid(config: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the unpadded fine grid of one image."""
    from transformers.image_processing_utils import select_best_resolution

    vision = config.vision_config
    best = select_best_resolution(size, config.image_grid_pinpoints)
    rows, cols = (n // vision.image_size * _side(vision) for n in best)
    return unpadded_grid(size, rows, cols)


def _llava_next(config: Any, inputs: Inputs) -> list[Tensor]:
    base = _side(config.vision_config) ** 2 + (config.vision_feature_select_strategy == "full")
    return [
        torch.cat([nowhere(base), grid_with_newlines(*anyres_grid(config, size))])
        for size in image_sizes(inputs)
    ]


def _onevision(config: Any, inputs: Inputs) -> list[Tensor]:
    side = _side(config.vision_config)
    counts = inputs.get("batch_num_images")
    sizes = image_sizes(inputs)
    per_sample = [1] * len(sizes) if counts is None else [int(n) for n in counts]
    alone = [n == 1 for n in per_sample for _ in range(n)]
    out = []
    for size, single in zip(sizes, alone, strict=True):
        if not single:  # several images in one sample: one square and one newline token each
            out.append(torch.cat([grid(side, side), nowhere(1)]))
            continue
        rows, cols = anyres_grid(config, size)
        limit = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(rows * cols / (limit * side**2))
        if ratio > 1.1:
            rows, cols = int(rows // ratio), int(cols // ratio)
        out.append(torch.cat([nowhere(side**2), grid_with_newlines(rows, cols)]))
    return out


def _merged(config: Any, inputs: Inputs) -> list[Tensor]:
    """Qwen-VL and GLM-V: the batch tells every image's grid of patches before merging."""
    merge = config.vision_config.spatial_merge_size
    grids = inputs.get("image_grid_thw")
    return [
        grid(height // merge, width // merge).repeat(time, 1)
        for time, height, width in ([] if grids is None else grids.tolist())
    ]


def _gemma3(config: Any, inputs: Inputs) -> list[Tensor]:
    return [_square(config.mm_tokens_per_image)] * _images(inputs)


def _paligemma(config: Any, inputs: Inputs) -> list[Tensor]:
    return [grid(*[_side(config.vision_config)] * 2)] * _images(inputs)


def _tile_side(config: Any) -> int:
    """Image tokens along one side of a tile, after pixel shuffle."""
    side = _side(config.vision_config)
    if (factor := getattr(config, "scale_factor", None)) is not None:
        return side // factor
    return int(side * config.downsample_ratio)


def _internvl(config: Any, inputs: Inputs) -> list[Tensor]:
    """Tiles; how they lie in the image is not told by the batch (see `ImageLayout`)."""
    return [grid(*[_tile_side(config)] * 2)] * _images(inputs)


def _idefics(config: Any, inputs: Inputs) -> list[Tensor]:
    """Tiles, [B, most tiles, 3, H, W], filled up with tiles of zeros."""
    pixels = inputs.get("pixel_values")
    tiles = 0 if pixels is None else int(pixels.flatten(2).ne(0).any(-1).sum())
    return [grid(*[_tile_side(config)] * 2)] * tiles


_FAMILIES: dict[str, Callable[[Any, Inputs], list[Tensor]]] = {
    "llava": _clip,
    "mistral3": _pixtral,
    "llava_next": _llava_next,
    "llava_onevision": _onevision,
    "gemma3": _gemma3,
    "paligemma": _paligemma,
    "internvl": _internvl,
    "idefics3": _idefics,
    "smolvlm": _idefics,
} | dict.fromkeys(
    ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "glm4v", "glm4v_moe"), _merged
)


def tile_ids(tokenizer: Any) -> dict[int, tuple[int, int]]:
    """Ids of SmolVLM's `<row_r_col_c>` tokens with (r, c) counted from 0; empty elsewhere."""
    found = {}
    for token, i in tokenizer.get_added_vocab().items() if tokenizer is not None else ():
        if match := re.fullmatch(r"<row_(\d+)_col_(\d+)>", token):
            found[i] = (int(match[1]) - 1, int(match[2]) - 1)
    return found


@dataclass
class ImageLayout:
    """Rows and columns of image tokens, for the families listed in `_FAMILIES`.

    What has no place in the image's grid has (-1, -1): newline tokens, CLS, the thumbnail of
    LLaVA-NeXT, LLaVA-OneVision and SmolVLM where a finer grid follows, and the tiles of an InternVL
    image cut into several (the batch does not tell how they lie). With Gemma 3's pan-and-scan every
    crop is a grid of its own. Models of other families have -1 throughout.
    """

    config: Any
    image_id: int | None
    tiles: dict[int, tuple[int, int]] = field(default_factory=dict)

    def check(self, inputs: Inputs) -> None:
        """Raise `UserError` unless there are as many image tokens as the images give."""
        if (cells := self._cells(inputs)) is None:
            return
        expected = sum(len(c) for c in cells)
        found = int(self._mask(inputs).sum())
        if found != expected:
            raise UserError(
                f"the batch has {found} image tokens, its images make {expected}: some were "
                "cut off or added; raise --ctx_len, or leave the processor's batch as it is"
            )

    def patches(self, inputs: Inputs) -> Tensor:
        """See `Stack.patches`; int16 [B, S, 2]."""
        ids = inputs["input_ids"]
        out = torch.full((*ids.shape, 2), -1, dtype=torch.int16, device=ids.device)
        cells = self._cells(inputs)
        if cells:
            self.check(inputs)
            mask = self._mask(inputs)
            out[mask] = torch.cat(self._placed(cells, inputs)).to(ids.device)
        return out

    def images(self, inputs: Inputs) -> Tensor:
        """See `Stack.images`; int16 [B, S]."""
        mask = self._mask(inputs)
        out = torch.full(mask.shape, -1, dtype=torch.int16, device=mask.device)
        cells = self._cells(inputs)
        if not cells:
            return out
        self.check(inputs)
        owner = torch.cat(
            [torch.full((len(c),), i) for i, c in enumerate(self._whole(cells, inputs))]
        ).to(mask.device)
        rows = mask.nonzero()[:, 0]
        first = torch.full((len(mask),), len(owner), device=mask.device)
        first = first.scatter_reduce(0, rows, owner, "amin")
        out[mask] = (owner - first[rows]).short()
        return out

    def tile_places(self, inputs: Inputs) -> list[list[tuple[int, int] | None]]:
        """For every picture of Idefics3 and SmolVLM the (row, column) of each of its tiles; None
        for the whole of it, seen small."""
        marks = self._marks(self._cells(inputs) or [], inputs)
        found, start = [], 0
        for n in _tiles_per_image(marks):
            found.append(marks[start : start + n])
            start += n
        return found

    def _mask(self, inputs: Inputs) -> Tensor:
        if self.image_id is None:
            return torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        return (inputs["input_ids"] == self.image_id) & attended(inputs)

    def _cells(self, inputs: Inputs) -> list[Tensor] | None:
        """Cells of every image, or tile, in the order of the batch; None: family not known."""
        family = _FAMILIES.get(self.config.model_type)
        return None if family is None else family(self.config, inputs)

    def _whole(self, cells: list[Tensor], inputs: Inputs) -> list[Tensor]:
        """Tiles joined to whole images."""
        if self.config.model_type == "internvl":
            lengths = self._runs(inputs)
        elif self.config.model_type in ("idefics3", "smolvlm"):
            lengths = _tiles_per_image(self._marks(cells, inputs))
        else:
            return cells
        joined, start = [], 0
        for n in lengths:
            joined.append(torch.cat(cells[start : start + n]))
            start += n
        return joined

    def _placed(self, cells: list[Tensor], inputs: Inputs) -> list[Tensor]:
        """Cells with tiles moved to where they lie in their image."""
        if self.config.model_type == "internvl":
            runs = self._runs(inputs)
            return [c if n == 1 else nowhere(len(c)) for n in runs for c in cells[:1] * n]
        if self.config.model_type not in ("idefics3", "smolvlm"):
            return cells
        marks = self._marks(cells, inputs)
        side = _tile_side(self.config)
        placed, start = [], 0
        for n in _tiles_per_image(marks):
            for mark, c in zip(marks[start : start + n], cells, strict=False):
                offset = torch.tensor(mark or (0, 0), dtype=torch.int16) * side
                placed.append(nowhere(len(c)) if mark is None and n > 1 else c + offset)
            start += n
        return placed

    def _runs(self, inputs: Inputs) -> list[int]:
        """Tiles in every unbroken run of image tokens: one run is one image."""
        mask = torch.nn.functional.pad(self._mask(inputs).int(), (1, 1))
        edges = mask.diff(dim=1)
        starts, ends = (edges == 1).nonzero()[:, 1], (edges == -1).nonzero()[:, 1]
        return ((ends - starts) // _tile_side(self.config) ** 2).tolist()

    def _marks(self, cells: list[Tensor], inputs: Inputs) -> list[tuple[int, int] | None]:
        """(row, column) of each tile by the token in front of it; None: the whole image."""
        mask = self._mask(inputs)
        firsts = mask.nonzero()[:: len(cells[0])]
        before = inputs["input_ids"][firsts[:, 0], firsts[:, 1] - 1].tolist()
        return [self.tiles.get(i) for i in before]


def _tiles_per_image(marks: list[tuple[int, int] | None]) -> list[int]:
    """An image's tiles end with the whole image, seen small."""
    ends = [i + 1 for i, mark in enumerate(marks) if mark is None]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]
