"""What every test starts from: no network, one thread, fixed seeds."""

from __future__ import annotations

import os
import random
import sys

import numpy as np
import pytest

# Before anything imports torch or transformers: both read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "disabled"
# sparsify takes its Triton decoder wherever Triton can be imported, CPU tensors or not.
os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
for _name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
    os.environ.pop(_name, None)


def _not_onto_the_disk(descriptor: int) -> None:
    """In the place of `os.fsync`, which takes 10 ms: no test survives a cut of the power anyway.
    Processes that tests start have the real one."""
    os.fstat(descriptor)


os.fsync = _not_onto_the_disk


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: many short ones at the end keep all workers busy to the last.

    For `--dist loadfile --no-loadscope-reorder`; a file's own order stays.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Fixed seeds; torch's only where a test has imported it, so that others stay quick."""
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        import torch

        torch.manual_seed(0)
