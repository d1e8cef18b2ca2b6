"""A decoder whose attention patterns and norm scales are those of one run, whatever flows through.

1. Attention: transformers asks a registry for the function that turns q, k, v into heads' outputs.
   Ours lets the model's own eager function make the pattern (masks, sliding windows, soft-caps and
   sinks included), keeps it without gradient, and multiplies it with v.
2. Norms: RMSNorm(h) = w ⊙ h / rms(h), whatever the model calls w (Gemma: 1 + weight), and
   LayerNorm(h) = w ⊙ (h − mean h) / std(h) + b. With the scale s₀ of the run on h₀,

       norm(h) = norm(h₀) + w ⊙ s₀ (h − h₀)          LayerNorm: of the centred difference

   which is exact at h₀ and linear everywhere. w is measured on a constant vector, s₀ from the
   norm's own output, so that no formula of a family is repeated here; that the two explain the
   output is checked.

Every norm of the decoder counts: before and after attention and MLP, of queries and keys, the last.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsify_vlm.errors import UserError
from sparsify_vlm.models.forwards import replace_forward

if TYPE_CHECKING:
    from sparsify_vlm.models import LoadedModel

_NAME = "sparsify_vlm_frozen"
_LARGE = 1e3
"""Constant that norms are measured on: large enough for their epsilon not to count."""


@dataclass
class NormCall:
    """One call of a norm: norm(h) = made + slope ⊙ (h − given), the difference centred first if
    `centred`. given, made, slope [..., width]."""

    given: Tensor
    made: Tensor
    slope: Tensor
    centred: bool

    def __call__(self, h: Tensor) -> Tensor:
        change = h - self.given
        if self.centred:
            change = change - change.mean(-1, keepdim=True)
        return (self.made + self.slope * change).to(self.made.dtype)


@dataclass
class AttentionCall:
    """One layer's attention: pattern [heads, S, S] after softmax, and the tensors around it as
    they were in the graph, value [1, kv heads, S, width], made [1, S, heads, width]."""

    pattern: Tensor
    value: Tensor
    made: Tensor


@dataclass
class Record:
    """What a run left: every attention call in order, every norm's calls in order."""

    attention: list[AttentionCall] = field(default_factory=list)
    norms: dict[nn.Module, list[NormCall]] = field(default_factory=lambda: defaultdict(list))


class Freezer:
    """Runs one model with frozen patterns and scales."""

    def __init__(self, loaded: LoadedModel, modules: Iterable[nn.Module] | None = None) -> None:
        """`modules`: those to be frozen; None: the decoder's."""
        modules = list(loaded.model.get_decoder().modules() if modules is None else modules)
        self.norms = [m for m in modules if is_norm(m)]
        configs = [getattr(m, "config", None) for m in modules]
        self._configs: dict[int, Any] = {
            id(c): c for c in configs if hasattr(c, "_attn_implementation")
        }
        self._weights: dict[nn.Module, Tensor] = {}

    @contextmanager
    def recording(self) -> Iterator[Record]:
        """Context in which a run is linear in its gradients, and its values are recorded."""
        record = Record()

        def attend(pattern: Tensor, value: Tensor) -> Tensor:
            made = mixed(pattern, value)
            record.attention.append(AttentionCall(pattern[0], value, made))
            return made

        def norm(module: nn.Module, own: Callable[..., Tensor], h: Tensor) -> Tensor:
            call = self.norm_call(module, own, h)
            record.norms[module].append(call)
            return call(h)

        with self._attention(attend), self._norms(norm):
            yield record

    @contextmanager
    def replaying(self, record: Record, scales: bool = True) -> Iterator[None]:
        """Context in which runs have the patterns of `record` and, if `scales`, its norms' scales.

        One run per context, of as many tokens as the recorded one.
        """
        patterns = iter(record.attention)
        calls = {module: iter(made) for module, made in record.norms.items()}

        def attend(pattern: Tensor | None, value: Tensor) -> Tensor:
            return mixed(next(patterns).pattern[None], value)

        def norm(module: nn.Module, own: Callable[..., Tensor], h: Tensor) -> Tensor:
            return next(calls[module])(h)

        with ExitStack() as stack:
            stack.enter_context(self._attention(attend, measured=False))
            if scales:
                stack.enter_context(self._norms(norm))
            yield

    @contextmanager
    def linear_norms(self) -> Iterator[None]:
        """Context in which norms are linear in their gradients around whatever they are given."""

        def norm(module: nn.Module, own: Callable[..., Tensor], h: Tensor) -> Tensor:
            return self.norm_call(module, own, h)(h)

        with self._norms(norm):
            yield

    # ---- norms

    def norm_call(self, module: nn.Module, own: Callable[..., Tensor], h: Tensor) -> NormCall:
        """The norm's linear map around h. Raises `UserError` for a module that is no such norm."""
        with torch.no_grad():
            given = h.detach()
            made = own(given)
            centred = isinstance(module, nn.LayerNorm)
            weight = self._weight(module, own, h)
            bias: Any = module.bias if centred else None
            scaled = weight * _centred(given.float()) if centred else weight * given.float()
            target = made.float() if bias is None else made.float() - bias.float()
            scale = (scaled * target).sum(-1, keepdim=True) / scaled.square().sum(
                -1, keepdim=True
            ).clamp(min=torch.finfo(torch.float32).tiny)
            fault = (scaled * scale - target).abs().max()
            if not bool(fault <= 20 * _rounding(made.dtype) * (1 + target.abs().max())):
                raise UserError(
                    f"{type(module).__name__} is not a norm whose scale can be frozen: "
                    "this model cannot be traced"
                )
        return NormCall(given, made, (weight * scale).to(made.dtype), centred)

    def _weight(self, module: nn.Module, own: Callable[..., Tensor], h: Tensor) -> Tensor:
        """w [width], float32."""
        if module not in self._weights:
            if isinstance(module, nn.LayerNorm):
                given: Any = module.weight
                w = h.new_ones(h.shape[-1]) if given is None else given
            else:
                w = own(torch.full_like(h.reshape(-1, h.shape[-1])[:1], _LARGE))[0]
            self._weights[module] = w.detach().float()
        return self._weights[module]

    @contextmanager
    def _norms(self, around: Callable[[nn.Module, Any, Tensor], Tensor]) -> Iterator[None]:
        with ExitStack() as stack:
            for module in self.norms:
                stack.callback(_wrap(module, around))
            yield

    # ---- attention

    @contextmanager
    def _attention(
        self, attend: Callable[[Any, Tensor], Tensor], measured: bool = True
    ) -> Iterator[None]:
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        def attention(
            module: nn.Module,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Any = None,
            **options: Any,
        ) -> tuple[Tensor, Tensor | None]:
            pattern = None
            if measured:
                with torch.no_grad():
                    own = _eager(module)
                    pattern = own(module, query, key, value, attention_mask, **options)[1]
            return attend(pattern, value), pattern

        was = {key: config._attn_implementation for key, config in self._configs.items()}
        ALL_ATTENTION_FUNCTIONS.register(_NAME, attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
        try:
            for config in self._configs.values():
                config._attn_implementation_internal = _NAME
            yield
        finally:
            for key, config in self._configs.items():
                config._attn_implementation_internal = was[key]


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a LayerNorm or an RMSNorm, by its class and by having no parts."""
    named = type(module).__name__.endswith("Norm")
    return named and not any(True for _ in module.children())


def _rounding(dtype: torch.dtype) -> float:
    """Norms compute in float32 at best, whatever they give back."""
    return max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


def _eager(module: nn.Module) -> Callable[..., Any]:
    """The eager attention function of the model a module belongs to."""
    home = sys.modules[type(module).__module__]
    own: Callable[..., Any] | None = getattr(home, "eager_attention_forward", None)
    if own is None:
        raise UserError(
            f"{type(module).__name__} has no eager attention: this model cannot be traced"
        )
    return own


def mixed(pattern: Tensor, value: Tensor) -> Tensor:
    """Σ_k pattern[q, k] value[k]: [1, heads, S, S] and [1, kv heads, S, w] to [1, S, heads, w]."""
    groups = pattern.shape[1] // value.shape[1]
    heads = value.repeat_interleave(groups, dim=1) if groups > 1 else value
    return (pattern.to(heads.dtype) @ heads).transpose(1, 2).contiguous()


def _centred(h: Tensor) -> Tensor:
    return h - h.mean(-1, keepdim=True)


def _wrap(module: nn.Module, around: Callable[[nn.Module, Any, Tensor], Tensor]) -> Any:
    """Put `around` in the place of a module's `forward`; returns what puts it back."""
    return replace_forward(module, partial(around, module, module.forward))
