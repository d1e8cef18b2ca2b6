"""One optimizer step's tokens: their moments, the joint gradient, and the figures reported.

A global batch b has n tokens in all processes together. Its loss is Σ_t sse_t / V_t, where

    V_t = Σ‖y_t − ȳ_t‖²                                  over the n tokens
    V_t of a role = Σ‖y_t − ȳ_t of the role‖²            over the role's tokens
                  = Σ‖c‖² − ‖Σ c‖² / n of the role       with c = y_t − ȳ_t

so that an FVU of 1 means, for each role, no better than that role's own mean. The step's loss is
the mean of its `grad_acc_steps` batches' losses; micro-batches only split the sums.

V_t must be known before the first gradient. A batch that comes in pieces is therefore gone through
twice: V about each piece's own mean, V_i, can be added up piece by piece (Chan et al. 1979),

    V_t = Σ_i V_i + n_i ‖ȳ_i − ȳ_t‖²

which never subtracts large numbers, and pieces and processes are added up in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsify_vlm.coders import Clt, CltConfig, JointStats, Objective, forward_backward
from sparsify_vlm.coders.sharing import ALONE, Sharing
from sparsify_vlm.errors import UserError
from sparsify_vlm.models import Role
from sparsify_vlm.training.at_once import UpdatedAtOnce
from sparsify_vlm.training.distributed import World
from sparsify_vlm.training.sources import Batch, TokenBatch
from sparsify_vlm.training.spliced import SplicedLoss

GROUPS = ("all", "image", "text")
"""The tokens a figure is given for."""


@dataclass
class Moments:
    """Of one global batch, over all processes; float64."""

    tokens: int
    mean_x: Tensor
    """[L, d]."""
    mean_y: Tensor
    """[L, d]."""
    variance: Tensor
    """V_t of each of `GROUPS`, [3, L]; 0 where a group has no tokens."""


@dataclass
class StepFigures:
    """Of one optimizer step, over all processes. NaN where there are no tokens or no target."""

    tokens: int
    loss: float
    fvu: Tensor
    """[3, L] by `GROUPS` and layer."""
    l0: Tensor
    """[3, coders]: mean number of active latents per token."""
    fired: Tensor
    """bool [coders, F]: which latents (those here, of a divided coder) were active at any token."""
    penalty: float
    """The sparsity penalty's part of the loss."""
    auxk: float
    """AuxK's part of the loss."""
    lowest: Tensor
    """[coders]: mean over the passes of the smallest activation (`batchtopk`); NaN otherwise."""


def membership(role: Tensor, dtype: torch.dtype) -> Tensor:
    """[3, T]: 1 where a token belongs to a group of `GROUPS`."""
    every = torch.ones_like(role, dtype=torch.bool)
    return torch.stack([every, role == Role.IMAGE, role == Role.TEXT]).to(dtype)


@dataclass
class _Sums:
    """Of the tokens gone through so far, float64; the three `GROUPS` first."""

    counts: Tensor
    """[3]."""
    x: Tensor
    """[L, d]: Σ x over all tokens."""
    y: Tensor
    """[3, L, d]: Σ y."""
    spread: Tensor
    """[3, L]: Σ‖y − mean of these tokens‖²."""

    @classmethod
    def of(cls, piece: TokenBatch, dtype: torch.dtype) -> _Sums:
        """Of one piece. Differences are taken in `dtype`, one layer at a time."""
        n_layers, _, d = piece.x.shape
        member = membership(piece.role, dtype)
        counts = member.sum(1, dtype=torch.float64)
        found = cls(
            counts,
            counts.new_zeros(n_layers, d),
            counts.new_zeros(3, n_layers, d),
            counts.new_zeros(3, n_layers),
        )
        for layer in range(n_layers):
            found.x[layer] = piece.x[layer].sum(0, dtype=torch.float64)
            y = piece.y[layer].to(dtype)
            mean = (y.sum(0, dtype=torch.float64) / counts[0].clamp(min=1)).to(dtype)
            centred = y - mean
            squares = member.double() @ centred.square().sum(1, dtype=torch.float64)
            sums = (member @ centred).double()
            found.spread[:, layer] = squares - sums.square().sum(1) / counts.clamp(min=1)
            found.y[:, layer] = sums + counts[:, None] * mean
        return found

    def means(self) -> Tensor:
        """[3, L, d] of y."""
        return self.y / self.counts.clamp(min=1)[:, None, None]

    def about(self, means: Tensor) -> Tensor:
        """[3, L]: Σ‖y − means‖²."""
        return self.spread + self.counts[:, None] * (self.means() - means).square().sum(2)

    def add(self, other: _Sums) -> None:
        """Take `other`'s tokens in."""
        counts, x, y = self.counts + other.counts, self.x + other.x, self.y + other.y
        means = y / counts.clamp(min=1)[:, None, None]
        self.spread = self.about(means) + other.about(means)
        self.counts, self.x, self.y = counts, x, y


def moments(batch: Batch, dtype: torch.dtype, world: World) -> Moments:
    """Means and variances of a global batch. Differences are taken in `dtype`."""
    sums: _Sums | None = None
    for piece in batch.pieces(1):
        found = _Sums.of(piece, dtype)
        del piece  # before the next one is made
        if sums is None:
            sums = found
        else:
            sums.add(found)
    assert sums is not None, "a batch has at least one piece, if an empty one"
    counts, x, y = sums.counts.clone(), sums.x, sums.y.clone()
    world.sum_([counts, x, y])
    means = y / counts.clamp(min=1)[:, None, None]
    spread = sums.about(means)
    world.sum_([spread])
    mean_x = x / counts[0].clamp(min=1)
    return Moments(int(counts[0]), mean_x, means[0], spread.clamp(min=0))


def mean_norms(batch: Batch, found: Moments, world: World) -> tuple[Tensor, Tensor]:
    """Mean over a global batch's tokens of ‖x‖ and of ‖y‖, each [L] float64."""
    sums = torch.zeros(2, len(found.mean_x), dtype=torch.float64, device=found.mean_x.device)
    for piece in batch.pieces(1):
        for layer in range(len(piece.x)):
            sums[0, layer] += _sum_of_norms(piece.x[layer])
            sums[1, layer] += _sum_of_norms(piece.y[layer])
        del piece  # before the next one is made
    world.sum_([sums])
    mean_x, mean_y = sums / found.tokens
    return mean_x, mean_y


def _sum_of_norms(values: Tensor) -> Tensor:
    return values.float().norm(dim=1).sum(dtype=torch.float64)


def check_finite(found: Moments, cfg: CltConfig, batch: int, last: str) -> None:
    """Raise `UserError` naming hookpoint and batch if an activation was NaN or infinite.

    x of layers without a coder and y of layers without a target do not matter: an imported store
    does not have them.
    """
    read, written = list(cfg.source_layers()), list(cfg.target_layers())
    for what, layers, mean in (("input", read, found.mean_x), ("output", written, found.mean_y)):
        bad = (~mean[layers].isfinite()).any(1).nonzero()
        if len(bad):
            raise UserError(
                f"the {what} of {cfg.hookpoints[layers[int(bad[0])]]} has NaN or infinite values "
                f"in batch {batch}: the model overflows in its dtype or the batch is broken. {last}"
            )


@dataclass
class StepPlan:
    """How one optimizer step is made."""

    grad_acc_steps: int = 1
    micro_acc_steps: int = 1
    objective: Objective = field(default_factory=Objective)
    dead: list[Tensor] | None = None
    """Per coder: bool [F], the latents that AuxK revives."""
    bf16_selection: bool = False
    reconstruction: float = 1.0
    """Weight of Σ_t FVU_t in the loss."""
    spliced: SplicedLoss | None = None
    """The loss on the spliced model's predictions, if there is one."""
    at_once: UpdatedAtOnce | None = None
    """Spends the tables' gradients; only for a single pass. None: they are kept in `.grad`."""
    sharing: Sharing = ALONE
    """The processes that hold the coders together."""


class JointStep:
    """Collects the gradient and the figures of one optimizer step."""

    def __init__(self, clt: Clt, world: World, plan: StepPlan) -> None:
        self.clt, self.world, self.plan = clt, world, plan
        coders, layers = len(clt.cfg.source_layers()), clt.cfg.n_layers
        wide: dict[str, Any] = {"dtype": torch.float64, "device": clt.device}
        self.tokens = 0
        self._parts = torch.zeros(3, **wide)  # loss, penalty, AuxK
        self._sse, self._variance = torch.zeros(3, layers, **wide), torch.zeros(3, layers, **wide)
        self._active, self._counted = torch.zeros(3, coders, **wide), torch.zeros(3, 1, **wide)
        self._lowest = torch.zeros(2, coders, **wide)  # sum and number
        here = plan.sharing.latents_here(clt.cfg.num_latents)
        self._fired = torch.zeros(coders, here, dtype=torch.uint8, device=clt.device)

    def add(self, batch: Batch, found: Moments, k: int) -> None:
        """Add one batch's gradient, with `k` active latents per token."""
        if found.tokens == 0:  # every sample of it was skipped
            return
        self.tokens += found.tokens
        self._variance += found.variance
        for piece in batch.pieces(self.plan.micro_acc_steps):
            self._add_piece(piece, found, k)
            del piece  # before the next one is made
        if self.plan.spliced is not None:
            weight = 1 / self.plan.grad_acc_steps
            self._parts[0] += weight * self.plan.spliced.backward(batch.inputs, weight)

    def _add_piece(self, piece: TokenBatch, found: Moments, k: int) -> None:
        plan, weight = self.plan, 1 / self.plan.grad_acc_steps
        stats = forward_backward(
            self.clt,
            piece.x,
            piece.y,
            variance=found.variance[0],
            weight=weight,
            k=k,
            objective=plan.objective,
            tokens=found.tokens,
            dead=plan.dead,
            gradients=plan.at_once,
            bf16_selection=plan.bf16_selection,
            reconstruction=plan.reconstruction,
            sharing=plan.sharing,
        )
        member = membership(piece.role, torch.float64)
        self._parts += weight * torch.stack([stats.loss, stats.penalty, stats.auxk])
        self._sse += member @ stats.errors.double().T
        self._count(stats, member)

    def _count(self, stats: JointStats, member: Tensor) -> None:
        self._active += member @ stats.active.double().T
        self._counted += member.sum(1, keepdim=True)
        for coder, (hit, lowest) in enumerate(zip(stats.fired, stats.lowest, strict=True)):
            self._fired[coder] |= hit
            if lowest is not None:
                self._lowest[0, coder] += lowest
                self._lowest[1, coder] += 1

    def finish(self) -> StepFigures:
        """Add everything up over the processes; the gradients are then in the parameters."""
        self.world.sum_(self._gradients())
        self.world.sum_([self._parts, self._sse, self._active, self._counted, self._lowest])
        self.world.max_([self._fired])
        fvu = torch.where(self._variance > 0, self._sse / self._variance, torch.nan)
        loss, penalty, auxk = self._parts.tolist()
        return StepFigures(
            tokens=self.tokens,
            loss=loss,
            fvu=fvu.cpu(),
            l0=(self._active / self._counted).cpu(),
            fired=self._fired.bool(),
            penalty=penalty,
            auxk=auxk,
            lowest=self._lowest[0] / self._lowest[1],
        )

    def _gradients(self) -> list[Tensor]:
        """Gradients of all trained parameters that have not been spent; zeros for a process that
        had no tokens."""
        spent = self.plan.at_once.tables if self.plan.at_once else set()
        gradients = []
        for parameter in self.clt.parameters():
            if parameter.requires_grad and parameter not in spent:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        return gradients
