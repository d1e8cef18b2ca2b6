"""The activations of a batch as a table of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsify_vlm.models.load import LoadedModel
from sparsify_vlm.models.roles import Role
from sparsify_vlm.models.stack import InputSite


@dataclass
class TokenTable:
    """Every non-pad token of a batch, samples one after the other; L layers, T tokens.

    Tensors are on the model's device.
    """

    x: Tensor
    """What the coders read, [L, T, d], in the model's dtype unless another was asked for."""
    y: Tensor
    """What the MLP blocks write, [L, T, d], in the same dtype."""
    input_ids: Tensor
    """[T] int32."""
    position: Tensor
    """Index among the sample's non-pad tokens, [T] int32."""
    sample: Tensor
    """Row in the batch, [T] int32."""
    role: Tensor
    """[T] uint8, see `Role`."""
    patch: Tensor
    """(row, column) of image tokens in their image, [T, 2] int16; -1 elsewhere."""
    logits: Tensor | None = None
    """[B, S, V] in the batch's own padding, if asked for."""

    def __len__(self) -> int:
        return len(self.input_ids)

    def counted(
        self, filter_bos: bool, remove_first_token: bool, bos_token_id: int | None
    ) -> Tensor:
        """Which tokens count in losses and metrics, bool [T].

        `filter_bos` leaves out tokens that are `bos_token_id`, `remove_first_token` the first token
        of every sample.
        """
        counts = torch.ones_like(self.role, dtype=torch.bool)
        if filter_bos and bos_token_id is not None:
            counts &= self.input_ids != bos_token_id
        if remove_first_token:
            counts &= self.position != 0
        return counts


def record_tokens(
    loaded: LoadedModel,
    inputs: Mapping[str, Any],
    input_site: InputSite = "mlp_in",
    layers: Iterable[int] | None = None,
    logits: bool = False,
    dtype: torch.dtype | None = None,
) -> TokenTable:
    """Run the model on a processor's batch and tabulate x and y of all `layers` (None: every one).

    x and y are in `dtype`, by default the model's. Raises `UserError` when image tokens are missing
    from the batch.
    """
    inputs = loaded.to_device(inputs)
    stack = loaded.stack
    chosen = list(range(stack.n_layers)) if layers is None else sorted(set(layers))
    slot = {layer: i for i, layer in enumerate(chosen)}
    roles = stack.roles(inputs)
    kept = (roles != Role.PAD).flatten().nonzero()[:, 0]
    shape = (len(chosen), len(kept), stack.d_model)
    x = torch.empty(shape, dtype=dtype or loaded.dtype, device=loaded.device)
    y = torch.empty_like(x)

    def write(layer: int, x_layer: Tensor, y_layer: Tensor) -> None:
        for table, values in ((x, x_layer), (y, y_layer)):
            rows = values.flatten(0, 1).to(loaded.device, table.dtype)
            torch.index_select(rows, 0, kept, out=table[slot[layer]])

    with stack.reading(write, input_site, chosen):
        out = loaded.forward(inputs, logits=logits)
    present = roles != Role.PAD
    position = present.cumsum(1, dtype=torch.int32) - 1
    sample = torch.arange(len(roles), dtype=torch.int32, device=roles.device)
    return TokenTable(
        x=x,
        y=y,
        input_ids=inputs["input_ids"].flatten()[kept].int(),
        position=position.flatten()[kept].int(),
        sample=sample[:, None].expand_as(roles).flatten()[kept],
        role=roles.flatten()[kept],
        patch=stack.patches(inputs).flatten(0, 1)[kept],
        logits=out.logits if logits else None,
    )
