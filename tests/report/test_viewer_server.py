"""What the viewer's server gives away, and to whom; what folders it refuses; the command line."""

from __future__ import annotations

import contextlib
import copy
import http.client
import json
import os
import random
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from made_up_graph import build, write

from sparsify_vlm.cli import main
from sparsify_vlm.errors import UserError
from sparsify_vlm.report.graph_page import standalone_page
from sparsify_vlm.report.viewer.folder import read_folder
from sparsify_vlm.report.viewer.marks import no_marks
from sparsify_vlm.report.viewer.server import ViewerServer

ORACLES = Path(__file__).parent.parent / "oracles" / "attribution" / "cases"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "secret.png").write_text("outside")
    return write(tmp_path / "graph")


@pytest.fixture
def server(folder: Path) -> Iterator[ViewerServer]:
    with ViewerServer(read_folder(folder), 0) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


def ask(
    server: ViewerServer, method: str, path: str, body: bytes | None = None, **headers: str | None
) -> tuple[int, dict[str, str], bytes]:
    """Send a request with exactly these headers and a right Host, unless one is given."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    given = {"Host": f"127.0.0.1:{server.server_port}", **headers}
    for name, value in given.items():
        if value is not None:
            connection.putheader(name.replace("_", "-"), value)
    connection.endheaders(body)
    reply = connection.getresponse()
    return reply.status, dict(reply.getheaders()), reply.read()


def version(server: ViewerServer) -> str:
    """Of the marks that are there now."""
    return ask(server, "GET", "/marks.json")[1].get("ETag", "none")


def post(server: ViewerServer, body: bytes, **changes: str | None) -> int:
    headers = {
        "If_Match": version(server),
        "Origin": f"http://127.0.0.1:{server.server_port}",
        "Content_Type": "application/json",
        "Content_Length": str(len(body)),
    }
    return ask(server, "POST", "/marks.json", body, **(headers | changes))[0]


MARKS = no_marks() | {"pinned": ["3_12_74"], "labels": {"3_12_74": "say it"}}


def test_it_gives_the_page_and_the_folders_files_with_a_strict_policy(
    server: ViewerServer, folder: Path
) -> None:
    paths = [
        "/",
        "/data.json",
        "/marks.json",
        "/image-0.png",
        "/assets/main.js",
        "/assets/viewer.css",
    ]
    for path in paths:
        status, headers, body = ask(server, "GET", path)
        assert (status, len(body) > 0) == (200, True), path
        assert headers["Content-Length"] == str(len(body))
        assert headers["X-Content-Type-Options"] == "nosniff"
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
        assert ask(server, "HEAD", path)[::2] == (200, b"")
    assert ask(server, "GET", "/image-0.png")[2] == (folder / "image-0.png").read_bytes()
    assert "Access-Control-Allow-Origin" not in ask(server, "GET", "/data.json")[1]


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "127.0.0.1:1", "", None])
def test_another_host_gets_nothing(server: ViewerServer, host: str | None) -> None:
    for path in ("/", "/data.json"):
        status, _, body = ask(server, "GET", path, Host=host)
        assert status == 421
        assert b"node" not in body
    assert post(server, json.dumps(MARKS).encode(), Host=host) == 421


def test_localhost_is_a_name_of_it(server: ViewerServer) -> None:
    assert ask(server, "GET", "/", Host=f"localhost:{server.server_port}")[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        *("/../secret.png", "/..%2fsecret.png", "/assets/../../secret.png", "//etc/passwd"),
        *(
            "/%2e%2e/secret.png",
            "/assets/%2e%2e/__init__.py",
            "/made-up.json",
            "/graph-metadata.json",
        ),
        *("/etc/passwd", "/assets/", "/image-0.png/", "/image-0.png%00", "/./image-0.png"),
        *("/graph.safetensors", "/assets/..\\server.py", "http://evil.example/../secret.png"),
    ],
)
def test_no_path_leads_elsewhere(server: ViewerServer, path: str) -> None:
    assert ask(server, "GET", path)[0] == 404


@pytest.mark.parametrize("name", ["image-0.png", "made-up.json", "examples.json", "marks.json"])
def test_links_out_of_the_folder_are_refused(folder: Path, name: str) -> None:
    outside = folder.parent / "outside"
    source = folder / name
    outside.write_bytes(source.read_bytes() if source.exists() else json.dumps(MARKS).encode())
    source.unlink(missing_ok=True)
    source.symlink_to(outside)
    with pytest.raises(UserError, match="leads out of the folder"):
        read_folder(folder)


def test_a_link_put_there_later_gives_nothing_away(server: ViewerServer, folder: Path) -> None:
    before = (folder / "image-0.png").read_bytes()
    for name in ("image-0.png", "marks.json"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(folder.parent / "secret.png")
    assert ask(server, "GET", "/image-0.png")[2] == before
    status, _, body = ask(server, "GET", "/marks.json")
    assert status == 500
    assert b"outside" not in body
    assert post(server, json.dumps(MARKS).encode()) == 500
    assert (folder.parent / "secret.png").read_text() == "outside"


def test_marks_are_written_and_read_again(server: ViewerServer, folder: Path) -> None:
    assert json.loads(ask(server, "GET", "/marks.json")[2]) == no_marks()
    assert post(server, json.dumps(MARKS).encode()) == 200
    assert json.loads((folder / "marks.json").read_text()) == MARKS
    assert json.loads(ask(server, "GET", "/marks.json")[2]) == MARKS
    assert [p.name for p in folder.iterdir() if p.name.endswith(".tmp")] == []


def test_a_change_of_other_marks_is_refused(server: ViewerServer, folder: Path) -> None:
    """Of two pages that read the same marks the first to save wins, and the second is told."""
    read = version(server)
    assert post(server, json.dumps(MARKS).encode(), If_Match=read) == 200
    other = no_marks() | {"labels": {"3_12_74": "another"}}
    assert post(server, json.dumps(other).encode(), If_Match=read) == 409
    assert json.loads((folder / "marks.json").read_text()) == MARKS
    headers = {"Origin": server.url.rstrip("/"), "Content_Type": "application/json"}
    body = json.dumps(other).encode()
    sent = {"If_Match": version(server), "Content_Length": str(len(body))}
    status, answer, _ = ask(server, "POST", "/marks.json", body, **headers, **sent)
    assert (status, answer["ETag"]) == (200, version(server))
    # and so is one that the file itself has gone past, whoever wrote it
    (folder / "marks.json").write_text(json.dumps(MARKS))
    assert post(server, body, If_Match=answer["ETag"]) == 409
    # the same marks are the same version
    assert version(server) != read
    (folder / "marks.json").unlink()
    assert version(server) == read


@pytest.mark.parametrize(
    ("body", "changes", "status"),
    [
        (MARKS, {"If_Match": None}, 428),
        (MARKS, {"If_Match": "*"}, 409),
        (MARKS, {"Origin": "http://evil.example"}, 403),
        (MARKS, {"Origin": "null"}, 403),
        (MARKS, {"Origin": None}, 403),
        (MARKS, {"Origin": "http://127.0.0.1:1"}, 403),
        (MARKS, {"Content_Type": "text/plain"}, 415),
        (MARKS, {"Content_Type": None}, 415),
        (MARKS, {"Content_Length": None}, 411),
        (MARKS, {"Content_Length": "-1"}, 411),
        (MARKS, {"Content_Length": str((1 << 20) + 1)}, 413),
        ({}, {}, 400),
        ([], {}, 400),
        (MARKS | {"version": 2}, {}, 400),
        (MARKS | {"more": 1}, {}, 400),
        (MARKS | {"pinned": [1]}, {}, 400),
        (MARKS | {"supernodes": [{"name": "a"}]}, {}, 400),
        (MARKS | {"labels": {"a": 1}}, {}, 400),
        (MARKS | {"labels": {"a": "x" * 2001}}, {}, 400),
        ("[" * 100_000, {}, 400),
        ('{"format": NaN', {}, 400),
    ],
)
def test_other_posts_change_nothing(
    server: ViewerServer, folder: Path, body: Any, changes: dict[str, str | None], status: int
) -> None:
    data = (body if isinstance(body, str) else json.dumps(body)).encode()
    assert post(server, data, **changes) == status
    assert not (folder / "marks.json").exists()
    origin = f"http://127.0.0.1:{server.server_port}"
    for path in ("/data.json", "/made-up.json", "/../marks.json"):
        assert ask(server, "POST", path, b"{}", Origin=origin, Content_Length="2")[0] == 404
    for method in ("PUT", "DELETE", "OPTIONS"):
        assert ask(server, method, "/marks.json")[0] == 501


def test_it_listens_on_this_machine_only(server: ViewerServer) -> None:
    assert server.server_address[0] == "127.0.0.1"


def test_a_port_that_is_taken_is_one_clear_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["view", str(folder), "--port", str(port), "--no_browser"]) == 1
    error = capsys.readouterr().err
    assert (
        error
        == f"error: --port {port} is taken: another viewer may be running; give another port\n"
    )
    assert main(["view", str(folder), "--port", "70000"]) == 1
    assert capsys.readouterr().err == "error: --port 70000: ports go from 0 to 65535\n"


def change(path: str, value: Any) -> Callable[[Path], None]:
    """Set one value in made-up.json, `path` like "nodes.0.ctx_idx"."""

    def apply(folder: Path) -> None:
        graph = json.loads((folder / "made-up.json").read_text())
        *way, last = [int(p) if p.isdecimal() else p for p in path.split(".")]
        inner = graph
        for step in way:
            inner = inner[step]
        inner[last] = value
        (folder / "made-up.json").write_text(json.dumps(graph))

    return apply


def text(name: str, value: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).write_text(value)

    return apply


def gone(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (gone("graph-metadata.json"), "graph-metadata.json: not there"),
        (gone("made-up.json"), "made-up.json: not there"),
        (gone("image-0.png"), "image-0.png: not there"),
        (text("graph-metadata.json", '{"graphs": [{"slug": "../made-up"}]}'), "lists no graphs"),
        (text("graph-metadata.json", '{"graphs": [{"slug": "a"}, {"slug": "b"}]}'), "--slug"),
        (text("made-up.json", '{"nodes": ['), "damaged, not JSON"),
        (text("made-up.json", "[]"), "not an object"),
        (text("image-0.png", "no picture"), "not a picture"),
        (text("examples.json", '{"features": {}}'), "examples.json: damaged"),
        (text("marks.json", "{}"), "marks.json: not sparsify-vlm marks; mend it or delete it"),
        (change("metadata.vlm.version", 2), "version 2, which this version does not read"),
        (change("metadata.vlm.images.0.file", "../secret.png"), "not the name of a picture"),
        (change("metadata.vlm.images.0.file", "made-up.json"), "not the name of a picture"),
        (change("metadata.vlm.tokens.5.patch", [8, 0]), "outside its image's patches"),
        (change("metadata.vlm.patch_effects.0.target", "x"), "target is not a node"),
        (change("metadata.vlm.patch_effects.0.values", [[1]]), "not a table of 8 × 8 numbers"),
        (change("nodes", []), "no nodes"),
        (change("nodes.0.ctx_idx", 75), "ctx_idx 75 is not one of the 75 tokens"),
        (change("nodes.8.layer", "x"), "layer 'x' is not a number"),
        (change("links.0.weight", float("nan")), "NaN is no JSON number"),
        (change("links.0.source", "nobody"), "leads from or to a node that is not there"),
        (change("links.0.source", "4_7_74"), "does not lead from a layer to a higher one"),
    ],
)
def test_a_damaged_folder_is_one_clear_line(
    folder: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], words: str
) -> None:
    damage(folder)
    assert main(["view", str(folder), "--no_browser"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("error: ")
    assert words in error
    assert str(folder) in error


def test_whatever_is_damaged_is_said_or_does_no_harm(tmp_path: Path) -> None:
    """Junk at any place of the file: either the page can be made of it or a `UserError` tells."""
    rng = random.Random(5)
    junk: list[Any] = [None, True, -1, 10**400, 1.5, "x", "", [], {}, [[]], {"a": 1}, [None]]
    graph = build()
    graph["links"] = graph["links"][:20]
    for _ in range(300):
        changed = copy.deepcopy(graph)
        inner: Any = changed
        while True:
            key = rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
            if not isinstance(inner[key], dict | list) or not inner[key] or rng.random() < 0.15:
                break
            inner = inner[key]
        inner[key] = rng.choice(junk)
        with contextlib.suppress(UserError):
            json.dumps(read_folder(write(tmp_path, changed)).page, allow_nan=False)


@pytest.mark.parametrize("case", ["llama_relu", "llama_soft_tokens", "llama_topk"])
def test_it_reads_circuit_tracers_own_graphs(case: str) -> None:
    folder = ORACLES / case / "graph_json"
    read = read_folder(folder)
    given = json.loads((folder / f"{read.slug}.json").read_text())
    assert len(read.page["nodes"]) == len(given["nodes"])
    assert len(read.page["links"]["weight"]) == len(given["links"])
    for mine, theirs in zip(read.page["nodes"], given["nodes"], strict=True):
        if mine["kind"] == "feature":
            assert theirs["node_id"] == f"{mine['layer']}_{mine['feature']}_{mine['position']}"


def test_a_second_node_of_an_id_is_left_out_and_counted(folder: Path) -> None:
    graph = build()
    graph["nodes"].append(dict(graph["nodes"][8]))
    read = read_folder(write(folder, graph))
    assert read.page["repeated_ids"] == 1
    assert len(read.page["nodes"]) == len(graph["nodes"]) - 1


def test_one_of_several_graphs_is_chosen(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = {"graphs": [{"slug": "other"}, {"slug": "made-up"}]}
    (folder / "graph-metadata.json").write_text(json.dumps(listed))
    assert read_folder(folder, "made-up").slug == "made-up"
    assert main(["view", str(folder), "--slug", "third"]) == 1
    assert "--slug third: not in" in capsys.readouterr().err


def test_the_standalone_file_replaces_no_other_file(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    for _ in range(2):  # one of its own may be replaced
        assert main(["view", str(folder), "--standalone", str(out)]) == 0
    assert capsys.readouterr().out == f"wrote {out}\n" * 2
    out.write_text("<p>mine</p>")
    assert main(["view", str(folder), "--standalone", str(out)]) == 1
    assert "holds something else" in capsys.readouterr().err
    assert out.read_text() == "<p>mine</p>"


def test_nothing_from_data_ends_the_standalone_script(folder: Path) -> None:
    graph = build()
    graph["nodes"][0]["clerp"] = "</script><script>alert(1)</script>"
    graph["metadata"]["vlm"]["question"] = "<!--<script>"
    page = standalone_page(read_folder(write(folder, graph)))
    assert page.count("</script>") == 3
    assert "alert(1)</script>" not in page
    assert "<!--<script>" not in page
    assert "import {" not in page


def test_ctrl_c_ends_it_quietly(folder: Path) -> None:
    import signal
    import subprocess
    import sys

    command = [sys.executable, "-m", "sparsify_vlm", "view", str(folder), "--port", "0"]
    with subprocess.Popen(
        [*command, "--no_browser"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"SPARSIFY_VLM_HOOK": "0"},
        # A job in the background ignores Ctrl-C, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        try:
            assert process.stdout is not None
            assert "is shown at http://127.0.0.1:" in process.stdout.readline()
            process.send_signal(signal.SIGINT)
            _, error = process.communicate(timeout=20)
        finally:
            process.kill()
    assert (process.returncode, error) == (0, "")
