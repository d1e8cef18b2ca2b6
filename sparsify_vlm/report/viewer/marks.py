"""marks.json: what a reader of a graph pinned, grouped and named."""

from __future__ import annotations

from typing import Any

FORMAT, VERSION = "sparsify-vlm marks", 1
MOST_BYTES = 1 << 20
"""A longer marks.json is refused, from the folder and from the page."""
LONGEST = 2000
"""Characters of a label, a name or a node's id."""


def no_marks() -> dict[str, Any]:
    """Marks of a graph that nobody has marked."""
    return {"format": FORMAT, "version": VERSION, "pinned": [], "supernodes": [], "labels": {}}


def check_marks(value: Any) -> None:
    """Raise `ValueError`, saying what is wrong, unless `value` is marks of this version."""
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise ValueError(f"not {FORMAT}")
    if value.get("version") != VERSION:
        raise ValueError(f"marks of version {value.get('version')!r}, not {VERSION}")
    if set(value) != set(no_marks()):
        raise ValueError("marks with missing or unknown fields")
    if not _texts(value["pinned"]):
        raise ValueError("pinned is not a list of node ids")
    groups = value["supernodes"]
    if not isinstance(groups, list) or not all(_is_group(group) for group in groups):
        raise ValueError("supernodes is not a list of names and nodes")
    labels = value["labels"]
    if not isinstance(labels, dict) or not _texts([*labels, *labels.values()]):
        raise ValueError("labels does not map node ids to texts")


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(x, str) and len(x) <= LONGEST for x in value)


def _is_group(value: Any) -> bool:
    if not isinstance(value, dict) or set(value) != {"name", "nodes"}:
        return False
    return _texts([value["name"]]) and _texts(value["nodes"])
