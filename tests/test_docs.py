"""The README and docs/ say what the program does: commands parse, links lead somewhere."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from sparsify_vlm._dispatch import is_wanted
from sparsify_vlm.cli import COMMANDS
from sparsify_vlm.flags import flags_of, parse

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))

# Everything up to the arguments of a command line of ours.
STARTS = re.compile(
    r"^\s*(?:[A-Z_]+=\S+ )*"
    r"(?:torchrun (?:--\S+ \S+ )*-m |python -m |)(sparsify|sparsify_vlm|sparsify-vlm) (.+)$"
)
PLACEHOLDER = re.compile(r"…|\.\.\.|\b[A-Z]{3,}\b|[\[\]{}]")


def code_lines(page: Path) -> Iterator[str]:
    """Lines of the page's code blocks, continued lines joined, comments cut."""
    for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            yield re.sub(r"\s+#.*", "", line)


def command_lines() -> list[tuple[str, str, str]]:
    found = []
    for page in PAGES:
        for line in code_lines(page):
            match = STARTS.match(line)
            if match and not PLACEHOLDER.search(line):
                found.append((page.name, *match.groups()))
    return found


def test_there_are_command_lines() -> None:
    assert len(command_lines()) > 8


@pytest.mark.parametrize(("page", "program", "arguments"), command_lines())
def test_documented_command_is_understood(
    page: str, program: str, arguments: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = shlex.split(arguments)
    if program == "sparsify":
        assert is_wanted(argv), "goes to upstream"
        name = "train"
    elif argv[0] in ("--help", "--version"):
        return
    else:
        name = argv.pop(0)
    if "--help" in argv:
        return
    command = COMMANDS[name]
    monkeypatch.chdir(tmp_path)
    for i, token in enumerate(argv):
        if token == "--config":  # the file itself is another test's matter
            argv[i + 1] = str(tmp_path / "run.yaml")
            (tmp_path / "run.yaml").write_text("model: tiny-llava\ntranscode: true\n")
    configs, _ = command.load()
    parse(configs, command.positionals, argv, name, command.substitutes)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_config_files_are_understood(file: Path) -> None:
    """A file of flags is one of some command's; a mix of datasets is read where it is used."""
    keys = set(yaml.safe_load(file.read_text()))
    if keys == {"streams"}:
        return
    loaded = [(command, command.load()[0]) for command in COMMANDS.values()]
    fitting = [pair for pair in loaded if keys <= set(flags_of(pair[1]))]
    assert fitting, keys
    for command, configs in fitting:
        parse(configs, command.positionals, ["--config", str(file)], "x", command.substitutes)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), target
