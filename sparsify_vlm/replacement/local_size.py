"""How much memory a prompt's local replacement model takes.

Before the run its size follows from the model and the number of positions S: attention patterns
(L · heads · S²), three tensors [S, d] for each norm and six for each layer's graph, what MLPs write
in four parts, logits. Features come on top: how many are active is known only after the run, when
everything that is held can be counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsify_vlm.replacement.frozen import is_norm

if TYPE_CHECKING:
    from sparsify_vlm.replacement.local import LocalModel
    from sparsify_vlm.replacement.model import VLMReplacementModel

PER_LAYER = 6
"""Tensors [S, d] of a layer's graph: its start and end, values and heads, two kept by autograd."""
WRITES = 4
"""y, ŷ and their difference with and without zeroed positions."""


def expected_bytes(model: VLMReplacementModel, n_positions: int) -> int:
    """What will be held for a prompt of `n_positions`, without features."""
    stack, S = model.loaded.stack, n_positions
    config = model.loaded.model.config.get_text_config(decoder=True)
    norms = sum(map(is_norm, model.loaded.model.get_decoder().modules()))
    each = torch.finfo(model.loaded.dtype).bits // 8
    precise = max(each, model.clt.dtype.itemsize)
    patterns = stack.n_layers * config.num_attention_heads * S * S * each
    streams = (3 * norms + PER_LAYER * stack.n_layers) * S * stack.d_model * each
    writes = WRITES * stack.n_layers * S * stack.d_model * precise
    return patterns + streams + writes + S * config.vocab_size * each


def held_bytes(local: LocalModel) -> int:
    """What a prompt's model holds, features included."""
    found = {part.untyped_storage().data_ptr(): part.untyped_storage() for part in _parts(local)}
    by_autograd = 2 * local.n_layers * local.embeddings.numel() * local.embeddings.itemsize
    return sum(storage.nbytes() for storage in found.values()) + by_autograd


def _parts(local: LocalModel) -> Iterator[Tensor]:
    yield from (local.embeddings, local.y, local.y_hat, local._rest, local.errors)
    yield from (local.unembedded, local.logits, *local.injected.values(), *local.reads.values())
    for segment in local.segments:
        call = segment.attention
        yield from (segment.start, segment.mid, call.pattern, call.value, call.made)
    for calls in local.record.norms.values():
        for norm in calls:
            yield from (norm.given, norm.made, norm.slope)
    for latents in local.latents.values():
        yield from (latents.values, latents.indices)
    for sources in local.writes.values():
        yield from (written.u for written in sources)
