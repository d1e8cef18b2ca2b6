"""A graph as one HTML file: picture, data, styles and scripts stand in it, nothing is fetched.

The scripts are the viewer's own modules, put one behind another in the order of their imports. The
page's policy allows exactly these scripts and styles, by their hashes, and no connection at all.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

from markupsafe import Markup

from sparsify_vlm.files import check_output, write_text
from sparsify_vlm.report.html import render
from sparsify_vlm.report.viewer.folder import PICTURES, GraphFolder

MARK = '<meta name="generator" content="sparsify-vlm view">'
"""Stands in every page, so that writing a page replaces no other file."""
IMPORT = re.compile(r'^import \{[^}]*\} from "\./(\w+\.js)";\n', re.MULTILINE)
EXPORT = re.compile(r"^export (?=async|function|const|class)", re.MULTILINE)


def write_standalone(folder: GraphFolder, output: str) -> Path:
    """Write the page of `folder` to `output`.

    Raises `UserError` if `output` cannot be written or is something else than such a page.
    """
    check_output("--standalone", output, lambda text: MARK in text[:4000])
    path = Path(output)
    write_text(path, standalone_page(folder))
    return path


def standalone_page(folder: GraphFolder) -> str:
    """The HTML text of the page."""
    pictures = {name: _data_uri(path) for name, path in folder.pictures.items()}
    script, style = _bundle("main.js"), _asset("viewer.css")
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; "
        "img-src data:; connect-src 'none'; base-uri 'none'; form-action 'none'"
    )
    standalone = {
        "policy": policy,
        "script": Markup(script),
        "style": Markup(style),
        "data": _json(folder.page | {"pictures": pictures}),
        "marks": _json(folder.marks()),
    }
    title = folder.page["question"] or folder.page["prompt"] or folder.slug
    return render("graph.html.j2", title=title, standalone=standalone)


def _json(value: Any) -> Markup:
    """JSON that may stand inside <script>: no "<" can end it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c"))


def _data_uri(path: Path) -> str:
    content = base64.b64encode(path.read_bytes()).decode("ascii")
    return f"data:{PICTURES[path.suffix.lower()]};base64,{content}"


def _asset(name: str) -> str:
    file = resources.files("sparsify_vlm.report.viewer") / "assets" / name
    return file.read_text("utf-8")


def _bundle(start: str) -> str:
    """The module `start` and all that it imports, as one module without imports or exports."""
    pieces: dict[str, str] = {}

    def add(name: str) -> None:
        if name in pieces:
            return
        text = _asset(name)
        pieces[name] = ""  # a module that imports one of its own importers is not added twice
        for needed in IMPORT.findall(text):
            add(needed)
        del pieces[name]
        pieces[name] = EXPORT.sub("", IMPORT.sub("", text))

    add(start)
    return "\n".join(pieces.values())


def _hash(text: str) -> str:
    """The CSP source that allows exactly the inline script or style `text`."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
