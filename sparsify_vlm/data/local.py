"""Rows of local files that we read ourselves: JSON, JSONL, metadata tables, folders of images.

JSONL is indexed by line, not loaded. `datasets` is not used for these because Arrow refuses columns
of mixed types, which instruct JSON has, and because its imagefolder passes over metadata rows whose
image is missing.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from natsort import natsorted

from sparsify_vlm.data.images import BadSample
from sparsify_vlm.errors import UserError

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
METADATA = ("metadata.jsonl", "metadata.csv")
_SLICE = re.compile(r"(?P<name>\w+)(\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


class Rows:
    """Numbered rows. Subclasses give `__len__` and `__getitem__`.

    Attributes:
        name: the dataset as messages call it.
        columns: the columns' names.
        root: folder that relative image paths start at.
        identity: text that differs when the data differ.
        shuffled: the order is random already and stays as it is.
        own_ids: rows carry an `id` that names them.
    """

    shuffled = False
    own_ids = False

    def __init__(self, name: str, columns: list[str], root: Path | None, identity: str) -> None:
        self.name, self.columns, self.root, self.identity = name, columns, root, identity

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> dict[str, Any]:
        raise NotImplementedError


class ListRows(Rows):
    """Rows held in memory."""

    def __init__(self, name: str, rows: list[Any], root: Path | None, identity: str) -> None:
        first = [row for row in rows[:1000] if isinstance(row, dict)]
        columns = list(dict.fromkeys(key for row in first for key in row))
        super().__init__(name, columns, root, identity)
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return _row(self.rows[index], f"{self.name}#{index}")


class LineRows(Rows):
    """Rows of a JSONL file, each read from the file when it is asked for."""

    def __init__(self, path: Path, root: Path) -> None:
        self.path = path
        self._starts: list[int] = []
        digest = hashlib.sha256()
        columns: dict[str, None] = {}
        with path.open("rb") as file:
            start = 0
            for line in file:
                digest.update(line)
                if line.strip():
                    self._starts.append(start)
                    if len(self._starts) <= 1000:
                        columns |= dict.fromkeys(_keys(line))
                start += len(line)
        super().__init__(path.name, list(columns), root, digest.hexdigest())
        if self._starts and not columns:
            self[0]  # raises where that is because no line is JSON

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        with self.path.open("rb") as file:
            file.seek(self._starts[index])
            line = file.readline()
        id = f"{self.name}#{index}"
        try:
            return _row(json.loads(line), id)
        except ValueError as error:
            raise BadSample(id, f"this line of {self.path} is not JSON: {error}") from None


class SliceRows(Rows):
    """Rows `start` to `stop` of others; rows keep the numbers they have there in messages."""

    def __init__(self, rows: Rows, start: int, stop: int) -> None:
        super().__init__(rows.name, rows.columns, rows.root, f"{rows.identity}[{start}:{stop}]")
        self.rows, self.range = rows, range(start, stop)
        self.shuffled, self.own_ids = rows.shuffled, rows.own_ids

    def __len__(self) -> int:
        return len(self.range)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[self.range[index]]


def _keys(line: bytes) -> list[str]:
    try:
        row = json.loads(line)
    except ValueError:
        return []
    return list(row) if isinstance(row, dict) else []


def _row(row: Any, id: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise BadSample(id, f"not a row with columns but {type(row).__name__}")
    return row


def parse_split(split: str) -> tuple[str, str | None, str | None]:
    """ "train[:10%]" as ("train", None, "10%"). Raises `UserError`."""
    match = _SLICE.fullmatch(split)
    if match is None:
        raise UserError(f"--split {split} is not understood; give a name such as train[:1000]")
    return match["name"], match["start"], match["stop"]


def slice_rows(rows: Rows, split: str) -> Rows:
    """The part of `rows` that the slice in `split` asks for, percentages rounded as datasets do."""
    _, first, last = parse_split(split)
    if first is None and last is None:
        return rows
    n = len(rows)

    def place(bound: str | None, default: int) -> int:
        if bound is None:
            return default
        at = round(n * int(bound[:-1]) / 100) if bound.endswith("%") else int(bound)
        return min(max(at + n if at < 0 else at, 0), n)

    start = place(first, 0)
    return SliceRows(rows, start, max(start, place(last, n)))


def read_json(path: Path) -> Rows:
    """A JSON list of rows, or JSON lines whatever the suffix says. Raises `UserError`."""
    if path.suffix in (".jsonl", ".ndjson"):
        return LineRows(path, path.parent)
    data = path.read_bytes()
    try:
        value = json.loads(data)
    except ValueError as error:
        if "Extra data" in str(error):
            return LineRows(path, path.parent)
        raise UserError(f"{path} is not JSON: {error}") from None
    if isinstance(value, dict):  # {"data": [rows]} beside other information
        lists = [v for v in value.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
        value = lists[0] if len(lists) == 1 else None
    if not isinstance(value, list):
        raise UserError(f"{path} holds no list of rows; give a JSON list of objects, or JSONL")
    return ListRows(path.name, value, path.parent, hashlib.sha256(data).hexdigest())


def read_metadata(path: Path) -> Rows:
    """An imagefolder's metadata.jsonl or metadata.csv, whose `file_name` names the images."""
    if path.suffix == ".jsonl":
        rows: Rows = LineRows(path, path.parent)
    else:
        text = path.read_text(encoding="utf-8-sig")
        table = [dict(row) for row in csv.DictReader(text.splitlines())]
        identity = hashlib.sha256(text.encode()).hexdigest()
        rows = ListRows(path.name, table, path.parent, identity)
    rows.name = f"{path.parent.name}/{path.name}"
    return rows


@cache
def _image_suffixes() -> frozenset[str]:
    from PIL import Image

    Image.init()
    return frozenset(s for s, kind in Image.EXTENSION.items() if kind in Image.OPEN)


def read_image_folder(folder: Path) -> Rows | None:
    """All images below a folder in natural order; None if there are none."""
    found = (p for p in folder.rglob("*") if p.suffix.lower() in _image_suffixes() and p.is_file())
    paths = natsorted(str(p.relative_to(folder)) for p in found)
    identity = hashlib.sha256("\n".join(paths).encode()).hexdigest()
    rows = [{"image": path} for path in paths]
    return ListRows(folder.name, rows, folder, identity) if rows else None
