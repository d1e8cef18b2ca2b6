"""A source of made-up tokens for tests of the trainer: y is a fixed nonlinear map of x."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from sparsify_vlm.models import Role
from sparsify_vlm.training.checkpoint import RunFolder
from sparsify_vlm.training.config import CoderConfig, TrainConfig
from sparsify_vlm.training.distributed import World
from sparsify_vlm.training.divided import divided, settled
from sparsify_vlm.training.parallel import Layout
from sparsify_vlm.training.run import coder_config
from sparsify_vlm.training.sources import TokenBatch
from sparsify_vlm.training.trainer import Trainer

LAYERS, D_MODEL, TOKENS = 3, 8, 48


class Killed(Exception):
    """Stands for a kill."""


def killed_at(step: int) -> Callable[[dict[str, Any]], None]:
    """An `on_step` that ends a run there."""

    def on_step(line: dict[str, Any]) -> None:
        if line["step"] == step:
            raise Killed

    return on_step


class ToySource:
    """`n_batches` global batches of `TOKENS` tokens; processes take contiguous parts."""

    def __init__(
        self,
        world: World | None = None,
        n_batches: int | None = 40,
        dtype: torch.dtype = torch.float32,
        spoil: Callable[[int, TokenBatch], None] | None = None,
    ) -> None:
        self.world, self.n_batches, self.dtype = world or World(), n_batches, dtype
        self.spoil = spoil
        self.hookpoints = [f"layers.{i}.mlp" for i in range(LAYERS)]
        self.d_model, self.device = D_MODEL, torch.device("cpu")
        self.identity: dict[str, Any] = {"dataset": "toy"}
        self.skipped: list[str] = []

    def batches(self, epoch: int, start: int) -> Iterator[TokenBatch]:
        for number in range(start, self.n_batches or 7):
            batch = self.global_batch(number)
            per, rank = TOKENS // self.world.size, self.world.rank
            mine = slice(rank * per, (rank + 1) * per)
            yield TokenBatch(batch.x[:, mine], batch.y[:, mine], batch.role[mine])

    def global_batch(self, number: int) -> TokenBatch:
        generator = torch.Generator().manual_seed(1000 + number)
        maps = torch.Generator().manual_seed(7)
        W = torch.randn(LAYERS, D_MODEL, D_MODEL, generator=maps, dtype=torch.float64)
        x = torch.randn(LAYERS, TOKENS, D_MODEL, generator=generator, dtype=torch.float64) + 0.5
        y = torch.tanh(x @ W).cumsum(0) + 2
        role = torch.randint(1, 4, (TOKENS,), generator=generator).to(torch.uint8)
        y[:, role == Role.IMAGE] -= 3
        batch = TokenBatch(x.to(self.dtype), y.to(self.dtype), role)
        if self.spoil is not None:
            self.spoil(number, batch)
        return batch


def toy_config(save_dir: Path, **changed: Any) -> TrainConfig:
    """Settings for a toy run; fields of the coder and of the training alike."""
    coder = {"transcode": True, "cross_layer": 3, "num_latents": 32, "k": 4}
    of_coder = CoderConfig.__dataclass_fields__
    coder |= {name: value for name, value in changed.items() if name in of_coder}
    values: dict[str, Any] = {
        "max_steps": 12,
        "lr": 1e-2,
        "lr_warmup_steps": 3,
        "save_every": 5,
        "save_dir": str(save_dir),
        "dead_feature_threshold": 100,
    }
    values |= {name: value for name, value in changed.items() if name not in of_coder}
    return TrainConfig(sae=CoderConfig(**coder), **values)


def toy_trainer(
    cfg: TrainConfig,
    source: ToySource | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    row: Layout | None = None,
) -> Trainer:
    """A prepared trainer, resumed if `cfg.resume` and there is something to resume."""
    source = source or ToySource()
    coders = coder_config(cfg, D_MODEL, source.hookpoints)
    layout = settled(row or Layout(), cfg, coders)
    clt = divided(coders, layout, "cpu", dtype)
    run = RunFolder(Path(cfg.save_dir) / (cfg.run_name or "unnamed"))
    world = source.world
    trainer = Trainer(cfg, clt, source, run, world, quiet=True, on_step=on_step, layout=layout)
    if world.is_first:
        run.prepare({"lr": cfg.lr}, resume=cfg.resume, overwrite=cfg.overwrite)
    world.barrier()
    if cfg.resume:
        trainer.load()
    return trainer
