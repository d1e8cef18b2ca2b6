"""The path for CPUs: loops over the active latents, compiled by numba at their first call.

What they gain over library calls: a token's gradient row is read once for both of its uses, a
decoder's gradient stays in the cache and goes straight into Adam, and rows are asked for before
they are needed. Results do not depend on the number of threads, which is torch's. Safe to call
from several threads and processes.

Tensors are contiguous, on the CPU, float32 or float64, all of one type except for moments in
bfloat16. A selection is given as `entries` describes it: `crow` [T+1] and `col` [E] by token;
`order` [E], `start` [F+1] and `token` [E] by latent.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import warnings
from functools import cache
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from sparsify_vlm.coders.kernels import rounding
from sparsify_vlm.coders.kernels.compiled_threads import over_rows

ROW_COST = 1
ADAM_ROW_COST = 5
"""What a latent costs beside its entries, in entries: writing its gradient, or its update."""


@cache
def available() -> bool:
    """Whether numba can be imported. Warns if it is installed but does not work."""
    if importlib.util.find_spec("numba") is None:
        return False
    try:
        importlib.import_module("numba")
    except ImportError as error:
        warnings.warn(
            f"numba is installed but cannot be imported, so the compiled kernels are not used: "
            f"{error}",
            stacklevel=2,
        )
        return False
    return True


@cache
def _loops(name: str) -> ModuleType:
    """`products` or `top`, whose import takes numba's."""
    return importlib.import_module(f"sparsify_vlm.coders.kernels.compiled_{name}")


def _array(tensor: Tensor | None) -> np.ndarray | None:
    """The tensor's own memory; bfloat16, which numpy lacks, as uint16."""
    if tensor is None:
        return None
    if not tensor.is_contiguous():
        raise ValueError(f"a compiled kernel was given a tensor with strides {tensor.stride()}")
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def sort(crow: Tensor, col: Tensor, num_latents: int) -> tuple[Tensor, Tensor, Tensor]:
    """(order, start, token) of a selection."""
    order, token = torch.empty_like(col), torch.empty_like(col)
    start = col.new_empty(num_latents + 1)
    _loops("products").sort(*map(_array, (order, start, token, crow, col)))
    return order, start, token


def decode_add(out: Tensor, crow: Tensor, col: Tensor, values: Tensor, W: Tensor) -> None:
    """out[t] += Σ values · W[col] over the entries of token t; out [T, d], W [F, d]."""
    loop, arrays = _loops("products").decode, [_array(x) for x in (out, crow, col, values, W)]
    over_rows(lambda lo, hi: loop(*arrays, lo, hi), crow.numpy())


def backward(
    G: Tensor,
    order: Tensor,
    start: Tensor,
    token: Tensor,
    values: Tensor,
    W: Tensor,
    grad: Tensor,
    want_dots: bool = True,
) -> Tensor | None:
    """grad[i] = Σ values · G[token] over the entries of latent i, all rows written; returns
    dots[e] = ⟨G[token], W[i]⟩ [E]. Without `want_dots`, W is not read."""
    dots = torch.empty_like(values) if want_dots else None
    loop = _loops("products").backward
    arrays = [_array(x) for x in (grad, dots, G, order, start, token, values, W)]
    over_rows(lambda lo, hi: loop(*arrays, lo, hi), _latent_costs(start, ROW_COST))
    return dots


def backward_adam(
    G: Tensor,
    order: Tensor,
    start: Tensor,
    token: Tensor,
    values: Tensor,
    W: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    decay: Tensor | None = None,
    want_dots: bool = True,
) -> Tensor | None:
    """`backward` whose gradient, + decay[:, None] · W if given, updates W at once.

    The update is that of torch.optim.Adam for step number `step` (from 1), of all rows. Both
    moments have the type of W, or bfloat16, where the second is rounded as `rounding` says. The
    dots are those with W before the update.
    """
    dots = torch.empty_like(values) if want_dots else None
    tensors = dots, decay, G, order, start, token, values, W, exp_avg, exp_avg_sq
    arrays = [_array(x) for x in tensors]
    numbers = (
        1 - beta1,
        beta2,
        1 - beta2,
        lr / (1 - beta1**step),
        1 / math.sqrt(1 - beta2**step),
        eps,
    )
    hyper = tuple(np.array(numbers, np.float64 if W.dtype == torch.float64 else np.float32))
    keys: list[np.ndarray | None] = [None, None]
    if exp_avg.dtype == torch.bfloat16:
        rows, columns = W.shape
        drawn = rounding.row_keys(step, rows, W.device), rounding.column_keys(columns, W.device)
        keys = [key.view(torch.uint32).numpy() for key in drawn]
    arrays += [*keys, np.uint32(rounding.MULTIPLIER)]
    loop = _loops("products").backward_adam
    over_rows(lambda lo, hi: loop(*arrays, hyper, lo, hi), _latent_costs(start, ADAM_ROW_COST))
    return dots


def top(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and indices [T, k] of the k largest of each row of `pre` [T, F], in no order."""
    if not 0 <= k <= pre.shape[1]:
        raise ValueError(f"{k} largest of {pre.shape[1]}")
    values, indices = pre.new_empty(len(pre), k), pre.new_empty((len(pre), k), dtype=torch.int64)
    if values.numel():
        loop = _loops("top").top
        arrays = [_array(x) for x in (pre, values, indices)]
        groups = _groups(pre.shape[1], k)
        over_rows(lambda lo, hi: loop(*arrays, groups, lo, hi), np.arange(len(pre) + 1))
    return values, indices


def _groups(width: int, k: int) -> int:
    """Maxima are gone through several times, and k groups element by element: the square root
    balances the two. Whole vectors, and at least k."""
    return min(width, max(k, math.ceil(math.sqrt(width * k) / 16) * 16))


def rescore(x: Tensor, W: Tensor, b: Tensor, candidates: Tensor) -> Tensor:
    """[T, C]: ⟨x, W[c]⟩ + b[c] for each candidate c [T, C]; x [T, d], W [F, d], b [F]."""
    out = x.new_empty(candidates.shape)
    loop, arrays = _loops("top").rescore, [_array(y) for y in (out, x, W, b, candidates)]
    over_rows(lambda lo, hi: loop(*arrays, lo, hi), np.arange(len(out) + 1))
    return out


def _latent_costs(start: Tensor, row_cost: int) -> np.ndarray:
    return start.numpy() + row_cost * np.arange(len(start))
