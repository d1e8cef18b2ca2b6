# mypy: disallow-incomplete-defs=False
"""The Triton kernels of the training step; `triton_launch` launches them. Triton must be installed.

Names and shapes are those of `triton_launch`. Pointers are to contiguous tensors; `width` is d. All
arithmetic is in float32, whatever the tensors hold.

Programs along the first axis of a grid start one after another, so that those running together
share a column tile (second axis), whose part of the tables then stays in the L2 cache.

Nothing is added by atomics, so results repeat bit by bit. In `decode` and `encode` each number is
summed in the same order whatever the tile sizes, which may thus be tuned at run time. In the others
it is not: their tiles follow from d alone, or a resumed run would differ in the last bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparsify_vlm.coders.kernels import rounding

MULTIPLIER = tl.constexpr(rounding.MULTIPLIER)


@triton.jit(do_not_specialize=["sources", "magnitude"])
def decode(
    out,  # [T, d]
    addresses,  # [4, S] int64: where each source's crow, col, values and W begin
    value_like, table_like,  # any pointer of the values' and of the tables' type
    sources, tokens, width,
    magnitude,  # sources rounded up to a power of two: not used, tiles are tuned for each
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, UNROLL: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """out[t] += Σ over sources and entries of t of values · W[col], one entry of each of BLOCK_T
    tokens at a time."""
    # Columns of shape [BLOCK_T, 1], not vectors: on those Triton 3.6 and 3.7 fail to compile this
    # for some tiles.
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    c = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    is_token, is_column = t < tokens, c < width
    sums = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for s in range(sources):
        crow = tl.load(addresses + s).to(tl.pointer_type(tl.int64))
        col = tl.load(addresses + sources + s).to(tl.pointer_type(tl.int64))
        values = tl.load(addresses + 2 * sources + s).to(value_like.dtype)
        W = tl.multiple_of(tl.load(addresses + 3 * sources + s).to(table_like.dtype), ALIGNED)
        begin = tl.load(crow + t, mask=is_token, other=0)
        count = tl.load(crow + t + 1, mask=is_token, other=0) - begin
        longest = tl.max(count)
        for first in range(0, longest, UNROLL):
            for step in tl.static_range(UNROLL):
                active = first + step < count
                e = begin + first + step
                latent = tl.load(col + e, mask=active, other=0)
                value = tl.load(values + e, mask=active, other=0).to(tl.float32)
                row = tl.load(W + latent * width + c, mask=active & is_column, other=0)
                sums += value * row.to(tl.float32)
    here = out + t.to(tl.int64) * width + c
    before = tl.load(here, mask=is_token & is_column, other=0).to(tl.float32)
    tl.store(here, (before + sums).to(out.dtype.element_ty), mask=is_token & is_column)


@triton.jit
def backward(
    grad, W, exp_avg, exp_avg_sq, decay,  # [F, d], decay [F]; those not used: any pointer
    row_keys, column_keys,  # [F], [d] int32: see `rounding`, for a bfloat16 exp_avg_sq
    dots,  # [column tiles, E]
    G,  # [T, d]
    rows,  # [F]: the latent of each program
    start, order, token, values,
    entries, width,
    beta1, rest1, beta2, rest2, step_size, root, eps,
    ADAM: tl.constexpr, DECAY: tl.constexpr, DOTS: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of one latent's row, BLOCK_E of its entries at a time, and its Adam update."""
    latent = tl.load(rows + tl.program_id(0))
    tile = tl.program_id(1)
    c = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    is_column = c < width
    here = latent * width + c
    begin, end = tl.load(start + latent), tl.load(start + latent + 1)
    if ADAM or DOTS:
        w = tl.load(W + here, mask=is_column, other=0).to(tl.float32)
    g = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(begin, end, BLOCK_E):
        j = first + tl.arange(0, BLOCK_E)
        active = j < end
        t = tl.load(token + j, mask=active, other=0)
        e = tl.load(order + j, mask=active, other=0)
        value = tl.load(values + e, mask=active, other=0).to(tl.float32)
        row = tl.load(
            G + t[:, None] * width + c[None, :],
            mask=active[:, None] & is_column[None, :],
            other=0,
        ).to(tl.float32)
        g += tl.sum(value[:, None] * row, axis=0)
        if DOTS:
            part = tl.sum(row * w[None, :], axis=1)
            tl.store(dots + tile.to(tl.int64) * entries + e, part, mask=active)
    if ADAM:
        if DECAY:
            g += tl.load(decay + latent).to(tl.float32) * w
        m = tl.load(exp_avg + here, mask=is_column, other=0).to(tl.float32)
        v = tl.load(exp_avg_sq + here, mask=is_column, other=0).to(tl.float32)
        m = beta1 * m + rest1 * g
        v = beta2 * v + rest2 * g * g
        w -= step_size * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), root) + eps)
        tl.store(W + here, w.to(W.dtype.element_ty), mask=is_column)
        tl.store(exp_avg + here, m.to(exp_avg.dtype.element_ty), mask=is_column)
        if exp_avg_sq.dtype.element_ty == tl.bfloat16:
            columns = tl.load(column_keys + c, mask=is_column, other=0)
            random = ((tl.load(row_keys + latent) ^ columns) * MULTIPLIER >> 16) & 0xFFFF
            rounded = (v.to(tl.int32, bitcast=True) + random) & -0x10000
            v = tl.where(v == v, rounded.to(tl.float32, bitcast=True), v)
        tl.store(exp_avg_sq + here, v.to(exp_avg_sq.dtype.element_ty), mask=is_column)
    else:
        tl.store(grad + here, g.to(grad.dtype.element_ty), mask=is_column)


@triton.jit
def dots(
    out,  # [column tiles, E]
    x, W, crow, col,
    entries, width,
    BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """⟨x[t], W[col]⟩ over one column tile for the entries of one token, BLOCK_E at a time."""
    t = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    c = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    is_column = c < width
    own = tl.load(x + t * width + c, mask=is_column, other=0).to(tl.float32)
    begin, end = tl.load(crow + t), tl.load(crow + t + 1)
    for first in range(begin, end, BLOCK_E):
        e = first + tl.arange(0, BLOCK_E)
        active = e < end
        latent = tl.load(col + e, mask=active, other=0)
        row = tl.load(
            W + latent[:, None] * width + c[None, :],
            mask=active[:, None] & is_column[None, :],
            other=0,
        ).to(tl.float32)
        part = tl.sum(row * own[None, :], axis=1)
        tl.store(out + tile.to(tl.int64) * entries + e, part, mask=active)


@triton.jit
def encode(
    pre, maxima,  # [T, groups · GROUP], [T, groups]
    x, W, b,  # [T, d], [F, d], [F]
    tokens, latents, width, groups,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, TOGETHER: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """relu(x @ Wᵀ + b), and of each GROUP neighbouring latents the largest; -1 beyond latent F.

    TOGETHER blocks of tokens go through the latents side by side and share the tiles of W.
    """
    along_t, along_f = tl.cdiv(tokens, BLOCK_T), tl.cdiv(groups * GROUP, BLOCK_F)
    band, inner = tl.program_id(0) // (TOGETHER * along_f), tl.program_id(0) % (TOGETHER * along_f)
    in_band = min(along_t - band * TOGETHER, TOGETHER)
    t = (band * TOGETHER + inner % in_band) * BLOCK_T + tl.arange(0, BLOCK_T)
    block = inner // in_band
    f = block * BLOCK_F + tl.arange(0, BLOCK_F)
    c = tl.arange(0, BLOCK_K)
    is_token, is_latent = t < tokens, f < latents
    xs = x + t.to(tl.int64)[:, None] * width + c[None, :]
    ws = W + f.to(tl.int64)[None, :] * width + c[:, None]
    sums = tl.zeros((BLOCK_T, BLOCK_F), tl.float32)
    for first in range(0, width, BLOCK_K):
        is_column = first + c < width
        left = tl.load(xs, mask=is_token[:, None] & is_column[None, :], other=0)
        right = tl.load(ws, mask=is_column[:, None] & is_latent[None, :], other=0)
        if WIDEN:  # the interpreter multiplies the bit patterns of bfloat16 as integers
            left, right = left.to(tl.float32), right.to(tl.float32)
        sums = tl.dot(left, right, sums, input_precision=PRECISION)
        xs += BLOCK_K
        ws += BLOCK_K
    bias = tl.load(b + f, mask=is_latent, other=0).to(tl.float32)
    sums = tl.where(is_latent[None, :], tl.maximum(sums + bias[None, :], 0), -1)
    rounded = sums.to(pre.dtype.element_ty)
    here = t.to(tl.int64)[:, None] * (groups * GROUP) + f[None, :]
    tl.store(pre + here, rounded, mask=is_token[:, None] & (f < groups * GROUP)[None, :])
    grouped = tl.reshape(rounded.to(tl.float32), (BLOCK_T, BLOCK_F // GROUP, GROUP))
    largest = tl.max(grouped, axis=2).to(pre.dtype.element_ty)
    i = block * (BLOCK_F // GROUP) + tl.arange(0, BLOCK_F // GROUP)
    here = t.to(tl.int64)[:, None] * groups + i[None, :]
    tl.store(maxima + here, largest, mask=is_token[:, None] & (i < groups)[None, :])


INTERPRETED = not isinstance(decode, triton.JITFunction)
"""Whether TRITON_INTERPRET was set when this module was imported: CPU tensors, no compilation."""
