"""Scenes as pixels, and which patches of the image each object covers.

Every shape is a signed distance d(x, y) in pixels (negative inside); a pixel's coverage is
clip(1/2 − d, 0, 1), which antialiases the edge.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from sparsify_vlm.data.shapes_scenes import CELL, IMAGE_SIZE, PATCH, PATCH_GRID, Scene, SceneObject

_NOISE = 3.0  # standard deviation of the pixel noise, in grey levels
_AXIS = np.arange(CELL, dtype=np.float32) + 0.5 - CELL / 2
_HALF_SQRT3 = np.float32(np.sqrt(3) / 2)


def render(scene: Scene) -> Image.Image:
    """The scene as a 48 × 48 RGB image; the same scene always gives the same pixels."""
    pixels = render_array(scene)
    return Image.frombytes("RGB", (IMAGE_SIZE, IMAGE_SIZE), pixels.tobytes())


def render_array(scene: Scene) -> np.ndarray:
    """The scene's pixels, uint8 [48, 48, 3]."""
    rng = np.random.Generator(np.random.SFC64(scene.noise_seed))
    pixels = rng.standard_normal((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.float32)
    pixels *= _NOISE
    pixels += scene.background + 0.5  # so that the cast below rounds
    for item in scene.objects:
        rows, columns = _cell_slices(item)
        difference = np.array([level - scene.background for level in item.rgb], np.float32)
        cell = pixels[rows, columns]
        cell += coverage(item)[:, :, None] * difference
    return _clipped(pixels, np.float32(255)).astype(np.uint8)


def coverage(item: SceneObject) -> np.ndarray:
    """How much of each pixel of its cell the object covers, float32 [16, 16] in 0..1."""
    x, y = _AXIS[None, :] - np.float32(item.dx), _AXIS[:, None] - np.float32(item.dy)
    distance = _DISTANCE[item.shape](x, y, np.float32(item.radius))
    return _clipped(np.subtract(np.float32(0.5), distance, out=distance), np.float32(1))


def _clipped(values: np.ndarray, top: np.float32) -> np.ndarray:
    """`values`, in place, in 0..top; `np.clip` takes longer to call than to work here."""
    np.maximum(values, np.float32(0), out=values)
    return np.minimum(values, top, out=values)


def object_mask(item: SceneObject) -> np.ndarray:
    """The pixels of the whole image that the object covers at least half, bool [48, 48]."""
    mask = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=bool)
    mask[_cell_slices(item)] = coverage(item) >= 0.5
    return mask


def object_patches(item: SceneObject) -> tuple[tuple[int, int], ...]:
    """(row, column) in the 6 × 6 patch grid of every patch that holds a pixel of the object."""
    tiles = object_mask(item).reshape(PATCH_GRID, PATCH, PATCH_GRID, PATCH)
    return tuple((int(r), int(c)) for r, c in np.argwhere(tiles.any(axis=(1, 3))))


def cell_patches(cell: int) -> tuple[tuple[int, int], ...]:
    """(row, column) in the 6 × 6 patch grid of the four patches that make up grid cell 0..8."""
    per_cell = CELL // PATCH
    top, left = (cell * CELL // IMAGE_SIZE) * per_cell, (cell % (IMAGE_SIZE // CELL)) * per_cell
    return tuple((top + r, left + c) for r in range(per_cell) for c in range(per_cell))


def _cell_slices(item: SceneObject) -> tuple[slice, slice]:
    top, left = item.row * CELL, item.column * CELL
    return slice(top, top + CELL), slice(left, left + CELL)


def _circle(x: np.ndarray, y: np.ndarray, r: np.float32) -> np.ndarray:
    return np.sqrt(x * x + y * y) - r


def _square(x: np.ndarray, y: np.ndarray, r: np.float32) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) - np.float32(0.87) * r


def _diamond(x: np.ndarray, y: np.ndarray, r: np.float32) -> np.ndarray:
    return (np.abs(x) + np.abs(y) - np.float32(1.15) * r) * np.float32(np.sqrt(0.5))


def _triangle(x: np.ndarray, y: np.ndarray, r: np.float32) -> np.ndarray:
    inner = np.float32(0.57) * r
    return np.maximum(y, _HALF_SQRT3 * np.abs(x) - y / 2) - inner


def _cross(x: np.ndarray, y: np.ndarray, r: np.float32) -> np.ndarray:
    ax, ay, width = np.abs(x), np.abs(y), np.float32(0.34) * r
    return np.minimum(np.maximum(ax - r, ay - width), np.maximum(ay - r, ax - width))


_DISTANCE = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
    "cross": _cross,
}
