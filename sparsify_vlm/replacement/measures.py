"""Sums over batches from which the figures of an evaluation are made.

Layers, on clean inputs, for all counted tokens and for each role R (float64):

    FVU_t = Σ‖y_t − ŷ_t‖² / Σ‖y_t − ȳ_t‖²    over the tokens of R, ȳ_t the mean over R

so that 1 means no better than R's own mean, as in training. The denominator is summed in one pass
about the first batch's mean c:  Σ‖y − c‖² − ‖Σ(y − c)‖² / n.

Predictions, over scored tokens (p: the model, q: the spliced model, natural logarithms):

    cross-entropy = −mean log q(token)     KL = mean Σ_v p_v (log p_v − log q_v)
    CE recovered  = (CE of the ablated − CE) / (CE of the ablated − CE of the model)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsify_vlm.coders import Clt, CltConfig
from sparsify_vlm.models import Role

GROUPS: dict[str, Role | None] = {"all": None, "image": Role.IMAGE, "text": Role.TEXT}
"""The tokens a figure is given for; None stands for every counted token."""

ARMS = ("full", "same_layer_only")
"""The coder as it is, and only with what each coder writes to its own layer (its first target)."""


def distinct_arms(cfg: CltConfig) -> tuple[str, ...]:
    """The arms that differ: one for per-layer coders, whose only write is the first."""
    return ARMS if cfg.n_targets > 1 else ARMS[:1]


def group_members(role: Tensor) -> Tensor:
    """float64 [3, T]: 1 where a token belongs to a group of `GROUPS`; role [T]."""
    rows = [role == r if r is not None else torch.ones_like(role) for r in GROUPS.values()]
    return torch.stack([row.double() for row in rows])


def finite(value: float) -> float | None:
    """The value, or None where it is undefined."""
    return value if math.isfinite(value) else None


class LayerSums:
    """FVU, L0 and dead latents of a coder over the tokens given to `add`; L layers."""

    def __init__(self, clt: Clt) -> None:
        self.clt, cfg = clt, clt.cfg
        wide: dict[str, Any] = {"dtype": torch.float64, "device": clt.device}
        self.tokens = torch.zeros(len(GROUPS), **wide)
        self._centre: Tensor | None = None
        self._sum = torch.zeros(len(GROUPS), cfg.n_layers, cfg.d_model, **wide)
        self._square = torch.zeros(len(GROUPS), cfg.n_layers, **wide)
        self._error = {arm: torch.zeros_like(self._square) for arm in distinct_arms(cfg)}
        self._active = torch.zeros_like(self._square)
        self._fired = torch.zeros(
            len(GROUPS), cfg.n_layers, cfg.num_latents, dtype=torch.bool, device=clt.device
        )

    @torch.no_grad()
    def add(self, x: Tensor, y: Tensor, role: Tensor) -> None:
        """Count a batch's tokens: x, y [L, T, d] and role [T]."""
        if len(role) == 0:
            return
        if self._centre is None:
            self._centre = torch.stack([y_t.double().mean(0) for y_t in y])
        member = group_members(role)
        self.tokens += member.sum(1)
        latents = self.clt.encode(x)
        for layer, active in enumerate(latents):
            if active is not None:
                on = active.values > 0
                self._active[:, layer] += member @ on.sum(1).double()
                for group, chosen in enumerate(member.bool()):
                    hit = active.indices[chosen][on[chosen]]
                    self._fired[group, layer, hit] = True
        for t, y_t in enumerate(y):
            centred = y_t.double() - self._centre[t]
            self._sum[:, t] += member @ centred
            self._square[:, t] += member @ centred.square().sum(1)
        for t in self.clt.cfg.target_layers():
            for arm in self._error:
                error = y[t].double() - self._reconstruction(arm, t, latents, x).double()
                self._error[arm][:, t] += member @ error.square().sum(1)

    def _reconstruction(self, arm: str, t: int, latents: Sequence[Any], x: Tensor) -> Tensor:
        nearest = t - self.clt.cfg.target_offset
        keep = None if arm == "full" else lambda s: s == nearest
        return self.clt.decode_target(t, latents, x, keep=keep)

    def mean_y(self) -> Tensor:
        """Mean of y over all tokens, [L, d] float64."""
        assert self._centre is not None
        return self._centre + self._sum[0] / self.tokens[0]

    def sigma(self) -> Tensor:
        """Standard deviation sqrt(E‖y_t − ȳ_t‖²) of each target over all tokens, [L] float64."""
        about = self._sum[0].square().sum(1) / self.tokens[0]
        return ((self._square[0] - about) / self.tokens[0]).clamp(min=0).sqrt()

    def fvu(self, arm: str) -> Tensor:
        """[3, L] by group and layer; NaN without tokens, variance, or a coder writing there."""
        about = self._sum.square().sum(2) / self.tokens.clamp(min=1)[:, None]
        variance = self._square - about
        # What is left of equal values is rounding.
        variance[variance <= 1e-12 * self._square] = torch.nan
        fvu = self._error.get(arm, self._error["full"]) / variance
        fvu[:, : self.clt.cfg.target_offset] = torch.nan
        return fvu

    def l0(self) -> Tensor:
        """Mean count of active latents, [3, L]; NaN for a layer without a coder."""
        l0 = self._active / self.tokens[:, None]
        l0[:, len(self.clt.cfg.source_layers()) :] = torch.nan
        return l0

    def dead(self) -> Tensor:
        """Share of latents that were never active, [3, L]; NaN without tokens or a coder."""
        dead = 1 - self._fired.double().mean(2)
        dead[self.tokens == 0] = torch.nan
        dead[:, len(self.clt.cfg.source_layers()) :] = torch.nan
        return dead

    def by_group(self, values: Tensor) -> list[dict[str, float | None]]:
        """A [3, L] table as one `{"all": …, "image": …, "text": …}` per layer."""
        return [
            {name: finite(v) for name, v in zip(GROUPS, row, strict=True)}
            for row in values.T.tolist()
        ]


def mean_over_layers(rows: Sequence[dict[str, float | None]]) -> dict[str, float | None]:
    """The mean of each group's values over the layers that have one."""
    means: dict[str, float | None] = {}
    for name in GROUPS:
        values = [row[name] for row in rows]
        known = [v for v in values if v is not None]
        means[name] = sum(known) / len(known) if known else None
    return means


@dataclass
class PredictionTerms:
    """What N predictions add to the figures above, each [N] float64; None without the model's own
    predictions to compare with."""

    cross_entropy: Tensor
    kl: Tensor | None = None
    same_top: Tensor | None = None


def prediction_terms(logits: Tensor, labels: Tensor, own: Tensor | None = None) -> PredictionTerms:
    """Terms of N predictions: logits [N, V], labels [N], the model's own log-probabilities [N, V].

    Computed in the dtype of `own`, float32 without it.
    """
    log_q = logits.to(torch.float32 if own is None else own.dtype).log_softmax(-1)
    cross_entropy = -log_q.gather(1, labels.long()[:, None])[:, 0].double()
    if own is None:
        return PredictionTerms(cross_entropy)
    # Where p is 0 in float32 the term is 0, whatever q is.
    terms = own.exp() * (own - log_q).masked_fill(own.isneginf(), 0.0)
    same = log_q.argmax(-1) == own.argmax(-1)
    return PredictionTerms(cross_entropy, terms.sum(1, dtype=torch.float64), same.double())


@dataclass
class Predictions:
    """Next-token predictions of one spliced model beside the model's own."""

    tokens: int = 0
    _compared: int = 0
    _cross_entropy: float = 0.0
    _kl: float = 0.0
    _same_top: int = 0

    def add(self, logits: Tensor, labels: Tensor, own: Tensor | None = None) -> None:
        """Count N predictions: logits [N, V], labels [N], the model's own log-probabilities [N, V].

        Without the last only the cross-entropy is counted.
        """
        terms = prediction_terms(logits, labels, own)
        self.tokens += len(labels)
        self._cross_entropy += float(terms.cross_entropy.sum())
        if terms.kl is None or terms.same_top is None:
            return
        self._compared += len(labels)
        self._kl += float(terms.kl.sum())
        self._same_top += int(terms.same_top.sum())

    @property
    def cross_entropy(self) -> float | None:
        """Mean over the scored tokens, in nats."""
        return finite(self._cross_entropy / self.tokens) if self.tokens else None

    @property
    def kl(self) -> float | None:
        """Mean KL(model ‖ spliced) in nats; rounding below 0 is cut."""
        return finite(max(self._kl, 0.0) / self._compared) if self._compared else None

    @property
    def top1_match(self) -> float | None:
        """Share of tokens for which both predict the same."""
        return self._same_top / self._compared if self._compared else None


def recovered(ce: float | None, ablated: float | None, own: float | None) -> float | None:
    """Share of an ablation's harm that is undone; None where the ablation does no harm."""
    if ce is None or ablated is None or own is None or ablated <= own:
        return None
    return (ablated - ce) / (ablated - own)


@dataclass
class AnswerCounts:
    """Generated answers against the reference, for all samples and by question type."""

    asked: dict[str, int] = field(default_factory=dict)
    right: dict[str, dict[str, int]] = field(default_factory=dict)
    lost: dict[str, dict[str, int]] = field(default_factory=dict)

    def add(self, kind: str | None, own: bool, spliced: dict[str, bool]) -> None:
        """Count a sample: whether the model, and each arm of the spliced one, is right."""
        for group in ("all", *([kind] if kind else [])):
            self.asked[group] = self.asked.get(group, 0) + 1
            for arm, correct in {"model": own, **spliced}.items():
                _count(self.right, arm, group, correct)
                _count(self.lost, arm, group, own and not correct)

    def exact_match(self, arm: str) -> dict[str, float] | None:
        """Share of right answers by group; None if nothing was asked."""
        return _shares(self.right.get(arm, {}), self.asked)

    def n_correct(self) -> dict[str, int] | None:
        """How many answers the model itself gets right, by group."""
        return dict(self.right["model"]) if self.asked else None

    def changed_of_correct(self, arm: str) -> dict[str, float | None] | None:
        """Share of the model's right answers that are wrong in `arm`, by group."""
        return _shares(self.lost.get(arm, {}), self.n_correct() or {})


def _count(table: dict[str, dict[str, int]], arm: str, group: str, true: bool) -> None:
    row = table.setdefault(arm, {})
    row[group] = row.get(group, 0) + int(true)


def _shares(counts: dict[str, int], totals: dict[str, int]) -> Any:
    if not totals:
        return None
    return {group: counts[group] / n if n else None for group, n in totals.items()}
