"""A report as plain parts, and the same parts as HTML and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sparsify_vlm.files import write_text
from sparsify_vlm.report.html import png_uri, write_page


@dataclass(frozen=True)
class Rows:
    """A table of text."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    folded: bool = False
    """Long: folded up in HTML."""


@dataclass(frozen=True)
class Picture:
    """A figure of the folder `figures`."""

    name: str
    caption: str


@dataclass(frozen=True)
class Section:
    """A heading with what stands below it, in this order."""

    title: str
    text: Sequence[str] = ()
    tables: Sequence[Rows] = ()
    figures: Sequence[Picture] = ()
    points: Sequence[str] = ()
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Points under a heading each."""
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Page:
    """A whole report."""

    title: str
    subtitle: str
    sections: Sequence[Section]
    facts: Sequence[tuple[str, str]] = field(default_factory=list)
    """What was measured, on what."""


def write_html(page: Page, pictures: Mapping[str, bytes], path: Path) -> None:
    """`page` as one HTML file that fetches nothing; `pictures` are PNG by name."""
    images = {name: png_uri(content) for name, content in pictures.items()}
    write_page(path, "analysis.html.j2", page=page, images=images)


def write_markdown(
    page: Page, pictures: Mapping[str, bytes], path: Path, figures: str = "figures"
) -> None:
    """`page` as Markdown beside the folder `figures`."""
    lines = [f"# {page.title}", "", page.subtitle, ""]
    if page.facts:
        lines += _table(Rows(("", ""), page.facts))
    for section in page.sections:
        lines += [f"## {section.title}", ""]
        for paragraph in section.text:
            lines += [paragraph, ""]
        for table in section.tables:
            lines += [f"**{table.caption}**", ""] if table.caption else []
            lines += _table(table)
        for figure in section.figures:
            if figure.name in pictures:
                lines += [f"![{figure.name}]({figures}/{figure.name}.png)", "", figure.caption, ""]
        lines += [f"- {point}" for point in section.points] + [""] * bool(section.points)
        for heading, points in section.groups.items():
            lines += [f"**{heading}**", "", *(f"- {point}" for point in points), ""]
        lines += [f"> {note}\n>" for note in section.notes] + [""] * bool(section.notes)
    write_text(path, "\n".join(lines).rstrip() + "\n")


def _table(table: Rows) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        safe = (cell.replace("|", r"\|").replace("<", "&lt;") for cell in cells)
        return f"| {' | '.join(safe)} |"

    return [line(table.header), "|" + "---|" * len(table.header), *map(line, table.rows), ""]
