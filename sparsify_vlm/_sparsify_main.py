"""Stands in for `sparsify.__main__` where `_dispatch` finds that the command line is ours."""

from __future__ import annotations

import sys

from sparsify_vlm.cli import run_as_sparsify as run

__all__ = ["run"]

if __name__ == "__main__":
    sys.exit(run())
