"""Scenes of coloured shapes on a 3 × 3 grid: what is where, and how it is told in words.

A scene is plain data, drawn from a generator; nothing here touches pixels. The grid, the image and
the vision tower's patches line up: each grid cell is 16 × 16 pixels, that is 2 × 2 patches of 8.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
SHAPES = ("circle", "square", "triangle", "diamond", "cross")
PLACES = (
    "top left",
    "top",
    "top right",
    "left",
    "center",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
SPLITS = ("train", "heldout")
MAX_OBJECTS = 4
GRID = 3
"""Grid cells along each side."""
CELL = 16
"""Pixels along each side of a grid cell."""
IMAGE_SIZE = GRID * CELL
PATCH = 8
"""Pixels along each side of the vision tower's patch."""
PATCH_GRID = IMAGE_SIZE // PATCH
"""Patches along each side of the image."""

_HELD_OUT_ONE_IN = 6
_KINDS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)


@dataclass(frozen=True)
class SceneObject:
    """One coloured shape. Offsets and radius are in pixels, the offsets from the cell's centre."""

    colour: str
    shape: str
    cell: int
    """Grid cell 0..8 in reading order."""
    dx: float
    dy: float
    radius: float
    rgb: tuple[int, int, int]

    @property
    def row(self) -> int:
        """Grid row 0..2, from the top."""
        return self.cell // GRID

    @property
    def column(self) -> int:
        """Grid column 0..2, from the left."""
        return self.cell % GRID

    @property
    def place(self) -> str:
        """The cell in words: "top left", "center", …"""
        return PLACES[self.cell]


@dataclass(frozen=True)
class Scene:
    """1 to 4 objects in different cells over a grey background with pixel noise."""

    objects: tuple[SceneObject, ...]
    background: int
    """Grey level 0..255."""
    noise_seed: int

    @property
    def kinds(self) -> tuple[tuple[str, str], ...]:
        """The sorted multiset of (colour, shape)."""
        return tuple(sorted((o.colour, o.shape) for o in self.objects))

    @property
    def held_out(self) -> bool:
        """Whether this multiset of (colour, shape) is kept from training."""
        return is_held_out(self.kinds)


def is_held_out(kinds: tuple[tuple[str, str], ...]) -> bool:
    """Whether a sorted multiset of (colour, shape) belongs to the held-out split.

    A fixed hash decides (about one multiset in six), so the splits can never overlap.
    """
    name = ",".join(f"{colour} {shape}" for colour, shape in kinds)
    return zlib.crc32(name.encode()) % _HELD_OUT_ONE_IN == 0


def draw_scene(rng: np.random.Generator, split: str, n_objects: int | None = None) -> Scene:
    """Draw a scene of `split` ("train" or "heldout") with `n_objects` (None: 1 to 4, uniform)."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, not {split!r}")
    n = int(rng.integers(1, MAX_OBJECTS + 1)) if n_objects is None else n_objects
    while True:
        kinds = [_KINDS[i] for i in rng.integers(len(_KINDS), size=n)]
        if is_held_out(tuple(sorted(kinds))) == (split == "heldout"):
            break
    cells = rng.permutation(GRID * GRID)[:n].tolist()
    jitter = rng.random((n, 3)).tolist()
    tint = rng.integers(-_TINT, _TINT + 1, size=(n, 3)).tolist()
    objects = tuple(
        _place(kind, cell, place, colour)
        for kind, cell, place, colour in zip(kinds, cells, jitter, tint, strict=True)
    )
    return Scene(objects, int(rng.integers(205, 226)), int(rng.integers(2**31)))


_TINT = 8
_RGB = {
    "red": (214, 40, 40),
    "green": (44, 160, 60),
    "blue": (36, 84, 205),
    "yellow": (240, 205, 24),
    "purple": (140, 55, 190),
    "orange": (245, 130, 30),
}


def _place(kind: tuple[str, str], cell: int, jitter: list[float], tint: list[int]) -> SceneObject:
    """An object with up to 1 px of offset and a radius of 5.2 to 6 px: it never leaves its cell."""
    colour, shape = kind
    red, green, blue = (
        min(255, max(0, base + t)) for base, t in zip(_RGB[colour], tint, strict=True)
    )
    dx, dy = 2 * jitter[0] - 1, 2 * jitter[1] - 1
    radius = 5.2 + 0.8 * jitter[2]
    return SceneObject(colour, shape, cell, dx, dy, radius, (red, green, blue))


def describe(scene: Scene) -> str:
    """The scene told in words: "there is a red circle at the top left, a blue … at the center."."""
    told = ", ".join(
        f"{article(o.colour)} {o.colour} {o.shape} at the {o.place}" for o in scene.objects
    )
    return f"there is {told}."


def article(word: str) -> str:
    """The indefinite article before `word`."""
    return "an" if word[0] in "aeiou" else "a"
