"""The local replacement model of one prompt: linear in its features, exact in its logits.

1. The prompt runs once with attention patterns and norm scales frozen (`frozen.py`).
2. Every layer starts from a leaf: the residual stream as it is there, cut from what made it. So the
   run leaves, for each layer, the small linear graph from its start to the stream between attention
   and MLP, and nothing of the MLPs.
3. Each MLP's write is y = ŷ + error, ŷ the coder's reconstruction, error a constant. Where no coder
   writes the error is all of y. A skip connection stays a linear map of x.

Layers are the decoder's own, whichever of them have coders. The logits are read at the unembedding:
a soft-cap or a factor after it (Gemma 2, Granite) is not part of the linear model. At the zeroed
positions (a special token at the start, and tokens the coder was not trained on) nothing is active
and the error is no node, as in circuit-tracer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsify_vlm.coders import Latents
from sparsify_vlm.errors import UserError
from sparsify_vlm.models.resolve import find_layers
from sparsify_vlm.replacement.frozen import AttentionCall, Freezer, Record

if TYPE_CHECKING:
    from sparsify_vlm.replacement.model import VLMReplacementModel


@dataclass
class Segment:
    """One decoder layer up to its MLP. start, mid [1, S, d]: leaf, and the stream the MLP reads."""

    start: Tensor
    mid: Tensor
    attention: AttentionCall


@dataclass
class Written:
    """What one coder writes to one layer: u [S, K] at the latents [S, K] of `source`."""

    source: int
    place: int
    u: Tensor


class LocalModel:
    """Built from a prompt. Sizes: S positions, L decoder layers, d the stream's width.

    Attributes:
        input_ids: [S].
        zeroed: bool [S], where features and errors are no nodes.
        embeddings: [S, d], what the first layer reads.
        injected: [S, d] by layer, what is added to the stream after that layer beside its own
            output (Qwen3-VL's deep image features).
        segments: one per layer.
        latents: active latents [S, K] by layer, nothing active at zeroed positions.
        writes: what coders write, by the layer written to.
        y, y_hat, errors: [L, S, d].
        unembedded, logits: [S, V], before and after a soft-cap or factor.
        record: patterns and scales.
    """

    def __init__(self, model: VLMReplacementModel, inputs: Mapping[str, Any]) -> None:
        """Run the prompt. Raises `UserError` for a batch, padding, or a model or coder that cannot
        be made linear."""
        if model.input_site == "mlp_out":
            raise UserError("coders that read mlp_out (autoencoders) cannot be traced")
        self.model, self.loaded = model, model.loaded
        self.stack, self.clt = model.loaded.stack, model.clt
        self.inputs = dict(inputs)
        self.input_ids = one_prompt(inputs)
        self.freezer = Freezer(self.loaded)
        self._run()
        self.zeroed = zeroed_positions(model, self.inputs).to(self.embeddings.device)
        self._encode()

    @property
    def n_layers(self) -> int:
        """L."""
        return self.stack.n_layers

    @property
    def n_positions(self) -> int:
        """S."""
        return len(self.input_ids)

    # ---- the run

    def _run(self) -> None:
        _, layers = find_layers(self.loaded.model)
        starts: list[Tensor] = []
        mids: list[Tensor] = []
        ends: list[Tensor] = []
        ys: list[Tensor] = []
        before: list[int] = []

        def start(h: Tensor) -> Tensor:
            before.append(len(record.attention))
            starts.append(h.detach().requires_grad_())
            return starts[-1]

        def read(layer: int, mid: Tensor, y: Tensor) -> None:
            mids.append(mid)
            ys.append(y.detach()[0])

        def end(h: Tensor) -> Tensor:
            ends.append(h.detach().requires_grad_(len(ends) == len(layers) - 1))
            return ends[-1]

        head: list[Tensor] = []
        with ExitStack() as stack:
            record = stack.enter_context(self.freezer.recording())
            stack.enter_context(torch.enable_grad())
            stack.enter_context(self.stack.reading(read, "resid_mid"))
            for layer in layers:
                stack.callback(_replacing_input(layer, start))
                stack.callback(_replacing_output(layer, end))
            stack.callback(reading_head(self.loaded.model, head))
            out = run(self.loaded, self.inputs)
        before.append(len(record.attention))
        self.record: Record = record
        self.segments = []
        for i, layer in enumerate(layers):
            if before[i + 1] != before[i] + 1:
                raise UserError(
                    f"the attention of {type(layer).__name__} cannot be frozen: it does not use "
                    "transformers' attention interface"
                )
            self.segments.append(Segment(starts[i], mids[i], record.attention[before[i]]))
        self.embeddings = starts[0].detach()[0]
        self.injected = {
            i: (starts[i + 1] - ends[i]).detach()[0]
            for i in range(len(layers) - 1)
            if not torch.equal(starts[i + 1], ends[i])
        }
        self.y = torch.stack(ys)
        self._last, self._final = ends[-1], head[0]
        self.unembedded, self.logits = head[1].detach()[0], out.logits.detach()[0]

    # ---- the coder

    @torch.no_grad()
    def _encode(self) -> None:
        clt, cfg = self.clt, self.clt.cfg
        layer_of = self.model.layers
        reads: list[Tensor | None] = [None] * cfg.n_layers
        latents: list[Latents | None] = [None] * cfg.n_layers
        for s in cfg.source_layers():
            x = self.read(layer_of[s], self.segments[layer_of[s]].mid)[0].detach().to(clt.device)
            reads[s], latents[s] = x, packed(clt.encode_layer(s, x), self.zeroed)
        self.latents = {layer_of[s]: a for s, a in enumerate(latents) if a is not None}
        self.reads = {layer_of[s]: x for s, x in enumerate(reads) if x is not None}
        self.writes: dict[int, list[Written]] = {layer: [] for layer in range(self.n_layers)}
        y = self.y.to(clt.device, torch.promote_types(self.y.dtype, clt.dtype))
        self.y_hat = torch.zeros_like(y)
        for t in cfg.target_layers():
            values = clt.written_to(t, latents)
            self.writes[layer_of[t]] = [
                Written(layer_of[s], place, u)
                for (s, place), u in zip(cfg.sources(t), values, strict=True)
            ]
            self.y_hat[layer_of[t]] = clt.decode_target(t, latents, reads)  # type: ignore[arg-type]
        self._rest = y - self.y_hat
        self.errors = self._rest.masked_fill(self.zeroed[None, :, None], 0)

    def coder_layer(self, layer: int) -> int:
        """The coder's own number of a decoder layer that has a coder."""
        return self.model.layers.index(layer)

    def skips(self, layer: int) -> list[tuple[int, Tensor]]:
        """Skip connections of the coder at `layer`: (decoder layer written to, [d, d] matrix M with
        which y changes by change of x @ M)."""
        clt = self.clt
        if clt.W_skip is None or layer not in self.latents:
            return []
        s = self.coder_layer(layer)
        unit = clt.skip_input(s, torch.ones(1, 1, device=clt.device)).item()
        found = []
        for k, t in enumerate(clt.cfg.targets(s)):
            if (W := clt.skip(s, k)) is not None:
                factor = unit * clt.write_factor(s, t) * clt.out_scale(t)
                found.append((self.model.layers[t], W.detach().T * factor))
        return found

    def encoder_rows(self, layer: int, indices: Tensor) -> Tensor:
        """[T, d]: gradients of pre-activations with respect to the x the coder is given."""
        s = self.coder_layer(layer)
        unit = self.clt.skip_input(s, torch.ones(1, 1, device=self.clt.device)).item()
        return self.clt.W_enc[s].detach()[indices] * unit

    # ---- gradients

    def read(self, layer: int, mid: Tensor) -> Tensor:
        """x [..., d] from the stream between attention and MLP, linear around `mid`."""
        if self.model.input_site == "resid_mid":
            return mid
        with self.freezer.linear_norms():
            return self.stack.normed(layer, mid)

    def read_gradient(self, layer: int, positions: Tensor, vectors: Tensor) -> Tensor:
        """Gradients [T, d] at the stream before the norm for `vectors` [T, d] at x [positions]."""
        with torch.enable_grad():
            mid = self.segments[layer].mid[:, positions].detach().requires_grad_()
            x = self.read(layer, mid)
        (gradient,) = torch.autograd.grad(x, mid, vectors[None].to(x.dtype))
        return gradient[0]

    def read_gradients(self, layer: int, gradients: Tensor) -> Tensor:
        """The same for gradients [S, T, d] at all positions."""
        with torch.enable_grad():
            mid = self.segments[layer].mid[:, : len(gradients)].detach().requires_grad_()
            x = self.read(layer, mid)
        return _batched(x, mid, gradients)

    def final_gradient(self, positions: Tensor, vectors: Tensor) -> Tensor:
        """Gradients [T, d] at the last layer's output for `vectors` [T, d] after the final norm."""
        T, S = len(vectors), self.n_positions
        given = vectors.new_zeros(S, T, vectors.shape[1])
        given[positions, torch.arange(T, device=given.device)] = vectors
        made = _batched(self._final, self._last, given)
        return made[positions, torch.arange(T, device=given.device)]

    def cross(self, layer: int, gradients: Tensor) -> Tensor:
        """From gradients [S, T, d] at the stream before the MLP to those at the layer's start."""
        segment = self.segments[layer]
        return _batched(segment.mid, segment.start, gradients)

    # ---- running it

    def forward(self, changes: Mapping[int, Tensor] | None = None) -> LocalOutput:
        """Run the model with patterns and scales frozen and ŷ + error (+ `changes` [S, d] by layer)
        in the place of every MLP."""
        reads: dict[int, Tensor] = {}
        moved: dict[int, Tensor] = {}

        def write(layer: int, x: Tensor) -> Tensor:
            reads[layer] = x[0]
            out = self.y_hat[layer] + self._rest[layer]
            for target, M in self.skips(layer):
                moved[target] = moved.get(target, 0) + (x[0] - self.reads[layer]).to(M) @ M
            if layer in moved:
                out = out + moved[layer]
            if changes is not None and layer in changes:
                out = out + changes[layer]
            return out[None].to(x.dtype)

        head: list[Tensor] = []
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(self.freezer.replaying(self.record))
            stack.enter_context(self.stack.replacing(write, self.model.input_site))
            stack.callback(reading_head(self.loaded.model, head))
            logits = run(self.loaded, self.inputs).logits[0]
        return LocalOutput(logits, head[1][0], reads)


@dataclass
class LocalOutput:
    """logits and unembedded [S, V]; reads: x [S, d] by layer."""

    logits: Tensor
    unembedded: Tensor
    reads: dict[int, Tensor]


# ---- inputs


def one_prompt(inputs: Mapping[str, Any]) -> Tensor:
    """The ids [S] of the only prompt in a processor's batch. Raises `UserError` for others."""
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor):
        raise UserError("a prompt to trace needs input_ids, also where inputs_embeds are given")
    if ids.ndim != 2 or len(ids) != 1:
        raise UserError(f"one prompt is traced at a time: input_ids have shape {tuple(ids.shape)}")
    mask = inputs.get("attention_mask")
    if mask is not None and not bool(mask.bool().all()):
        raise UserError("a prompt to trace must have no padding: process it alone")
    embeds = inputs.get("inputs_embeds")
    if embeds is not None and embeds.shape[:2] != ids.shape:
        raise UserError(
            f"inputs_embeds {tuple(embeds.shape)} do not fit input_ids {tuple(ids.shape)}"
        )
    return ids[0]


def zeroed_positions(model: VLMReplacementModel, inputs: Mapping[str, Any]) -> Tensor:
    """bool [S]: a special token at the start, and what the coder was not trained on."""
    ids = inputs["input_ids"].cpu()
    zeroed = model.excluded.of(ids, torch.arange(ids.shape[1])[None])[0]
    zeroed[0] |= int(ids[0, 0]) in model.loaded.stack.special_ids
    return zeroed


def run(loaded: Any, inputs: Mapping[str, Any], **options: Any) -> Any:
    """The model on a prompt, all logits; `inputs_embeds` take the place of ids where given."""
    if "inputs_embeds" not in inputs:
        loaded.stack.layout.check(inputs)
    given = {k: v for k, v in inputs.items() if k != "input_ids" or "inputs_embeds" not in inputs}
    return loaded.model(**{"use_cache": False, **loaded.to_device(given), **options})


def packed(latents: Latents, zeroed: Tensor) -> Latents:
    """The latents without those at zeroed positions, and without places that nowhere are used."""
    values = latents.values.masked_fill(zeroed[:, None].to(latents.values.device), 0)
    most = max(1, int((values > 0).sum(1).max()))
    if most == values.shape[1]:
        return Latents(values, latents.indices)
    values, places = values.topk(most, dim=1)
    return Latents(values, latents.indices.gather(1, places))


# ---- autograd and hooks


def _batched(made: Tensor, leaf: Tensor, gradients: Tensor) -> Tensor:
    """Gradients [S', T, d] for those of `made` [1, S, d], T at once; S' <= S positions are given,
    S come back."""
    P = len(gradients)
    given = gradients.transpose(0, 1).unsqueeze(1).to(made.dtype)
    if made.shape[1] > P:
        given = nn.functional.pad(given, (0, 0, 0, made.shape[1] - P))
    (found,) = torch.autograd.grad(made, leaf, given, retain_graph=True, is_grads_batched=True)
    return found[:, 0].transpose(0, 1).contiguous()


def _replacing_input(layer: nn.Module, fn: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (fn(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": fn(kwargs["hidden_states"])}

    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    return handle.remove


def _replacing_output(layer: nn.Module, fn: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return fn(output) if isinstance(output, Tensor) else (fn(output[0]), *output[1:])

    handle = layer.register_forward_hook(hook)
    return handle.remove


def reading_head(model: Any, kept: list[Tensor]) -> Callable[[], None]:
    """Keep what the unembedding is given and what it makes."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        kept[:] = [args[0], output]

    handle = model.get_output_embeddings().register_forward_hook(hook)
    return handle.remove


@contextmanager
def freed(local: LocalModel) -> Iterator[LocalModel]:
    """Context at whose end the prompt's graphs are let go."""
    try:
        yield local
    finally:
        local.segments = []
