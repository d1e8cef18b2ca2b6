"""Splitting a step's time into phases."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

PHASES = ("encode", "decode", "backward", "update", "other")


def timer(device: str) -> Callable[[], float]:
    """Seconds of the processor with one CPU thread, which others on the machine do not lengthen;
    seconds of the wall otherwise."""
    alone = torch.device(device).type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if alone else time.perf_counter


class Clock:
    """Seconds per phase of one step at a time. A phase within another interrupts it.

    On a CPU they are those of `timer`; on CUDA those of the device's queue, so that nothing waits.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._cuda = torch.device(device).type == "cuda"
        self._read = timer(device)
        self._now, self._marks = "", list[tuple[str, Any]]()

    def begin(self) -> None:
        """Start a step, in the phase `other`."""
        self._marks.clear()
        self._switch("other")

    def end(self) -> dict[str, float]:
        """End the step: seconds of each of PHASES."""
        self._switch("")
        if self._cuda:
            torch.cuda.synchronize()
        seconds = dict.fromkeys(PHASES, 0.0)
        for (name, start), (_, stop) in zip(self._marks, self._marks[1:], strict=False):
            seconds[name] += start.elapsed_time(stop) / 1e3 if self._cuda else stop - start
        return seconds

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Within, the time is that of `name`."""
        before = self._now
        self._switch(name)
        try:
            yield
        finally:
            self._switch(before)

    @contextmanager
    def watching(self, functions: list[tuple[Any, str, str]]) -> Iterator[None]:
        """Within, calls of (owner, name, phase) are that phase's."""
        with ExitStack() as stack:
            for owner, name, phase in functions:
                timed = self._timed(getattr(owner, name), phase)
                stack.enter_context(patch.object(owner, name, timed))
            yield

    def _timed(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(phase):
                return function(*args, **kwargs)

        return timed

    def _switch(self, name: str) -> None:
        mark: Any = torch.cuda.Event(enable_timing=True) if self._cuda else self._read()
        if self._cuda:
            mark.record()
        self._now = name
        self._marks.append((name, mark))
