"""Brings `python -m sparsify` here when the job is one for this package.

The PyPI package `eai-sparsify` imports torch before Python looks up `sparsify.__main__`, and torch
calls every entry point of the group `torch.backends` while it is imported. `install` is such an
entry point. It puts a finder on `sys.meta_path` that knows one module name, `sparsify.__main__`,
and answers for it only when `sparsify_vlm._dispatch` says that the command line asks for something
upstream does not have; otherwise Python goes on and finds upstream's own file.

Nothing here may raise: the exception would break `import torch` for the whole environment. Hence
the standard library only, and every other import delayed until the one name is asked for.
`SPARSIFY_VLM_HOOK=0` switches the finder off.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

TARGET = "sparsify.__main__"


class SparsifyMainFinder:
    """A meta-path finder for `sparsify.__main__` alone."""

    @staticmethod
    def find_spec(
        fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Our module's spec when the command line is ours, else None: let Python look on."""
        if fullname != TARGET:
            return None
        try:
            from sparsify_vlm._dispatch import find_main

            return find_main(fullname, path, sys.argv)
        except Exception as error:  # noqa: BLE001 - upstream's jobs must run whatever happens here
            if os.environ.get("SPARSIFY_VLM_DEBUG"):
                print(f"sparsify_vlm: hook passed over: {error!r}", file=sys.stderr)
            return None


def install() -> None:
    """Insert the finder, once. Called by torch while it is imported; never raises."""
    try:
        if os.environ.get("SPARSIFY_VLM_HOOK") == "0" or SparsifyMainFinder in sys.meta_path:
            return
        sys.meta_path.insert(0, SparsifyMainFinder)
    except Exception:  # noqa: BLE001 - see the module's docstring
        return
