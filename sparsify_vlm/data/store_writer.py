"""Writing an activation store in a thread, so that it can be cut off at any moment and continued.

A shard is closed by the first batch with which it reaches `shard_tokens`: its borders depend on the
batches alone; its two files are written, flushed and renamed; then its line is appended to
`shards.jsonl`. What is not in a line does not exist: a continued capture drops torn lines and
temporary files and starts at the first batch that no line counts.
"""

from __future__ import annotations

import errno
import json
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sparsify_vlm.data.store_files import append, drop_unfinished, is_temporary, lock
from sparsify_vlm.data.store_format import (
    ABOUT_PROGRESS,
    FORMAT,
    MANIFEST,
    SHARD_FORMAT,
    SHARDS,
    UNKNOWN_ROLE,
    VERSION,
    Shard,
    read_manifest,
    read_shards,
    shard_name,
    tensor_path,
    write_tensor_file,
)
from sparsify_vlm.errors import UserError
from sparsify_vlm.files import write_atomically, write_json

if TYPE_CHECKING:
    from torch import Tensor

TOKEN_AXIS = {"x": 1, "y": 1}
"""Of the tensors that have layers before tokens; the others have tokens first."""


@dataclass
class TokenRows:
    """The tokens of one batch, on the CPU and contiguous; L layers, T tokens (T may be 0).

    x, y: [L, T, d_model]; input_ids, position, sample [T] int32 (sample counts within the batch);
    role [T] uint8; patch [T, 2] int16. `samples` are the samples' ids, `skipped` those left out as
    "id: reason", `number` is the batch's own, `ready` waits until the tensors are filled (copies
    from a GPU).
    """

    x: Tensor
    y: Tensor
    input_ids: Tensor
    position: Tensor
    sample: Tensor
    role: Tensor
    patch: Tensor
    samples: list[str]
    skipped: list[str] = field(default_factory=list)
    number: int = 0
    ready: Callable[[], None] = lambda: None

    def __len__(self) -> int:
        return len(self.input_ids)


class StoreWriter:
    """Writes the batches it is given, in order, in a thread of its own; a context manager.

    `manifest` says what is captured: everything but `ABOUT_PROGRESS`. After entering, `batches`
    is the number of batches that are already stored, `complete` whether nothing is left to do.
    Up to three shards are in memory: one being filled, one waiting, one being written.

    A `numbered` store holds some of the batches: they are told apart by their numbers, and samples
    count from batch number · batch_size, as far as they are where no sample is skipped.

    Entering raises `UserError` if the folder holds anything but a capture with the same manifest,
    or is being written to by another process. `add` and `finish` raise what the thread met: an
    `OSError`, or `UserError` for values that are not finite.
    """

    def __init__(
        self,
        path: str | Path,
        manifest: dict[str, Any],
        shard_tokens: int,
        numbered: bool = False,
    ) -> None:
        self.path = Path(path)
        self.numbered = numbered
        self.manifest = {"format": FORMAT, "version": VERSION, **manifest}
        self.shard_tokens = shard_tokens
        self.shards: list[Shard] = []
        self.complete = False
        self._filling: list[TokenRows] = []
        self._waiting: queue.Queue[list[TokenRows] | None] = queue.Queue(1)
        self._error: Exception | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="shard writer")
        self._started = datetime.now(timezone.utc)

    @property
    def batches(self) -> int:
        """Batches in finished shards."""
        return sum(shard.batches for shard in self.shards)

    @property
    def samples(self) -> int:
        """Samples in finished shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Tokens in finished shards."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def skipped(self) -> list[str]:
        """Samples left out of the finished shards."""
        return [reason for shard in self.shards for reason in shard.skipped]

    def __enter__(self) -> StoreWriter:
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = lock(self.path)
        try:
            self.open()
        except BaseException:
            os.close(self._lock)
            raise
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._stop.set()
        self._waiting.put(None)
        self._thread.join()
        os.close(self._lock)

    def wants(self, number: int) -> bool:
        """Whether the batch is still to be stored."""
        return number >= self.batches

    def add(self, batch: TokenRows) -> None:
        """Store a batch. Waits only while a whole shard is waiting for the disk."""
        self._filling.append(batch)
        if sum(map(len, self._filling)) >= self.shard_tokens:
            self._hand_over()

    def finish(self) -> None:
        """Write what is left and declare the store complete. Raises `UserError` if it is empty."""
        left_out: list[str] = []
        if not any(map(len, self._filling)):
            left_out = [reason for batch in self._filling for reason in batch.skipped]
            self._filling = []
        self.flush()
        self.declare_complete(left_out)

    def flush(self) -> None:
        """Write all batches that were added, the last shard however small."""
        if self._filling:
            self._hand_over()
        self._waiting.join()
        self._raise()

    def declare_complete(self, left_out: Sequence[str] = ()) -> None:
        """Say in the manifest that nothing is to follow; `left_out` were skipped in no shard.

        Raises `UserError` if there is no shard.
        """
        if not self.shards:
            raise UserError(f"nothing was captured into {self.path}: no sample could be used")
        self._write_manifest(True, [*self.skipped, *left_out])
        self.complete = True

    def _hand_over(self) -> None:
        self._raise()
        self._waiting.put(self._filling)
        self._filling = []

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (batches := self._waiting.get()) is not None:
            try:
                if self._error is None and not self._stop.is_set():
                    self._write_shard(batches)
            except Exception as error:  # noqa: BLE001 - raised again in the thread that adds
                self._error = error
            finally:
                del batches
                self._waiting.task_done()

    def _write_shard(self, batches: list[TokenRows]) -> None:
        for place, batch in enumerate(batches, self.batches):
            batch.ready()
            self._check_finite(batch, batch.number if self.numbered else place)
        name = shard_name(len(self.shards))
        tables = _tables(batches, self._first_samples(batches))
        ids = [id for batch in batches for id in batch.samples]
        about: dict[str, dict[str, Any]] = {"x": {"sample_ids": ids}, "y": {}}
        with ThreadPoolExecutor(len(tables), "shard file") as pool:
            files = {
                kind: pool.submit(self._write_file, name, kind, pieces, about[kind])
                for kind, pieces in tables.items()
            }
        digests = {kind: file.result() for kind, file in files.items()}
        shard = Shard(
            name=name,
            batches=len(batches),
            samples=len(ids),
            tokens=sum(map(len, batches)),
            roles=_count_roles(batches),
            skipped=[reason for batch in batches for reason in batch.skipped],
            sha256=digests,
            numbers=[batch.number for batch in batches] if self.numbered else None,
        )
        append(self.path / SHARDS, shard.line())
        self.shards = [*self.shards, shard]

    def _first_samples(self, batches: list[TokenRows]) -> list[int]:
        """The number within the store of every batch's first sample."""
        if self.numbered:
            return [batch.number * self.manifest["batch_size"] for batch in batches]
        before = [0, *accumulate(len(batch.samples) for batch in batches)]
        return [self.samples + n for n in before[:-1]]

    def _write_file(
        self, shard: str, kind: str, pieces: dict[str, list[Tensor]], about: dict[str, Any]
    ) -> str:
        metadata = {"format": SHARD_FORMAT, "version": str(VERSION)}
        metadata |= {key: json.dumps(value, ensure_ascii=False) for key, value in about.items()}
        axes = {name: TOKEN_AXIS.get(name, 0) for name in pieces}
        digest = ""

        def write(temporary: Path) -> None:
            nonlocal digest
            digest = write_tensor_file(temporary, pieces, axes, metadata)

        write_atomically(tensor_path(self.path, shard, kind), write)
        return digest

    def _check_finite(self, batch: TokenRows, number: int) -> None:
        wrong = [
            (self.manifest[f"{kind}_layers"][slot], kind)
            for kind, values in (("x", batch.x), ("y", batch.y))
            for slot in _not_finite(values)
        ]
        if wrong:
            layer, kind = min(wrong)  # where it began: later layers have it from there
            which = f" ({batch.samples[0]} to {batch.samples[-1]})" if batch.samples else ""
            raise UserError(
                f"{kind} of {self.manifest['hookpoints'][layer]} in batch {number}{which} holds "
                "NaN or infinity: another dtype of the model or of the store may help"
            )

    def open(self) -> None:
        """Read what stands there, or begin; for who holds the folder's lock.

        Raises `UserError` if it is something else.
        """
        if not (self.path / MANIFEST).exists():
            others = [p.name for p in self.path.iterdir() if not is_temporary(p)]
            if others:
                raise UserError(
                    f"{self.path} is not empty and holds no capture (it has {others[0]}): choose "
                    "another folder"
                )
            drop_unfinished(self.path)
            self._write_manifest(False, [])
            return
        there = read_manifest(self.path)
        self._refuse_another(there)
        self.complete = bool(there["complete"])
        self._started = datetime.fromisoformat(there["times"]["started"])
        if not self.complete:
            drop_unfinished(self.path)
        self.shards = read_shards(self.path)

    def _refuse_another(self, there: dict[str, Any]) -> None:
        keys = dict.fromkeys([*self.manifest, *there])
        for key in keys:
            ours, theirs = self.manifest.get(key), there.get(key)
            if key not in ABOUT_PROGRESS and ours != theirs:
                raise UserError(
                    f"{self.path} already holds another capture: {_difference(key, theirs, ours)}; "
                    "choose another folder"
                )

    def _write_manifest(self, complete: bool, skipped: list[str]) -> None:
        roles: dict[str, int] = {}
        for shard in self.shards:
            for role, n in shard.roles.items():
                roles[role] = roles.get(role, 0) + n
        ended = datetime.now(timezone.utc).isoformat(timespec="seconds") if complete else None
        progress = {
            "complete": complete,
            "shards": len(self.shards),
            "samples": self.samples,
            "tokens": {"all": self.tokens, **roles},
            "skipped": skipped,
            "times": {"started": self._started.isoformat(timespec="seconds"), "ended": ended},
        }
        write_json(self.path / MANIFEST, {**self.manifest, **progress})


class Writes(Protocol):
    """Whoever writes shards into a folder."""

    path: Path

    @property
    def shards(self) -> list[Shard]:
        """Those that are finished."""


@contextmanager
def disk_errors_told(writer: Writes) -> Iterator[None]:
    """Turn a full disk into a `UserError` that says what is safe and how to go on."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"no space left on the disk of {writer.path}; its {len(writer.shards)} finished shards "
            "are intact: make room and run the same command again, it continues there"
        ) from error


def _not_finite(values: Tensor) -> list[int]:
    """Indices along the first axis at which there is NaN or infinity."""

    # A sum is many times quicker than isfinite, and not finite if any of its terms is not.
    if bool(values.flatten(1).sum(1).isfinite().all()):
        return []
    indices: list[int] = (~values.flatten(1).isfinite().all(1)).nonzero()[:, 0].tolist()
    return indices


def _tables(batches: list[TokenRows], first: list[int]) -> dict[str, dict[str, list[Tensor]]]:
    """The tensors of a shard's two files, in pieces; `first` are the batches' first samples."""
    return {
        "x": {
            "x": [batch.x for batch in batches],
            "input_ids": [batch.input_ids for batch in batches],
            "position": [batch.position for batch in batches],
            "sample": [batch.sample + n for batch, n in zip(batches, first, strict=True)],
            "patch": [batch.patch for batch in batches],
            "role": [batch.role for batch in batches],
        },
        "y": {"y": [batch.y for batch in batches]},
    }


def _count_roles(batches: list[TokenRows]) -> dict[str, int]:
    from sparsify_vlm.models import ROLE_NAMES

    names = {int(role): name for name, role in ROLE_NAMES.items() if name != "pad"}
    names[UNKNOWN_ROLE] = "unknown"
    counts = {role: sum(int((b.role == role).sum()) for b in batches) for role in names}
    return {names[role]: n for role, n in counts.items() if n or role != UNKNOWN_ROLE}


def _difference(key: str, theirs: Any, ours: Any) -> str:
    """Which key differs, down to the first differing entry of a mapping."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        inner = next(k for k in {**theirs, **ours} if theirs.get(k) != ours.get(k))
        return _difference(f"{key} {inner}", theirs.get(inner), ours.get(inner))
    return f"{key} {_short(theirs)} there, {_short(ours)} asked for"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
