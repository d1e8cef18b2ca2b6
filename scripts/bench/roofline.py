"""The least time that a machine with given rates needs for a step, whatever the method.

With P source-target pairs, n = T·k active latents per source, r = 4·d bytes per row, S the bytes of
all encoders and decoders:

    encode     2·L·T·F·d operations in matrix products; or, selecting in bfloat16, the same in
               bfloat16 and (k + MARGIN)·T·L rows gathered for the exact values
    decode     P·n rows gathered; the rows of the decoders that are active and y read from memory
    backward   P·n rows of the outputs' gradients gathered, once for the gradients of latents and
               of decoders together; L·n rows of x for the encoders
    update     weights and Adam's two moments read and written: 6·S

Gathered rows come from the second-level cache: a kernel can go through the columns in pieces so
narrow that they fit. Within a phase memory and arithmetic overlap (the slower one counts), but
gathering in `encode` follows the product. Phases follow one another. The selection itself, sorting,
statistics and biases cost nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.machine import Rates
from bench.sizes import Size
from sparsify_vlm.coders.selecting import MARGIN

FLOAT = 4


@dataclass(frozen=True)
class Work:
    """Of one phase."""

    operations: float = 0
    """In dense matrix products."""

    gathered: float = 0
    """Bytes of rows read from the cache."""

    streamed: float = 0
    """Bytes read from and written to memory."""


def work(size: Size, select: str = "fp32") -> dict[str, Work]:
    """What a step at least has to do, by phase; `select` is `fp32` or `bf16`."""
    n, row = size.tokens * size.k, FLOAT * size.d_model
    table = size.num_latents * row
    inputs = size.layers * size.tokens * row
    rescored = size.layers * size.tokens * (size.k + MARGIN) * row if select == "bf16" else 0
    active_rows = min(size.num_latents, n) * row
    return {
        "encode": Work(
            operations=2 * size.layers * size.tokens * size.num_latents * size.d_model,
            gathered=rescored,
            streamed=size.layers * table + inputs,
        ),
        "decode": Work(gathered=size.pairs * n * row, streamed=size.pairs * active_rows + inputs),
        "backward": Work(gathered=(size.pairs + size.layers) * n * row),
        "update": Work(streamed=6 * FLOAT * size.weights),
    }


def least(size: Size, rates: Rates, select: str = "fp32") -> dict[str, float]:
    """Seconds of each phase."""
    product = rates.bf16 if select == "bf16" else rates.fp32
    seconds = {}
    for phase, part in work(size, select).items():
        gather, stream = part.gathered / rates.gather, part.streamed / rates.copy
        if phase == "encode":
            seconds[phase] = max(part.operations / product, stream) + gather
        else:
            seconds[phase] = max(gather, stream)
    return seconds
