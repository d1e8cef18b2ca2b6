"""Losses on the predictions of the spliced model: cross-entropy, and KL from the model's own.

All MLPs are replaced at once and the features are recomputed on the changed stream, so gradients
go through the frozen model and through every coder above. With p the model's own distribution and
q the spliced one's, over the n positions whose next token is text:

    ce = −(1/n) Σ log q(next token)        kl = (1/n) Σ Σ_v p_v (log p_v − log q_v)

Image tokens are never predicted, so what stands before one is not scored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from sparsify_vlm.coders import Clt
from sparsify_vlm.models import LoadedModel, Role
from sparsify_vlm.replacement import ExcludedTokens, VLMReplacementModel
from sparsify_vlm.training.config import TrainConfig
from sparsify_vlm.training.distributed import World


@dataclass
class SplicedLoss:
    """`--loss_fn ce`, `kl` or `kl-fvu` for the coders `clt` in the model `loaded`."""

    loaded: LoadedModel
    clt: Clt
    cfg: TrainConfig
    world: World

    def __post_init__(self) -> None:
        trained = {
            "filter_bos": self.cfg.filter_bos,
            "remove_first_token": self.cfg.remove_first_token,
            "exclude_tokens": self.cfg.exclude_tokens,
        }
        excluded = ExcludedTokens.as_trained(trained, self.loaded.tokenizer)
        self._spliced = VLMReplacementModel(self.loaded, self.clt, excluded)

    def backward(self, batches: Sequence[Mapping[str, Any]], weight: float) -> Tensor:
        """Add the gradient of `weight` times this process's part of the loss to the parameters'
        `.grad`; that part, a float64 scalar. The model is run on one of `batches` after the other;
        one without samples is empty.

        Every process must call this together.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.clt.device)
        number = total.clone()
        for inputs in filter(None, batches):
            number += self._scored(self.loaded.to_device(inputs)).sum()
        self.world.sum_([number])
        for inputs in filter(None, batches):
            total += self._backward(self.loaded.to_device(inputs), number, weight)
        return total

    def _backward(self, inputs: Mapping[str, Any], number: Tensor, weight: float) -> Tensor:
        """Of one batch's share of the loss over `number` positions."""
        scored = self._scored(inputs)
        if not bool(scored.any()):
            return torch.zeros_like(number)
        own = None
        if self.cfg.loss_fn != "ce":
            own = _rows(self.loaded.forward(inputs, logits=True).logits, scored).log_softmax(-1)
        with torch.enable_grad(), self._spliced.replaced(training=True):
            logits = _rows(self.loaded.forward(inputs, logits=True, gradients=True).logits, scored)
            if own is None:
                labels = inputs["input_ids"][:, 1:][scored].to(logits.device)
                total = functional.cross_entropy(logits, labels, reduction="sum")
            else:
                log_q = logits.log_softmax(-1)
                total = functional.kl_div(log_q, own, reduction="sum", log_target=True)
            loss = self.cfg.kl_coeff * total / number.to(total)
            (weight * loss).backward()
        return loss.detach().double().to(number.device)

    def _scored(self, inputs: Mapping[str, Any]) -> Tensor:
        """bool [B, S-1]: positions that are no padding and whose next token is text."""
        roles = self.loaded.stack.roles(inputs)
        return (roles[:, 1:] == Role.TEXT) & (roles[:, :-1] != Role.PAD)


def _rows(logits: Tensor, scored: Tensor) -> Tensor:
    """float32 [n, V]: the logits of the scored positions."""
    return logits[:, :-1][scored].float()
