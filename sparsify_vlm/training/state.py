"""A run between two steps: what it is made of, saved and taken up again, and the coders published
from it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsify_vlm.coders import Clt, save_clt
from sparsify_vlm.errors import UserError
from sparsify_vlm.training.checkpoint import RunFolder
from sparsify_vlm.training.divided import gathered, gathered_clt

if TYPE_CHECKING:
    from sparsify_vlm.training.trainer import Trainer


@dataclass
class Clock:
    """Time and tokens of the run, earlier parts of a resumed one included."""

    seconds: float = 0.0
    tokens: int = 0
    _since: float = 0.0
    _last: tuple[float, int] = (0.0, 0)

    def start(self) -> None:
        """Go on counting."""
        self._since = time.monotonic() - self.seconds
        self._last = (self.seconds, self.tokens)

    def tick(self) -> float:
        """Update `seconds`; tokens per second since the last tick."""
        self.seconds = time.monotonic() - self._since
        seconds, tokens = self.seconds - self._last[0], self.tokens - self._last[1]
        self._last = (self.seconds, self.tokens)
        return tokens / max(seconds, 1e-9)


def numbers_of(clt: Clt) -> Iterator[tuple[str, Tensor]]:
    """Everything the coders are made of, by name."""
    for name, value in chain(clt.named_parameters(), clt.named_buffers()):
        yield name, value.detach()


def of(trainer: Trainer, ended: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The state after the last step: plain values and tensors (the run's own, not copies).

    Of coders divided over a row of processes, all of the row must call it. The first gets whole
    tensors, on the CPU, the others none.
    """
    of_optimizers, plain = trainer.optimizers.state()
    parts = {f"weights.{name}": value for name, value in numbers_of(trainer.clt)}
    parts |= {f"optimizers.{name}": value for name, value in of_optimizers.items()}
    parts["since_fired"] = trainer.since_fired
    tensors = parts if trainer.layout.alone else _wholes(trainer, parts)
    tensors["rng"] = torch.get_rng_state()
    trainer.clock.tick()
    return {
        "tokens": trainer.clock.tokens,
        "seconds": trainer.clock.seconds,
        "ended": ended,
        "optimizers": plain,
    }, tensors


def _divided_like(trainer: Trainer) -> Callable[[str], str]:
    """Gives the name of the parameter that a state's tensor is divided like, given its key."""
    trained = [name for name, p in trainer.clt.named_parameters() if p.requires_grad]

    def name_of(key: str) -> str:
        kind, _, rest = key.partition(".")
        return trained[int(rest.partition(".")[0])] if kind == "optimizers" else rest or kind

    return name_of


def _wholes(trainer: Trainer, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put together, one after the other, in the first process of the row."""
    name_of, wholes = _divided_like(trainer), {}
    for key, part in parts.items():
        whole = gathered(trainer.layout, name_of(key), part, trainer.shapes) if part.ndim else part
        if trainer.layout.place == 0:
            wholes[key] = whole.cpu()
    return wholes


def own_part(trainer: Trainer) -> Callable[[str, Tensor], Tensor]:
    """Takes this process's part (a view) of a state's tensor, given its key."""
    name_of = _divided_like(trainer)
    return lambda key, whole: (
        trainer.layout.own(name_of(key), whole) if whole.ndim and key != "rng" else whole
    )


def take_up(trainer: Trainer, plain: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Go on from what `of` gave, this process's parts of it.

    Raises `UserError` for a tensor that is missing or has another shape, `KeyError` for anything
    else that is missing.
    """
    with torch.no_grad():
        for name, value in numbers_of(trainer.clt):
            _restore(value, tensors, f"weights.{name}", trainer.run)
        _restore(trainer.since_fired, tensors, "since_fired", trainer.run)
    torch.set_rng_state(tensors["rng"])
    prefix = "optimizers."
    trainer.optimizers.load_state(
        {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)},
        plain["optimizers"],
    )
    trainer.step, trainer.without_weights = int(plain["step"]), False
    trainer.clock = Clock(plain["seconds"], plain["tokens"])


def _restore(into: Tensor, tensors: dict[str, Tensor], key: str, run: RunFolder) -> None:
    found = tensors.get(key)
    if found is None or found.shape != into.shape:
        raise UserError(
            f"{run.path}/resume: tensor '{key}' is missing or has another shape; the run cannot be "
            "resumed"
        )
    into.copy_(found)


def publish(trainer: Trainer) -> None:
    """Write the coder folders and clt.json; the row of the first process must call it together."""
    cfg = trainer.cfg
    trainer.clt.cfg.training = {
        "step": trainer.step,
        "tokens": trainer.clock.tokens,
        "optimizer": cfg.optimizer,
        "lr": trainer.optimizers.lr,
        "seed": cfg.seed,
        "filter_bos": cfg.filter_bos,
        "remove_first_token": cfg.remove_first_token,
        "exclude_tokens": cfg.exclude_tokens,
    }
    with trainer.optimizers.published():
        whole = gathered_clt(trainer.clt, trainer.layout, trainer.shapes)
        if trainer.world.is_first and whole is not None:
            save_clt(whole, trainer.run.path)
