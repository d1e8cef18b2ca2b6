"""Started by test_hook.py: `python -m sparsify …` in forks of a process that has imported it.

A call is given as "arguments", "run_name" (`__main__`, or `__mp_main__` as in a spawned worker) and
"hook"; said are "status", "stdout" and "stderr", and the module that `run` comes from.
"""

from __future__ import annotations

import os
import runpy
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import sparsify.trainer  # noqa: F401 - the seconds that all calls share
from forks import serve

from sparsify_vlm._hook import SparsifyMainFinder


def called(call: dict[str, Any]) -> dict[str, Any]:
    if not call["hook"]:
        sys.meta_path.remove(SparsifyMainFinder)
    sys.argv = call["arguments"]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        for number, file in enumerate(files, 1):
            os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY), number)
        status, names = 0, {}
        try:
            names = runpy.run_module("sparsify.__main__", run_name=call["run_name"], alter_sys=True)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except Exception:  # noqa: BLE001 - as Python does it
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        out, err = (file.read_text() for file in files)
    of = getattr(names.get("run"), "__module__", None)
    return {"status": status, "stdout": out, "stderr": err, "run_is_of": of}


if __name__ == "__main__":
    serve(called)
