"""What a run reports: metrics.jsonl, always, and the logging services that were asked for."""

from __future__ import annotations

import importlib
import json
import math
import os
from pathlib import Path
from typing import Any, Protocol, TextIO

from sparsify_vlm.errors import UserError
from sparsify_vlm.training.checkpoint import RunFolder
from sparsify_vlm.training.config import TrainConfig
from sparsify_vlm.training.step import GROUPS, StepFigures

Line = dict[str, Any]


def metrics_line(
    figures: StepFigures,
    *,
    step: int,
    tokens: int,
    seconds: float,
    tokens_per_s: float,
    lr: float,
    k: int,
    dead: list[float],
) -> Line:
    """One line of metrics.jsonl. A figure that has no tokens or no target is null."""
    layers, l0 = (
        {group: values[i].tolist() for i, group in enumerate(GROUPS)}
        for values in (figures.fvu, figures.l0)
    )
    return {
        "step": step,
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "tokens_per_s": round(tokens_per_s, 1),
        "loss": figures.loss,
        "penalty": figures.penalty,
        "auxk": figures.auxk,
        "lr": lr,
        "k": k,
        "fvu": {group: _mean(values) for group, values in layers.items()},
        "fvu_layers": {group: [_or_none(v) for v in vs] for group, vs in layers.items()},
        "l0": _mean(l0["all"]),
        "l0_layers": {group: [_or_none(v) for v in vs] for group, vs in l0.items()},
        "dead": _mean(dead),
        "dead_layers": dead,
    }


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _mean(values: list[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None


def scalars(line: Line, hookpoints: list[str]) -> dict[str, float]:
    """A metrics line as flat name: number pairs, as logging services want them.

    With a target offset the last of the hookpoints have no coder, and no L0 and dead latents.
    """
    flat = {k: v for k, v in line.items() if isinstance(v, int | float) and k != "step"}
    for group, value in line["fvu"].items():
        flat[f"fvu/{group}"] = value
        for name, of_layer in zip(hookpoints, line["fvu_layers"][group], strict=True):
            flat[f"fvu_{group}/{name}"] = of_layer
        for name, of_coder in zip(hookpoints, line["l0_layers"][group], strict=False):
            flat[f"l0_{group}/{name}"] = of_coder
    for name, share in zip(hookpoints, line["dead_layers"], strict=False):
        flat[f"dead/{name}"] = share
    return {name: value for name, value in flat.items() if value is not None}


class _Service(Protocol):
    def log(self, values: dict[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, cfg: TrainConfig, run: RunFolder, settings: dict[str, Any]) -> None:
        self._writer = _import("torch.utils.tensorboard", "tensorboard").SummaryWriter(run.path)

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, cfg: TrainConfig, run: RunFolder, settings: dict[str, Any]) -> None:
        self._run = _import("wandb", "wandb").init(
            entity=os.environ.get("WANDB_ENTITY"),
            project=os.environ.get("WANDB_PROJECT", "sparsify"),
            name=cfg.run_name,
            id=run.id,
            resume="allow",
            config=settings,
        )

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, cfg: TrainConfig, run: RunFolder, settings: dict[str, Any]) -> None:
        self._trackio = _import("trackio", "trackio")
        project = os.environ.get("TRACKIO_PROJECT", "sparsify")
        name = cfg.run_name or run.id
        self._trackio.init(project=project, name=name, resume="allow", config=settings)

    def log(self, values: dict[str, float], step: int) -> None:
        self._trackio.log(values, step=step)

    def close(self) -> None:
        self._trackio.finish()


def _import(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"--log_to_{package} needs the package {package}: pip install 'sparsify-vlm[log]' "
            f"({error})"
        ) from None


class Metrics:
    """Writes each line to metrics.jsonl at once, and passes it on to the services."""

    def __init__(
        self, cfg: TrainConfig, run: RunFolder, settings: dict[str, Any], hookpoints: list[str]
    ) -> None:
        self._hookpoints, self._frequency = hookpoints, cfg.wandb_log_frequency
        self._lines = 0
        self._services: list[_Service] = [
            make(cfg, run, settings)
            for make, wanted in (
                (_TensorBoard, cfg.log_to_tensorboard),
                (_Wandb, cfg.log_to_wandb),
                (_Trackio, cfg.log_to_trackio),
            )
            if wanted
        ]
        self._file = _append(run.metrics)

    def write(self, line: Line) -> None:
        """Report one step."""
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        self._lines += 1
        if self._lines % self._frequency == 0:
            for service in self._services:
                service.log(scalars(line, self._hookpoints), line["step"])

    def sync(self) -> None:
        """Have everything written so far on the disk, before a state that counts on it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """End the file and the services."""
        self._file.close()
        for service in self._services:
            service.close()


def _append(path: Path) -> TextIO:
    return path.open("a", encoding="utf-8")


def read_metrics(path: Path) -> list[Line]:
    """All lines of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
