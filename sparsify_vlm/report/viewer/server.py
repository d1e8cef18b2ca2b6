"""The viewer's server: this machine only, a fixed list of files, one file that may be written.

A page of another site can make a browser send requests to 127.0.0.1, or resolve its own name to
it; so every request must name this server in `Host`, and whatever changes something must come from
a page of this server (`Origin`).
"""

from __future__ import annotations

import errno
import hashlib
import json
import socketserver
import threading
import webbrowser
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from sparsify_vlm import __version__
from sparsify_vlm.errors import UserError
from sparsify_vlm.files import write_json
from sparsify_vlm.report.html import render
from sparsify_vlm.report.viewer.folder import PICTURES, GraphFolder
from sparsify_vlm.report.viewer.marks import MOST_BYTES, check_marks

ADDRESS = "127.0.0.1"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
TYPES = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8", **PICTURES}
HTML, JSON = "text/html; charset=utf-8", "application/json"


@dataclass(frozen=True)
class _Answer:
    """What a path gives; `read` is called on each request."""

    type: str
    read: Callable[[], bytes]


def page_data(folder: GraphFolder) -> bytes:
    """Everything the page shows but the marks, as JSON; pictures stand under their own names."""
    data = folder.page | {"pictures": {name: quote(name) for name in folder.pictures}}
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()


def _kept(type: str, content: bytes) -> _Answer:
    return _Answer(type, lambda: content)


def _answers(folder: GraphFolder) -> dict[str, _Answer]:
    """Every path that is served. Nothing of a request ever becomes part of a file's path."""
    title = folder.page["question"] or folder.page["prompt"] or folder.slug
    page = render("graph.html.j2", title=title, standalone=None)
    answers = {
        "/": _kept(HTML, page.encode()),
        "/data.json": _kept(JSON, page_data(folder)),
        "/marks.json": _Answer(JSON, lambda: _marks(folder)),
    }
    for name, path in folder.pictures.items():
        # Read now: what stands there later may be a link.
        answers[f"/{name}"] = _kept(PICTURES[path.suffix.lower()], path.read_bytes())
    for asset in (resources.files("sparsify_vlm.report.viewer") / "assets").iterdir():
        type = TYPES[Path(asset.name).suffix]
        answers[f"/assets/{asset.name}"] = _Answer(type, asset.read_bytes)
    return answers


def _marks(folder: GraphFolder) -> bytes:
    return json.dumps(folder.marks()).encode()


def _version(marks: bytes) -> str:
    """The `ETag` of marks: other marks have another one, whoever wrote them."""
    return f'"{hashlib.sha256(marks).hexdigest()[:16]}"'


class ViewerServer(ThreadingHTTPServer):
    """Serves one graph folder on 127.0.0.1.

    Raises `UserError` when the port is taken.
    """

    daemon_threads = True

    def __init__(self, folder: GraphFolder, port: int) -> None:
        self.folder = folder
        self.answers = _answers(folder)
        self.writing = threading.Lock()
        try:
            super().__init__((ADDRESS, port), _Handler)
        except OverflowError:
            raise UserError(f"--port {port}: ports go from 0 to 65535") from None
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise UserError(
                    f"--port {port} is taken: another viewer may be running; give another port"
                ) from None
            raise UserError(f"--port {port} cannot be opened: {error.strerror}") from None

    def server_bind(self) -> None:
        """As `socketserver` does it: `http.server` would look the host's name up in the DNS."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = ADDRESS, self.server_address[1]

    @property
    def hosts(self) -> set[str]:
        """Every `Host` that is ours."""
        return {f"{name}:{self.server_port}" for name in (ADDRESS, "localhost")}

    @property
    def url(self) -> str:
        return f"http://{ADDRESS}:{self.server_port}/"


class _Handler(BaseHTTPRequestHandler):
    server: ViewerServer
    server_version = f"sparsify-vlm/{__version__}"
    sys_version = ""
    timeout = 30  # seconds a client may leave a request unfinished

    def do_GET(self) -> None:
        self._give(with_body=True)

    def do_HEAD(self) -> None:
        self._give(with_body=False)

    def _give(self, with_body: bool) -> None:
        if not self._is_for_us():
            return
        answer = self.server.answers.get(unquote(urlsplit(self.path).path))
        if answer is None:
            self._refuse(404, "no such file")
            return
        try:
            body = answer.read()
        except UserError as error:
            self._refuse(500, str(error))
            return
        tag = {"ETag": _version(body)} if answer.type == JSON else {}
        self._reply(200, answer.type, body if with_body else b"", len(body), tag)

    def do_POST(self) -> None:
        if not self._is_for_us():
            return
        if urlsplit(self.path).path != "/marks.json":
            self._refuse(404, "only marks.json can be written")
            return
        origins = {f"http://{host}" for host in self.server.hosts}
        if self.headers.get("Origin") not in origins:
            self._refuse(403, "not from a page of this server")
        elif self.headers.get_content_type() != JSON:
            self._refuse(415, "marks are application/json")
        elif self.headers.get("If-Match") is None:
            self._refuse(428, "If-Match is missing: which marks are these a change of?")
        elif not (length := self.headers.get("Content-Length", "")).isdecimal():
            self._refuse(411, "Content-Length is missing")
        elif int(length) > MOST_BYTES:
            self._refuse(413, f"marks of more than {MOST_BYTES} bytes")
        else:
            self._write(self.rfile.read(int(length)))

    def _write(self, body: bytes) -> None:
        try:
            marks = json.loads(body)
            check_marks(marks)
            with self.server.writing:
                if self.headers.get("If-Match") != _version(_marks(self.server.folder)):
                    self._refuse(409, "marks.json has been changed since this page read it")
                    return
                write_json(self.server.folder.path / "marks.json", marks)
                tag = {"ETag": _version(_marks(self.server.folder))}
        except UserError as error:
            self._refuse(500, str(error))
        except (ValueError, RecursionError) as error:
            self._refuse(400, f"marks.json was not written: {error}")
        except OSError as error:
            self._refuse(500, f"marks.json cannot be written: {error.strerror}")
        else:
            self._reply(200, JSON, b"{}", 2, tag)

    def _is_for_us(self) -> bool:
        """Whether `Host` names this server; refuses the request if not."""
        if self.headers.get_all("Host") in [[host] for host in self.server.hosts]:
            return True
        self._refuse(421, "this server answers to 127.0.0.1 and localhost only")
        return False

    def _refuse(self, status: int, why: str) -> None:
        self.close_connection = True  # a body that was not read must not become the next request
        body = why.encode()
        self._reply(status, "text/plain; charset=utf-8", body, len(body))

    def _reply(
        self,
        status: int,
        type: str,
        body: bytes,
        length: int,
        more: Mapping[str, str] | None = None,
    ) -> None:
        self.send_response(status)
        own = {"Content-Type": type, "Content-Length": str(length), **(more or {})}
        for name, value in {**HEADERS, **own}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the terminal keeps the one line with the address."""


def serve(folder: GraphFolder, port: int, open_browser: bool) -> None:
    """Serve `folder` until Ctrl-C. Raises `UserError` when the port is taken."""
    with ViewerServer(folder, port) as server:
        try:
            print(f"{folder.path} is shown at {server.url} (Ctrl-C ends it)", flush=True)
            if open_browser:
                threading.Thread(target=webbrowser.open, args=(server.url,), daemon=True).start()
            server.serve_forever()
        except KeyboardInterrupt:
            print("ended")
