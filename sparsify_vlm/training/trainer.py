"""The training loop: batches in, one joint step, figures and checkpoints out.

1. Start: weights from the first batch's means (or `--finetune`), or everything from the last state.
2. A step takes `grad_acc_steps` global batches, adds up the gradient of their joint losses over
   micro-batches and processes, and updates all coders at once.
3. Every `log_every` steps a line of metrics; every `save_every` steps, and at the end, a state to
   resume from, and the coders published from it.

Nothing but the step number decides which batches come next, which learning rate and which k are
used, so a resumed run goes on as if it had not stopped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from sparsify_vlm.coders import Clt
from sparsify_vlm.errors import UserError
from sparsify_vlm.progress import Progress
from sparsify_vlm.training import state
from sparsify_vlm.training.at_once import UpdatedAtOnce
from sparsify_vlm.training.checkpoint import RunFolder, disk_full_explained
from sparsify_vlm.training.config import TrainConfig
from sparsify_vlm.training.distributed import World
from sparsify_vlm.training.divided import whole_shapes
from sparsify_vlm.training.metrics import Line, Metrics, metrics_line
from sparsify_vlm.training.optimizers import Optimizers
from sparsify_vlm.training.parallel import Layout
from sparsify_vlm.training.sources import Batch, TokenSource
from sparsify_vlm.training.spliced import SplicedLoss
from sparsify_vlm.training.state import Clock
from sparsify_vlm.training.step import (
    JointStep,
    Moments,
    StepFigures,
    StepPlan,
    check_finite,
    mean_norms,
    moments,
)

Callback = Callable[[Line], None]

WHOLE = Layout()
THRESHOLD_RATE = 0.01
"""How far batch top-k's threshold moves in a step towards the batch's smallest activation."""


def planned_steps(cfg: TrainConfig, n_batches: int | None) -> int | None:
    """Optimizer steps of the whole run: `--max_steps`, or what `--epochs` passes give.

    None if the length of the data is not known. Raises `UserError` for less than one step.
    """
    if cfg.max_steps is not None:
        return cfg.max_steps
    if n_batches is None:
        if cfg.epochs > 1:
            raise UserError("--epochs needs a dataset whose length is known; give --max_steps")
        return None
    steps = cfg.epochs * n_batches // cfg.grad_acc_steps
    if steps == 0:
        raise UserError(
            f"--grad_acc_steps {cfg.grad_acc_steps} is more than the {n_batches} batches there are"
        )
    return steps


class Trainer:
    """Trains `clt` on `source`; `run` must be prepared. Call `fit` once.

    `clt` is this process's part of the coders in `layout`; `world` are the processes that share out
    the tokens, which hold the same part.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        clt: Clt,
        source: TokenSource,
        run: RunFolder,
        world: World,
        *,
        settings: dict[str, Any] | None = None,
        quiet: bool = False,
        on_step: Callback | None = None,
        spliced: SplicedLoss | None = None,
        layout: Layout = WHOLE,
    ) -> None:
        self.cfg, self.clt, self.source, self.run, self.world = cfg, clt, source, run, world
        self.spliced, self.layout, self.shapes = spliced, layout, whole_shapes(clt.cfg)
        self.settings = settings or {}
        self.quiet, self.on_step = quiet or not world.is_first, on_step
        self.total = planned_steps(cfg, source.n_batches)
        trained = [p for p in clt.parameters() if p.requires_grad]
        self.optimizers = Optimizers(trained, cfg, clt.cfg.num_latents, self.total)
        self.step = 0
        self.clock = Clock()
        self.without_weights = cfg.finetune is None
        torch.manual_seed(cfg.seed)  # for whatever a model may draw; `load` restores a run's own
        coders, here = len(clt.cfg.source_layers()), layout.latents_here(clt.cfg.num_latents)
        self.since_fired = torch.zeros(coders, here, dtype=torch.int64, device=clt.device)

    @property
    def finished(self) -> bool:
        """Whether all planned steps are done."""
        return self.total is not None and self.step >= self.total

    # ---- the loop

    def fit(self) -> None:
        """Train from the current step to the end, and save."""
        if self.clt.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # tensor cores, as sparsify does
        self.clock.start()
        metrics = None
        if self.world.is_first:
            self.run.cut_metrics(self.step)
            metrics = Metrics(self.cfg, self.run, self.settings, self.source.hookpoints)
        progress = Progress(
            "Training", self.total, unit="steps", initial=self.step, quiet=self.quiet
        )
        try:
            with progress:
                self._loop(metrics, progress)
            self.save(metrics, ended=True)
        finally:
            if metrics is not None:
                metrics.close()
            if self.world.is_first:
                self.run.undo_overwrite()

    def _loop(self, metrics: Metrics | None, progress: Progress) -> None:
        batches = self._numbered_batches()
        while not self.finished:
            k, lr = self.active_latents(), self.optimizers.begin(self.step)
            figures = self._gradient(batches, k)
            if figures is None:
                return self._say_ended()
            self._update(figures)
            if self.step % self.cfg.log_every == 0 or self.finished:
                self._report(figures, lr, k, metrics, progress)
            progress.update()
            if self.step % self.cfg.save_every == 0 and not self.finished:
                self.save(metrics)

    def _numbered_batches(self) -> Iterator[tuple[int, Batch]]:
        """Batches with their numbers from this step's first on, pass after pass."""
        number = self.step * self.cfg.grad_acc_steps
        epoch, start = (
            divmod(number, self.source.n_batches) if self.source.n_batches else (0, number)
        )
        while True:
            for batch in self.source.batches(epoch, start):
                yield number, batch
                del batch  # before the next one is made
                number += 1
            if self.source.n_batches is None:
                return
            epoch, start = epoch + 1, 0

    def _say_ended(self) -> None:
        if self.total is not None:
            print(f"The data ended after {self.step} of {self.total} steps.")

    def _gradient(self, batches: Iterator[tuple[int, Batch]], k: int) -> StepFigures | None:
        """The gradient of this step's batches and their figures; None if the data ends before."""
        step = JointStep(self.clt, self.world, self._plan())
        fresh, taken = self.without_weights, 0
        for number, batch in islice(batches, self.cfg.grad_acc_steps):
            found = moments(batch, self.clt.dtype, self.world)
            check_finite(found, self.clt.cfg, number, self._last_kept())
            self._initialise(batch, found)
            if self._unit_norm_decoders:
                self.clt.set_decoder_norm_to_unit_norm()
            step.add(batch, found, k)
            taken += 1
            del batch  # before the next one is made
        if taken < self.cfg.grad_acc_steps:
            self.clt.zero_grad()
            return None
        figures = step.finish()
        if not math.isfinite(figures.loss):
            raise UserError(
                f"the loss is not finite at step {self.step + 1}: the coders have diverged, try a "
                f"smaller --lr than {self.optimizers.lr:.2g}. {self._last_kept()}"
            )
        if fresh and taken == 1 and self.cfg.sae.transcode:
            self._drop_bias_noise()
        return figures

    def _plan(self) -> StepPlan:
        cfg, revives = self.cfg, self.cfg.auxk_alpha > 0
        dead = self.since_fired > cfg.dead_feature_threshold
        return StepPlan(
            cfg.grad_acc_steps,
            cfg.micro_acc_steps,
            cfg.objective(self.step),
            list(dead) if revives else None,
            cfg.bf16_selection,
            float("fvu" in cfg.loss_fn),
            self.spliced,
            UpdatedAtOnce(self.clt, self.optimizers, self.world) if self._spends_at_once else None,
            self.layout,
        )

    @property
    def _spends_at_once(self) -> bool:
        """Whether a table's gradient is whole, and final, when the pass has made it."""
        one_pass = self.cfg.grad_acc_steps == self.cfg.micro_acc_steps == 1
        return one_pass and self.spliced is None and not self._unit_norm_decoders

    def _update(self, figures: StepFigures) -> None:
        """Update the coders with the gradients that are left, and the counts."""
        if figures.tokens:  # none where every sample was bad: nothing to learn from
            if self._unit_norm_decoders:
                self.clt.remove_gradient_parallel_to_decoder_directions()
            self.optimizers.finish()
            self.clt.project()
            self._learn_thresholds(figures.lowest)
        self.clt.zero_grad()
        self.step += 1
        self.clock.tokens += figures.tokens
        self.since_fired += figures.tokens
        self.since_fired[figures.fired] = 0

    @torch.no_grad()
    def _learn_thresholds(self, lowest: Tensor) -> None:
        """Move batch top-k's thresholds towards the smallest activations of this step."""
        if self.clt.cfg.activation != "batchtopk":
            return
        for threshold, found in zip(self.clt.threshold, lowest.to(self.clt.dtype), strict=True):
            if found.isfinite():
                known = threshold.isfinite() & (threshold > 0)
                threshold.copy_(torch.where(known, threshold.lerp(found, THRESHOLD_RATE), found))

    def _drop_bias_noise(self) -> None:
        """Set the decoder biases' gradient to the 0 that it is where they are this batch's mean.

        What is computed is rounding, which SignSGD would take for full steps, a different one for
        every number of processes.
        """
        for bias in self.clt.b_dec:
            if bias.grad is not None:
                bias.grad.zero_()

    @property
    def _unit_norm_decoders(self) -> bool:
        return self.cfg.sae.normalize_decoder and not self.cfg.sae.transcode

    def _last_kept(self) -> str:
        last = self.run.last_step()
        return "No checkpoint was saved yet." if last is None else f"Step {last} is kept."

    def _initialise(self, batch: Batch, found: Moments) -> None:
        """Set the starting weights from the first batch that has tokens."""
        if self.without_weights and found.tokens:
            norm_x = norm_y = None
            if self.clt.cfg.normalize_io:
                norm_x, norm_y = mean_norms(batch, found, self.world)
            means, own = (found.mean_x, found.mean_y), self.layout.own
            self.clt.initialise(*means, self.cfg.seed, norm_x, norm_y, own)
            self.without_weights = False

    def active_latents(self) -> int:
        """k of this step: with `k_decay_steps`, linear from 10 times the width down to `--k`."""
        final, decay = self.clt.cfg.k, self.cfg.k_decay_steps
        if self.step >= decay:
            return final
        initial = min(self.clt.cfg.num_latents, 10 * self.clt.cfg.d_model)
        progress = self.step / decay
        return round(initial * (1 - progress) + final * progress)

    def dead_shares(self) -> list[float]:
        """Per coder: share of latents that have not fired for more than `dead_feature_threshold`
        tokens."""
        dead = (self.since_fired > self.cfg.dead_feature_threshold).sum(1).double()
        shares: list[float] = (self.layout.sum_features(dead) / self.clt.cfg.num_latents).tolist()
        return shares

    def _report(
        self,
        figures: StepFigures,
        lr: float,
        k: int,
        metrics: Metrics | None,
        progress: Progress,
    ) -> None:
        rate, dead = self.clock.tick(), self.dead_shares()
        if metrics is None or figures.tokens == 0:
            return
        line = metrics_line(
            figures,
            step=self.step,
            tokens=self.clock.tokens,
            seconds=self.clock.seconds,
            tokens_per_s=rate,
            lr=lr,
            k=k,
            dead=dead,
        )
        metrics.write(line)
        progress.note(**_shown(line))
        if self.on_step is not None:
            self.on_step(line)

    # ---- states

    def save(self, metrics: Metrics | None = None, *, ended: bool = False) -> None:
        """Write the state of this step and publish the coders; all processes must call it.

        Raises `UserError` when the disk is full; the state before is then still there. Also when
        no token was counted so far: coders that have learnt nothing are not published. Nor are
        weights that are not finite, which the loss shows only a step later.
        """
        if self.clock.tokens == 0:
            raise UserError(_no_token(self.step, self.source.skipped))
        self._check_weights()
        if self.world.rank == 0:  # those that hold a coder together with the first process
            with disk_full_explained(self.run):
                plain, tensors = state.of(self, ended)
                if self.world.is_first:
                    if metrics is not None:
                        metrics.sync()
                    self.run.save_state(self.step, plain, tensors)
                del tensors  # of a divided coder, copies
                state.publish(self)
        self.world.barrier()

    def _check_weights(self) -> None:
        for name, weights in self.clt.named_parameters():
            if not bool(weights.isfinite().all()):
                raise UserError(
                    f"{name} has NaN or infinite values after step {self.step}: the coders have "
                    f"diverged, try a smaller --lr than {self.optimizers.lr:.2g}. "
                    f"{self._last_kept()}"
                )

    def load(self) -> bool:
        """Go on from the run's last state; whether that was the run's end. Publishes it again.

        Raises `UserError` for a state that cannot be read or has other tensors.
        """
        loaded = self.run.load_state(state.own_part(self))
        if loaded is None:
            return False
        plain, tensors = loaded
        try:
            state.take_up(self, plain, tensors)
        except KeyError as error:
            raise UserError(
                f"{self.run.path}/resume lacks {error}: it is damaged, the run cannot be resumed"
            ) from None
        if self.world.rank == 0:
            with disk_full_explained(self.run):
                state.publish(self)
        return self.finished or (plain["ended"] and self.total is None)


def _no_token(steps: int, skipped: list[str]) -> str:
    why = f"{skipped[0]} was skipped" if skipped else "--exclude_tokens leaves none, or all are BOS"
    return f"there was no token to train on in {steps} steps ({why}); nothing was saved"


def _shown(line: Line) -> dict[str, object]:
    """The figures of the progress line."""
    shown: dict[str, object] = {"FVU": line["fvu"]["all"]}
    shown |= {g: line["fvu"][g] for g in ("image", "text") if line["fvu"][g] is not None}
    return shown | {
        "L0": line["l0"],
        "dead": f"{100 * line['dead']:.1f}%",
        "tokens/s": f"{line['tokens_per_s']:.0f}",
    }
