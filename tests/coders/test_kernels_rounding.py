"""Rounding by chance: against whole numbers one by one, on average, and on every fused path."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sparsify_vlm.coders import kernels
from sparsify_vlm.coders.kernels import AdamState, Entries, rounding

CPU = torch.device("cpu")


def stored(wide: Tensor, step: int = 1) -> Tensor:
    kept = torch.empty_like(wide, dtype=torch.bfloat16)
    rows = rounding.row_keys(step, len(wide), CPU)
    rounding.store(kept, wide.clone(), rows, rounding.column_keys(wide[0].numel(), CPU))
    return kept


def mixed(x: int) -> int:
    x = (x ^ x >> 15) * 0x2C1B3C6D % 2**32
    x = (x ^ x >> 12) * 0x297A2D39 % 2**32
    return x ^ x >> 15


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(30, 40), (50,), (3, 4, 5)])
def test_one_by_one(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Unsigned whole numbers as Python has them."""
    wide = torch.rand(shape, dtype=dtype)
    found = stored(wide, step=7).view(len(wide), -1)
    bits = wide.float().view(torch.int32).view(len(wide), -1).tolist()
    for r, row in enumerate(bits):
        for c, number in enumerate(row):
            product = (mixed(r ^ mixed(7)) ^ mixed(c)) * 0x7FEB352D % 2**32
            expected = torch.tensor((number + (product >> 16)) >> 16, dtype=torch.int16)
            assert found[r, c].view(torch.int16) == expected


def test_right_on_average() -> None:
    """Every number by itself over the steps, and all of them in one step."""
    wide, steps = torch.logspace(-20, 20, 50 * 40).view(50, 40), 1500
    below = (wide.view(torch.int32) & -0x10000).view(torch.float32).double()
    unit = (below.float().view(torch.int32) + 0x10000).view(torch.float32).double() - below
    error = torch.stack([stored(wide, step).double() for step in range(1, steps + 1)])
    error = (error - wide.double()) / unit
    assert error.abs().max() < 1
    chance = (wide.double() - below) / unit
    deviation = (chance * (1 - chance)).sqrt()  # of one rounding, in units
    assert (error.mean(0).abs() <= 5 * deviation / math.sqrt(steps) + 1e-9).all()
    assert abs(error.mean()) < 5 * deviation.mean() / math.sqrt(error.numel())
    assert (error.mean((1, 2)).abs() < 6 * 0.5 / math.sqrt(wide.numel())).all()


def test_what_is_not_rounded() -> None:
    """Zero, infinity, nan (those that arithmetic gives), and what bfloat16 can hold."""
    numbers = torch.tensor([0.0, math.inf, 1.0, 2.0**-133, 3.3895e38]).bfloat16().float()
    nans = torch.tensor([0x7FC00000, 0x7FFFFFFF, 0x7FC0FFFF, -1, -0x400000], dtype=torch.int32)
    for step in range(1, 200):
        kept = stored(torch.stack([numbers, nans.view(torch.float32)]), step)
        assert torch.equal(kept[0].view(torch.int16), numbers.bfloat16().view(torch.int16))
        assert kept[1].isnan().all()


@pytest.mark.parametrize("name", [n for n in kernels.usable("cpu") if kernels.path(n).fuses_adam])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_fused_paths_round_the_same(name: str, dtype: torch.dtype) -> None:
    """Without a gradient a step is one multiplication, of which nothing else can differ."""
    kernel, (F, d) = kernels.path(name), (70, 37)
    entries = Entries(
        kernel.uniform(torch.zeros(0, 3, dtype=torch.int64), F), torch.zeros(0).to(dtype)
    )
    W, G = torch.zeros(F, d, dtype=dtype), torch.zeros(0, d, dtype=dtype)
    moments = torch.zeros(F, d).bfloat16(), torch.logspace(-40, 38, F * d).view(F, d).bfloat16()
    expected = moments[1].clone()
    for step in range(1, 60):
        expected = stored(expected.to(dtype) * 0.999, step)
        kernel.backward_adam(G, entries, W, AdamState(*moments, step, 0.1))
        assert torch.equal(moments[1].view(torch.int16), expected.view(torch.int16))
    assert not W.any()
