"""Rows of large tensors, read in order of the file through two buffers that are used in turn.

A decoder of many gigabytes is looked at once, in pieces: while one piece is worked on, a thread
reads the next one.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from sparsify_vlm.errors import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class Rows:
    """`count` rows of one stored tensor, each of `shape`, that follow each other in the file."""

    path: Path
    key: str
    offset: int
    """Byte at which the first row starts."""
    count: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def part(self, first: int, count: int) -> Rows:
        """Rows `first` … `first + count - 1` of these."""
        return replace(self, offset=self.offset + first * self.row_bytes, count=count)

    def inside(self, i: int) -> Rows:
        """The rows that row `i` of these consists of: the second axis of the tensor."""
        start = self.offset + i * self.row_bytes
        return replace(self, offset=start, count=self.shape[0], shape=self.shape[1:])


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


def read_in_turn(
    pieces: Sequence[Sequence[Rows]],
) -> Iterator[Tensor]:
    """For each piece its rows as [len(piece), count, *shape], in a buffer that is used again.

    The rows of one piece are equal in number, shape and dtype. A tensor is overwritten when the
    next but one is asked for. Raises `UserError` for files that end too early.
    """
    if not pieces:
        return
    size = max(sum(rows.count * rows.row_bytes for rows in piece) for piece in pieces)
    buffers = [torch.empty(size, dtype=torch.uint8) for _ in pieces[:2]]
    files = _OpenFiles()
    with files, ThreadPoolExecutor(1) as reader:
        coming = reader.submit(_read, pieces[0], buffers[0], files)
        for i in range(len(pieces)):
            piece = coming.result()
            if i + 1 < len(pieces):
                coming = reader.submit(_read, pieces[i + 1], buffers[(i + 1) % 2], files)
            yield piece


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


def _read(piece: Sequence[Rows], buffer: Tensor, files: _OpenFiles) -> Tensor:
    first = piece[0]
    size = first.count * first.row_bytes
    for place, rows in enumerate(piece):
        view = buffer[place * size : (place + 1) * size].numpy().data
        done = 0
        while done < size:
            got = os.preadv(files.get(rows.path), [view[done:]], rows.offset + done)
            if not got:
                raise UserError(f"{rows.path}: the file ends within tensor '{rows.key}'")
            done += got
    whole = buffer[: len(piece) * size].view(first.dtype)
    return whole.view(len(piece), first.count, *first.shape)
