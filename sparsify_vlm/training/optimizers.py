"""The three optimizers of sparsify with its learning rates and schedules.

    signum  SignSGD under schedule-free averaging (momentum 0.95), lr 5e-3 / √(F / 2^14), constant
    adam    lr 2e-4 / √(F / 2^14), linear warm-up over `lr_warmup_steps`, then linear decay to 0
    muon    matrices: Muon, lr 2e-3, linear decay; vectors: Adam, lr 2e-3, warm-up and decay

The learning rate of a step is a function of the step alone, so a resumed run needs no scheduler
state. Schedule-free optimizes at points between the averaged weights and its iterate `z`; the
averaged weights are the ones to publish (`published`), while resuming needs the points themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from schedulefree import ScheduleFreeWrapper
from torch import Tensor, nn

from sparsify_vlm.errors import UserError
from sparsify_vlm.training import upstream
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


class Optimizers:
    """The optimizers of one run, stepped together.

    `total_steps` is needed where the learning rate decays; None raises `UserError` there.
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
        warmup = warmup_steps(cfg, total)
        # Pairs of an optimizer and its warm-up; None: the learning rate is constant.
        self._optimizers: list[tuple[Any, int | None]] = {
            "signum": self._signum,
            "adam": self._adam,
            "muon": self._muon,
        }[cfg.optimizer](warmup)

    def _signum(self, warmup: int) -> list[tuple[Any, int | None]]:
        base = upstream.imported("sign_sgd").SignSGD(self._parameters, lr=self.lr)
        optimizer = ScheduleFreeWrapper(base, momentum=SIGNUM_MOMENTUM)
        optimizer.train()
        return [(optimizer, None)]

    def _adam(self, warmup: int) -> list[tuple[Any, int | None]]:
        return [(torch.optim.Adam(self._parameters, lr=self.lr, fused=True), warmup)]

    def _muon(self, warmup: int) -> list[tuple[Any, int | None]]:
        matrices = [p for p in self._parameters if p.ndim >= 2]
        vectors = [p for p in self._parameters if p.ndim < 2]
        # With ddp every process would keep the momentum of its share of the matrices only, which a
        # run resumed on another number of processes could not use. Gradients are summed already.
        muon = upstream.imported("muon").Muon(matrices, lr=self.lr, ddp=False)
        return [(muon, 0), (torch.optim.Adam(vectors, lr=self.lr, fused=True), warmup)]

    def step(self, step: int) -> float:
        """Update the parameters with their gradients in step `step`; the learning rate used."""
        lr = self.lr
        for optimizer, warmup in self._optimizers:
            if warmup is not None:
                lr = self.lr * linear_schedule(step, warmup, self._total)
                for group in optimizer.param_groups:
                    group["lr"] = lr
            optimizer.step()
        return lr

    @contextmanager
    def published(self) -> Iterator[None]:
        """Within, the parameters are the weights to publish; afterwards, bit for bit, as before."""
        held = [p.data for p in self._parameters]
        try:
            for optimizer, _ in self._optimizers:
                if isinstance(optimizer, ScheduleFreeWrapper):
                    _swap_in_average(optimizer)
            yield
        finally:
            for parameter, data in zip(self._parameters, held, strict=True):
                parameter.data = data

    def state(self) -> tuple[dict[str, Tensor], list[Any]]:
        """Everything needed to go on: tensors by name, and what is no tensor as plain JSON."""
        tensors: dict[str, Tensor] = {}
        plain = []
        for i, (optimizer, _) in enumerate(self._optimizers):
            state = optimizer.state_dict()
            numbers: dict[str, dict[str, Any]] = {}
            for p, values in state["state"].items():
                for name, value in values.items():
                    if isinstance(value, Tensor):
                        tensors[f"{i}.{p}.{name}"] = value
                    else:
                        numbers.setdefault(str(p), {})[name] = value
            plain.append({"param_groups": state["param_groups"], "state": numbers})
        return tensors, plain

    def load_state(self, tensors: dict[str, Tensor], plain: list[Any]) -> None:
        """Put back what `state` gave."""
        for i, ((optimizer, _), saved) in enumerate(zip(self._optimizers, plain, strict=True)):
            state = {int(p): dict(values) for p, values in saved["state"].items()}
            for key, tensor in tensors.items():
                which, p, name = key.split(".", 2)
                if int(which) == i:
                    state.setdefault(int(p), {})[name] = tensor
            groups = [
                {k: tuple(v) if k == "betas" else v for k, v in group.items()}
                for group in saved["param_groups"]
            ]
            optimizer.load_state_dict({"state": state, "param_groups": groups})


def _swap_in_average(optimizer: ScheduleFreeWrapper) -> None:
    """Point the parameters at their averages x, where they are y = lerp(x, z, 1 - momentum)."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            z = optimizer.state[parameter].get("z")
            if z is not None:
                parameter.data = parameter.data.lerp(z, 1 - 1 / optimizer.momentum)
