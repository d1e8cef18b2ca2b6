"""Launchers of the Triton kernels, as functions of tensors: the path for CUDA devices.

W [F, d] is float32 or bfloat16, as are G, x [T, d] and moments; values, dots and everything
computed are float32. crow, col, order, start, token are those of `entries.Selection`. All tensors
contiguous and on one device, or `ValueError`.

With TRITON_INTERPRET=1 in the environment before triton is first imported the same kernels run on
CPU tensors in Triton's interpreter, far too slow for anything but tests. Three differences: small
tiles, no tuning, and bfloat16 operands of the encoder are widened before they are multiplied.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from sparsify_vlm.coders.kernels import rounding
from sparsify_vlm.coders.kernels.entries import AdamState

GROUP = 16
"""Latents per group in the two-stage selection."""

MARGIN = 8
"""Candidates more than k that are rescored exactly."""

Part = tuple[Tensor, Tensor, Tensor, Tensor]
"""crow, col, values and the table W of one source."""


def available(device: torch.device | str) -> bool:
    """Whether these functions work on tensors of `device`; imports triton only if they may."""
    kind = torch.device(device).type
    interpreting = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")
    if find_spec("triton") is None or kind != ("cpu" if interpreting else "cuda"):
        return False
    if kind == "cuda":
        return torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (8, 0)
    return bool(_kernels().INTERPRETED)


@cache
def _kernels() -> Any:
    from sparsify_vlm.coders.kernels import triton_kernels

    return triton_kernels


@cache
def _decoder() -> tuple[Any, dict[str, int]]:
    """The kernel, and the tiles to give it where it does not choose them itself."""
    kernels = _kernels()
    if kernels.INTERPRETED:
        return kernels.decode, {"BLOCK_T": 4, "BLOCK_D": 32, "UNROLL": 2}
    import triton

    tiles = [(32, 32, 4), (16, 64, 4), (32, 64, 4), (16, 128, 4), (32, 128, 8), (8, 256, 4)]
    configs = [
        triton.Config({"BLOCK_T": t, "BLOCK_D": d, "UNROLL": 4}, num_warps=warps)
        for t, d, warps in tiles
    ]
    # Whatever the tuning chooses, each sum is taken in the same order: see the kernel.
    tune = triton.autotune(configs, key=["width", "magnitude"], restore_value=["out"])
    return tune(kernels.decode), {}


@cache
def _encoder(precision: str) -> tuple[Any, dict[str, int]]:
    kernels = _kernels()
    if kernels.INTERPRETED:
        return kernels.encode, {"BLOCK_T": 16, "BLOCK_F": 2 * GROUP, "BLOCK_K": 16, "TOGETHER": 2}
    import triton

    tiles, depth = {
        "bf16": ([(128, 256, 8, 4), (128, 256, 8, 3), (128, 128, 8, 4), (256, 128, 8, 3)], 64),
        "tf32": ([(128, 256, 8, 3), (128, 128, 8, 4), (128, 128, 4, 3)], 32),
        "ieee": ([(64, 64, 4, 3), (128, 64, 8, 3)], 32),
    }[precision]
    # One depth for all, so that tuning does not change the order of the sums.
    configs = [
        triton.Config(
            {"BLOCK_T": t, "BLOCK_F": f, "BLOCK_K": depth, "TOGETHER": 8},
            num_warps=warps, num_stages=stages,
        )
        for t, f, warps, stages in tiles
    ]  # fmt: skip
    return triton.autotune(configs, key=["latents", "width"])(kernels.encode), {}


def _row_tiles(width: int) -> dict[str, int]:
    """Tiles of the kernels that take dot products: a function of d alone, never tuned."""
    if _kernels().INTERPRETED:
        return {"BLOCK_E": 4, "BLOCK_D": 32}
    return {"BLOCK_E": 8, "BLOCK_D": min(512, 1 << max(4, (width - 1).bit_length()))}


def _check(*tensors: Tensor) -> None:
    first = tensors[0]
    for tensor in tensors:
        if tensor.device != first.device or not tensor.is_contiguous():
            raise ValueError("the Triton kernels take contiguous tensors of one device")
        if tensor.dtype == torch.float64:
            raise ValueError("the Triton kernels compute in float32: float64 is not for them")


def _addresses(parts: list[Part]) -> Tensor:
    """[4, S] int64, on their device: where each tensor begins. The caller keeps them alive."""
    kinds = list(zip(*parts, strict=True))
    if any(tensor.dtype != kind[0].dtype for kind in kinds for tensor in kind):
        raise ValueError("the sources' tensors must be of one type")
    device = parts[0][0].device
    found = torch.tensor([[tensor.data_ptr() for tensor in kind] for kind in kinds], device="cpu")
    # Pinned, or the host would wait for the device at every target.
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found


def decode(out: Tensor, parts: list[Part]) -> None:
    """out[t] += Σ values · W[col] over the entries of token t in every part; out [T, d]."""
    parts = [part for part in parts if part[1].numel()]
    if not parts:
        return
    for part in parts:
        _check(out, *part)
    tokens, width = out.shape
    values, W = parts[0][2:]
    kernel, tiles = _decoder()

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        return -(-tokens // meta["BLOCK_T"]), -(-width // meta["BLOCK_D"])

    with torch.cuda.device_of(out):
        kernel[grid](
            out, _addresses(parts), values, W, len(parts), tokens, width,
            1 << (len(parts) - 1).bit_length(),
            ALIGNED=16 if all(part[3].data_ptr() % 16 == 0 for part in parts) else 2,
            **tiles,
        )  # fmt: skip


def dots(x: Tensor, crow: Tensor, col: Tensor, W: Tensor) -> Tensor:
    """[E] float32: ⟨x[t], W[col]⟩ for the entries of each token t."""
    _check(x, crow, col, W)
    width = x.shape[1]
    tiles = _row_tiles(width)
    across = -(-width // tiles["BLOCK_D"])
    parts = x.new_empty(across, len(col), dtype=torch.float32)
    if len(col):
        with torch.cuda.device_of(x):
            _kernels().dots[(len(x), across)](parts, x, W, crow, col, len(col), width, **tiles)
    return parts[0] if across == 1 else parts.sum(0)


def rescore(x: Tensor, W: Tensor, b: Tensor, candidates: Tensor) -> Tensor:
    """[T, C] float32: ⟨x, W[c]⟩ + b[c] for each candidate c [T, C]."""
    tokens, count = candidates.shape
    crow = torch.arange(tokens + 1, device=x.device) * count
    return dots(x, crow, candidates.flatten(), W).view(tokens, count) + b[candidates]


def busiest_first(start: Tensor) -> Tensor:
    """[F]: the latents by falling number of entries. Programs begin in this order, so that one
    latent that is active at most tokens does not begin last and keep the device waiting."""
    return start.diff().argsort(descending=True, stable=True)


def backward(
    G: Tensor,
    order: Tensor,
    start: Tensor,
    token: Tensor,
    values: Tensor,
    W: Tensor | None = None,
    *,
    out: Tensor,
    rows: Tensor | None = None,
) -> Tensor:
    """Write out[i] = Σ values · G[token] over the entries of latent i, for all i; out [F, d].

    Returns [E] ⟨G[token], W[col]⟩ if W is given, otherwise nothing ([0]). `rows`: `busiest_first`.
    """
    return _backward(G, order, start, token, values, W, out, rows, None, None, W is not None)


def backward_adam(
    G: Tensor,
    order: Tensor,
    start: Tensor,
    token: Tensor,
    values: Tensor,
    W: Tensor,
    state: AdamState,
    decay: Tensor | None = None,
    *,
    want_dots: bool = True,
    rows: Tensor | None = None,
) -> Tensor:
    """Like `backward`, but the gradient, plus decay[i] · W[i], goes into Adam's update of row i of
    W and of the moments, for all i; a bfloat16 second moment is rounded as `rounding` says. The dot
    products are with W before the update."""
    return _backward(G, order, start, token, values, W, None, rows, state, decay, want_dots)


def _backward(
    G: Tensor,
    order: Tensor,
    start: Tensor,
    token: Tensor,
    values: Tensor,
    W: Tensor | None,
    out: Tensor | None,
    rows: Tensor | None,
    state: AdamState | None,
    decay: Tensor | None,
    want_dots: bool,
) -> Tensor:
    moments = (state.exp_avg, state.exp_avg_sq) if state else ()
    given = [t for t in (W, out, decay, rows, *moments) if t is not None]
    _check(G, order, start, token, values, *given)
    width = G.shape[1]
    tiles = _row_tiles(width)
    across = -(-width // tiles["BLOCK_D"])
    if rows is None:
        rows = busiest_first(start)
    parts = G.new_empty(across if want_dots else 0, len(order), dtype=torch.float32)
    unused = G
    keys = (unused, unused)
    if state is not None and state.exp_avg_sq.dtype == torch.bfloat16:
        keys = (
            rounding.row_keys(state.step, len(state.exp_avg_sq), G.device),
            rounding.column_keys(width, G.device),
        )
    with torch.cuda.device_of(G):
        _kernels().backward[(len(rows), across)](
            *(unused if each is None else each for each in (out, W)),
            *(moments or (unused, unused)),
            unused if decay is None else decay,
            *keys,
            parts, G, rows, start, order, token, values, len(order), width,
            *_adam_numbers(state),
            ADAM=state is not None, DECAY=decay is not None, DOTS=want_dots, **tiles,
        )  # fmt: skip
    if not want_dots:
        return parts.flatten()[:0]
    return parts[0] if across == 1 else parts.sum(0)


def _adam_numbers(state: AdamState | None) -> tuple[float, ...]:
    """β1, 1 - β1, β2, 1 - β2, lr / (1 - β1ⁿ), √(1 - β2ⁿ), ε at step n."""
    if state is None:
        return (0.0,) * 7
    step_size = state.lr / (1 - state.beta1**state.step)
    root = (1 - state.beta2**state.step) ** 0.5
    beta1, beta2 = state.beta1, state.beta2
    return beta1, 1 - beta1, beta2, 1 - beta2, step_size, root, state.eps


def encode(
    x: Tensor,
    W: Tensor,
    b: Tensor,
    *,
    precision: str = "bf16",
    pre_dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor]:
    """relu(x @ Wᵀ + b) as [T, groups · GROUP] and the maximum of each group of GROUP neighbouring
    latents [T, groups], both of `pre_dtype`; -1 in place of latents beyond F.

    `precision` of the products: bf16 (operands are cast), tf32 or ieee (operands of one type);
    they are summed in float32.
    """
    if precision == "bf16":
        x, W = x.to(torch.bfloat16), W.to(torch.bfloat16)
    _check(x, W, b)
    (tokens, width), latents = x.shape, len(W)
    groups = -(-latents // GROUP)
    pre = x.new_empty(tokens, groups * GROUP, dtype=pre_dtype)
    maxima = x.new_empty(tokens, groups, dtype=pre_dtype)
    if not tokens:
        return pre, maxima
    kernel, tiles = _encoder(precision)

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (-(-tokens // meta["BLOCK_T"]) * -(-groups * GROUP // meta["BLOCK_F"]),)

    with torch.cuda.device_of(x):
        kernel[grid](
            pre, maxima, x, W, b, tokens, latents, width, groups, GROUP=GROUP,
            PRECISION="tf32" if precision == "tf32" else "ieee", WIDEN=_kernels().INTERPRETED,
            **tiles,
        )  # fmt: skip
    return pre, maxima


def largest(pre: Tensor, maxima: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Values and latents [T, count] of the `count` largest of each row of what `encode` gave.

    They lie in the `count` groups with the largest maxima.
    """
    if count >= maxima.shape[1]:
        values, indices = pre.topk(count, dim=1, sorted=False)
        return values, indices
    groups = maxima.topk(count, dim=1, sorted=False).indices
    inside = torch.arange(GROUP, device=pre.device)
    latents = (groups[:, :, None] * GROUP + inside).flatten(1)
    values, places = pre.gather(1, latents).topk(count, dim=1, sorted=False)
    return values, latents.gather(1, places)


def top(x: Tensor, W: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values (float32) and latents [T, k] of the k largest of relu(x @ Wᵀ + b), in no order.

    k + MARGIN candidates are taken from the bfloat16 product and rescored from x and W as given.
    """
    pre, maxima = encode(x, W, b)
    candidates = largest(pre, maxima, min(k + MARGIN, len(W)))[1]
    exact = rescore(x, W, b, candidates).relu()
    values, places = exact.topk(k, dim=1, sorted=False)
    return values, candidates.gather(1, places)
