"""What is explained: logits, differences of logits, directions in the stream, features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify_vlm.errors import UserError
from sparsify_vlm.graphs.rows import Reads
from sparsify_vlm.replacement.local import LocalModel


@dataclass(frozen=True)
class Difference:
    """The logit of one token minus that of another, at the last position. Tokens are ids or text
    that is one token."""

    plus: int | str
    minus: int | str


@dataclass(frozen=True)
class Feature:
    """The pre-activation of a latent; layers are the decoder's."""

    layer: int
    position: int
    index: int


Target = int | str | Difference | Feature | Tensor
"""A token (id, or text that is one token), a difference, a feature, or a direction [d_model] in the
residual stream after the final norm at the last position."""


@dataclass
class Targets:
    """Targets as read, with what the graph says about them.

    token_ids [n]: -1 where a target is no token; weights [n]: probability of a token, 1 of others.
    """

    reads: Reads
    token_ids: Tensor
    weights: Tensor
    labels: list[str]


def resolve_targets(
    local: LocalModel,
    targets: Sequence[Target] | Tensor | None,
    max_n_logits: int,
    desired_logit_prob: float,
) -> Targets:
    """The given targets, or the likeliest next tokens that together reach the probability.

    Raises `UserError` for text that is not one token, ids and features that there are not, and
    vectors of another width or with numbers that are not finite.
    """
    probabilities = local.logits[-1].float().softmax(0)
    if targets is None:
        top = probabilities.topk(min(max_n_logits, len(probabilities)))
        reached = top.values.cumsum(0)
        wanted = torch.tensor(desired_logit_prob, device=reached.device)
        count = min(int(torch.searchsorted(reached, wanted)) + 1, len(reached))
        targets = top.indices[:count].tolist()
    elif isinstance(targets, str):
        raise UserError(f"targets are given as a list: ['{targets}']")
    elif isinstance(targets, Tensor):
        targets = list(targets) if targets.is_floating_point() else targets.tolist()
    if not targets:
        raise UserError("no target to explain: give at least one token, direction or feature")
    named = any(isinstance(target, int | str) for target in targets)
    mean = mean_row(unembedding(local)) if named else torch.zeros(0)
    made = [_Resolved.of(local, target, probabilities, mean) for target in targets]
    reads = Reads(
        torch.tensor([one.layer for one in made], device=local.errors.device),
        torch.tensor([one.position for one in made], device=local.errors.device),
        torch.stack([one.vector.to(local.errors) for one in made]),
    )
    return Targets(
        reads,
        torch.tensor([one.token_id for one in made]),
        torch.tensor([one.weight for one in made], dtype=torch.float32),
        [one.label for one in made],
    )


@dataclass
class _Resolved:
    vector: Tensor
    layer: int
    position: int
    label: str
    token_id: int = -1
    weight: float = 1.0

    @classmethod
    def of(
        cls, local: LocalModel, target: Target, probabilities: Tensor, mean: Tensor
    ) -> _Resolved:
        last = (local.n_layers, local.n_positions - 1)
        if isinstance(target, Feature):
            return _feature(local, target)
        if isinstance(target, Tensor) and target.ndim == 1:
            if len(target) != local.stack.d_model:
                raise UserError(
                    f"a target direction has {len(target)} numbers, the model's stream has "
                    f"{local.stack.d_model}"
                )
            if not bool(target.isfinite().all()):
                raise UserError("a target direction has numbers that are not finite")
            return cls(target.detach(), *last, "direction")
        W = unembedding(local)
        if isinstance(target, Difference):
            a, b = (token_id(local, t) for t in (target.plus, target.minus))
            vector = W[a].float() - W[b].float()
            return cls(vector, *last, f"{text(local, a)} − {text(local, b)}")
        id = token_id(local, target)  # type: ignore[arg-type]
        vector = W[id].float() - mean
        return cls(vector, *last, text(local, id), id, float(probabilities[id]))


def _feature(local: LocalModel, target: Feature) -> _Resolved:
    if target.layer not in local.latents:
        raise UserError(
            f"target feature {target.layer}/{target.index}: layer {target.layer} has no coder"
        )
    if not 0 <= target.index < local.clt.cfg.num_latents:
        raise UserError(
            f"target feature {target.layer}/{target.index}: the coder has "
            f"{local.clt.cfg.num_latents} latents per layer"
        )
    if not -local.n_positions <= target.position < local.n_positions:
        raise UserError(
            f"target feature at position {target.position}: the prompt has {local.n_positions}"
        )
    position = target.position % local.n_positions
    vector = local.encoder_rows(target.layer, torch.tensor([target.index], device=local.clt.device))
    label = f"feature {target.layer}/{target.index} at {position}"
    return _Resolved(vector[0], target.layer, position, label)


def unembedding(local: LocalModel) -> Tensor:
    """W_U [V, d]."""
    weight: Tensor = local.loaded.model.get_output_embeddings().weight.detach()
    return weight


def mean_row(W: Tensor) -> Tensor:
    """The mean of W's rows [d], float32, a few thousand rows at a time."""
    total = sum(part.double().sum(0) for part in W.split(8192))
    return (total / len(W)).float()


def token_id(local: LocalModel, token: int | str) -> int:
    """The id of a target token. Raises `UserError` where text is not one token, or none at all."""
    size = len(unembedding(local))
    if isinstance(token, str):
        tokenizer = local.loaded.tokenizer
        ids = tokenizer.encode(token, add_special_tokens=False)
        if len(ids) != 1:
            pieces = ", ".join(repr(text(local, i)) for i in ids)
            raise UserError(
                f"target token '{token}' is {len(ids)} tokens of this model ({pieces}): "
                "give one of them, or an id"
            )
        if ids == [tokenizer.unk_token_id] and token != tokenizer.unk_token:
            raise UserError(f"target token '{token}' is not in this model's vocabulary")
        token = ids[0]
    if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < size:
        raise UserError(f"target token {token}: this model has the ids 0 to {size - 1}")
    return token


def text(local: LocalModel, id: int) -> str:
    """A token as text."""
    made: str = local.loaded.tokenizer.decode([id])
    return made
