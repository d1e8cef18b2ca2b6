"""A capture by several processes that share a folder, and nothing else.

    activations/manifest.json    what is captured; complete when the shares are joined
    activations/part_00/         the shards of process 0, written like a store of its own
    activations/part_01/         …

Batch number b of a capture in one process is the business of process b mod n. The line of a shard
in a part names its batches, and what is in any line is not captured again: a capture that was cut
off is continued by any number of processes, one included. The process that ends last finds all
batches in lines. It joins the shards in the order of their first batches: moves their files into
the store's folder, writes the store's `shards.jsonl`, declares it complete and removes the parts.
Until then the parts' lines stay where they are, so that a join that was cut off can be repeated.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from sparsify_vlm.data.store_files import lock
from sparsify_vlm.data.store_format import SHARDS, Shard, read_shards, shard_name, tensor_path
from sparsify_vlm.data.store_writer import StoreWriter, TokenRows
from sparsify_vlm.errors import UserError
from sparsify_vlm.files import sync, write_text

PATIENCE = 60.0
"""Seconds to wait for another process that opens or joins the store."""


def has_parts(folder: Path) -> bool:
    """Whether several processes have begun a capture into `folder`."""
    return bool(_parts(folder))


class Share:
    """What one of `world` processes writes of `store`; a context manager, used like a writer.

    Entering raises `UserError` as a `StoreWriter` does, also where a process of an earlier run
    still writes. `joined` says afterwards whether it was this process that joined the shares.
    """

    def __init__(self, store: StoreWriter, rank: int, world: int) -> None:
        self.store, self.rank, self.world = store, rank, world
        self.path = store.path
        about = {k: v for k, v in store.manifest.items() if k not in ("format", "version")}
        self._part = StoreWriter(_part(self.path, rank), about, store.shard_tokens, numbered=True)
        self._stored: set[int] = set()
        self._total = 0
        self._held = ExitStack()
        self.joined = False

    batches = 0
    """Of these nothing is known before `wants` is asked."""

    @property
    def shards(self) -> list[Shard]:
        """Finished shards of this process."""
        return self._part.shards

    @property
    def samples(self) -> int:
        """Samples in finished shards of this process."""
        return self._part.samples

    @property
    def skipped(self) -> list[str]:
        """Samples left out of the finished shards of this process."""
        return self._part.skipped

    def __enter__(self) -> Share:
        with ExitStack() as held:
            with _alone(self.path):
                self.store.open()
                if self.store.complete:
                    _remove_parts(self.path)  # a kill may have left some
                    return self
                for part in _parts(self.path):
                    if _number(part) >= self.world:  # of an earlier run with more processes
                        held.callback(os.close, lock(part, shared=True))
                held.enter_context(self._part)
                self._stored = set(self._numbers())
            self._held = held.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._held.__exit__(*error)  # type: ignore[arg-type]

    def wants(self, number: int) -> bool:
        """Whether this process is to store the batch; asked for every batch there is, in order."""
        self._total = number + 1
        return number % self.world == self.rank and number not in self._stored

    def add(self, batch: TokenRows) -> None:
        """Store a batch that `wants` wanted."""
        self._part.add(batch)

    def finish(self) -> None:
        """Write what is left; if all batches are stored, join the shares to one store.

        Raises `UserError` if no sample could be used.
        """
        self._part.flush()
        with _alone(self.path):
            self.store.open()
            if not self.store.complete and set(self._numbers()) == set(range(self._total)):
                self._join()

    def _numbers(self) -> Iterator[int]:
        """The batches of all finished shards, in the store and in its parts."""
        for shards in (self.store.shards, *map(read_shards, _parts(self.path))):
            for _, numbers in _numbered(shards):
                yield from numbers

    def _join(self) -> None:
        joined = self.store.shards
        there = {number for _, numbers in _numbered(joined) for number in numbers}
        found = [
            (numbers, part, shard)
            for part in _parts(self.path)
            for shard, numbers in _numbered(read_shards(part))
            if numbers[0] not in there
        ]
        left_out: list[str] = []
        for _, part, shard in sorted(found, key=lambda entry: entry[0][0]):
            if not shard.tokens:
                left_out += shard.skipped
                continue
            name = shard_name(len(joined))
            for kind in shard.sha256:
                _move(tensor_path(part, shard.name, kind), tensor_path(self.path, name, kind))
            joined = [*joined, replace(shard, name=name)]
        sync(self.path)
        write_text(self.path / SHARDS, "".join(shard.line() for shard in joined))
        self.store.shards = joined
        self.store.declare_complete(left_out)
        _remove_parts(self.path)
        self.joined = True


def _numbered(shards: list[Shard]) -> Iterator[tuple[Shard, list[int]]]:
    """Shards with the numbers of their batches; without any they are the next ones."""
    before = 0
    for shard in shards:
        yield shard, shard.numbers or list(range(before, before + shard.batches))
        before += shard.batches


def _part(folder: Path, rank: int) -> Path:
    return folder / f"part_{rank:02d}"


def _parts(folder: Path) -> list[Path]:
    """The parts that there are, by number."""
    return sorted(folder.glob("part_*"), key=_number)


def _number(part: Path) -> int:
    return int(part.name.removeprefix("part_"))


def _remove_parts(folder: Path) -> None:
    for part in _parts(folder):
        shutil.rmtree(part)


def _move(source: Path, target: Path) -> None:
    if source.exists():  # else it was moved before a kill
        os.replace(source, target)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Context in which no other process opens or joins the store in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + PATIENCE
    while True:
        try:
            descriptor = lock(folder)
            break
        except UserError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
    try:
        yield
    finally:
        os.close(descriptor)
