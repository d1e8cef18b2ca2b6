"""Setting features, steering the stream, exchanging image patches, and seeing what the model does.

A feature's write changes by (u(value) − u(a)) W to every layer it writes to, a being what it was.

    constrained        patterns, norm scales and all else that MLPs write stay as they were on this
                       prompt (skip connections of the coder go on): the direct effects, which a
                       graph's edges predict. a is the prompt's.
    freeze_attention   attention patterns stay; norms and the model's own MLPs run on the stream as
                       it has become. a is the coder's on that stream.
    free               nothing is frozen.

Steering vectors (`steering.py`) are added behind a layer, image tokens (`patches.py`) exchanged
before the first, in every mode; in `constrained` all goes on through attention's values alone.
In no mode do other features' changes propagate through the coder: the model's own MLPs carry them,
or in `constrained` nothing does. This is circuit-tracer's `feature_intervention`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from sparsify_vlm.coders import Latents
from sparsify_vlm.errors import UserError
from sparsify_vlm.replacement.local import LocalModel, reading_head, run
from sparsify_vlm.replacement.patches import PatchIntervention, patched
from sparsify_vlm.replacement.steering import SteeringVector, check_vectors

if TYPE_CHECKING:
    from sparsify_vlm.replacement.model import VLMReplacementModel

Mode = Literal["constrained", "freeze_attention", "free"]
MODES: tuple[str, ...] = get_args(Mode)


@dataclass(frozen=True)
class Intervention:
    """Set the activation of a latent to `value`. Layers are the decoder's, as in a graph."""

    layer: int
    position: int | None
    """Index into the prompt, from its end if negative; in `generate` new tokens count on. None:
    every position, new tokens included."""
    latent: int
    value: float


Change = Intervention | SteeringVector | PatchIntervention
"""What `intervene` and `intervening` take, in any mixture."""


def sorted_out(
    changes: Sequence[Change],
) -> tuple[list[Intervention], list[SteeringVector], list[PatchIntervention]]:
    """Changes by their kind. Raises `UserError` for anything else."""
    if isinstance(changes, Intervention | SteeringVector | PatchIntervention):
        raise UserError(f"give a list of changes: [{type(changes).__name__}(…)]")
    for one in changes:
        if not isinstance(one, Intervention | SteeringVector | PatchIntervention):
            raise UserError(
                f"{type(one).__name__} is no intervention: give Intervention, SteeringVector or "
                "PatchIntervention"
            )
    return (
        [one for one in changes if isinstance(one, Intervention)],
        [one for one in changes if isinstance(one, SteeringVector)],
        [one for one in changes if isinstance(one, PatchIntervention)],
    )


@dataclass
class Intervened:
    """What the model did. logits, unembedded [S, V]: after and before a soft-cap or factor (the
    latter is what a graph's targets are). reads: x [S, d] of each coder, by layer."""

    model: VLMReplacementModel
    mode: Mode
    logits: Tensor
    unembedded: Tensor
    reads: dict[int, Tensor]
    zeroed: Tensor

    @torch.no_grad()
    def pre_activations(self, layer: int) -> Tensor:
        """[S, F]."""
        s = self.model.layers.index(layer)
        return self.model.clt.pre_activations(s, self.reads[layer].to(self.model.clt.device))

    @torch.no_grad()
    def activations(self, layer: int) -> Tensor:
        """[S, F], 0 at zeroed positions."""
        s = self.model.layers.index(layer)
        clt = self.model.clt
        made = clt.encode_layer(s, self.reads[layer].to(clt.device)).dense(clt.cfg.num_latents)
        return made.masked_fill(self.zeroed.to(made.device)[:, None], 0)

    def features(self, which: Tensor) -> Tensor:
        """[n] for `which` [n, 3] of layer, position, index: pre-activations in `constrained`,
        activations in the other modes."""
        values = torch.empty(len(which))
        for layer in which[:, 0].unique().tolist():
            here = which[:, 0] == layer
            constrained = self.mode == "constrained"
            table = self.pre_activations(layer) if constrained else self.activations(layer)
            values[here] = table.cpu().float()[which[here, 1], which[here, 2]]
        return values


def intervene(
    model: VLMReplacementModel,
    inputs: Mapping[str, Any] | LocalModel,
    changes: Sequence[Change],
    mode: Mode = "constrained",
) -> Intervened:
    """Run one prompt with changes; see `VLMReplacementModel.intervene`."""
    if mode not in MODES:
        raise UserError(f"intervention mode '{mode}' is none of {', '.join(MODES)}")
    local = inputs if isinstance(inputs, LocalModel) else LocalModel(model, inputs)
    features, vectors, patches = sorted_out(changes)
    check(model, features, local.n_positions)
    check_vectors(model, vectors, local.n_positions)
    if mode == "constrained":
        with patched(model.loaded, patches):
            out = local.forward(_changes(local, features, vectors))
        reads = {layer: out.reads[layer] for layer in local.latents}
        return Intervened(model, mode, out.logits, out.unembedded, reads, local.zeroed)
    head: list[Tensor] = []
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if mode == "freeze_attention":
            stack.enter_context(local.freezer.replaying(local.record, scales=False))
        steering = stack.enter_context(steered(model, changes, local.zeroed))
        stack.callback(reading_head(model.loaded.model, head))
        logits = run(model.loaded, local.inputs).logits[0]
    reads = {layer: x[0] for layer, x in steering.reads.items()}
    return Intervened(model, mode, logits, head[1][0], reads, local.zeroed)


def check(
    model: VLMReplacementModel, interventions: Sequence[Intervention], n_positions: int | None
) -> None:
    """Raise `UserError` for a layer, position or latent there is not; positions are not checked
    where `n_positions` is None."""
    for one in interventions:
        name = f"intervention on layer {one.layer}, position {one.position}, latent {one.latent}"
        coded = [model.layers[s] for s in model.clt.cfg.source_layers()]
        if one.layer not in coded:
            raise UserError(f"{name}: coders are at the layers {coded[0]} to {coded[-1]}")
        if not 0 <= one.latent < model.clt.cfg.num_latents:
            raise UserError(f"{name}: a coder has {model.clt.cfg.num_latents} latents")
        if one.position is None or n_positions is None:
            continue
        if not -n_positions <= one.position < n_positions:
            raise UserError(f"{name}: the prompt has {n_positions} positions")


def _changes(
    local: LocalModel, interventions: Sequence[Intervention], vectors: Sequence[SteeringVector]
) -> dict[int, Tensor]:
    """What is added to each layer's write [S, d], from the prompt's own activations."""
    S = local.n_positions
    changes: dict[int, Tensor] = defaultdict(lambda: torch.zeros_like(local.errors[0]))
    for one in interventions:
        places = slice(None) if one.position is None else slice(p := one.position % S, p + 1)
        latents = local.latents[one.layer]
        a = activation(latents, one.latent)[places]
        for target, added in writes(local.model, one, a).items():
            (written,) = [w for w in local.writes[target] if w.source == one.layer]
            u = activation(Latents(written.u, latents.indices), one.latent)[places]
            dropped = (a > 0) & (u == 0)  # by `topk_coalesced`, whose choice stays
            changes[target][places] += added.masked_fill(dropped[:, None], 0)
    for vector in vectors:
        places = slice(None) if vector.position is None else slice(p := vector.position % S, p + 1)
        changes[vector.layer][places] += (vector.strength * vector.vector).to(local.errors)
    return changes


def activation(latents: Latents, latent: int) -> Tensor:
    """The value [S] of one latent."""
    return (latents.values * (latents.indices == latent)).sum(1)


@torch.no_grad()
def writes(model: VLMReplacementModel, one: Intervention, a: Tensor) -> dict[int, Tensor]:
    """By layer written to: how the write changes [n, d] where the activation was `a` [n]."""
    clt, s = model.clt, model.layers.index(one.layer)
    index = torch.full((len(a), 1), one.latent, device=clt.device)
    was = Latents(a[:, None].to(clt.device, clt.dtype), index)
    now = Latents(torch.full_like(was.values, one.value), index)
    found = {}
    for k, t in enumerate(clt.cfg.targets(s)):
        row = torch.stack([table.detach()[one.latent] for table in clt.tables(s, k)]).sum(0)
        row = row * (clt.write_factor(s, t) * clt.out_scale(t))
        change = clt.written_values(s, k, now) - clt.written_values(s, k, was)
        found[model.layers[t]] = change * row
    return found


@contextmanager
def steered(
    model: VLMReplacementModel,
    changes: Sequence[Change],
    zeroed: Tensor | None = None,
) -> Iterator[Steering]:
    """Context in which the model's own MLPs write what they do, plus the changes.

    Serves whole prompts and `generate`; `zeroed` bool [S]: positions at which nothing is active.
    """
    features, vectors, patches = sorted_out(changes)
    check(model, features, None)
    check_vectors(model, vectors, None)
    steering = Steering(model, features, vectors, zeroed)
    stack, coded = model.loaded.stack, [model.layers[s] for s in model.clt.cfg.source_layers()]
    handle = model.loaded.model.register_forward_pre_hook(steering.begin, with_kwargs=True)
    try:
        with (
            patched(model.loaded, patches),
            stack.replacing(steering.read, model.input_site, coded),
            stack.replacing(steering.write, "mlp_out"),
        ):
            yield steering
    finally:
        handle.remove()


class Steering:
    """Adds the changes of a forward pass, layer after layer. reads: x [B, S, d] by layer."""

    def __init__(
        self,
        model: VLMReplacementModel,
        interventions: Sequence[Intervention],
        vectors: Sequence[SteeringVector],
        zeroed: Tensor | None,
    ) -> None:
        self.model, self.zeroed, self.vectors = model, zeroed, vectors
        self.by_layer: dict[int, list[Intervention]] = defaultdict(list)
        for one in interventions:
            self.by_layer[one.layer].append(one)
        self.reads: dict[int, Tensor] = {}
        self._added: dict[int, Tensor] = {}
        self._past = 0
        self._prompt: int | None = None

    def begin(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward call begins: with a key-value cache it sees the new positions only."""
        cache = kwargs.get("past_key_values")
        self._past = 0 if cache is None else int(cache.get_seq_length())
        self._added.clear()

    def read(self, layer: int, x: Tensor) -> None:
        """x [B, S, d] of a coder; the layer keeps its own MLP."""
        self.reads[layer] = x.detach()
        if self._past == 0:
            self._prompt = x.shape[1]
        if not self.by_layer[layer]:
            return
        B, S, d = x.shape
        clt = self.model.clt
        rows = x.flatten(0, 1).to(clt.device)
        latents = clt.encode_layer(self.model.layers.index(layer), rows)
        for one in self.by_layer[layer]:
            places = self._places(one.position, S)
            a = activation(latents, one.latent).view(B, S)
            if self.zeroed is not None:
                a = a.masked_fill(self.zeroed.to(a.device), 0)
            for target, change in writes(self.model, one, a[:, places].flatten()).items():
                if target not in self._added:
                    self._added[target] = torch.zeros(B, S, d, device=x.device, dtype=x.dtype)
                self._added[target][:, places] += change.view(B, -1, d).to(x)

    def write(self, layer: int, y: Tensor) -> Tensor | None:
        """y with what features and vectors add."""
        if self._past == 0:
            self._prompt = y.shape[1]
        added = self._added.pop(layer, None)
        made = None if added is None else y + added.to(y.device)
        for one in self.vectors:
            if one.layer == layer:
                made = y.clone() if made is None else made
                places = self._places(one.position, y.shape[1])
                made[:, places] += (one.strength * one.vector).to(made)
        return made

    def _places(self, position: int | None, S: int) -> slice:
        """Where a position stands in this call, possibly nowhere."""
        if position is None:
            return slice(None)
        if position < 0:
            position += self._prompt or 0
        here = position - self._past
        return slice(here, here + 1) if 0 <= here < S else slice(0, 0)
