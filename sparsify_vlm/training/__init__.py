"""Training coders: settings, the trainer, checkpoints and exact resume, many processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsify_vlm.training.config import CoderConfig, RunConfig, TrainConfig

if TYPE_CHECKING:
    from pathlib import Path

    from sparsify_vlm.data import DataConfig
    from sparsify_vlm.models import LoadedModel
    from sparsify_vlm.training.trainer import Callback

__all__ = ["CoderConfig", "RunConfig", "TrainConfig", "train"]


def train(
    cfg: TrainConfig,
    data: DataConfig | None = None,
    run: RunConfig | None = None,
    *,
    loaded: LoadedModel | None = None,
    quiet: bool = False,
    on_step: Callback | None = None,
) -> Path:
    """Train coders and return the run's folder; see `sparsify_vlm.training.run.train`.

    What it needs is imported when it is called: settings are read without importing torch.
    """
    from sparsify_vlm.training import run as implementation

    return implementation.train(cfg, data, run, loaded=loaded, quiet=quiet, on_step=on_step)
