"""The systems that are compared. To measure another one, add it to `systems`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from bench import peers
from bench.clock import Clock
from sparsify_vlm.coders import Clt, forward_backward, gradients, joint, kernels, source
from sparsify_vlm.training.at_once import UpdatedAtOnce
from sparsify_vlm.training.config import CoderConfig, TrainConfig
from sparsify_vlm.training.distributed import World
from sparsify_vlm.training.optimizers import Optimizers

LR = 1e-4
DENSE, SPARSE, OURS = "dense autograd", "sparse autograd", "ours"
SELECT = ("fp32", "bf16")

Step = Callable[[Tensor, Tensor, Clock], None]
"""Trains once on x, y [L, T, d]."""


class State:
    """A coder and its Adam moments, which all systems that take turns on it share: each alone
    would need as much memory again. Only their counts of steps are their own."""

    def __init__(self, clt: Clt) -> None:
        self.clt = clt
        parameters = [p for p in clt.parameters() if p.requires_grad]
        # So long a run has a constant learning rate to within rounding.
        cfg = TrainConfig(sae=CoderConfig(), optimizer="adam", lr=LR, lr_warmup_steps=0)
        self.optimizers = Optimizers(parameters, cfg, clt.cfg.num_latents, 10**12)
        self.adam = torch.optim.Adam(parameters, lr=LR, fused=True)
        moments = self.optimizers.state()[0]
        for i, parameter in enumerate(parameters):
            self.adam.state[parameter] = {
                "step": torch.zeros((), device=clt.device),
                "exp_avg": moments[f"{i}.exp_avg"],
                "exp_avg_sq": moments[f"{i}.exp_avg_sq"],
            }


@dataclass(frozen=True)
class System:
    """A way to make a step."""

    name: str
    make: Callable[[State], Step]
    select: str = "fp32"
    path: str | None = None
    """Of ours: the kernels that are forced."""


def autograd(loss: Callable[[Clt, Tensor, Tensor, Clock], Tensor]) -> Callable[[State], Step]:
    """Backward by autograd, then Adam."""

    def make(state: State) -> Step:
        def step(x: Tensor, y: Tensor, clock: Clock) -> None:
            found = loss(state.clt, x, y, clock)
            with clock.phase("backward"):
                found.backward()
            with clock.phase("update"):
                state.adam.step()
                state.adam.zero_grad(set_to_none=True)

        return step

    return make


OUR_PHASES = [
    (joint, "Source", "encode"),
    (joint._Pass, "_decode", "decode"),
    (joint._Pass, "target", "backward"),
    (source.Source, "finish", "backward"),
    (Optimizers, "update", "update"),
]
"""Where our step's phases are. A path that fuses gradient and Adam has no update of its own for
the tables; then it is part of the backward."""


def ours(path: str | None, select: str) -> Callable[[State], Step]:
    """The trainer's step with kernels `path` (None: those it chooses)."""

    def make(state: State) -> Step:
        clt, optimizers = state.clt, state.optimizers
        into: gradients.Gradients = UpdatedAtOnce(clt, optimizers, World())
        number = 0

        def step(x: Tensor, y: Tensor, clock: Clock) -> None:
            nonlocal number
            with forced(path), clock.watching(OUR_PHASES):
                optimizers.begin(number)
                forward_backward(clt, x, y, gradients=into, bf16_selection=select == "bf16")
                optimizers.finish()
            number += 1

        return step

    return make


@contextmanager
def chosen_latents() -> Iterator[list[Tensor]]:
    """Within, a step of ours leaves here the active latents [T, k] of each layer."""
    found: list[Tensor] = []

    def recording(*args: Any, **kwargs: Any) -> source.Source:
        made = source.Source(*args, **kwargs)
        found.append(made.selection.col.view(made.selection.tokens, -1))
        return made

    with patch.object(joint, "Source", recording):
        yield found


@contextmanager
def forced(path: str | None) -> Iterator[None]:
    """Within, kernels are those of `path`."""
    with patch.dict(os.environ, {} if path is None else {kernels.VARIABLE: path}):
        yield


def taken(path: str | None, table: Tensor, k: int) -> str:
    """Name of the kernels that a step uses. Raises `UserError` where `path` cannot be used."""
    with forced(path):
        return kernels.kernels_for(table, k).name


def systems(paths: list[str | None], selects: list[str]) -> list[System]:
    """The baselines, then ours for each path (None: the default) and each way of selecting."""
    found = [
        System(DENSE, autograd(peers.dense_loss)),
        System(SPARSE, autograd(peers.sparse_loss)),
    ]
    for path in paths:
        for select in selects:
            words = [OURS, *([path] if path else []), *([select] if select != "fp32" else [])]
            found.append(System(" ".join(words), ours(path, select), select, path))
    return found
