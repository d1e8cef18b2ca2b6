"""Several datasets read together by weight.

Streams take turns in a fixed pattern in which each gets its share evenly spread (smooth weighted
round robin), so that sample `i` of the mix is known in closed form: with period P and n_s turns of
stream s in it, turn r of round q is sample q·n_s + (turns of s before r) of its stream. The mix
ends when one of its streams ends; no sample comes twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from sparsify_vlm.data.config import DataConfig
from sparsify_vlm.data.images import BadSample
from sparsify_vlm.data.rows import Sample
from sparsify_vlm.data.sources import Pending, SampleSource, fingerprint, open_dataset
from sparsify_vlm.errors import UserError

if TYPE_CHECKING:
    from sparsify_vlm.models import LoadedModel

KINDS = ("image", "text", "conversation")
COMMON = {"dataset_mix", "ctx_len", "skip_bad", "max_image_pixels"}
"""Options that hold for the whole mix."""
RESOLUTION = 1000
"""Weights are rounded to thousandths of their sum."""


@dataclass(frozen=True)
class Stream:
    """One entry of the file."""

    name: str
    weight: float
    kind: str | None
    cfg: DataConfig


class MixSource(SampleSource):
    """Samples of several sources in a fixed pattern; ids start with the stream's name."""

    def __init__(
        self, name: str, cfg: DataConfig, streams: Sequence[Stream], sources: list[SampleSource]
    ) -> None:
        self.streams, self.sources = streams, sources
        self.turns = turns([stream.weight for stream in streams])
        n = len(streams)
        # before[r, s]: turns of stream s before turn r of a round
        self._before = np.vstack([np.zeros(n, int), np.cumsum(np.eye(n, dtype=int)[self.turns], 0)])
        kinds = [
            (s.name, s.kind, source.fingerprint) for s, source in zip(streams, sources, strict=True)
        ]
        identity = f"{kinds} {self.turns.tolist()}"
        super().__init__(name, cfg, self._size(cfg.max_examples), fingerprint(cfg, identity))

    def starts(self, index: int) -> list[int]:
        """How many samples of each stream come before sample `index` of the mix."""
        rounds, turn = divmod(index, len(self.turns))
        starts: list[int] = (rounds * self._before[-1] + self._before[turn]).tolist()
        return starts

    def _size(self, limit: int | None) -> int | None:
        """Where the first stream ends, if that is known, or the limit if that comes before."""
        ends = []
        for s, source in enumerate(self.sources):
            if source.size is None:
                return None
            places = np.flatnonzero(self.turns == s)
            rounds, rest = divmod(source.size, len(places))
            ends.append(rounds * len(self.turns) + int(places[rest]))
        return min(ends) if limit is None else min(*ends, limit)

    def pending(self, start: int) -> Iterator[Pending]:
        starts = self.starts(start)
        iterators = [s.pending(n) for s, n in zip(self.sources, starts, strict=True)]
        stop = self.size if self.size is not None else self.cfg.max_examples
        index = start
        while stop is None or index < stop:
            s = int(self.turns[index % len(self.turns)])
            made = next(iterators[s], None)
            if made is None:
                return
            yield partial(_named, self.streams[s].name, made)
            index += 1


def _named(stream: str, pending: Pending) -> Sample:
    try:
        sample = pending()
    except BadSample as error:
        raise BadSample(f"{stream}:{error.id}", error.reason) from None
    return replace(sample, id=f"{stream}:{sample.id}")


def turns(weights: Sequence[float]) -> np.ndarray:
    """One round: whose turn it is, each stream as often as its weight says, evenly spread.

    Raises:
        UserError: a weight is below a thousandth of the sum.
    """
    shares = np.asarray(weights) / np.sum(weights) * RESOLUTION
    counts = np.floor(shares).astype(int)
    largest = np.argsort(counts - shares, kind="stable")[: RESOLUTION - counts.sum()]
    counts[largest] += 1
    if counts.min() == 0:
        raise UserError(f"dataset mix: weight {min(weights)} is less than 1/{RESOLUTION} of all")
    counts //= math.gcd(*counts.tolist())
    credit, order = np.zeros_like(counts), []
    for _ in range(counts.sum()):
        credit += counts
        order.append(int(np.argmax(credit)))
        credit[order[-1]] -= counts.sum()
    return np.array(order)


def open_mix(cfg: DataConfig, loaded: LoadedModel) -> MixSource:
    """Open the mix that `cfg.dataset_mix` describes. Raises `UserError`."""
    path = Path(str(cfg.dataset_mix)).expanduser()
    streams = read_mix(path, cfg)
    sources = [open_dataset(stream.cfg, loaded, stream.kind) for stream in streams]
    return MixSource(path.name, cfg, streams, sources)


def read_mix(path: Path, cfg: DataConfig) -> list[Stream]:
    """The streams of a mix file; what an entry leaves out is taken from `cfg`.

    Raises:
        UserError: the file is missing or not understood; the message names the entry.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--dataset_mix {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UserError(
            f"--dataset_mix {path} is not YAML: {' '.join(str(error).split())}"
        ) from None
    entries = content.get("streams") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"--dataset_mix {path}: give a list called streams")
    streams = [
        _stream(entry, f"{path.name}, stream {i}", path, cfg) for i, entry in enumerate(entries)
    ]
    names = [stream.name for stream in streams]
    if len(set(names)) < len(names):
        raise UserError(
            f"--dataset_mix {path}: two streams have one name; tell them apart by `name`"
        )
    return streams


def _stream(entry: Any, where: str, path: Path, cfg: DataConfig) -> Stream:
    if not isinstance(entry, dict) or not isinstance(entry.get("dataset"), str):
        raise UserError(f"{where}: give at least a `dataset`")
    options = dict(entry)
    name, weight = options.pop("name", entry["dataset"]), options.pop("weight", 1)
    kind = options.pop("kind", None)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight > 0:
        raise UserError(f"{where}: weight {weight!r} is not a positive number")
    if kind is not None and kind not in KINDS:
        raise UserError(f"{where}: kind {kind!r} is none of {', '.join(KINDS)}")
    known = {f.name for f in fields(DataConfig)} - COMMON
    for option in options.keys() - known:
        near = get_close_matches(option, known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{where}: there is no option {option}{hint}")
    for option in ("dataset", "image_root"):  # paths are relative to the file that names them
        if option in options and (path.parent / options[option]).exists():
            options[option] = str(path.parent / options[option])
    base = replace(cfg, dataset_mix=None, max_examples=None, data_args="", split="train")
    try:
        return Stream(str(name), float(weight), kind, replace(base, **options))
    except (TypeError, UserError) as error:
        raise UserError(f"{where}: {error}") from None
