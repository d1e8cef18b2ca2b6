"""Rows of large tensors, read in order of the file through one buffer that is used again.

A decoder of many gigabytes is looked at once. Read in pieces that stay in the processor's cache,
what is done with them costs little beside the reading; the kernel reads ahead meanwhile. Where only
a part of each row is wanted, it does not see what comes next and is told.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparsify_vlm.errors import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}

AHEAD = 8 << 20
"""Bytes that the kernel is told to read before they are asked for."""
LEAST_GAP = 32 << 10
"""Bytes between rows from which on skipping them costs less than reading them."""


@dataclass(frozen=True)
class Rows:
    """`count` rows of one stored tensor, or parts of rows, of which each is of `shape`."""

    path: Path
    key: str
    offset: int
    """Byte at which the first row starts."""
    count: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    gap: int = 0
    """Bytes between the end of a row and the start of the next."""

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def step(self) -> int:
        """Bytes from the start of a row to that of the next."""
        return self.row_bytes + self.gap

    def part(self, first: int, count: int) -> Rows:
        """Rows `first` … `first + count - 1` of these."""
        return replace(self, offset=self.offset + first * self.step, count=count)

    def inside(self, i: int) -> Rows:
        """The rows that row `i` of these consists of: the second axis of the tensor."""
        start = self.offset + i * self.step
        return replace(self, offset=start, count=self.shape[0], shape=self.shape[1:], gap=0)

    def beginning(self, entry: int) -> Rows:
        """Of each row what begins at this entry of its first axis; the rows as they are if that
        would leave out less than LEAST_GAP."""
        skipped = entry * self.row_bytes // self.shape[0]
        if skipped + self.gap < LEAST_GAP:
            return self
        shape = (self.shape[0] - entry, *self.shape[1:])
        return replace(self, offset=self.offset + skipped, shape=shape, gap=self.gap + skipped)

    def until(self, entry: int) -> Rows:
        """Of each row what comes before this entry of its first axis."""
        size = entry * self.row_bytes // self.shape[0]
        return replace(self, shape=(entry, *self.shape[1:]), gap=self.step - size)


def stored_rows(path: Path, key: str) -> Rows:
    """Where the rows (first axis) of a tensor lie. Raises `UserError` for unknown dtypes."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))[key]
    if entry["dtype"] not in DTYPES:
        raise UserError(f"{path}: tensor '{key}' is of type {entry['dtype']}, not floating point")
    count, *shape = entry["shape"]
    offset = 8 + length + entry["data_offsets"][0]
    return Rows(path, key, offset, count, tuple(shape), DTYPES[entry["dtype"]])


def read_in_turn(pieces: Iterable[Sequence[Rows]]) -> Iterator[Tensor]:
    """For each piece its rows as [len(piece), count, *shape], in a buffer that is used again.

    The rows of one piece are equal in number, shape and dtype. A tensor is overwritten when the
    next one is asked for. Raises `UserError` for files that end too early.
    """
    buffer = torch.empty(0, dtype=torch.uint8)
    with _OpenFiles() as files:
        for piece in _announced(pieces, files):
            first = piece[0]
            size = first.count * first.row_bytes
            if len(buffer) < len(piece) * size:
                buffer = torch.empty(len(piece) * size, dtype=torch.uint8)
            view = buffer.numpy().data
            for place, rows in enumerate(piece):
                _fill(view[place * size : (place + 1) * size], rows, files)
            values = buffer[: len(piece) * size].view(first.dtype)
            yield values.view(len(piece), first.count, *first.shape)


def read_rows(rows: Rows) -> Tensor:
    """All of them, [count, *shape], in memory of their own."""
    return next(iter(read_in_turn([[rows]])))[0]


def _announced(pieces: Iterable[Sequence[Rows]], files: _OpenFiles) -> Iterator[Sequence[Rows]]:
    """The pieces, each after the kernel was told of those that follow within AHEAD bytes."""
    coming: deque[Sequence[Rows]] = deque()
    ahead = 0
    for piece in pieces:
        coming.append(piece)
        ahead += sum(rows.count * rows.row_bytes for rows in piece)
        for rows in piece:
            _announce(rows, files)
        while ahead > AHEAD and coming:
            ahead -= sum(rows.count * rows.row_bytes for rows in coming[0])
            yield coming.popleft()
    yield from coming


def _announce(rows: Rows, files: _OpenFiles) -> None:
    """Tell the kernel of rows with gaps; of others it knows by itself."""
    if not rows.gap or not hasattr(os, "posix_fadvise"):
        return
    descriptor, size, step = files.get(rows.path), rows.row_bytes, rows.step
    if _cached(descriptor, rows):
        return
    for i in range(rows.count):
        os.posix_fadvise(descriptor, rows.offset + i * step, size, os.POSIX_FADV_WILLNEED)


def _cached(descriptor: int, rows: Rows) -> bool:
    """Whether the ends of the first and the last row are in memory, so probably all of them."""
    if not hasattr(os, "RWF_NOWAIT"):
        return False
    byte = bytearray(1)
    ends = (rows.offset + i * rows.step + rows.row_bytes - 1 for i in (0, rows.count - 1))
    try:
        return all(os.preadv(descriptor, [byte], end, os.RWF_NOWAIT) for end in ends)
    except OSError:  # would have to wait, or the file system cannot tell
        return False


class _OpenFiles:
    """Descriptors of the files a reader goes through, each opened once."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}

    def __enter__(self) -> _OpenFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def get(self, path: Path) -> int:
        if path not in self._descriptors:
            self._descriptors[path] = os.open(path, os.O_RDONLY)
        return self._descriptors[path]


def _fill(place: memoryview, rows: Rows, files: _OpenFiles) -> None:
    """Read all of `rows` into `place`."""
    descriptor, step = files.get(rows.path), rows.step
    size = rows.row_bytes if rows.gap else len(place)
    for i, start in enumerate(range(0, len(place), size)):
        done = 0
        while done < size:
            part = place[start + done : start + size]
            got = os.preadv(descriptor, [part], rows.offset + i * step + done)
            if not got:
                raise UserError(f"{rows.path}: the file ends within tensor '{rows.key}'")
            done += got


def any_non_zero(tensor: Tensor) -> bool:
    """Whether a value of [rows, ...], whose rows are contiguous, is not 0; -0 counts as 0.

    Looks at the bits, eight bytes at a time: some ten times as fast as `tensor.any()`.
    """
    bits = tensor.flatten(1).view(torch.uint8).numpy()
    words = bits[:, : bits.shape[1] // 8 * 8]
    suspicious = bool(np.bitwise_or.reduce(words.view(np.int64), axis=None))
    return (suspicious or words.shape != bits.shape) and bool(tensor.any())
