"""One training stage: its schedule, its optimizer, its loop, and the file it leaves behind."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from sparsify_vlm.errors import UserError
from sparsify_vlm.files import write_tensors
from sparsify_vlm.progress import Progress

_FORMAT, _VERSION = "sparsify-vlm tiny pair stage", "1"


@dataclass(frozen=True)
class Schedule:
    """How a stage is optimized: AdamW, linear warm-up, constant, linear decay to zero."""

    lr: float
    weight_decay: float = 0.1
    """On the matrices inside layers; embeddings, norms and biases have none."""
    tower_lr_factor: float = 1.0
    """The vision tower's learning rate in units of `lr`."""
    warmup: int = 50
    decay: float = 0.5
    """Share of the steps, at the end, over which the rate falls to zero."""

    def factor(self, step: int, steps: int) -> float:
        """The learning rate at `step` of `steps` in units of `lr`."""
        rise = (step + 1) / self.warmup
        fall = (steps - step) / (self.decay * steps)
        return min(1.0, rise, fall)


def optimizer(modules: Iterable[nn.Module], schedule: Schedule) -> torch.optim.AdamW:
    """AdamW over all parameters of `modules`, in groups that differ in decay and rate."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in (item for module in modules for item in module.named_parameters()):
        is_matrix = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
        decay = schedule.weight_decay if is_matrix else 0.0
        rate = schedule.tower_lr_factor if "vision_tower" in name else 1.0
        groups.setdefault((decay, rate), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": decay, "lr": schedule.lr * rate}
            for (decay, rate), parameters in groups.items()
        ],
        betas=(0.9, 0.98),
    )


def optimize(
    label: str,
    modules: list[nn.Module],
    schedule: Schedule,
    steps: int,
    loss_at: Callable[[int], Tensor],
) -> None:
    """Take `steps` optimizer steps on `loss_at(step)`, gradients clipped to norm 1.

    Raises `FloatingPointError` when the loss stops being finite.
    """
    adamw = optimizer(modules, schedule)
    rates = [group["lr"] for group in adamw.param_groups]
    parameters = [p for group in adamw.param_groups for p in group["params"]]
    smooth = None
    with Progress(label, steps, unit="steps") as progress:
        for step in range(steps):
            for group, rate in zip(adamw.param_groups, rates, strict=True):
                group["lr"] = rate * schedule.factor(step, steps)
            loss = loss_at(step)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
            adamw.step()
            adamw.zero_grad()
            smooth = loss.item() if smooth is None else 0.95 * smooth + 0.05 * loss.item()
            progress.note(loss=smooth)
            progress.update()


@dataclass(frozen=True)
class StageFile:
    """The weights a finished stage leaves behind, tied to the recipe and seed that made them."""

    path: Path
    fingerprint: str

    def load(self) -> dict[str, Tensor] | None:
        """The weights; None when the stage is not done.

        Raises `UserError` when the file is of another recipe or seed.
        """
        if not self.path.exists():
            return None
        with safe_open(self.path, "pt") as file:
            found = file.metadata() or {}
        if (found.get("format"), found.get("version")) != (_FORMAT, _VERSION):
            raise UserError(f"{self.path} is no stage of this script; give another --output")
        if found["fingerprint"] != self.fingerprint:
            raise UserError(
                f"{self.path} was made with another recipe, seed or device; give another --output"
            )
        return load_file(self.path)

    def save(self, weights: dict[str, Tensor]) -> None:
        """Write the weights, whole or not at all."""
        write_tensors(
            self.path,
            {name: value.detach().cpu() for name, value in weights.items()},
            {"format": _FORMAT, "version": _VERSION, "fingerprint": self.fingerprint},
        )


def fingerprint(recipe: Any, *plain: object) -> str:
    """A digest of a recipe (a dataclass) and plain values."""
    text = json.dumps([asdict(recipe), *plain], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def seeded(seed: int, stage: str) -> np.random.Generator:
    """The stage's own generator of scenes; torch's is seeded alongside (initial weights, noise)."""
    sequence = np.random.SeedSequence([seed, *stage.encode()])
    torch.manual_seed(int(sequence.generate_state(1)[0]))
    return np.random.default_rng(sequence)
