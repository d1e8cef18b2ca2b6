"""Samples in an order that depends on the configuration alone.

Sample `i` of a source is a function of the configuration and `i`: a resumed run and every rank of
a distributed one see the same samples under the same numbers. A row that cannot be used leaves its
number empty; numbers never shift.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsify_vlm.data.config import DataConfig
from sparsify_vlm.data.images import BadSample
from sparsify_vlm.data.local import Rows
from sparsify_vlm.data.reading import Stream, open_rows
from sparsify_vlm.data.rows import Columns, Sample, recognise, to_sample
from sparsify_vlm.errors import UserError

if TYPE_CHECKING:
    from sparsify_vlm.models import LoadedModel

Pending = Callable[[], Sample]
"""A sample that is made when called; raises `BadSample`."""


class SampleSource(ABC):
    """Numbered samples.

    Attributes:
        name: the dataset as messages call it.
        cfg: the configuration it was opened with.
        size: how many numbers there are (rows that turn out bad included), None if not known.
        fingerprint: changes when other samples would come; for refusing a wrong resume.
    """

    def __init__(self, name: str, cfg: DataConfig, size: int | None, fingerprint: str) -> None:
        self.name, self.cfg, self.size, self.fingerprint = name, cfg, size, fingerprint
        self._bad: dict[str, str] = {}

    def __len__(self) -> int:
        if self.size is None:
            raise TypeError(f"{self.name} is a stream; its length is not known")
        return self.size

    def __iter__(self) -> Iterator[Sample]:
        return self.from_index(0)

    @property
    def bad(self) -> list[str]:
        """The samples skipped so far, as "id: reason", in the order they were met."""
        return [f"{id}: {reason}" for id, reason in self._bad.items()]

    def from_index(self, start: int) -> Iterator[Sample]:
        """The usable samples from number `start` on.

        Raises:
            BadSample: for a row that cannot be used, unless `cfg.skip_bad`.
        """
        found = (self.resolve(pending) for pending in self.pending(start))
        return (sample for sample in found if sample is not None)

    def resolve(self, pending: Pending) -> Sample | None:
        """Make a sample; None, noted in `bad`, if it is bad and `cfg.skip_bad`."""
        try:
            return pending()
        except BadSample as error:
            self.skip(error)
            return None

    def skip(self, error: BadSample) -> None:
        """Note a sample as skipped, or raise `error` if bad samples are not to be skipped."""
        if not self.cfg.skip_bad:
            raise error
        self._bad.setdefault(error.id, error.reason)

    @abstractmethod
    def pending(self, start: int) -> Iterator[Pending]:
        """Number `start` and all that follow, not yet made."""


class RowSource(SampleSource):
    """Samples of rows that can be had by their number, in a seeded permutation.

    The permutation is numpy's `default_rng(seed).permutation`, as `datasets` shuffles, so that
    plain text comes in the order in which upstream's trainer reads it.
    """

    def __init__(self, rows: Rows, cfg: DataConfig, columns: Columns) -> None:
        n = len(rows)
        self.rows, self.columns = rows, columns
        shuffled = cfg.shuffle_seed >= 0 and not rows.shuffled
        order = np.random.default_rng(cfg.shuffle_seed).permutation(n) if shuffled else None
        self._order = order
        size = min(n, cfg.max_examples or n)
        super().__init__(rows.name, cfg, size, fingerprint(cfg, rows.identity))

    def get(self, index: int) -> Sample:
        """Sample number `index`. Raises `BadSample`."""
        row = index if self._order is None else int(self._order[index])
        return _sample(self.rows[row], self.columns, self.rows, row)

    def pending(self, start: int) -> Iterator[Pending]:
        assert self.size is not None
        return (partial(self.get, i) for i in range(start, self.size))


class StreamSource(SampleSource):
    """Samples of a stream, shuffled within a buffer; starting late reads past the rows before."""

    def __init__(self, stream: Stream, cfg: DataConfig, columns: Columns) -> None:
        self.stream, self.columns = stream, columns
        super().__init__(stream.name, cfg, None, fingerprint(cfg, stream.identity))

    def pending(self, start: int) -> Iterator[Pending]:
        rows = islice(enumerate(self.stream), start, self.cfg.max_examples)
        return (partial(_sample, row, self.columns, self.stream, i) for i, row in rows)


def _sample(row: dict[str, Any], columns: Columns, rows: Rows | Stream, index: int) -> Sample:
    id = row["id"] if rows.own_ids else f"{rows.name}#{index}"
    return to_sample(row, columns, id, rows.root)


def fingerprint(cfg: DataConfig, identity: str) -> str:
    """Of the options that decide which samples come in which order, and of the data itself."""
    options = asdict(cfg)
    for name in ("streaming", "skip_bad", "data_preprocessing_num_proc", "dataset_mix"):
        options.pop(name)
    text = json.dumps([options, identity], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def open_samples(cfg: DataConfig, loaded: LoadedModel) -> SampleSource:
    """Open the dataset or the mix of datasets that `cfg` names, for the model `loaded`.

    Raises:
        UserError: the dataset cannot be had or read, has no such split or column, is empty, or
            shows images to a model that reads text only.
    """
    if cfg.dataset_mix is None:
        return open_dataset(cfg, loaded)
    from sparsify_vlm.data.mix import open_mix

    return open_mix(cfg, loaded)


def open_dataset(cfg: DataConfig, loaded: LoadedModel, kind: str | None = None) -> SampleSource:
    """Open one dataset; `kind` takes only its images, text or conversations. Raises `UserError`."""
    rows = open_rows(cfg, loaded)
    if not isinstance(rows, Stream) and len(rows) == 0:
        raise UserError(f"{rows.name} (split {cfg.split}) has no rows")
    columns = _only(kind, recognise(rows.columns, cfg, rows.name), rows.name)
    if columns.image and not loaded.is_vlm and columns.shape in ("caption", "image", "question"):
        raise UserError(f"{rows.name} has images, which {loaded.name} does not read")
    if columns.shape == "text":
        from sparsify_vlm.data.text import chunked

        rows = chunked(rows, columns.text or "", loaded.tokenizer, cfg)
        columns = Columns("tokens")
    if isinstance(rows, Stream):
        return StreamSource(rows, cfg, columns)
    return RowSource(rows, cfg, columns)


def _only(kind: str | None, columns: Columns, name: str) -> Columns:
    """Read the rows of a dataset as `kind`. Raises `UserError` if they have nothing of the kind."""
    if kind == "image" and columns.image:
        return replace(columns, shape="image")
    if kind == "text" and columns.shape != "tokens" and columns.text:
        return replace(columns, shape="text", image=None)
    fits = {"text": ("tokens",), "conversation": ("conversation", "question", "caption")}
    if kind is not None and columns.shape not in fits.get(kind, ()):
        raise UserError(f"{name}: a stream of kind {kind} needs such a column; it has none")
    return columns
