"""A run between two steps: what it is made of, saved and taken up again, and the coders published
from it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsify_vlm.coders import Clt, save_clt
from sparsify_vlm.errors import UserError
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
    parts = [(f"weights.{name}", name, value) for name, value in numbers_of(trainer.clt)]
    names = _names_of(trainer, of_optimizers)
    parts += [(f"optimizers.{key}", names[key], value) for key, value in of_optimizers.items()]
    parts.append(("since_fired", "since_fired", trainer.since_fired))
    tensors = {key: whole for key, whole in _wholes(trainer, parts)}
    tensors["rng"] = torch.get_rng_state()
    trainer.clock.tick()
    return {
        "tokens": trainer.clock.tokens,
        "seconds": trainer.clock.seconds,
        "ended": ended,
        "optimizers": plain,
    }, tensors


def _names_of(trainer: Trainer, of_optimizers: dict[str, Tensor]) -> dict[str, str]:
    """The parameter that each tensor of the optimizers is divided like; "" for plain numbers."""
    trained = [name for name, p in trainer.clt.named_parameters() if p.requires_grad]
    return {
        key: trained[int(key.partition(".")[0])] if value.ndim else ""
        for key, value in of_optimizers.items()
    }


def _wholes(trainer: Trainer, parts: list[tuple[str, str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Key and whole tensor for each (key, name of what it is divided like, part)."""
    layout = trainer.layout
    for key, name, part in parts:
        if layout.alone:
            yield key, part
            continue
        whole = gathered(layout, name, part, trainer.shapes)
        if layout.place == 0:
            yield key, whole.cpu()


def take_up(trainer: Trainer, plain: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Go on from what `of` gave.

    Raises `UserError` for a tensor that is missing or has another shape, `KeyError` for anything
    else that is missing.
    """
    with torch.no_grad():
        for name, value in numbers_of(trainer.clt):
            _restore(trainer, value, tensors, f"weights.{name}", name)
        _restore(trainer, trainer.since_fired, tensors, "since_fired", "since_fired")
    torch.set_rng_state(tensors["rng"])
    prefix = "optimizers."
    wholes = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    names, own = _names_of(trainer, wholes), trainer.layout.own
    trainer.optimizers.load_state(
        {key: own(names[key], whole).contiguous() for key, whole in wholes.items()},
        plain["optimizers"],
    )
    trainer.step, trainer.without_weights = int(plain["step"]), False
    trainer.clock = Clock(plain["seconds"], plain["tokens"])


def _restore(
    trainer: Trainer, into: Tensor, tensors: dict[str, Tensor], key: str, name: str
) -> None:
    found = tensors.get(key)
    if found is not None and found.ndim == into.ndim:
        found = trainer.layout.own(name, found)
    if found is None or found.shape != into.shape:
        raise UserError(
            f"{trainer.run.path}/resume: tensor '{key}' is missing or has another shape; the run "
            "cannot be resumed"
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
