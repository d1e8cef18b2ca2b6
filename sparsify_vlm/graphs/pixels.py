"""From the image tokens' nodes on to the pixels: gradient × input through the frozen vision tower.

The local replacement model is linear in what the decoder reads at its tokens, e_p. So a target t
has one vector g_t[p] there, over all paths through the features that are nodes,

    g_t = direct gradient of t + Σ_s E[t, s] / a_s · direct gradient of s          s: feature nodes

with E as in `effects.py`, and ⟨g_t[p], e_p⟩ is the total effect of token p. Vision tower and
projector make the e_p of image tokens out of the pixels x; with g_t held fixed,

    E[t, pixel i] = x_i ∂/∂x_i Σ_p ⟨g_t[p], e_p(x)⟩

summed over the pixels of a patch. x is what the processor made: the baseline is 0 after its
normalisation (its mean colour). Two gradients through tower and projector:

    frozen    attention patterns and norm scales are constants, as in the decoder; activation
              functions are followed by their gradient
    plain     nothing is a constant

The tower has biases and activation functions: what pixels add up to is not what tokens add up to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsify_vlm.errors import UserError
from sparsify_vlm.graphs.config import PATCH_GRADIENTS, PatchGradient
from sparsify_vlm.graphs.effects import total_effects
from sparsify_vlm.graphs.graph import AttributionGraph, PixelEffects
from sparsify_vlm.graphs.targets import Target, resolve_targets
from sparsify_vlm.models.pixels import PixelGrid, pixel_grid
from sparsify_vlm.replacement.frozen import Freezer
from sparsify_vlm.replacement.local import LocalModel, run
from sparsify_vlm.replacement.patches import EMBEDDINGS, entering

if TYPE_CHECKING:
    from sparsify_vlm.graphs.rows import Reads

Gradients = dict[int, Tensor]
"""[S, T, d] by place: `EMBEDDINGS`, or the layer behind which more of the image is added."""


def pixel_effects(
    local: LocalModel,
    graph: AttributionGraph,
    targets: Sequence[Target] | None = None,
    gradient: PatchGradient = "frozen",
) -> PixelEffects:
    """What each patch of the pictures adds to each of the graph's targets.

        local = LocalModel(model, inputs)
        graph = attribute(local.model, local)
        graph.pixels = pixel_effects(local, graph)

    Args:
        local: the prompt's, from which `graph` was made.
        targets: as `attribute` was given them; None: the graph's tokens.
        gradient: through tower and projector, `frozen` or `plain`.

    Raises `UserError` where there is no picture, where its pixels' places are not known, where the
    tower cannot be frozen, and where `targets` are not the graph's.
    """
    if gradient not in PATCH_GRADIENTS:
        raise UserError(f"--patch_gradient {gradient} is none of {', '.join(PATCH_GRADIENTS)}")
    grid = patches_of(local)
    reads = resolve_targets(local, _given(graph, targets), 0, 1.0).reads
    n = graph.n_features
    if len(reads) != len(graph.target_labels):
        raise UserError(f"{len(reads)} targets for a graph with {len(graph.target_labels)}")
    activation = graph.activation_values[graph.selected_features].double()
    shares = total_effects(graph)[:, :n] / activation
    both = torch.cat([shares, torch.zeros_like(shares)])  # over all paths, and over edges alone
    reads = reads.at(torch.arange(len(reads), device=reads.layer.device).repeat(2))
    given = token_gradients(local, reads, graph.features, both)
    total, direct = _by_patch(local, grid, given, gradient).chunk(2)
    return PixelEffects(
        effects=total[:, 1:],
        outside=total[:, 0],
        direct=direct[:, 1:],
        grids=torch.tensor(grid.sizes, dtype=torch.int32),
        gradient=gradient,
    )


def patches_of(local: LocalModel) -> PixelGrid:
    """Where the prompt's pixels lie. Raises `UserError`."""
    if "inputs_embeds" in local.inputs:
        raise UserError("--patches needs the pictures themselves, not inputs_embeds")
    try:
        return pixel_grid(local.stack.layout, local.inputs)
    except UserError as error:
        raise UserError(f"--patches: {error}") from error


def _given(graph: AttributionGraph, targets: Sequence[Target] | None) -> Sequence[Target]:
    if targets is not None:
        return targets
    ids: list[Target] = graph.logit_token_ids.tolist()
    if any(id < 0 for id in graph.logit_token_ids.tolist()):
        raise UserError("the graph has targets that are no tokens: give `targets` again")
    return ids


# ---- down the decoder


def token_gradients(local: LocalModel, reads: Reads, features: Tensor, shares: Tensor) -> Gradients:
    """g [S, T, d] at what the decoder reads, for targets read as `reads` and features [m, 3] that
    join each of them with the shares [T, m]."""
    T, S, L, d = len(reads), local.n_positions, local.n_layers, local.stack.d_model
    kind = torch.promote_types(local.errors.dtype, torch.float32)
    G = torch.zeros(S, T, d, device=local.errors.device, dtype=kind)
    top = (reads.layer == L).nonzero()[:, 0]
    if len(top):
        positions = reads.position[top]
        G[positions, top] = local.final_gradient(positions, reads.vectors[top]).to(G)
    features, shares = features.to(G.device), shares.to(G)
    kept: Gradients = {}
    found: Gradients = {}
    for layer in reversed(range(L)):
        if layer in local.injected:
            found[layer] = G
        kept[layer] = G
        read = _at_coder(local, layer, kept, reads, features, shares)
        if bool(read.any()):
            G = G + local.read_gradients(layer, read).to(G)
        if local.clt.W_skip is None:
            kept.clear()
        G = local.cross(layer, G).to(G)
    return found | {EMBEDDINGS: G}


def _at_coder(
    local: LocalModel,
    layer: int,
    kept: Gradients,
    reads: Reads,
    features: Tensor,
    shares: Tensor,
) -> Tensor:
    """Gradients [S, T, d] at x of `layer`: of features and targets read there, and of skips."""
    read = torch.zeros_like(kept[layer])
    here = (features[:, 0] == layer).nonzero()[:, 0]
    if len(here):
        rows = local.encoder_rows(layer, features[here, 2]).to(read)
        for t in range(len(shares)):
            read[:, t].index_add_(0, features[here, 1], shares[t, here, None] * rows)
    for t in (reads.layer == layer).nonzero()[:, 0].tolist():
        read[reads.position[t], t] += reads.vectors[t].to(read)
    for target, M in local.skips(layer):
        if target in kept:
            read += kept[target] @ M.T.to(read)
    return read


# ---- through the tower


def _by_patch(
    local: LocalModel, grid: PixelGrid, given: Gradients, gradient: PatchGradient
) -> Tensor:
    """[T, 1 + patches] float32: what is in no patch first."""
    made = []
    with embedded(local, gradient) as (pixels, read):
        if not any(one.requires_grad for one in read.values()):
            raise UserError(
                f"--patches: {local.loaded.name} passes no gradient from its image tokens to its "
                "pixels"
            )
        for t in range(given[EMBEDDINGS].shape[1]):
            total = sum(
                (read[place][0] * G[:, t].to(read[place])).sum() for place, G in given.items()
            )
            (found,) = torch.autograd.grad(total, pixels, retain_graph=True)  # type: ignore[arg-type]
            inside, outside = grid.sums((found * pixels.detach()).double())
            made.append(torch.cat([outside[None], inside]).float().cpu())
    return torch.stack(made)


@contextmanager
def embedded(
    local: LocalModel, gradient: PatchGradient
) -> Iterator[tuple[Tensor, Mapping[int, Tensor]]]:
    """The pixels as a leaf, and what the decoder reads of them: by place, tensors [1, S, d] whose
    gradients lead to the pixels, through tower and projector alone."""
    loaded = local.loaded
    pixels = loaded.to_device({"": local.inputs["pixel_values"]})[""].detach().clone()
    pixels.requires_grad_()
    inputs = {**local.inputs, "pixel_values": pixels}
    decoder = {id(module) for module in loaded.model.get_decoder().modules()}
    others = [module for module in loaded.model.modules() if id(module) not in decoder]
    with torch.enable_grad():
        if gradient == "plain":
            yield pixels, _read(local, inputs)
            return
        with Freezer(loaded, others).recording() as record:
            try:
                read = _read(local, inputs)
            except UserError as error:
                raise UserError(f"{error}; --patch_gradient plain freezes nothing there") from error
        if not record.attention:
            raise UserError(
                f"the attention of {loaded.name}'s vision tower cannot be frozen: give "
                "--patch_gradient plain"
            )
        yield pixels, read


def _read(local: LocalModel, inputs: Mapping[str, Any]) -> dict[int, Tensor]:
    """What the layers read of the pixels. No gradient goes through a layer: behind one, only what
    was added there leads to the pixels."""
    last = max(local.injected, default=EMBEDDINGS)
    found: dict[int, Tensor] = {}

    def keep(place: int, h: Tensor, before: Tensor | None) -> Tensor:
        found[place] = h
        if place == last:
            raise _Reached
        return h.detach()

    try:
        with entering(local.loaded, keep):
            run(local.loaded, inputs)
    except _Reached:
        pass
    return found


class _Reached(Exception):
    """The last layer that pixels are added to has been reached."""
