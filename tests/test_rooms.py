"""The package's rooms import downwards only, as docs say, and only the command line parses."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import sparsify_vlm

PACKAGE = Path(sparsify_vlm.__file__).parent
BELOW = {
    "models": set(),
    "coders": set(),
    "data": {"models"},
    "replacement": {"models", "coders", "data"},
    "training": {"models", "coders", "data", "replacement"},
    "graphs": {"models", "coders", "data", "replacement", "training"},
    "analysis": {"models", "coders", "data", "replacement", "training"},
    "features": {"models", "coders", "data", "replacement", "training"},
    "report": {"analysis", "graphs", "features"},
}
"""Rooms that each room may import from."""


def imported(file: Path) -> Iterator[str]:
    """Modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("room", BELOW)
def test_rooms_import_downwards(room: str) -> None:
    for file in (PACKAGE / room).rglob("*.py"):
        used = {name.split(".")[1] for name in imported(file) if name.startswith("sparsify_vlm.")}
        assert used & (set(BELOW) | {"cli", "flags", "demo"}) <= BELOW[room] | {room}, file


def test_every_room_is_known() -> None:
    found = {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").is_file()}
    assert found <= set(BELOW)


def test_only_the_command_line_parses_arguments() -> None:
    for file in PACKAGE.rglob("*.py"):
        parses = {"argparse", "simple_parsing"} & {name.split(".")[0] for name in imported(file)}
        if file.name == "config.py":  # how a field is written to files
            parses -= {"simple_parsing"}
        assert not parses or file.name == "flags.py", file
