"""Output that nobody reads any more (`… | head`): the work that makes it goes on."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO, cast


class Unread:
    """A stream that drops what is written once its reader is gone."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As the stream's own."""
        try:
            self._stream.write(text)
        except BrokenPipeError:
            self._drop()
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """As the stream's own."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """As the stream's own."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._drop()

    def _drop(self) -> None:
        """Send to nowhere what comes, and what is in the stream's buffer still."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


@contextmanager
def readers_may_leave() -> Iterator[None]:
    """Both output streams as `Unread` for the duration, and flushed at its end."""
    streams = Unread(sys.stdout), Unread(sys.stderr)
    out, err = (cast(TextIO, stream) for stream in streams)
    with redirect_stdout(out), redirect_stderr(err):
        try:
            yield
        finally:
            for stream in streams:
                stream.flush()
