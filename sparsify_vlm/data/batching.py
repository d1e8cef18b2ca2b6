"""Batches of a source, the same for every number of processes, and their preparation ahead."""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count, islice
from typing import TYPE_CHECKING, TypeVar

from sparsify_vlm.data.encoding import EncodedBatch, decode_images, encode_decoded
from sparsify_vlm.data.images import BadSample
from sparsify_vlm.data.prompts import Prompter
from sparsify_vlm.data.rows import Sample
from sparsify_vlm.data.sources import SampleSource

if TYPE_CHECKING:
    from PIL.Image import Image

    from sparsify_vlm.models import LoadedModel

T = TypeVar("T")
DECODING_THREADS = 8
TURN = 2e-4
"""Seconds after which one of Python's threads may interrupt another while batches are made."""


def batches(
    source: SampleSource,
    loaded: LoadedModel,
    batch_size: int,
    ctx_len: int,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    *,
    with_answer: bool = True,
    wanted: Callable[[int], bool] = lambda number: True,
) -> Iterator[EncodedBatch]:
    """The batches of one process.

    Global batch `b` holds the samples numbered `b · batch_size · world` and following; rank `r`
    takes the r-th of `world` contiguous parts. Bad samples leave their place empty, so a batch may
    be smaller than `batch_size`; the last one is also smaller, split as evenly as it goes. A
    process whose part is empty gets a batch without samples, so that all ranks count the same
    batches. Starting late costs nothing where rows can be had by number. `wanted` is asked for
    every global batch there is, in order; those that it does not want are passed over undecoded.

    Raises:
        BadSample: for a sample that cannot be used, unless the source's configuration skips those.
    """
    numbered = source.pending(start * batch_size * world)
    prompter = Prompter.of(loaded)
    with ThreadPoolExecutor(min(DECODING_THREADS, os.cpu_count() or 1)) as pool:
        for number in count(start):
            if not (part := list(islice(numbered, batch_size * world))):
                return
            if not wanted(number):
                continue
            n = len(part)
            mine = part[n * rank // world : n * (rank + 1) // world]
            samples = [s for s in map(source.resolve, mine) if s is not None]
            made = _encode_usable(source, loaded, prompter, samples, ctx_len, with_answer, pool)
            made.number = number
            yield made


def _encode_usable(
    source: SampleSource,
    loaded: LoadedModel,
    prompter: Prompter,
    samples: Sequence[Sample],
    ctx_len: int,
    with_answer: bool,
    pool: ThreadPoolExecutor,
) -> EncodedBatch:
    """Encode what can be used of `samples`; the source notes the others or raises."""

    def decode(sample: Sample) -> list[Image] | BadSample:
        try:
            return decode_images(loaded, sample, source.cfg.max_image_pixels)
        except BadSample as error:
            return error

    stored = any(image.image is None for sample in samples for image in sample.images)
    decoded_by = pool.map if stored else map  # threads only where there is something to decode
    usable: list[tuple[Sample, list[Image]]] = []
    for sample, images in zip(samples, decoded_by(decode, samples), strict=True):
        if isinstance(images, BadSample):
            source.skip(images)
        else:
            usable.append((sample, images))
    while usable:
        kept, decoded = zip(*usable, strict=True)
        try:
            return encode_decoded(
                loaded, kept, decoded, ctx_len, with_answer=with_answer, prompter=prompter
            )
        except BadSample as error:
            source.skip(error)
            usable = [pair for pair in usable if pair[0].id != error.id]
    return EncodedBatch({}, [])


def prefetched(items: Iterator[T], depth: int = 2) -> Generator[T, None, None]:
    """The same items, up to `depth` of them made ahead in a thread.

    An exception in `items` is raised here at its place. Closing this iterator ends the thread and
    waits for the item that it is making. Meanwhile Python's threads take turns more often: a model
    gives the interpreter away with every operation, and would wait 5 ms each to get it back.
    """
    ready: queue.Queue[tuple[bool, T | BaseException | None]] = queue.Queue(depth)
    closed = threading.Event()

    def put(entry: tuple[bool, T | BaseException | None]) -> None:
        while not closed.is_set():
            try:
                return ready.put(entry, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put((True, item))
                if closed.is_set():
                    return
            put((False, None))
        except BaseException as error:  # noqa: BLE001 - raised again by the consumer
            put((False, error))
        finally:
            if isinstance(items, Generator):
                items.close()

    worker = threading.Thread(target=work, daemon=True, name="prefetch")
    turns = sys.getswitchinterval()
    sys.setswitchinterval(min(turns, TURN))
    worker.start()
    try:
        while True:
            more, item = ready.get()
            if more:
                yield item  # type: ignore[misc]
            elif item is None:
                return
            else:
                raise item  # type: ignore[misc]
    finally:
        closed.set()
        # Ending the interpreter while the thread is inside a native library would abort it.
        worker.join()
        sys.setswitchinterval(turns)
