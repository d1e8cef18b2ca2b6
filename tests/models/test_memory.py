from __future__ import annotations

import platform
import resource
import subprocess
import sys

import pytest

MAPPED_ANEW = """
import resource, sys, torch
from sparsify_vlm.models.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(3):
    torch.ones(8 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(8 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc is meant")
def test_a_freed_block_is_used_again_without_page_faults() -> None:
    """32 MiB, twenty times: mapped anew each time, or taken from the heap."""

    def faults(how: str) -> int:
        command = [sys.executable, "-c", MAPPED_ANEW, how]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    per_block = (32 << 20) // resource.getpagesize()
    assert faults("keep") < per_block
    assert faults("as it is") > per_block
