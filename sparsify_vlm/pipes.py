"""Output that nobody reads any more (`… | head`) or never did (`>&-`): the work goes on."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO, cast

from sparsify_vlm.errors import UserError


class Unread:
    """A stream that drops what is written once its reader is gone.

    What cannot be written for another reason, as on a full disk, is a `UserError` where it is
    `needed`, and dropped otherwise.
    """

    def __init__(self, stream: TextIO, needed: bool) -> None:
        self._stream, self._needed = stream, needed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As the stream's own."""
        with self._dropped():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """As the stream's own."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """As the stream's own."""
        with self._dropped():
            self._stream.flush()

    @contextmanager
    def _dropped(self) -> Iterator[None]:
        """From the first failure on, send to nowhere what comes and what is still in the buffer."""
        try:
            yield
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            if self._needed and not isinstance(error, BrokenPipeError):
                raise UserError(
                    f"the standard output cannot be written: {error.strerror}"
                ) from None


@contextmanager
def readers_may_leave() -> Iterator[None]:
    """Both output streams as `Unread` for the duration, and flushed at its end."""
    for descriptor in range(3):  # else the next file opened would be taken for a closed stream
        with suppress(OSError):
            os.fstat(descriptor)
            continue
        os.open(os.devnull, os.O_RDWR)
    with open(os.devnull, "w") as nowhere:
        streams = Unread(sys.stdout or nowhere, True), Unread(sys.stderr or nowhere, False)
        out, err = (cast(TextIO, stream) for stream in streams)
        with redirect_stdout(out), redirect_stderr(err):
            try:
                yield
            finally:
                for stream in streams:
                    with suppress(UserError):  # commands flush what they print, and have told it
                        stream.flush()
