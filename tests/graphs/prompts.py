"""One prompt for each family, and coders for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from families import D_MODEL, FAMILIES, N_LAYERS, picture

from sparsify_vlm.coders import Clt, CltConfig
from sparsify_vlm.models import LoadedModel

F, K = 40, 6


def one_prompt(loaded: LoadedModel, **options: Any) -> dict[str, Any]:
    """A question, about a picture in a VLM, through the family's processor."""
    image = FAMILIES[Path(loaded.name).name].image
    text = f"{image} what colour is the thing ? it is".strip()
    if not image:
        return dict(loaded.processor([text], return_tensors="pt"))
    pictures = [[picture(40, 24, seed=1)]]
    return dict(loaded.processor(images=pictures, text=[text], return_tensors="pt", **options))


def random_coder(
    loaded: LoadedModel, *, biases: float = 0.1, hookpoints=None, **options: Any
) -> Clt:
    """A coder whose every weight is random; `biases` is the size of the biases' numbers."""
    options = {"n_targets": N_LAYERS, "num_latents": F, "k": K} | options
    cfg = CltConfig(D_MODEL, hookpoints or loaded.stack.hookpoints, **options)
    clt = Clt(cfg).requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in clt.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.startswith("threshold"):
            parameter.copy_(noise.abs() * 0.1)
        elif name.startswith(("b_enc", "b_dec")):
            parameter.copy_(noise * biases)
        else:
            parameter.copy_(noise * (0.3 if parameter.ndim > 1 else 0.1))
    if clt.in_norm is not None:
        clt.in_norm.uniform_(2.0, 4.0, generator=generator)
        clt.out_norm.uniform_(2.0, 4.0, generator=generator)
    return clt
