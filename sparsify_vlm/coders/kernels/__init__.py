"""The products of a training step over active latents, in several implementations.

For entries e of a selection (token row[e], latent col[e], a value each) and a decoder W [F, d]:

    decode      out[t]  += Σ_{e of t} values[e] · W[col[e]]
    dots        out[e]   = ⟨G[row[e]], W[col[e]]⟩
    outer       out[i]   = Σ_{e of i} values[e] · G[row[e]]

`kernels_for` chooses by the tensors' device, type and density:

    eager       the definitions, one operation after another; any precision
    torch       PyTorch's own sparse kernels
    compiled    loops over the entries compiled by numba, for CPUs; gradient and Adam in one pass
    triton      the same on CUDA
    dense       matrix products, where few latents are inactive (not with `eager`)

The environment variable SPARSIFY_VLM_KERNELS forces one of the first four. All of them are held to
`eager` in float64 by tests/coders/test_kernels.py, which a new path must pass.
"""

from __future__ import annotations

import math
import os
from functools import cache

import torch
from torch import Tensor

from sparsify_vlm.coders.kernels import compiled, dense, eager, portable, triton_launch
from sparsify_vlm.coders.kernels.base import Functions, Kernels
from sparsify_vlm.coders.kernels.entries import AdamState, Entries, Selection
from sparsify_vlm.errors import UserError

__all__ = [
    "AdamState",
    "Entries",
    "Kernels",
    "Selection",
    "kernels_for",
    "path",
    "prefers_dense",
    "usable",
]

VARIABLE = "SPARSIFY_VLM_KERNELS"
PATHS = ("eager", "torch", "compiled", "triton")

DENSE_BELOW = {"cpu": 3.0, "cuda": 50.0}
"""F / K below which the dense products are taken: measured for CPUs (docs/log.md), an estimate for
CUDA. Other devices have no sparse products in torch."""


def prefers_dense(k: float, W: Tensor) -> bool:
    """Whether products of `k` active latents with W [F, d] should go through dense matrices."""
    if W.dtype not in (torch.float32, torch.float64):
        return True
    return W.shape[0] < DENSE_BELOW.get(W.device.type, math.inf) * k


@cache
def path(name: str) -> Kernels:
    """The path of this name, or `dense`."""
    match name:
        case "eager":
            return Functions("eager", eager, eager)
        case "torch":
            return Functions("torch", portable, portable)
        case "dense":
            return Functions("dense", dense, portable)
        case "compiled":
            from sparsify_vlm.coders.kernels.compiled_path import CompiledKernels

            return CompiledKernels()
        case "triton":
            from sparsify_vlm.coders.kernels.triton_path import TritonKernels

            return TritonKernels()
    raise ValueError(f"no kernel path is called {name}")


def usable(device: str | torch.device) -> list[str]:
    """Those of `PATHS` that work here on float32 tensors of `device`, in their order.

    `triton` works on a CPU where TRITON_INTERPRET=1 makes it an interpreter, for tests.
    """
    found = ["eager", "torch"]
    if torch.device(device).type == "cpu" and compiled.available():
        found.append("compiled")
    if triton_launch.available(device):
        found.append("triton")
    return found


def _works(name: str, W: Tensor) -> bool:
    types = {
        "compiled": (torch.float32, torch.float64),
        "triton": (torch.float32, torch.bfloat16),
    }
    return name in usable(W.device) and W.dtype in types.get(name, (W.dtype,))


def _chosen(W: Tensor) -> Kernels:
    forced = os.environ.get(VARIABLE)
    if not forced:  # an empty variable is an unset one
        fastest = "compiled" if W.device.type == "cpu" else "triton"
        return path(fastest if _works(fastest, W) else "torch")
    if forced not in PATHS:
        raise UserError(f"{VARIABLE}={forced}: choose one of {', '.join(PATHS)}, or unset it")
    if not _works(forced, W):
        there = ", ".join(name for name in PATHS if _works(name, W))
        raise UserError(
            f"{VARIABLE}={forced} does not work here for {W.dtype} tensors on {W.device}; choose "
            f"one of {there}, or unset it"
        )
    return path(forced)


def kernels_for(W: Tensor, k: float) -> Kernels:
    """The implementation for about `k` active latents per token and tables like W [F, d].

    Raises `UserError` if the one that SPARSIFY_VLM_KERNELS names cannot be used.
    """
    chosen = _chosen(W)
    if chosen.name != "eager" and prefers_dense(k, W):
        return path("dense")
    return chosen
