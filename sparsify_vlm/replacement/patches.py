"""Other image tokens in the place of some patches', as the decoder reads them.

What the decoder reads of an image stands at its tokens' positions before the first layer, and in
some families (Qwen3-VL) again behind later ones. Both are exchanged; positions, masks and all other
tokens stay as they are. The vision tower is not touched: its attention has carried what a patch
shows into other tokens already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from sparsify_vlm.errors import UserError
from sparsify_vlm.models.resolve import find_layers

if TYPE_CHECKING:
    from sparsify_vlm.models import LoadedModel
    from sparsify_vlm.replacement.model import VLMReplacementModel

EMBEDDINGS = -1
"""The place before the first layer; place i is behind layer i."""

Patch = tuple[int, int]
"""Row and column."""


@dataclass(frozen=True)
class PatchIntervention:
    """Exchange the image tokens of patches.

    PatchIntervention([(2, 3), (2, 4)], by="mean")
    PatchIntervention.from_image(model, other_inputs, [(2, 3), (2, 4)])
    """

    patches: Sequence[Patch] | None = None
    """Which, by row and column in the grid of image tokens; None: all tokens of the image, those
    without a place in the grid (row ends, a thumbnail) too."""
    image: int = 0
    """Which of the prompt's images."""
    by: Literal["zero", "mean"] | Mapping[int, Tensor] = "zero"
    """What they become: 0, the mean of the image's own tokens, or tokens [n, d] by place, in the
    order of `patches`."""

    @classmethod
    def from_image(
        cls,
        model: VLMReplacementModel,
        inputs: Mapping[str, Any],
        patches: Sequence[Patch] | None = None,
        *,
        image: int = 0,
        other_image: int = 0,
    ) -> PatchIntervention:
        """The tokens that the same patches of another prompt's `other_image` have; with the
        prompt's own inputs and two images, one half of a swap. Raises `UserError` where that image
        has no such patches."""
        at = places_of(model.loaded, inputs, patches, other_image)
        if len(at) != 1:
            raise UserError("tokens are taken from one prompt at a time")
        read = decoder_reads(model.loaded, inputs)
        return cls(patches, image, {place: h[0, at[0]] for place, h in read.items()})


def places_of(
    loaded: LoadedModel, inputs: Mapping[str, Any], patches: Sequence[Patch] | None, image: int
) -> list[Tensor]:
    """Positions of an image's patches in every row of a batch. Raises `UserError`."""
    given = {k: v for k, v in inputs.items() if v is not None}
    images, grid = loaded.stack.images(given).cpu(), loaded.stack.patches(given).cpu()
    found = []
    for row, places in zip(images, grid.long(), strict=True):
        mine = (row == image).nonzero()[:, 0]
        if not len(mine):
            raise UserError(f"image {image}: the prompt has {int(row.max()) + 1} images")
        if patches is None:
            found.append(mine)
            continue
        known = {tuple(places[i].tolist()): int(i) for i in mine if places[i, 0] >= 0}
        for patch in patches:
            if tuple(patch) not in known:
                size = [1 + max((place[i] for place in known), default=-1) for i in (0, 1)]
                raise UserError(
                    f"patch {tuple(patch)} of image {image}: it has {size[0]} rows and {size[1]} "
                    "columns of image tokens"
                )
        found.append(torch.tensor([known[tuple(patch)] for patch in patches], dtype=torch.int64))
    return found


@torch.no_grad()
def decoder_reads(loaded: LoadedModel, inputs: Mapping[str, Any]) -> dict[int, Tensor]:
    """What the decoder reads beside its own layers' outputs: [B, S, d] by place."""
    read: dict[int, Tensor] = {}

    def keep(place: int, h: Tensor, before: Tensor | None) -> None:
        if before is None:
            read[place] = h
        elif not torch.equal(h, before):
            read[place] = h - before

    with entering(loaded, keep):
        loaded.forward(inputs)
    return read


@contextmanager
def entering(loaded: LoadedModel, fn: Any) -> Iterator[None]:
    """Context in which `fn(place, h, before)` is told what every layer is given, h [B, S, d], and
    what the layer before it gave (None for the first); what it returns takes the place of h."""
    _, layers = find_layers(loaded.model)
    outputs: list[Tensor | None] = [None]

    def enter(place: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        h = args[0] if args else kwargs["hidden_states"]
        made = fn(place, h, None if place == EMBEDDINGS else outputs[0])
        if made is None:
            return None
        if args:
            return (made, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": made}

    def leave(output: Any) -> None:
        outputs[0] = output if isinstance(output, Tensor) else output[0]

    with ExitStack() as stack:
        for i, layer in enumerate(layers):
            hook = layer.register_forward_pre_hook(
                lambda _, args, kwargs, place=i - 1: enter(place, args, kwargs), with_kwargs=True
            )
            stack.callback(hook.remove)
            stack.callback(layer.register_forward_hook(lambda _, args, out: leave(out)).remove)
        yield


@contextmanager
def patched(loaded: LoadedModel, interventions: Sequence[PatchIntervention]) -> Iterator[None]:
    """Context in which prompts are read with other image tokens; new tokens in `generate` follow.

    Raises `UserError`, when a prompt is run, for images and patches that it does not have.
    """
    if not interventions:
        yield
        return
    patching = _Patching(loaded, interventions)
    with ExitStack() as stack:
        begin = loaded.model.register_forward_pre_hook(patching.begin, with_kwargs=True)
        stack.callback(begin.remove)
        stack.callback(_around_generate(loaded.model, patching))
        stack.enter_context(entering(loaded, patching.exchange))
        yield


def _around_generate(model: Any, patching: _Patching) -> Callable[[], None]:
    """Tell `patching` of the prompts that `generate` is given: it runs the vision tower ahead, so
    that no forward call sees the pictures. Returns what undoes it."""
    own, was = model.generate, model.__dict__.get("generate")

    def generate(*args: Any, **kwargs: Any) -> Any:
        patching.prompt = {"input_ids": args[0], **kwargs} if args else kwargs
        try:
            return own(*args, **kwargs)
        finally:
            patching.prompt = {}

    def undo() -> None:
        if was is None:
            del model.generate
        else:
            model.generate = was

    model.generate = generate
    return undo


class _Patching:
    def __init__(self, loaded: LoadedModel, interventions: Sequence[PatchIntervention]) -> None:
        self.loaded, self.interventions = loaded, interventions
        self.prompt: dict[str, Any] = {}
        """What `generate` was given."""
        self._at: list[tuple[PatchIntervention, int, Tensor, Tensor]] = []
        """Intervention, row of the batch, positions of its patches, positions of its image."""

    def begin(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward call begins; with a key-value cache the image has been read before."""
        cache = kwargs.get("past_key_values")
        self._at = []
        if cache is not None and cache.get_seq_length():
            return
        inputs = {"input_ids": args[0], **kwargs} if args else kwargs
        if inputs.get("input_ids") is None:
            raise UserError("image tokens are exchanged in prompts with input_ids")
        rows = len(inputs["input_ids"])
        inputs = self.prompt or inputs
        for one in self.interventions:
            at = places_of(self.loaded, inputs, one.patches, one.image)
            whole = places_of(self.loaded, inputs, None, one.image)
            copies = rows // len(at)  # beams, or several answers
            self._at += [(one, r, at[r // copies], whole[r // copies]) for r in range(rows)]

    def exchange(self, place: int, h: Tensor, before: Tensor | None) -> Tensor | None:
        """h with other tokens in it."""
        if not self._at or (before is not None and torch.equal(h, before)):
            return None
        own = h if before is None else h - before
        made = h.clone()
        for one, row, at, whole in self._at:
            tokens = _tokens(one, place, own[row], at.to(h.device), whole.to(h.device))
            made[row, at] = tokens if before is None else before[row, at] + tokens
        return made


def _tokens(one: PatchIntervention, place: int, own: Tensor, at: Tensor, whole: Tensor) -> Tensor:
    """What stands at the positions `at` instead of `own` [S, d]."""
    if one.by == "zero":
        return torch.zeros_like(own[at])
    if one.by == "mean":
        return own[whole].mean(0).expand(len(at), -1)
    if isinstance(one.by, str):
        raise UserError(f"image patches are exchanged by zero, mean or tokens, not by '{one.by}'")
    given = one.by.get(place)
    if given is None or given.shape != own[at].shape:
        shape = None if given is None else tuple(given.shape)
        raise UserError(
            f"the other image's tokens have the shape {shape}, {tuple(own[at].shape)} are exchanged"
        )
    return given.to(own)
