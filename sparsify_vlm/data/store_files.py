"""What keeps a store's folder whole: a lock, lines that are appended, what kills leave behind."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from sparsify_vlm.data.store_format import SHARDS
from sparsify_vlm.errors import UserError
from sparsify_vlm.files import sync


def lock(folder: Path, shared: bool = False) -> int:
    """An open descriptor that keeps other writers out of `folder` until it is closed.

    A `shared` one keeps out those that are not shared. Raises `UserError` if another is in the way.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"another process is capturing into {folder}: wait for it") from None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def is_temporary(path: Path) -> bool:
    """Whether `path` is what `files.write_atomically` leaves behind when it is killed."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def drop_unfinished(folder: Path) -> None:
    """Remove what a kill can leave: temporary files, and a line without its end."""
    for path in folder.iterdir():
        if is_temporary(path):
            path.unlink()
    lines = folder / SHARDS
    if not lines.exists():
        return
    text = lines.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        with lines.open("r+b") as file:
            file.truncate(len(whole))
            os.fsync(file.fileno())


def append(path: Path, line: str) -> None:
    """Add a line to a file, safe on the disk on return. Raises `OSError`, the file as it was."""
    new = not path.exists()
    size = 0 if new else path.stat().st_size
    with path.open("ab") as file:
        try:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        except OSError:  # a full disk may have taken half of the line
            file.truncate(size)
            raise
    if new:
        sync(path.parent)
