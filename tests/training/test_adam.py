"""Adam for one parameter at a time against torch's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsify_vlm.coders.kernels import compiled
from sparsify_vlm.training.adam import BETAS, EPS, Adam


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_torch(dtype: torch.dtype) -> None:
    ours, theirs = (nn.Parameter(torch.ones(7, 3, dtype=dtype)) for _ in range(2))
    rule, adam = Adam(ours), torch.optim.Adam([theirs], lr=0.1)
    for step in range(5):
        ours.grad = torch.randn(7, 3, dtype=dtype)
        theirs.grad = ours.grad.clone()
        lr = adam.param_groups[0]["lr"] = 0.1 / (step + 1)
        rule.step(lr)
        adam.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_bfloat16_moments_are_rounded_after_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsify_vlm.training.adam.AT_ONCE", 8)  # several pieces
    ours = nn.Parameter(torch.ones(7, 3))
    rule = Adam(ours, torch.bfloat16)
    weight, m, v = torch.ones(7, 3).double(), torch.zeros(7, 3), torch.zeros(7, 3)
    for step in range(1, 6):
        ours.grad = torch.randn(7, 3)
        wide_m = BETAS[0] * m.double() + (1 - BETAS[0]) * ours.grad.double()
        wide_v = BETAS[1] * v.double() + (1 - BETAS[1]) * ours.grad.double() ** 2
        root = (wide_v / (1 - BETAS[1] ** step)).sqrt() + EPS
        weight -= 0.1 / (1 - BETAS[0] ** step) * wide_m / root
        rule.step(0.1)
        m, v = wide_m.bfloat16().float(), wide_v.bfloat16().float()
        torch.testing.assert_close(rule.exp_avg.float(), m, rtol=1e-2, atol=0)
        torch.testing.assert_close(rule.exp_avg_sq.float(), v, rtol=1e-2, atol=0)
        m, v = rule.exp_avg.float(), rule.exp_avg_sq.float()
        torch.testing.assert_close(ours.double(), weight, rtol=1e-4, atol=1e-5)
    assert rule.exp_avg.dtype == rule.exp_avg_sq.dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(60, 32), (80,), (5, 4, 8)])
def test_pieces_change_no_bit(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of whole vectors: torch computes what is left of one with other roundings."""
    gradients, found = torch.randn(4, *shape), []
    for at_once in (16, 64, 1 << 20):
        monkeypatch.setattr("sparsify_vlm.training.adam.AT_ONCE", at_once)
        rule = Adam(nn.Parameter(torch.ones(shape)), torch.bfloat16)
        for rule.parameter.grad in gradients:
            rule.step(0.1)
        found.append((rule.parameter.data, rule.exp_avg, rule.exp_avg_sq))
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


@pytest.mark.skipif(not compiled.available(), reason="needs numba")
def test_bfloat16_moments_are_those_of_the_compiled_path() -> None:
    """Bit for bit, except where the arithmetic differs in the last digit of a float32."""
    tokens, (F, d) = 6, (50, 40)
    rule, W = Adam(nn.Parameter(torch.ones(F, d)), torch.bfloat16), torch.ones(F, d)
    moments = [torch.zeros(F, d, dtype=torch.bfloat16) for _ in range(2)]
    crow, col = torch.arange(tokens + 1), torch.arange(tokens) * 3
    entries, values = compiled.sort(crow, col, F), torch.ones(tokens)
    for step in range(1, 30):
        G = torch.randn(tokens, d)
        rule.parameter.grad = torch.zeros(F, d).index_copy_(0, col, G)
        rule.step(0.1)
        compiled.backward_adam(G, *entries, values, W, *moments, step=step, lr=0.1)
    for found, expected in zip(moments, (rule.exp_avg, rule.exp_avg_sq), strict=True):
        assert (found == expected)[col].float().mean() > 0.97
        assert (found[col].view(torch.int16) - expected[col].view(torch.int16)).abs().max() <= 1
        assert torch.equal(found, expected) or (found != expected).nonzero()[:, 0].isin(col).all()


def test_a_bfloat16_second_moment_decays() -> None:
    """2,000 steps without a gradient, each less than half a unit of bfloat16's last place."""
    ours = nn.Parameter(torch.zeros(40, 50))
    rule = Adam(ours, torch.bfloat16)
    rule.exp_avg_sq.copy_(torch.logspace(-12, 3, 2000).view(40, 50))
    rule.exp_avg_sq[0] = 0
    begun = rule.exp_avg_sq.double()[1:]
    for _ in range(2000):
        ours.grad = torch.zeros(40, 50)
        rule.step(0.1)
    left = rule.exp_avg_sq.double()[1:] / begun
    torch.testing.assert_close(left.mean(), torch.tensor(0.999**2000).double(), rtol=0.01, atol=0)
    assert 0.7 < left.min() / 0.999**2000 < left.max() / 0.999**2000 < 1.4
    assert not rule.exp_avg_sq[0].any()
