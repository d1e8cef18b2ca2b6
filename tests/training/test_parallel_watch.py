"""The threads of one process that watches the others, on a store in memory."""

from __future__ import annotations

import threading
import time

from torch.distributed import HashStore

from sparsify_vlm.training.parallel_watch import Watch


class SlowStore:
    """A store whose answers take half a second, as from a busy machine."""

    def __init__(self) -> None:
        self.store, self.called = HashStore(), threading.Event()

    def __getattr__(self, name: str) -> object:
        return getattr(self.store, name)

    def add(self, key: str, amount: int) -> int:
        self.called.set()
        time.sleep(0.5)
        return self.store.add(key, amount)


def test_no_call_to_the_store_outlives_the_run() -> None:
    """The interpreter would be aborted if it ended meanwhile."""
    store = SlowStore()
    with Watch(0, 1, lambda: store, "process 0"):  # type: ignore[arg-type, return-value]
        assert store.called.wait(10)
    assert "beats" not in [thread.name for thread in threading.enumerate()]
