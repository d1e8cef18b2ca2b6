"""The decoder's MLPs as one stack: names, reading what they read and write, replacing their writes.

A decoder layer's feed-forward half is

    resid_mid → norm → x → MLP → post-norm (some models) → × scale (some) = y
    out = resid_mid + y

so y is always what the block adds to the residual stream. That this holds is checked numerically
when the stack is built (`resolve.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

from sparsify_vlm.errors import UserError
from sparsify_vlm.models.forwards import replace_forward
from sparsify_vlm.models.patches import ImageLayout
from sparsify_vlm.models.roles import token_roles

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

InputSite = Literal["mlp_in", "resid_mid", "mlp_out"]
INPUT_SITES: tuple[str, ...] = get_args(InputSite)

Callback = Callable[[int, "Tensor", "Tensor"], None]
"""`callback(layer, x, y)`, x and y [B, S, d]."""

Replacement = Callable[[int, "Tensor"], "Tensor | None"]
"""`fn(layer, x) -> y_hat`, both [B, S, d]; None keeps the layer's own MLP for this call."""

Kept = Callable[[], "Tensor | None"]
"""Asked in every forward: bool [B, S], where the MLP's own write stays; None for nowhere."""


@dataclass
class Block:
    """The feed-forward half of one decoder layer."""

    mlp: Module
    norm: Module | None
    """Produces the MLP's input; None where the MLP reads the residual stream itself."""
    post: list[Module]
    """Modules between the MLP's output and the residual stream, in order (post-norm, dropout)."""
    scale: float
    """Factor between the last module's output and what is added to the stream."""

    @property
    def last(self) -> Module:
        """The module whose output, times `scale`, is written."""
        return self.post[-1] if self.post else self.mlp


@dataclass
class Stack:
    """The decoder's MLPs, in order. Build it with `resolve_stack`."""

    hookpoints: list[str]
    """Canonical names, one per layer."""
    d_model: int
    """Width of the residual stream."""
    model_name: str
    """For messages."""
    image_token_id: int | None
    special_ids: frozenset[int]
    layout: ImageLayout
    _blocks: list[Block] = field(repr=False)
    _aliases: list[tuple[str, ...]] = field(repr=False)

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return len(self._blocks)

    def match(self, patterns: Sequence[str]) -> list[int]:
        """Layers whose name matches any of the shell-style `patterns`, ascending.

        A name may be canonical, relative to the base model (as upstream writes it), relative to the
        decoder, or the module's full name. Raises `UserError` for a pattern that matches nothing.
        """
        found: set[int] = set()
        for pattern in patterns:
            hits = {
                layer
                for layer, names in enumerate(self._aliases)
                if any(fnmatchcase(name, pattern) for name in names)
            }
            if not hits:
                raise UserError(
                    f"hookpoint '{pattern}' matches no MLP of {self.model_name}; "
                    f"it has {self.hookpoints[0]} … {self.hookpoints[-1]}"
                )
            found |= hits
        return sorted(found)

    def roles(self, inputs: Mapping[str, Any]) -> Tensor:
        """The role of every token of the processor's batch, uint8 [B, S]; see `Role`."""
        return token_roles(inputs, self.image_token_id, self.special_ids)

    def patches(self, inputs: Mapping[str, Any]) -> Tensor:
        """(row, column) of every image token within its image, int16 [B, S, 2]; -1 elsewhere.

        Tokens of an image that are no patch (row ends, thumbnails beside a finer grid) have -1, see
        `ImageLayout`. Raises `UserError` when image tokens are missing, as truncation leaves them.
        """
        return self.layout.patches(inputs)

    def images(self, inputs: Mapping[str, Any]) -> Tensor:
        """Which of its sample's images an image token belongs to, int16 [B, S]; -1 elsewhere."""
        return self.layout.images(inputs)

    def normed(self, layer: int, stream: Tensor) -> Tensor:
        """What MLP `layer` reads where the residual stream before its norm is `stream` [..., d]."""
        norm = self._blocks[layer].norm
        made: Tensor = stream if norm is None else norm(stream)
        return made

    @contextmanager
    def reading(
        self,
        callback: Callback,
        input_site: InputSite = "mlp_in",
        layers: Iterable[int] | None = None,
    ) -> Iterator[None]:
        """Context in which every forward calls `callback(layer, x, y)`, layer after layer.

        x and y, [B, S, d], are the model's own tensors: copy what you keep. x is what `input_site`
        says: the MLP's input (`mlp_in`), the residual stream before the norm (`resid_mid`), or y
        itself (`mlp_out`). Within `replacing`, y is what is really written.
        """
        _check_site(input_site)
        with ExitStack() as stack:
            for layer in self._chosen(layers):
                for handle in _read(self._blocks[layer], layer, callback, input_site):
                    stack.callback(handle.remove)
            yield

    @contextmanager
    def replacing(
        self,
        fn: Replacement,
        input_site: InputSite = "mlp_in",
        layers: Iterable[int] | None = None,
        kept: Kept = lambda: None,
    ) -> Iterator[None]:
        """Context in which each MLP writes `fn(layer, x)` to the residual stream.

        x and the result are [B, S, d] (S is 1 in the steps of `generate`); the result takes the
        dtype of x. Neither the MLP nor its post-norm nor its scale is computed, except where `fn`
        returns None, on the positions that `kept` names, and for `mlp_out`, where x is what the
        MLP writes.
        """
        _check_site(input_site)
        with ExitStack() as stack:
            for layer in self._chosen(layers):
                swap = _Swap(self._blocks[layer], layer, fn, input_site, kept)
                stack.callback(swap.undo)
            yield

    def _chosen(self, layers: Iterable[int] | None) -> list[int]:
        chosen = list(range(self.n_layers)) if layers is None else sorted(set(layers))
        if wrong := [layer for layer in chosen if not 0 <= layer < self.n_layers]:
            raise UserError(f"layer {wrong[0]} is not one of the {self.n_layers} of this model")
        return chosen


def _check_site(site: str) -> None:
    if site not in INPUT_SITES:
        raise UserError(f"input_site '{site}' is none of {', '.join(INPUT_SITES)}")


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def _read(block: Block, layer: int, callback: Callback, site: InputSite) -> list[Any]:
    held: list[Tensor] = []

    def keep(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        held[:] = [_first(args, kwargs)]

    def call(module: Module, args: tuple[Any, ...], output: Tensor) -> None:
        y = output if block.scale == 1.0 else output * block.scale
        callback(layer, held.pop() if held else y, y)

    handles: list[Any] = [block.last.register_forward_hook(call)]
    if site != "mlp_out":
        reader = block.norm if site == "resid_mid" and block.norm is not None else block.mlp
        handles.append(reader.register_forward_pre_hook(keep, with_kwargs=True))
    return handles


class _Swap:
    """Puts a replacement in the place of one block's `forward`s; `undo` puts them back.

    `forward` is set on the instance, so that hooks (of `reading`, of accelerate) still run.
    """

    def __init__(
        self, block: Block, layer: int, fn: Replacement, site: InputSite, kept: Kept
    ) -> None:
        self.block, self.layer, self.fn, self.kept = block, layer, fn, kept
        self.replaced = False
        self.stream: Tensor | None = None
        self._undo: list[Callable[[], None]] = []
        self._post: list[Callable[..., Tensor]] = [module.forward for module in block.post]
        if site == "mlp_out":
            self._set(block.last, self._rewrite)
            return
        if site == "resid_mid" and block.norm is not None:
            handle = block.norm.register_forward_pre_hook(self._keep, with_kwargs=True)
            self._undo.append(handle.remove)
        self._set(block.mlp, self._write)
        for module in block.post:
            self._set(module, self._pass)

    def undo(self) -> None:
        """Restore the block."""
        while self._undo:
            self._undo.pop()()

    def _set(self, module: Module, around: Callable[..., Tensor]) -> None:
        self._undo.append(replace_forward(module, partial(around, module.forward)))

    def _keep(self, module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.stream = _first(args, kwargs)

    def _write(self, own: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        x = _first(args, kwargs)
        stream, self.stream = self.stream, None
        y_hat = self.fn(self.layer, x if stream is None else stream)
        self.replaced = y_hat is not None
        if y_hat is None:
            return own(*args, **kwargs)
        y_hat = self._unscaled(y_hat.to(x.dtype))
        kept = self.kept()
        if kept is None:
            return y_hat
        kept = kept.to(x.device)
        return y_hat.index_put((kept,), self._own_rows(own, x[kept], args, kwargs))

    def _own_rows(
        self,
        own: Callable[..., Tensor],
        x: Tensor,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Tensor:
        """What the block itself writes for the MLP inputs x [N, d], before its scale."""
        rows = x.unsqueeze(0)
        if args:
            written = own(rows, *args[1:], **kwargs)
        else:
            written = own(**{**kwargs, next(iter(kwargs)): rows})
        for module in self._post:
            written = module(written)
        return written[0]

    def _pass(self, own: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        return _first(args, kwargs) if self.replaced else own(*args, **kwargs)

    def _rewrite(self, own: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        written = own(*args, **kwargs)
        y_hat = self.fn(self.layer, written * self.block.scale)
        if y_hat is None:
            return written
        y_hat = self._unscaled(y_hat.to(written.dtype))
        kept = self.kept()
        return y_hat if kept is None else y_hat.index_put((kept,), written[kept])

    def _unscaled(self, y_hat: Tensor) -> Tensor:
        return y_hat if self.block.scale == 1.0 else y_hat / self.block.scale
