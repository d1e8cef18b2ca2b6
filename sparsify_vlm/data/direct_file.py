"""Writing a large file past the page cache, and its sha256 on the way.

A store is written once and is larger than what fits into memory. Going through the page cache costs
the kernel a page for every 4 KiB, which is more processor time than the hash takes, and drives out
what the dataset is read from.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PIECE = 1 << 20
"""Bytes per write: a multiple of every disk's block."""


class DirectFile:
    """A new file that is written from its beginning to its end; make it with `direct_file`."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._piece = mmap.mmap(-1, PIECE)  # starts at a page, as direct writes ask for
        self._filled = 0
        self._digest = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes (a memoryview of bytes, contiguous). Raises `OSError`."""
        rest = memoryview(data)
        while rest:
            taken = rest[: PIECE - self._filled]
            self._piece[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            rest = rest[len(taken) :]
            if self._filled == PIECE:
                self._flush()

    def hexdigest(self) -> str:
        """The sha256 of what was written; writes what is left, so that nothing may follow."""
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~_DIRECT)  # the end is no whole block
        self._flush()
        return self._digest.hexdigest()

    def _flush(self) -> None:
        piece = memoryview(self._piece)[: self._filled]
        self._digest.update(piece)
        while piece:
            piece = piece[os.write(self._descriptor, piece) :]
        self._filled = 0


_DIRECT = getattr(os, "O_DIRECT", 0)


@contextmanager
def direct_file(path: Path) -> Iterator[DirectFile]:
    """Context with a new, empty file at `path`; through the page cache where it must be.

    What is written is whole once `hexdigest` was called. Raises `OSError`.
    """
    descriptor = _open(path)
    try:
        yield DirectFile(descriptor)
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    plain = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, plain | _DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:  # so say file systems that cannot
            raise
        return os.open(path, plain, 0o666)
