"""Writing files so that a kill at any moment leaves either the old file or the new one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify_vlm.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write(temporary_path)`, flush the result to disk and rename it to `path`.

    Raises `OSError` (for example when the disk is full) with the temporary file removed and
    whatever stood at `path` untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def check_output(flag: str, name: str, replaceable: Callable[[str], bool]) -> None:
    """Raise `UserError`, before any work, unless the file `name` can be written.

    One that is there must be empty or, by its text, `replaceable`: a slip of the hand on the
    command line must not cost a dataset or a checkpoint.
    """
    path = Path(name)
    if not name or path.is_dir():
        raise UserError(f"{flag} '{name}' is a folder: give the name of a file")
    if path.is_file():
        text = path.read_text(encoding="utf-8", errors="replace")
        if text and not replaceable(text):
            raise UserError(f"{flag} {name} is there and holds something else: give another name")
    check_writable(flag, name, path.parent)


def check_writable(flag: str, name: str, folder: Path) -> None:
    """Raise `UserError`, before any work, unless `folder` is there or can be made, and written to.

    What is made to find out is removed again: a run that is interrupted leaves nothing behind.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise UserError(f"{flag} {name}: {folder} cannot be written to")
    except OSError as error:
        raise UserError(f"{flag} {name}: {error.strerror}") from error
    finally:
        for path in missing:
            with suppress(OSError):  # others may be making something there
                path.rmdir()


def has_format(text: str, format: str) -> bool:
    """Whether `text` is a JSON object of this format."""
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return isinstance(value, dict) and value.get("format") == format


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically, UTF-8."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON, atomically. NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically; `metadata` must name `format` and `version`."""
    from safetensors.torch import save_file

    def write(temporary: Path) -> None:
        save_file({k: v.contiguous() for k, v in tensors.items()}, str(temporary), metadata)
        temporary.chmod(0o644)  # safetensors creates its files readable by the owner alone

    write_atomically(path, write)


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
