"""Where latents fire on the images of a dataset, patch by patch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from sparsify_vlm.features.concepts import Firings
from sparsify_vlm.models import Role, record_tokens

if TYPE_CHECKING:
    from sparsify_vlm.coders import Clt
    from sparsify_vlm.data import EncodedBatch
    from sparsify_vlm.models import LoadedModel

_Piece = tuple["NDArray[np.int64]", "NDArray[np.int64]", "NDArray[np.float32]"]
"""Patch, latent and value of one batch's firings."""


@torch.no_grad()
def image_firings(
    loaded: LoadedModel, clt: Clt, batches: Iterable[EncodedBatch], grid: tuple[int, int]
) -> dict[int, Firings]:
    """Active latents of every source layer on the image tokens of `batches`.

    Args:
        grid: (rows, columns) of patches, the same for every image; one image per sample.

    Returns:
        Source layer -> firings; patch number = (sample · rows + row) · columns + column, samples
        counted through all batches.
    """
    layers = loaded.stack.match(clt.cfg.hookpoints)
    parts: dict[int, list[_Piece]] = {}
    first_sample = 0
    for batch in batches:
        table = record_tokens(loaded, batch.inputs, clt.cfg.input_site, layers)  # type: ignore[arg-type]
        image = table.role == Role.IMAGE
        row, column = table.patch[image].long().unbind(1)
        sample = table.sample[image].long() + first_sample
        patch = ((sample * grid[0] + row) * grid[1] + column).cpu().numpy()
        for s in clt.cfg.source_layers():
            latents = clt.encode_layer(s, table.x[s][image].to(clt.device))
            values, indices = latents.values.cpu().numpy(), latents.indices.cpu().numpy()
            active = values > 0
            where = np.broadcast_to(patch[:, None], values.shape)[active]
            parts.setdefault(s, []).append((where, indices[active], values[active]))
        first_sample += len(batch)
    return {s: _joined(pieces, clt.cfg.num_latents) for s, pieces in parts.items()}


def _joined(pieces: list[_Piece], num_latents: int) -> Firings:
    patch, latent, value = (np.concatenate(column) for column in zip(*pieces, strict=True))
    return Firings(patch, latent, value, num_latents)
