"""Files written past the page cache: the bytes and the checksum, whatever the pieces."""

from __future__ import annotations

import errno
import hashlib
import os
import random
from pathlib import Path
from typing import Any

import pytest

from sparsify_vlm.data.direct_file import PIECE, direct_file


def write(path: Path, pieces: list[bytes]) -> str:
    with direct_file(path) as file:
        for piece in pieces:
            file.write(piece)
        return file.hexdigest()


@pytest.mark.parametrize(
    "sizes",
    [[], [0, 1], [PIECE], [PIECE - 1, 1], [7, PIECE, 5], [3 * PIECE + 11], [4096] * 300],
    ids=str,
)
def test_bytes_and_checksum(tmp_path: Path, sizes: list[int]) -> None:
    pieces = [random.Random(i).randbytes(n) for i, n in enumerate(sizes)]
    digest = write(tmp_path / "f", pieces)
    whole = b"".join(pieces)
    assert (tmp_path / "f").read_bytes() == whole
    assert digest == hashlib.sha256(whole).hexdigest()


def test_file_system_without_direct_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, refused = os.open, []

    def refusing(path: Any, flags: int, *rest: Any) -> int:
        if flags & getattr(os, "O_DIRECT", 0):
            refused.append(path)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", refusing)
    digest = write(tmp_path / "f", [b"a" * (PIECE + 3)])
    assert bool(refused) == hasattr(os, "O_DIRECT")
    assert digest == hashlib.sha256((tmp_path / "f").read_bytes()).hexdigest()
    assert (tmp_path / "f").stat().st_size == PIECE + 3


def test_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "f", [b"a" * (2 * PIECE)])
