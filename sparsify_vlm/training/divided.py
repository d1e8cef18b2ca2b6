"""Coders of which every process has a part: made, put together again, and what can be divided."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from sparsify_vlm.coders import Clt, CltConfig
from sparsify_vlm.errors import UserError
from sparsify_vlm.training.config import TrainConfig
from sparsify_vlm.training.parallel import Layout, best_kind, check_divisible

Shapes = dict[str, torch.Size]


def settled(layout: Layout, cfg: TrainConfig, clt: CltConfig) -> Layout:
    """`layout` with the kind that `--tp_layout` asks for, or that suits these coders.

    Raises `UserError` where they cannot be divided in that way.
    """
    if layout.alone:
        return layout
    kind = cfg.tp_layout
    if kind == "auto":
        best = best_kind(clt.d_model, clt.k, layout.parts)
        fits = clt.transcode and clt.d_model % layout.parts == 0
        kind = best if fits else "feature"
    check_divisible(kind, layout.parts, clt.num_latents, clt.d_model)
    if clt.activation == "groupmax" and clt.k % layout.parts:
        raise UserError(
            f"--tp {layout.parts} does not divide the {clt.k} groups of --activation groupmax: "
            "choose a divisor of --k"
        )
    return replace(layout, kind=kind)


def divided(
    cfg: CltConfig, layout: Layout, device: str | torch.device, dtype: torch.dtype = torch.float32
) -> Clt:
    """This process's part of a coder, as `Clt` makes the whole: the whole is never held."""
    if layout.alone:
        return Clt(cfg, device, dtype)
    clt = Clt(cfg, "meta", dtype)
    made: dict[nn.Parameter, nn.Parameter] = {}
    for name, whole in list(clt.named_parameters(remove_duplicate=False)):
        if whole not in made:
            start = torch.ones if name.startswith("post_scale") else torch.zeros
            part = start(layout.own(name, whole).shape, device=device, dtype=dtype)
            made[whole] = nn.Parameter(part, requires_grad=whole.requires_grad)
        owner, _, last = name.rpartition(".")
        clt.get_submodule(owner).register_parameter(last, made[whole])
    for name, norms in list(clt.named_buffers()):
        clt.register_buffer(name, torch.ones(norms.shape, device=device, dtype=dtype))
    return clt


def whole_shapes(cfg: CltConfig) -> Shapes:
    """Of all that a whole coder is made of, by name, and of the trainer's count `since_fired`.

    Shared tables are there under each of their names.
    """
    shapes = {name: value.shape for name, value in Clt(cfg, "meta").state_dict().items()}
    return shapes | {"since_fired": torch.Size([len(cfg.source_layers()), cfg.num_latents])}


def gathered(layout: Layout, name: str, part: Tensor, shapes: Shapes) -> Tensor:
    """The whole of a parameter, or of a tensor that goes with it, in every process."""
    axis = layout.axis(name)
    return part if axis is None else layout.gather(name, part, shapes[name][axis])


@torch.no_grad()
def gathered_clt(clt: Clt, layout: Layout, shapes: Shapes) -> Clt | None:
    """The whole coder, on the CPU, in the first process of the row; None in the others.

    All processes of the row must call it. No more than one parameter is gathered at a time.
    """
    if layout.alone:
        return clt
    whole = Clt(clt.cfg, "cpu", clt.dtype) if layout.place == 0 else None
    into = {} if whole is None else whole.state_dict()
    parts = [*clt.named_parameters(), *clt.named_buffers()]
    for name, part in parts:
        value = gathered(layout, name, part, shapes)
        if whole is not None:
            into[name].copy_(value)
    return whole
