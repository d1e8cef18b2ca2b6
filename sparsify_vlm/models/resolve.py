"""Finding a model's MLPs and checking that they write what we think they write.

1. The decoder is `model.get_decoder()`; its layers are the one ModuleList of
   `num_hidden_layers` modules that have an MLP.
2. One forward pass of a few text tokens shows, for every layer, which module makes the MLP's input
   (the norm) and which modules its output goes through (the post-norm).
3. In the same pass `layer output == residual stream + y` is checked to the last bits of the dtype.
   A layer that fails is refused: a coder trained on it would learn the wrong thing.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsify_vlm.errors import UserError
from sparsify_vlm.models.patches import ImageLayout, tile_ids
from sparsify_vlm.models.roles import image_token_id, special_ids
from sparsify_vlm.models.stack import Block, Stack

if TYPE_CHECKING:
    from collections.abc import Callable

MLP_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
PROBE_TOKENS = 7


def is_multimodal(config: Any) -> bool:
    """Whether the model has images beside its text decoder."""
    return getattr(config, "vision_config", None) is not None


def resolve_stack(model: Any, processor: Any = None) -> Stack:
    """The MLPs of `model`'s decoder as a `Stack`, checked numerically.

    `processor` (or tokenizer) tells which token ids are special; without it only those of the
    config are known. Raises `UserError`, naming the model, when it has no MLPs or a layer's output
    is not the residual stream plus what its MLP block writes.
    """
    config = model.config
    name = type(model).__name__
    tokenizer = getattr(processor, "tokenizer", processor)
    prefix, layers = find_layers(model)
    mlps = [_mlp_name(layer) for layer in layers]
    blocks = probe_blocks(model, layers, [getattr(m, n) for m, n in zip(layers, mlps, strict=True)])
    base = model.base_model_prefix + "."
    full = [f"{prefix}.{i}.{mlp}" for i, mlp in enumerate(mlps)]
    relative = [n.removeprefix(base) for n in full]
    canonical = relative
    if is_multimodal(config):
        canonical = [f"language_model.model.layers.{i}.mlp" for i in range(len(layers))]
    short = [".".join(n.rsplit(".", 3)[1:]) if n.count(".") > 2 else n for n in full]
    image_id = image_token_id(config) if is_multimodal(config) else None
    return Stack(
        hookpoints=canonical,
        d_model=config.get_text_config(decoder=True).hidden_size,
        model_name=name,
        image_token_id=image_id,
        special_ids=special_ids(config, tokenizer),
        layout=ImageLayout(config, image_id, tile_ids(tokenizer)),
        _blocks=blocks,
        _aliases=list(zip(canonical, relative, full, short, strict=True)),
    )


def _mlp_name(layer: nn.Module) -> str:
    """What a layer calls its MLP; empty where it has none."""
    return next((n for n in MLP_NAMES if isinstance(getattr(layer, n, None), nn.Module)), "")


def find_layers(model: Any) -> tuple[str, list[nn.Module]]:
    """The decoder layers and the full name of the ModuleList that holds them."""
    if model.config.is_encoder_decoder:
        raise UserError(f"{type(model).__name__} cannot be used: it is an encoder-decoder model")
    decoder = model.get_decoder()
    wanted = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = {
        name: list(module)
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == wanted
    }
    outer = {
        name: layers
        for name, layers in lists.items()
        if not any(name.startswith(other + ".") for other in lists)
    }
    found = {
        name: layers for name, layers in outer.items() if all(_mlp_name(layer) for layer in layers)
    }
    if len(found) != 1:
        raise UserError(_no_layers(model, wanted, outer, found))
    (inner, layers), *_ = found.items()
    outside = next(name for name, module in model.named_modules() if module is decoder)
    return ".".join(part for part in (outside, inner) if part), layers


def _no_layers(
    model: Any, wanted: int, lists: dict[str, list[nn.Module]], found: dict[str, list[nn.Module]]
) -> str:
    start = f"{type(model).__name__} cannot be used: its decoder has "
    if len(found) > 1:
        return start + f"{len(found)} lists of {wanted} layers with MLPs ({', '.join(found)})"
    if not lists:
        return start + f"no list of {wanted} layers"
    name, layers = next(iter(lists.items()))
    lacking = next(layer for layer in layers if not _mlp_name(layer))
    parts = ", ".join(n for n, _ in lacking.named_children())
    return (
        start + f"no MLP module ({', '.join(MLP_NAMES)}) in every layer of '{name}': "
        f"{type(lacking).__name__} has {parts}"
    )


@dataclass
class _Call:
    """One module's call. The values are copies: some layers go on to add in place."""

    module: nn.Module
    given: Tensor
    made: Tensor
    given_value: Tensor
    made_value: Tensor


@dataclass
class _Seen:
    """What one layer did during the probe."""

    calls: list[_Call] = field(default_factory=list)
    """Of the layer's children, in order."""
    output: Tensor | None = None


def probe_blocks(model: Any, layers: list[nn.Module], mlps: list[nn.Module]) -> list[Block]:
    """Run a few text tokens, find each block's parts and check its write."""
    seen = [_Seen() for _ in layers]
    with ExitStack() as stack:
        for layer, record in zip(layers, seen, strict=True):
            for child in layer.children():
                stack.callback(
                    child.register_forward_hook(_recorder(record), with_kwargs=True).remove
                )
            stack.callback(layer.register_forward_hook(_output_recorder(record)).remove)
        _run_probe(model)
    scales = [1.0]
    text = model.config.get_text_config(decoder=True)
    if (factor := getattr(text, "residual_multiplier", None)) is not None:
        scales.append(float(factor))
    name = type(model).__name__
    return [
        _block(f"{name}'s layer {i} ({type(layer).__name__})", record, mlp, scales)
        for i, (layer, record, mlp) in enumerate(zip(layers, seen, mlps, strict=True))
    ]


def _recorder(record: _Seen) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        given = args[0] if args else kwargs.get("hidden_states", kwargs.get("x"))
        if isinstance(given, Tensor) and isinstance(output, Tensor):
            record.calls.append(_Call(module, given, output, given.clone(), output.clone()))

    return hook


def _output_recorder(record: _Seen) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        record.output = (output if isinstance(output, Tensor) else output[0]).clone()

    return hook


def _run_probe(model: Any) -> None:
    embedding = model.get_input_embeddings()
    top = embedding.num_embeddings
    taken = special_ids(model.config, None) | {image_token_id(model.config)}
    free = [i for i in range(top) if i not in taken]
    chosen = [free[len(free) * j // PROBE_TOKENS] for j in range(PROBE_TOKENS)]
    ids = torch.tensor([chosen], device=embedding.weight.device)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            model.get_decoder()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        name = type(model).__name__
        raise UserError(f"{name}'s decoder does not run on text tokens alone: {reason}") from error
    finally:
        model.train(training)


def _block(name: str, record: _Seen, mlp: nn.Module, scales: list[float]) -> Block:
    if record.output is None:
        raise UserError(
            f"{name} does not run on text alone (a cross-attention layer?): not supported"
        )
    position = next((i for i, call in enumerate(record.calls) if call.module is mlp), None)
    if position is None:
        raise UserError(f"the MLP of {name} does not map one tensor to one tensor: not supported")
    last = record.calls[position]
    norm, stream = None, last.given_value
    for call in record.calls[:position]:
        if call.made is last.given:
            norm, stream = call.module, call.given_value
    post = []
    for call in record.calls[position + 1 :]:
        if call.given is last.made:
            post.append(call.module)
            last = call
    for scale in scales:
        if _is_sum(record.output, stream, last.made_value, scale):
            return Block(mlp, norm, post, scale)
    if not bool(record.output.isfinite().all()):
        raise UserError(
            f"{name} gives NaN or infinity: its weights are damaged, or --dtype is too narrow"
        )
    raise UserError(
        f"{name} is not supported: its output is not the residual stream plus what its MLP writes "
        "(attention and MLP in parallel, or gated), so there is no well-defined target for a coder"
    )


def _is_sum(out: Tensor, stream: Tensor, y: Tensor, scale: float) -> bool:
    """Whether `out == stream + scale * y` up to the rounding of out's dtype, element by element."""
    if not out.shape == stream.shape == y.shape:
        return False
    stream64, write64 = stream.double(), scale * y.double()
    allowed = torch.finfo(out.dtype).eps * (stream64.abs() + write64.abs())
    return bool(((out.double() - stream64 - write64).abs() <= allowed).all())
