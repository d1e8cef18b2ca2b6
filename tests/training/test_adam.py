"""Adam for one parameter at a time against torch's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

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
