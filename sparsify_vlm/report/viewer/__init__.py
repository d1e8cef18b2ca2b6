"""`sparsify-vlm view`: a graph folder in the browser, from a loopback server or as one file.

Everything here reads plain files: no torch, no model, no coder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass
class ViewConfig:
    """What to show, and where."""

    graph: str
    """Graph folder, written by `trace` or by circuit-tracer."""

    slug: str = ""
    """Which graph of a folder that holds several. Default: the only one."""

    port: int = 8041
    """Port on this machine (127.0.0.1) to serve on; 0 takes any free one."""

    no_browser: bool = False
    """Only print the address; open no browser."""

    standalone: str | None = None
    """Write one HTML file that needs no server and no network, instead of serving."""


def view(cfg: ViewConfig) -> None:
    """Serve the folder until Ctrl-C, or write the standalone page.

    Raises `UserError` for a folder that cannot be shown, a port that is taken, or an output file
    that must not be replaced.
    """
    from sparsify_vlm.report.viewer.folder import read_folder

    folder = read_folder(Path(cfg.graph), cfg.slug)
    if cfg.standalone is not None:
        from sparsify_vlm.report.graph_page import write_standalone

        print(f"wrote {write_standalone(folder, cfg.standalone)}")
        return
    from sparsify_vlm.report.viewer.server import serve

    serve(folder, cfg.port, open_browser=not cfg.no_browser)
