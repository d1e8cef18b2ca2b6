"""What a process can learn about another one without asking it: is it there, does it run?"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

_PROC = Path("/proc")


class State(Enum):
    """Of a process on this machine."""

    RUNS = "runs"
    STOPPED = "stopped"
    GONE = "gone"


@dataclass(frozen=True)
class Peer:
    """Where a process of the run is, written so that others can look for it."""

    pid: int
    place: str
    """Machine and pid namespace; empty where the system has no /proc to look into."""
    started: int
    """Start time in clock ticks since boot: a pid may be given out again."""

    @classmethod
    def own(cls) -> Peer:
        """This process."""
        return cls(os.getpid(), _place(), _stat(os.getpid())[1])

    @property
    def is_near(self) -> bool:
        """Whether `state` can tell anything here."""
        return self.place != "" and self.place == _place()

    def state(self) -> State:
        """What the process does now; only for one that `is_near`."""
        letter, started = _stat(self.pid)
        if started != self.started or letter in ("Z", "X", "x"):
            return State.GONE
        return State.STOPPED if letter in ("T", "t") else State.RUNS


def _place() -> str:
    namespace = _PROC / "self/ns/pid"
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{socket.gethostname()} {boot} {os.readlink(namespace)}"
    except OSError:
        return ""


def _stat(pid: int) -> tuple[str, int]:
    """State letter and start time of a process; ("", -1) without one or without /proc."""
    try:
        text = (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", -1
    fields = text.rpartition(")")[2].split()  # the name before may hold spaces and brackets
    return fields[0], int(fields[19])
