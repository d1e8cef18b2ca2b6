"""Predictions of the model with its MLPs replaced by an arm, summed per sample.

    all layers    every MLP at once, each arm on the stream as it has become
    one layer     a single MLP; the others are the model's own, so the coders read clean inputs up
                  to it, and it writes what the arm makes of those

Scored are the predictions that `evaluate` scores, excluded tokens keep the model's own MLPs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sparsify_vlm.analysis.arms import Arm, Parts
from sparsify_vlm.analysis.reconstruction import clean_parts
from sparsify_vlm.analysis.tokens import ModelTokens, TokenBatch
from sparsify_vlm.progress import Progress
from sparsify_vlm.replacement import VLMReplacementModel
from sparsify_vlm.replacement.evaluate import scored_tokens
from sparsify_vlm.replacement.measures import prediction_terms
from sparsify_vlm.replacement.model import CrossLayerSums

SUMS = ("tokens", "cross_entropy", "kl", "same_top")
"""What is summed over a sample's scored tokens."""


@dataclass(frozen=True)
class SplicedSums:
    """N samples, A arms, T layers; the last axis is `SUMS`, float64."""

    arms: list[str]
    model: np.ndarray
    """Of the model itself, [N, 4]."""
    all_layers: np.ndarray
    """[N, A, 4]."""
    one_layer_arms: list[str]
    layers: list[int]
    one_layer: np.ndarray
    """[M, A', T, 4], of the first M samples."""
    draws: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Of arms that are drawn at random: each draw's sums over all samples, [draws, 4]. In
    `all_layers` is their mean."""


@dataclass
class _Asked:
    """The predictions of a batch that are scored."""

    scored: Tensor
    labels: Tensor
    row: Tensor
    """Row in the batch of each, [n]."""
    own: Tensor
    """The model's log-probabilities, [n, V]."""
    samples: int

    def sums(self, logits: Tensor) -> Tensor:
        """[B, 4] of the logits [B, S, V]."""
        terms = prediction_terms(logits[:, :-1][self.scored], self.labels, self.own)
        assert terms.kl is not None
        assert terms.same_top is not None
        ones = torch.ones_like(terms.kl)
        values = torch.stack([ones, terms.cross_entropy, terms.kl, terms.same_top], 1)
        total = torch.zeros(self.samples, len(SUMS), dtype=torch.float64, device=values.device)
        return total.index_add_(0, self.row, values).cpu()


@torch.no_grad()
def spliced(
    model: VLMReplacementModel,
    arms: Sequence[Arm],
    one_layer_arms: Sequence[Arm],
    tokens: ModelTokens,
    one_layer_samples: int,
    quiet: bool = False,
) -> SplicedSums:
    """Splice every arm into `model` on the samples of `tokens`; the one-layer splices on the first
    `one_layer_samples` of them, in whole batches. Arms of one name are draws of one arm."""
    layers = list(model.clt.cfg.target_layers())
    own, every, single = [], [], []
    with Progress("Splicing", tokens.size, unit="samples", quiet=quiet) as progress:
        for batch in tokens.with_logits():
            asked = _asked(model, batch)
            own.append(asked.sums(_logits(batch)))
            every.append(
                torch.stack([asked.sums(_all_layers(model, arm, batch)) for arm in arms], 1)
            )
            if int(batch.rows[0]) < one_layer_samples and one_layer_arms:
                single.append(_one_layer(model, one_layer_arms, layers, batch, asked))
            progress.update(len(batch.rows))
    none = torch.zeros(0, len(one_layer_arms), len(layers), len(SUMS))
    whole = torch.cat(every)
    return SplicedSums(
        arms=list(dict.fromkeys(arm.name for arm in arms)),
        model=torch.cat(own).numpy(),
        all_layers=_mean_of_draws(arms, whole).numpy(),
        one_layer_arms=list(dict.fromkeys(arm.name for arm in one_layer_arms)),
        layers=layers,
        one_layer=_mean_of_draws(one_layer_arms, torch.cat([*single, none])).numpy(),
        draws={
            name: whole[:, at].sum(0).numpy() for name, at in _by_name(arms).items() if len(at) > 1
        },
    )


def _by_name(arms: Sequence[Arm]) -> dict[str, list[int]]:
    """Places of the arms of each name, in order."""
    names = dict.fromkeys(arm.name for arm in arms)
    return {name: [i for i, arm in enumerate(arms) if arm.name == name] for name in names}


def _mean_of_draws(arms: Sequence[Arm], sums: Tensor) -> Tensor:
    """sums [N, A, …] with arms of one name made one."""
    places = _by_name(arms).values()
    if not places:
        return sums
    return torch.stack([sums[:, at].mean(1) for at in places], 1)


def _logits(batch: TokenBatch) -> Tensor:
    assert batch.logits is not None
    return batch.logits


def _asked(model: VLMReplacementModel, batch: TokenBatch) -> _Asked:
    encoded, device = batch.encoded, model.loaded.device
    assert encoded is not None
    scored = scored_tokens(encoded, model.loaded.stack.roles(encoded.inputs))[:, 1:].to(device)
    labels = encoded.inputs["input_ids"].to(device)[:, 1:][scored]
    own = _logits(batch)[:, :-1][scored].float().log_softmax(-1)
    return _Asked(scored, labels, scored.nonzero()[:, 0], own, len(encoded))


def _all_layers(model: VLMReplacementModel, arm: Arm, batch: TokenBatch) -> Tensor:
    """Logits [B, S, V] with every MLP that the arm makes a ŷ for replaced."""
    encoded = batch.encoded
    assert encoded is not None
    written = model.clt.cfg.target_layers()
    if arm.clt is None:
        values = arm.constant
        assert values is not None
        with model.writing(lambda t, x: values[t].to(x).expand_as(x) if t in written else None):
            return _forward(model, batch)
    clt = arm.clt
    half = (batch.rows % 2).repeat_interleave(encoded.inputs["input_ids"].shape[1])
    sums = CrossLayerSums(clt, lambda t, latents, x: arm.decode(Parts(clt, latents, x, half), t))
    with model.writing(sums.write):
        return _forward(model, batch)


def _forward(model: VLMReplacementModel, batch: TokenBatch) -> Tensor:
    assert batch.encoded is not None
    logits: Tensor = model.loaded.forward(batch.encoded.inputs, logits=True).logits
    return logits


def _one_layer(
    model: VLMReplacementModel,
    arms: Sequence[Arm],
    layers: Sequence[int],
    batch: TokenBatch,
    asked: _Asked,
) -> Tensor:
    """Sums [B, A, T, 4]."""
    counted, parts = batch.counted, clean_parts(arms, batch)
    assert counted is not None
    by_layer = []
    for t in layers:
        found = []
        for arm in arms:
            y_hat = arm.decode(parts[id(arm.clt)], t)
            written = torch.zeros(*counted.shape, y_hat.shape[1], device=counted.device)
            written[counted] = y_hat.to(written)
            with model.writing(lambda layer, x, w=written, t=t: w if layer == t else None):  # type: ignore[misc]
                found.append(asked.sums(_forward(model, batch)))
        by_layer.append(torch.stack(found, 1))
    return torch.stack(by_layer, 2)
