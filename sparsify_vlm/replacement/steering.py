"""Steering vectors: what is added to the residual stream behind a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsify_vlm.errors import UserError

if TYPE_CHECKING:
    from sparsify_vlm.replacement.model import VLMReplacementModel


@dataclass(frozen=True)
class SteeringVector:
    """Add `strength` · `vector` to the stream that leaves a layer.

    steer = SteeringVector.from_feature(model, layer=5, latent=117, value=8.0)
    with model.intervening([steer]):
        model.loaded.model.generate(**inputs)
    """

    layer: int
    """Of the decoder; the vector is added behind its MLP."""
    vector: Tensor
    """[d]."""
    position: int | None = None
    """Index into the prompt, from its end if negative; in `generate` new tokens count on. None:
    every position, new tokens included."""
    strength: float = 1.0

    @classmethod
    def from_feature(
        cls,
        model: VLMReplacementModel,
        layer: int,
        latent: int,
        target_layer: int | None = None,
        *,
        value: float = 1.0,
        position: int | None = None,
    ) -> SteeringVector:
        """What a feature of activation `value` writes to `target_layer` (None: the first it writes
        to), whatever the feature itself does. Raises `UserError` for a feature there is not, and
        for a layer that it does not write to."""
        from sparsify_vlm.replacement.interventions import Intervention, check, writes

        feature = Intervention(layer, position, latent, value)
        check(model, [feature], None)
        rows = writes(model, feature, torch.zeros(1))
        target = min(rows) if target_layer is None else target_layer
        if target not in rows:
            raise UserError(
                f"feature {layer}/{latent} writes to the layers {min(rows)} to {max(rows)}, not to "
                f"{target}"
            )
        return cls(target, rows[target][0], position)


def check_vectors(
    model: VLMReplacementModel, vectors: Sequence[SteeringVector], n_positions: int | None
) -> None:
    """Raise `UserError` for a layer or position there is not, and for vectors of another width."""
    stack = model.loaded.stack
    for one in vectors:
        name = f"steering vector at layer {one.layer}"
        if not 0 <= one.layer < stack.n_layers:
            raise UserError(f"{name}: the model has the layers 0 to {stack.n_layers - 1}")
        if tuple(one.vector.shape) != (stack.d_model,):
            raise UserError(
                f"{name}: it has the shape {tuple(one.vector.shape)}, the stream is "
                f"{stack.d_model} wide"
            )
        if not bool(one.vector.isfinite().all()):
            raise UserError(f"{name}: it holds NaN or infinite values")
        if one.position is None or n_positions is None:
            continue
        if not -n_positions <= one.position < n_positions:
            raise UserError(f"{name}, position {one.position}: the prompt has {n_positions}")
