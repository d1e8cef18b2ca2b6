"""Optimizers and learning rates, as sparsify sets them up.

    signum   schedule-free SignSGD, momentum 0.95, constant learning rate
    adam     Adam, linear warm-up, then linearly down to 0 at the end of the run
    muon     Muon on matrices (linear decay, no warm-up) and Adam on the rest (with warm-up)

Every parameter has an optimizer of its own, so that a large table can be updated in the moment its
gradient is known. The learning rate is computed from the step number, so there is no scheduler
state. Schedule-free optimizes at points between the averaged weights and its iterate `z`; the
averaged weights are the ones to publish (`published`), while resuming needs the points themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from schedulefree import ScheduleFreeWrapper
from torch import Tensor, nn

from sparsify_vlm.coders.kernels import AdamState
from sparsify_vlm.errors import UserError
from sparsify_vlm.training import upstream
from sparsify_vlm.training.adam import Adam
from sparsify_vlm.training.config import TrainConfig

SIGNUM_MOMENTUM = 0.95
REFERENCE_LATENTS = 2**14


def learning_rate(cfg: TrainConfig, num_latents: int) -> float:
    """`--lr`, or sparsify's default for this optimizer and number of latents."""
    if cfg.lr is not None:
        return cfg.lr
    scale = (num_latents / REFERENCE_LATENTS) ** 0.5
    return {"signum": 5e-3 / scale, "adam": 2e-4 / scale, "muon": 2e-3}[cfg.optimizer]


def linear_schedule(step: int, warmup: int, total: int) -> float:
    """Factor on the learning rate in step `step` (from 0): up to 1 over `warmup`, then down to 0.

    The same as transformers' `get_linear_schedule_with_warmup`.
    """
    if step < warmup:
        return step / max(1, warmup)
    return max(0.0, (total - step) / max(1, total - warmup))


def warmup_steps(cfg: TrainConfig, total_steps: int | None) -> int:
    """`--lr_warmup_steps`, or a tenth of the run where the run would end before it is warm."""
    if total_steps is not None and cfg.lr_warmup_steps >= total_steps:
        return total_steps // 10
    return cfg.lr_warmup_steps


class Rule(Protocol):
    """The optimizer of one parameter."""

    def step(self, lr: float) -> None:
        """Update the parameter with its gradient."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values to go on from."""

    def load(self, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
        """Put back what `state` gave."""


class Wrapped:
    """An optimizer of torch's kind that has one parameter."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def step(self, lr: float) -> None:
        """Update the parameter with its gradient."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values to go on from."""
        state = self.optimizer.state_dict()
        values = state["state"].get(0, {})
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        numbers = {name: value for name, value in values.items() if name not in tensors}
        return tensors, {"param_groups": state["param_groups"], "state": numbers}

    def load(self, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
        """Put back what `state` gave."""
        groups = [
            {k: tuple(v) if k == "betas" else v for k, v in group.items()}
            for group in plain["param_groups"]
        ]
        state = {0: {**plain["state"], **tensors}} if tensors or plain["state"] else {}
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


class Optimizers:
    """The optimizers of one run, one for each parameter.

    `total` steps are needed where the learning rate decays; None raises `UserError` there.
    """

    def __init__(
        self, parameters: list[nn.Parameter], cfg: TrainConfig, num_latents: int, total: int | None
    ) -> None:
        if total is None and cfg.optimizer != "signum":
            raise UserError(
                f"--optimizer {cfg.optimizer} lowers the learning rate over the whole run, and the "
                "length of this dataset is not known: give --max_steps"
            )
        self.lr = learning_rate(cfg, num_latents)
        self._parameters = parameters
        self._total = total or 0
        self._warmup = warmup_steps(cfg, total)
        self._cfg = cfg
        self._rules: dict[nn.Parameter, Rule] = {p: self._rule(p) for p in parameters}
        self._now: dict[type, float] = {}

    def _rule(self, parameter: nn.Parameter) -> Rule:
        if self._cfg.optimizer == "signum":
            base = upstream.imported("sign_sgd").SignSGD([parameter], lr=self.lr)
            optimizer = ScheduleFreeWrapper(base, momentum=SIGNUM_MOMENTUM)
            optimizer.train()
            return Wrapped(optimizer)
        if self._cfg.optimizer == "muon" and parameter.ndim >= 2:
            # With ddp every process would keep the momentum of its share of the matrices only,
            # which a run resumed on another number of processes could not use.
            return Wrapped(upstream.imported("muon").Muon([parameter], lr=self.lr, ddp=False))
        return Adam(parameter, torch.bfloat16 if self._cfg.bf16_moments else None)

    # ---- a step

    def begin(self, step: int) -> float:
        """Set the learning rates of step `step` (from 0); the one to report."""
        constant = self._cfg.optimizer == "signum"
        warm = self.lr if constant else self.lr * linear_schedule(step, self._warmup, self._total)
        cold = self.lr if constant else self.lr * linear_schedule(step, 0, self._total)
        self._now = {Adam: warm, Wrapped: cold}
        return warm

    def update(self, parameter: nn.Parameter) -> None:
        """Update `parameter` with its `.grad`, which is spent."""
        rule = self._rules[parameter]
        rule.step(self._now[type(rule)])
        parameter.grad = None

    def adam_state(self, parameter: nn.Parameter) -> AdamState | None:
        """Begin an update that the caller makes; None if another rule than Adam is used."""
        rule = self._rules[parameter]
        return rule.next(self._now[Adam]) if isinstance(rule, Adam) else None

    def finish(self) -> None:
        """Update all parameters that still have a gradient."""
        for parameter in self._parameters:
            if parameter.grad is not None:
                self.update(parameter)

    # ---- between steps

    @contextmanager
    def published(self) -> Iterator[None]:
        """Within, the parameters are the weights to publish; afterwards, bit for bit, as before."""
        held = [p.data for p in self._parameters]
        try:
            for parameter, rule in self._rules.items():
                _swap_in_average(parameter, rule)
            yield
        finally:
            for parameter, data in zip(self._parameters, held, strict=True):
                parameter.data = data

    def state(self) -> tuple[dict[str, Tensor], list[Any]]:
        """Everything needed to go on: tensors by name, and what is no tensor as plain JSON."""
        tensors: dict[str, Tensor] = {}
        plain = []
        for i, rule in enumerate(self._rules.values()):
            found, rest = rule.state()
            tensors |= {f"{i}.{name}": value for name, value in found.items()}
            plain.append(rest)
        return tensors, plain

    def load_state(self, tensors: dict[str, Tensor], plain: list[Any]) -> None:
        """Put back what `state` gave."""
        of_rules: list[dict[str, Tensor]] = [{} for _ in self._rules]
        for key, tensor in tensors.items():
            which, name = key.split(".", 1)
            of_rules[int(which)][name] = tensor
        for rule, found, rest in zip(self._rules.values(), of_rules, plain, strict=True):
            rule.load(found, rest)


def _swap_in_average(parameter: nn.Parameter, rule: Rule) -> None:
    """Point the parameter at its average x, where it is y = lerp(x, z, 1 - momentum)."""
    optimizer = rule.optimizer if isinstance(rule, Wrapped) else None
    if isinstance(optimizer, ScheduleFreeWrapper):
        z = optimizer.state[parameter].get("z")
        if z is not None:
            parameter.data = parameter.data.lerp(z, 1 - 1 / optimizer.momentum)
