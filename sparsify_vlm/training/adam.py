"""Adam for one parameter at a time, with moments in float32 or bfloat16.

The formulas are those of `torch.optim.Adam`. In bfloat16 the two moments take half the memory; the
arithmetic is in the parameter's own precision, a piece of the rows at a time. When they are put
back the first moment is rounded to the nearest, the second by chance (`coders.kernels.rounding`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from sparsify_vlm.coders.kernels import AdamState, rounding

BETAS, EPS = (0.9, 0.999), 1e-8
AT_ONCE = 1 << 16
"""Numbers of a bfloat16 moment that are widened at a time: what stays in the cache."""


class Adam:
    """The state of one parameter."""

    def __init__(self, parameter: nn.Parameter, moments: torch.dtype | None = None) -> None:
        self.parameter = parameter
        dtype = moments or parameter.dtype
        self.exp_avg = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
        self.exp_avg_sq = torch.zeros_like(self.exp_avg)
        self.steps = 0

    def next(self, lr: float) -> AdamState:
        """Begin a step; the caller makes the update."""
        self.steps += 1
        return AdamState(self.exp_avg, self.exp_avg_sq, self.steps, lr, *BETAS, EPS)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update the parameter with its gradient."""
        self.steps += 1
        parameter, gradient = self.parameter.data, self.parameter.grad
        assert gradient is not None
        if self.exp_avg.dtype == parameter.dtype:
            return self._update(parameter, gradient, self.exp_avg, self.exp_avg_sq, lr)
        width = max(1, parameter[:1].numel())
        keys = rounding.row_keys(self.steps, len(parameter), parameter.device)
        columns = rounding.column_keys(width, parameter.device)
        tensors = parameter, gradient, self.exp_avg, self.exp_avg_sq, keys
        pieces = [t.split(max(1, AT_ONCE // width)) for t in tensors]
        for weight, grad, first, second, rows in zip(*pieces, strict=True):
            wide = first.to(weight.dtype), second.to(weight.dtype)
            self._update(weight, grad, *wide, lr)
            first.copy_(wide[0])
            rounding.store(second, wide[1], rows, columns)

    def _update(self, weight: Tensor, grad: Tensor, m: Tensor, v: Tensor, lr: float) -> None:
        before = torch.tensor(float(self.steps - 1), device=weight.device)
        adam(
            [weight], [grad], [m], [v], [], [before],
            fused=True, amsgrad=False, beta1=BETAS[0], beta2=BETAS[1], lr=lr,
            weight_decay=0.0, eps=EPS, maximize=False,
        )  # fmt: skip

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Tensors and plain numbers to go on from."""
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}, {"steps": self.steps}

    def load(self, tensors: dict[str, Tensor], plain: dict[str, int]) -> None:
        """Put back what `state` gave."""
        self.exp_avg.copy_(tensors["exp_avg"])
        self.exp_avg_sq.copy_(tensors["exp_avg_sq"])
        self.steps = plain["steps"]
