"""Learning rates and schedules against sparsify's rules and transformers' schedule."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from toy_source import toy_config
from transformers import get_linear_schedule_with_warmup

from sparsify_vlm.training.optimizers import (
    Optimizers,
    learning_rate,
    linear_schedule,
    warmup_steps,
)


@pytest.mark.parametrize(("warmup", "total"), [(3, 12), (0, 5), (10, 40)])
def test_schedule_is_that_of_transformers(warmup: int, total: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_linear_schedule_with_warmup(optimizer, warmup, total)
    for step in range(total):
        assert linear_schedule(step, warmup, total) == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(
    ("optimizer", "expected"), [("signum", 1e-2), ("adam", 4e-4), ("muon", 2e-3)]
)
def test_default_learning_rates(tmp_path: Path, optimizer: str, expected: float) -> None:
    cfg = toy_config(tmp_path, optimizer=optimizer, lr=None)
    assert learning_rate(cfg, 2**12) == pytest.approx(expected)
    assert learning_rate(toy_config(tmp_path, lr=0.5), 2**12) == 0.5


def test_warmup_longer_than_the_run_is_shortened(tmp_path: Path) -> None:
    cfg = toy_config(tmp_path, lr_warmup_steps=1000)
    assert warmup_steps(cfg, 400) == 40
    assert warmup_steps(cfg, 4000) == 1000
    assert warmup_steps(cfg, None) == 1000


def test_signum_steps_by_the_sign_and_publishes_the_mean_of_its_iterates(tmp_path: Path) -> None:
    """Schedule-free: z_{i+1} = z_i - lr sign(g_i); what is published is the mean of z_1 … z_n."""
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    start = weight.detach().clone()
    optimizers = Optimizers([weight], toy_config(tmp_path, lr=0.1), 32, None)
    signs = [(1, -1, 0), (1, 1, -1), (-1, 1, -1)]
    for step, sign in enumerate(signs):
        weight.grad = torch.tensor(sign, dtype=torch.float64) * 7
        optimizers.begin(step)
        optimizers.finish()
    iterates = start - 0.1 * torch.tensor(signs, dtype=torch.float64).cumsum(0)
    with optimizers.published():
        torch.testing.assert_close(weight.detach(), iterates.mean(0))
    expected = 0.95 * iterates.mean(0) + 0.05 * iterates[-1]
    torch.testing.assert_close(weight.detach(), expected)


def test_muon_takes_matrices_and_adam_vectors(tmp_path: Path) -> None:
    matrix, vector = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((6, 4), (4,)))
    cfg = toy_config(tmp_path, optimizer="muon", lr=0.1, lr_warmup_steps=0)
    optimizers = Optimizers([matrix, vector], cfg, 32, 10)
    matrix.grad, vector.grad = torch.randn(6, 4), torch.randn(4)
    sign = vector.grad.sign()
    optimizers.begin(0)
    optimizers.finish()
    # Newton-Schulz makes the update nearly orthogonal: singular values near lr · 0.2 · √6.
    singular = torch.linalg.svdvals(matrix.detach()) / (0.1 * 0.2 * 6**0.5)
    assert ((singular > 0.5) & (singular < 1.5)).all()
    torch.testing.assert_close(vector.detach(), -0.1 * sign, rtol=1e-4, atol=0)
