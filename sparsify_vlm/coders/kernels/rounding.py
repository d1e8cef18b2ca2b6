"""Stochastic rounding of Adam's second moment to bfloat16, the same on every path.

With β2 = 0.999 a step takes at most 0.1 % off the second moment, less than half a unit of
bfloat16's last place (0.2 to 0.4 %): rounded to the nearest it could grow but never decay. Rounded
up with the probability of what is cut off, it is right on average.

The chance is a function of where the number stands and of the step's number, so that nothing has to
be kept to resume a run, and neither threads nor pieces change a bit. For row r and column c

    random = ((row_keys[r] ^ column_keys[c]) · MULTIPLIER) >> 16      16 bits, of 32-bit unsigned

is added to the bits of the float32, whose upper half is then kept. Row keys are new at every step.
Two tables of one shape draw the same numbers, which biases neither.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

Bits = TypeVar("Bits", int, Tensor)

MULTIPLIER = 0x7FEB352D
"""Odd; below 2³¹, so that it is the same signed and unsigned."""

QUIET_NAN = 0x7FC00000


def _mix(x: Bits) -> Bits:
    """A one-to-one map of 32-bit numbers (int64 if a tensor) that spreads each bit over all."""
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 15)


@lru_cache(maxsize=4)
def row_keys(step: int, rows: int, device: torch.device) -> Tensor:
    """[rows] int32: 32 bits for each row at step number `step`. Not to be written to."""
    return _mix(torch.arange(rows, device=device) ^ _mix(step)).to(torch.int32)


@lru_cache(maxsize=8)
def column_keys(columns: int, device: torch.device) -> Tensor:
    """[columns] int32: 32 bits for each column. Not to be written to."""
    return _mix(torch.arange(columns, device=device)).to(torch.int32)


def store(kept: Tensor, wide: Tensor, rows: Tensor, columns: Tensor) -> None:
    """kept = `wide` rounded to bfloat16, with the keys of its rows and columns.

    `wide` [n, ...] is not negative, float32 (float64 is rounded to that first), and is spent. Zero
    and infinity stay what they are, as does nan (a quiet one; arithmetic gives no others).
    """
    wide = wide.float()
    # A nan's sign and payload, whose upper half might carry over into a number, are taken off.
    bits = wide.abs_().view(torch.int32).clamp_(max=QUIET_NAN)
    random = (rows[:, None] ^ columns).mul_(MULTIPLIER)
    random.bitwise_right_shift_(16).bitwise_and_(0xFFFF)  # the shift is that of signed numbers
    rounded = random.add_(bits.view_as(random)).bitwise_and_(-0x10000)
    kept.copy_(rounded.view(torch.float32).view_as(kept))
