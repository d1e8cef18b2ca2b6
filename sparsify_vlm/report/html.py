"""Self-contained HTML pages from plain data: no scripts or styles are fetched, text is escaped."""

from __future__ import annotations

import base64
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from sparsify_vlm.files import write_text


def _template(name: str) -> str:
    return (resources.files("sparsify_vlm.report") / "templates" / name).read_text("utf-8")


def percent(value: float | None, digits: int = 1) -> str:
    """0.123 -> '12.3 %'; None -> 'n/a'."""
    return "n/a" if value is None else f"{100 * value:.{digits}f} %"


def number(value: float | None, digits: int = 3) -> str:
    """A float with `digits` places; None -> 'n/a'."""
    return "n/a" if value is None else f"{value:.{digits}f}"


def png_uri(data: bytes) -> str:
    """PNG bytes as a data URI."""
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")


def render(template: str, **values: Any) -> str:
    """Fill a template of `report/templates`; everything but `Markup` is escaped.

    Raises `jinja2.UndefinedError` when the template names a value that was not given.
    """
    environment = Environment(
        loader=FunctionLoader(_template), autoescape=True, undefined=StrictUndefined
    )
    environment.filters.update(percent=percent, number=number)
    return environment.get_template(template).render(**values)


def write_page(path: Path, template: str, **values: Any) -> None:
    """Render `template` and write it to `path` atomically."""
    write_text(path, render(template, **values))


def svg(text: str) -> Markup:
    """Mark a figure made by `report.figures` as safe to stand in a page as it is."""
    return Markup(text)
