"""Calls in processes of their own, forked from one that has imported what they need.

A test starts `Forks(SCRIPT, environment)` once; SCRIPT imports, and ends with `serve(call)`. Each
`ask(what)` then has a fork return `call(what)`, both plain data, without the seconds of importing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ANSWERS = "FORKS_ANSWERS"
"""Number of the file descriptor that answers are written to."""


def serve(call: Callable[[Any], Any]) -> None:
    """Answer each line of the standard input, each by a fork."""
    output = os.fdopen(int(os.environ[ANSWERS]), "w")
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                print(json.dumps(call(json.loads(line))), file=output, flush=True)
                status = 0
            except BaseException:  # noqa: BLE001 - told to the one who asked
                traceback.print_exc()
            finally:
                os._exit(status)
        if os.waitpid(child, 0)[1]:
            print("null", file=output, flush=True)


class Forks:
    """The process that forks."""

    def __init__(self, script: Path, environment: Mapping[str, str]) -> None:
        answers, theirs = os.pipe()
        paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        self._process = subprocess.Popen(
            [sys.executable, str(script)],
            env={
                **os.environ,
                **{"PYTHONPATH": os.pathsep.join(filter(None, paths)), ANSWERS: str(theirs)},
                **environment,
            },
            stdin=subprocess.PIPE,
            stdout=self._said,
            stderr=self._said,
            pass_fds=[theirs],
            text=True,
        )
        os.close(theirs)
        self._answers = os.fdopen(answers)

    def ask(self, what: Any) -> Any:
        """What the call returns; an error shows what its process said."""
        assert self._process.stdin is not None
        print(json.dumps(what), file=self._process.stdin, flush=True)
        answer = self._answers.readline()
        if answer.strip() in ("", "null"):
            self._said.seek(0)
            raise AssertionError(self._said.read())
        return json.loads(answer)

    def end(self) -> None:
        """No more calls."""
        self._process.communicate(timeout=60)
        self._answers.close()
        self._said.close()
