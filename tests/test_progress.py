"""Progress where the output is no terminal."""

from __future__ import annotations

import io

from sparsify_vlm.progress import Progress


def test_the_last_line_is_there_once() -> None:
    stream = io.StringIO()
    with Progress("Counting", 3, unit="things", interval=0.0, stream=stream) as progress:
        for _ in range(3):
            progress.update()
    lines = stream.getvalue().splitlines()
    assert [line.split(" things")[0] for line in lines] == [
        *("Counting: 1/3", "Counting: 2/3", "Counting: 3/3")
    ]


def test_the_end_is_said_where_nothing_was_said_before() -> None:
    stream = io.StringIO()
    with Progress("Counting", 3, unit="things", stream=stream) as progress:
        progress.update(3)
        progress.note(lost=1)
    (line,) = stream.getvalue().splitlines()
    assert line.startswith("Counting: 3/3 things")
    assert line.endswith("lost=1")
