"""Rows of large tensors, read in order of the file through one buffer that is used again.

A decoder of many gigabytes is looked at once. Read in pieces that stay in the processor's cache,
what is done with them costs little beside the reading; the kernel reads ahead meanwhile.
"""

from __future__ import annotations

import json
import math
import os
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


def read_in_turn(pieces: Iterable[Sequence[Rows]]) -> Iterator[Tensor]:
    """For each piece its rows as [len(piece), count, *shape], in a buffer that is used again.

    The rows of one piece are equal in number, shape and dtype. A tensor is overwritten when the
    next one is asked for. Raises `UserError` for files that end too early.
    """
    buffer = torch.empty(0, dtype=torch.uint8)
    with _OpenFiles() as files:
        for piece in pieces:
            first = piece[0]
            size = first.count * first.row_bytes
            if len(buffer) < len(piece) * size:
                buffer = torch.empty(len(piece) * size, dtype=torch.uint8)
            view = buffer.numpy().data
            for place, rows in enumerate(piece):
                _fill(view[place * size : (place + 1) * size], rows, files)
            values = buffer[: len(piece) * size].view(first.dtype)
            yield values.view(len(piece), first.count, *first.shape)


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
    done = 0
    while done < len(place):
        got = os.preadv(files.get(rows.path), [place[done:]], rows.offset + done)
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
