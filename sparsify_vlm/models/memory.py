"""Memory that the C library keeps, so that forward passes on a CPU do not wait for pages."""

from __future__ import annotations

import ctypes
import platform
from functools import cache

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


@cache
def keep_freed_memory() -> None:
    """Have glibc keep what torch frees instead of giving it back to the system at once.

    By default every tensor above some megabytes is mapped anew, and its pages are faulted in one by
    one; in virtual machines that costs more than the arithmetic of a small model (docs/log.md).
    Blocks up to 256 MiB now come from the heap, of which up to 1 GiB stays when it is free. Does
    nothing where the C library is not glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, 256 << 20)
    libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)
    libc.mallopt(_M_TOP_PAD, 64 << 20)
