"""Ends this process with one clear line when another one of the run is gone.

A process that waits in a collective for one that is stopped, killed, or on a machine without power
waits for hours, and one whose connection breaks learns neither who ended nor why. So, beside the
main thread, every process of the run

1. beats: a thread counts up its entry in the run's key-value store, once a second; and, for its
   neighbour on the same machine, that one's entry too as long as /proc says that it runs. So a
   process that holds Python's lock for minutes, in a download or a long call, counts as alive;
2. looks: at the beat of the next rank, and with /proc at the processes of its own machine;
3. claims: who finds another gone writes what it found into the store, once for the whole run. The
   claimer prints it; all others end without a word.

A second thread, which needs neither the store nor the main thread, sees to signals that come while
the main thread is in a call that does not return, and to a store that does not answer.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any, NoReturn

from torch.distributed import Store

from sparsify_vlm.errors import UserError
from sparsify_vlm.training.parallel_peers import Peer, State

BEAT = 1.0
"""Seconds between beats."""
SILENCE, SILENCE_VARIABLE = 45.0, "SPARSIFY_VLM_RANK_TIMEOUT"
"""Seconds without a beat after which a process counts as gone, and what sets another number."""
START = 600.0
"""Seconds for the next rank to join; it may still be importing its libraries."""
EVIDENCE = 8.0
"""Seconds that a broken connection is looked into before it is reported without a culprit."""
ORDERLY = 1.5
"""Seconds that the main thread has for an orderly end before it is ended."""
FAILED, TERMINATED = 1, 128 + signal.SIGTERM


def silence_allowed() -> float:
    """Seconds, from the environment. Raises `UserError` for what is no positive number."""
    text = os.environ.get(SILENCE_VARIABLE, "")
    if not text:
        return SILENCE
    with suppress(ValueError):
        if float(text) > 0:
            return float(text)
    raise UserError(f"{SILENCE_VARIABLE}={text}: give a number of seconds above 0")


class Watch:
    """The watch of one process over the others; a context manager, entered before any waiting.

    `connect` makes a connection to the store that nobody else uses; it may wait for the others.
    `holder` says who holds the store.
    """

    def __init__(self, rank: int, size: int, connect: Callable[[], Store], holder: str) -> None:
        self.rank, self.size, self._connect, self._holder = rank, size, connect, holder
        self.silence = silence_allowed()
        self.beat = min(BEAT, self.silence / 8)
        self.last_step: Callable[[], int | None] | None = None
        """Looks up the step that --resume would continue from; None as long as nobody knows."""
        self._store: Store | None = None
        self._peers: dict[int, Peer] = {}
        self._joined, self._met = threading.Event(), threading.Event()
        self._left, self._ending = threading.Event(), threading.Event()
        self._claiming = threading.RLock()
        self._claimed: tuple[str, bool] | None = None
        self._lost: str | None = None
        self._is_lowest: bool | None = None
        self._beat_at = time.monotonic()
        self._heard = (-1, time.monotonic())
        self._before: Any = None
        self._wakes: tuple[int, int] | None = None

    # ---- from the main thread

    def __enter__(self) -> Watch:
        if threading.current_thread() is threading.main_thread():
            self._wakes = os.pipe()
            os.set_blocking(self._wakes[1], False)
            self._old_wakeup = signal.set_wakeup_fd(self._wakes[1], warn_on_full_buffer=False)
            self._before = signal.signal(signal.SIGTERM, self._terminated)
            os.register_at_fork(after_in_child=self._forget_signals)
        self._beating = threading.Thread(target=self._beats, name="beats", daemon=True)
        self._beating.start()
        threading.Thread(target=self._guards, name="guards", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Tell the others that this process ended well, or that it says itself why it did not. Of
        several that end over something given, the first one tells it."""
        self._joined.wait(5.0)  # one that ends at once may be before its own thread
        if error is None:
            self._note(f"left {self.rank}")
            self._left.set()
            # Ending the interpreter while the thread is in a call to the store would abort it.
            self._beating.join(5.0)
        else:
            _, is_ours = self._claim("")
            self._end_in(10.0, FAILED)
            if not is_ours and isinstance(error, KeyboardInterrupt):
                raise SystemExit(128 + signal.SIGINT) from error
            if not is_ours and isinstance(error, UserError):  # often the same one
                time.sleep(1.0)  # the launcher ends the claimer when we end: let it speak first
                raise SystemExit(FAILED) from error
        if self._wakes is not None:
            signal.set_wakeup_fd(self._old_wakeup)
            signal.signal(signal.SIGTERM, self._before)

    def _forget_signals(self) -> None:
        """In a forked worker, which is no process of the run: its signals are its own."""
        if signal.getsignal(signal.SIGTERM) == self._terminated:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def meet(self) -> None:
        """Wait until it is known where all processes are: from here on each death has a name."""
        self._met.wait(START)

    def connection_broke(self, error: RuntimeError) -> NoReturn:
        """End over a collective that failed: with the one line, or silently if another tells it."""
        deadline = time.monotonic() + EVIDENCE
        found = None
        while found is None and self._claimed is None and time.monotonic() < deadline:
            found = self._read_claim() or self._lost or self._gone(min(5.0, self.silence))
            time.sleep(0.05)
        broke = f"the connection to the other processes broke ({_first(error)})"
        line, is_ours = self._claim(found or broke)
        self._end_in(10.0, FAILED)
        if is_ours and line:
            raise UserError(line) from error
        raise SystemExit(FAILED) from error

    def _terminated(self, _: int, __: FrameType | None) -> NoReturn:
        """SIGTERM, while Python runs: leave through the `finally`s, within `ORDERLY` seconds."""
        self._end_in(ORDERLY, TERMINATED)
        self._tell_end()
        raise SystemExit(TERMINATED)

    # ---- the two threads

    def _beats(self) -> None:
        try:
            store = self._connect()
            store.set_timeout(timedelta(seconds=self.silence))
            store.set(f"peer {self.rank}", json.dumps(asdict(Peer.own())))
            self._store = store
            self._heard = (-1, time.monotonic())
            self._joined.set()
            while not self._left.is_set():
                self._round(store)
                self._left.wait(self.beat if self._peers else self.beat / 20)
        except RuntimeError as error:  # the store's own errors, from every method
            self._store = None
            self._without_store(_first(error))

    def _without_store(self, why: str) -> None:
        """End over a store that is gone. All processes notice within a beat, and first look around
        while the others are still there, so that none takes another's end for the cause."""
        if self._left.wait(1.0):  # at a good end, whoever holds the store may go first
            return
        lost = f"{self._holder}, which holds the run's store, is gone ({why})"
        self._is_lowest = self._lowest_near()
        self._lost = self._gone_near() or lost
        if not self._left.wait(1.5):
            self._end(self._lost)

    def _round(self, store: Store) -> None:
        if time.monotonic() - self._beat_at > self.beat + self.silence / 3:
            self._heard = (self._heard[0], time.monotonic())  # it was us who slept
        store.add(f"beat {self.rank}", 1)
        keys = [f"peer {rank}" for rank in range(self.size)]
        if not self._peers and store.check(keys):
            self._peers = {r: Peer(**json.loads(store.get(key))) for r, key in enumerate(keys)}
            self._met.set()
        near = sorted(r for r, peer in self._peers.items() if peer.is_near)
        neighbour = near[(near.index(self.rank) + 1) % len(near)] if near else self.rank
        if neighbour != self.rank and self._peers[neighbour].state() is State.RUNS:
            store.add(f"beat {neighbour}", 1)
        self._beat_at = time.monotonic()
        claim, gone = self._read_claim(), self._gone(self.silence)
        if claim is not None:
            self._left.wait(1.0)  # the launcher ends the claimer when we end: let it speak first
            self._end("")
        elif gone is not None:
            self._end(gone)

    def _guards(self) -> None:
        while not self._left.is_set():
            before = time.monotonic()
            for number in self._signals(self.beat):
                if number == signal.SIGTERM and not self._ending.is_set():
                    time.sleep(0.5)  # the main thread's own handler, if it can run
                    self._end_in(ORDERLY, TERMINATED)
                    self._tell_end()
                elif number == signal.SIGINT:
                    self._end_in(3.0, 128 + signal.SIGINT)
            if time.monotonic() - before > self.beat + self.silence / 3:
                self._beat_at = time.monotonic()  # this process was stopped
            if self._store is not None and time.monotonic() - self._beat_at > self.silence:
                self._store = None  # the other thread is in a call to it
                lost = f"{self._holder}, which holds the run's store, is stopped or gone: it has"
                lost = f"{lost} not answered for {self.silence:g} s"
                self._end(self._gone_near() or self._stopped_near() or lost)

    def _signals(self, seconds: float) -> bytes:
        if self._wakes is None:
            self._left.wait(seconds)
            return b""
        ready, _, _ = select.select([self._wakes[0]], [], [], seconds)
        return os.read(self._wakes[0], 64) if ready else b""

    # ---- what there is to see

    def _gone(self, silence: float) -> str | None:
        """Who is gone, if anybody is; `silence` in seconds."""
        with suppress(RuntimeError):
            return self._gone_near() or self._silent(silence)
        return None

    def _gone_near(self) -> str | None:
        for rank, peer in list(self._peers.items()):
            gone = rank != self.rank and peer.is_near and peer.state() is State.GONE
            if gone and not self._has(f"left {rank}"):
                return f"process {rank} of {self.size} was killed or has crashed (pid {peer.pid})"
        return None

    def _silent(self, silence: float) -> str | None:
        next_one = (self.rank + 1) % self.size
        if self._store is None or self._has(f"left {next_one}"):
            return None
        count, now = self._store.add(f"beat {next_one}", 0), time.monotonic()
        if count != self._heard[0]:
            self._heard = (count, now)
        waited = now - self._heard[1]
        if count == 0:
            never = f"process {next_one} of {self.size} has not started within {waited:.0f} s"
            return never if waited > max(START, silence) else None
        if waited <= silence:
            return None
        silent = f"process {next_one} of {self.size} or its machine is stopped or gone: it has been"
        return self._stopped_near() or f"{silent} silent for {waited:.0f} s"

    def _stopped_near(self) -> str | None:
        """A process of this machine that is stopped, which may well go on again."""
        for rank, peer in list(self._peers.items()):
            if peer.is_near and peer.state() is State.STOPPED:
                return f"process {rank} of {self.size} is stopped (pid {peer.pid})"
        return None

    def _has(self, key: str) -> bool:
        return self._store is not None and self._store.check([key])

    def _note(self, key: str) -> None:
        with suppress(RuntimeError):
            if self._store is not None:
                self._store.set(key, "1")

    # ---- the one line

    def _read_claim(self) -> str | None:
        """What the run ends over, if a process has claimed it."""
        with suppress(RuntimeError):
            if self._store is not None and self._store.check(["end"]):
                return str(json.loads(self._store.get("end"))["line"])
        return None

    def _claim(self, what: str) -> tuple[str, bool]:
        """The run's one line, and whether it is this process that tells it."""
        with self._claiming:
            if self._claimed is None:
                line = f"{what}; {self._how_to_go_on()}" if what else ""
                self._claimed = line, self._claim_in_store(line)
            return self._claimed

    def _claim_in_store(self, line: str) -> bool:
        mine = json.dumps({"rank": self.rank, "line": line})
        with suppress(RuntimeError):
            if self._store is not None:
                return bool(self._store.compare_set("end", "", mine).decode() == mine)
        return self._lowest_near() if self._is_lowest is None else self._is_lowest

    def _lowest_near(self) -> bool:
        """Whether this process has the lowest rank of those that run here: without a store to
        claim the line in, that one tells it."""
        lower = [peer for rank, peer in self._peers.items() if peer.is_near and rank < self.rank]
        return all(peer.state() is not State.RUNS for peer in lower)

    def _how_to_go_on(self) -> str:
        if self.last_step is None:
            return "--resume continues from the last checkpoint"
        step = self.last_step()
        if step is None:
            return (
                "nothing was saved yet: give the same command again, with --resume or --overwrite"
            )
        return f"--resume continues from step {step}"

    def _tell_end(self) -> None:
        """Over a SIGTERM, which a launcher sends too when it has seen another process die."""
        with self._claiming:
            if self._claimed is None:
                self._say(self._gone(self.silence) or "stopped by SIGTERM")

    def _say(self, what: str) -> None:
        line, is_ours = self._claim(what)
        if is_ours and line:
            sys.stdout.flush()
            where = f"[rank {self.rank}] " if self.rank else ""
            newline = "\n" if os.isatty(2) else ""  # behind the progress line
            os.write(2, f"{newline}{where}error: {line}\n".encode())

    def _end(self, what: str) -> None:
        """From a thread: say it and end the process, unless the main thread does so already."""
        # Not waiting for ever: whoever holds the lock may be in a call to a store that is stopped.
        if self._claiming.acquire(timeout=ORDERLY):
            if self._claimed is None:
                self._say(what)
                os._exit(FAILED)
            self._claiming.release()
        self._end_in(10.0, FAILED)

    def _end_in(self, seconds: float, status: int) -> None:
        """End the process after that time, whatever the main thread does then."""
        if not self._ending.is_set():
            self._ending.set()
            timer = threading.Timer(seconds, os._exit, (status,))
            timer.daemon = True
            timer.start()


def _first(error: BaseException) -> str:
    """The first line of torch's message, which often goes on with a stack."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
