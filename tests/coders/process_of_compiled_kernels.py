"""Started by test_kernels_compiled.py: what needs a process that has not used numba yet."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from forks import serve

from sparsify_vlm.coders.kernels import compiled


def use_in_fork() -> int:
    """The exit status of a fork that uses threads after its parent has: it would wait for ever."""
    torch.set_num_threads(2)
    pre = torch.randn(64, 40)
    compiled.top(pre, 3)
    child = os.fork()
    if child == 0:
        compiled.top(pre, 3)
        os._exit(7)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def numba_is_imported() -> bool:
    return "numba" in sys.modules


def sort_entries(folder: str, writable: bool) -> list[int]:
    """The order of two entries, by a loop that numba may keep in `folder`."""
    os.environ["NUMBA_CACHE_DIR"] = folder
    from numba.core import caching

    def nowhere(*_: Any) -> None:
        raise OSError("read-only file system")

    if not writable:
        caching._CacheLocator.ensure_cache_path = nowhere
    order, _, _ = compiled.sort(torch.tensor([0, 2]), torch.tensor([1, 0]), 2)
    return order.tolist()


CALLS = {call.__name__: call for call in (use_in_fork, numba_is_imported, sort_entries)}

if __name__ == "__main__":
    serve(lambda call: CALLS[call.pop("call")](**call))
