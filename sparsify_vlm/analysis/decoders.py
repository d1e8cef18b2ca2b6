"""All that the experiments on weights need of the decoders, from reading each of them once.

Of the decoder of source layer s, [F, T, d] with T targets, what stays in memory is [F, T]: squared
norms, and products with the decoder of the first target. The first target is the source's own
layer; of a coder that reads x_l to write from y_{l+1} on, it is the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from natsort import natsorted
from torch import Tensor

from sparsify_vlm.coders import Clt, CltConfig
from sparsify_vlm.coders.formats.stored import InMemory, StoredClt
from sparsify_vlm.coders.kernels import compiled

BLOCK_BYTES = 4 << 20
"""Read at a time: it is still in the cache when it is worked on."""
READERS = 2
"""Layers read side by side: one is worked on while the system copies what was read of another."""
COLUMNS = 16
"""Of an encoder that is stored by columns, gone through at a time."""


@dataclass(frozen=True)
class SourceDecoders:
    """The decoders of one source layer, as numbers per latent and target. All in y's units."""

    source: int
    targets: range
    squared: Tensor
    """[F, T]: ‖W_{s→t}[i]‖²."""
    with_first: Tensor
    """[F, T]: ⟨W_{s→t}[i], W_{s→first}[i]⟩."""
    encoder_norm: Tensor
    """[F]: ‖W_enc[i]‖."""

    @property
    def writes(self) -> Tensor:
        """[F]: whether a latent writes anywhere."""
        return self.squared.sum(1) > 0

    def cosine(self) -> Tensor:
        """[F, T] float64: cosine with the decoder of the first target; NaN where one is 0."""
        squared = self.squared.double()
        return self.with_first.double() / (squared * squared[:, :1]).sqrt()


@dataclass(frozen=True)
class Decoders:
    """The decoders of all source layers."""

    cfg: CltConfig
    sources: Sequence[SourceDecoders]
    warnings: Sequence[str] = ()
    """What the reader found and did not use."""

    @property
    def writes_across(self) -> bool:
        """Whether any coder has a target beside its first."""
        return any(len(source.targets) > 1 for source in self.sources)


Coder = StoredClt | Clt | Decoders


@contextmanager
def one_thread() -> Iterator[None]:
    """Context in which torch's operations stay in the calling thread, also a decorator.

    Many of those here are too small to be shared out, and helping threads that wait for the next
    one by spinning keep others from their work.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@one_thread()
def read_decoders(coder: Coder, watch: Callable[[int], None] = lambda _: None) -> Decoders:
    """Read every layer's coder once, by READERS threads, each one block of `BLOCK_BYTES` at a time.

    `watch(s)` is called before source layer `s` is waited for. What was read already is returned
    as it is. Raises `UserError` naming the file and key of a tensor that is not finite.
    """
    if isinstance(coder, Decoders):
        return coder
    stored = InMemory(coder) if isinstance(coder, Clt) else coder
    sources, pool = [], ThreadPoolExecutor(READERS)
    try:
        readings = [(s, pool.submit(_source, stored, s)) for s in stored.cfg.source_layers()]
        for s, reading in readings:
            watch(s)
            sources.append(reading.result())
    finally:
        pool.shutdown(cancel_futures=True)
    return Decoders(stored.cfg, sources, tuple(natsorted(stored.warnings)))


@torch.no_grad()
def _source(stored: StoredClt, s: int) -> SourceDecoders:
    targets = stored.cfg.targets(s)
    shape = (stored.cfg.num_latents, len(targets))
    squared, with_first = torch.empty(shape), torch.empty(shape)
    for first, block in stored.decoder_blocks(s, BLOCK_BYTES, check=False):
        if first == 0 and block.dtype == torch.float64:
            squared, with_first = squared.double(), with_first.double()
        rows = slice(first, first + len(block))
        _products()(block, squared[rows], with_first[rows])
    if not bool(torch.isfinite(squared).all()):
        raise stored.not_finite(s)
    stored.encoder_bias(s), stored.threshold(s)  # not used here, but refused if not finite
    norms = encoder_norms(stored.encoder(s).to(squared.dtype))
    return SourceDecoders(s, targets, squared, with_first, norms)


def encoder_norms(W: Tensor) -> Tensor:
    """‖W_enc[i]‖ [F] of W_enc [F, d], however it lies in memory."""
    if W.is_contiguous():
        return torch.linalg.vecdot(W, W).sqrt()
    total = torch.zeros(len(W), dtype=W.dtype)
    for part in W.split(COLUMNS, dim=1):
        columns = part.T.numpy()
        total += torch.from_numpy(np.einsum("df,df->f", columns, columns))
    return total.sqrt()


def products(block: Tensor, squared: Tensor, with_first: Tensor) -> None:
    """Fill `squared` and `with_first` [rows, T] from W [rows, T, d]."""
    W = block.to(squared.dtype)
    torch.linalg.vecdot(W, W, out=squared)
    torch.linalg.vecdot(W, W[:, :1], out=with_first)


def compiled_products(block: Tensor, squared: Tensor, with_first: Tensor) -> None:
    """The same in one pass over the numbers. Needs numba, and tensors on the CPU."""
    from sparsify_vlm.analysis.compiled_products import row_products

    W = block.to(squared.dtype)
    if W.stride(2) != 1:
        W = W.contiguous()
    (rows, targets, d), (of_row, of_target, _) = W.shape, W.stride()
    spanned = (rows - 1) * of_row + (targets - 1) * of_target + d
    flat = W.as_strided((spanned,), (1,))
    row_products(flat.numpy(), of_row, of_target, d, squared.numpy(), with_first.numpy())


@cache
def _products() -> Callable[[Tensor, Tensor, Tensor], None]:
    return compiled_products if compiled.available() else products


def mean_write_norms(coder: Coder, sigma: Sequence[float]) -> list[list[float | None]]:
    """Mean over latents of ‖W_{s→t}[i]‖ / σ_t, as [source layer][target layer].

    W_{s→t}[i] is all that latent i, with activation 1, adds to ŷ_t; σ_t is the standard deviation
    of y_t. None where a source does not write to a target.
    """
    decoders = read_decoders(coder)
    n_layers = decoders.cfg.n_layers
    norms: list[list[float | None]] = [[None] * n_layers for _ in range(n_layers)]
    for source in decoders.sources:
        for t, mean in zip(source.targets, source.squared.sqrt().mean(0).tolist(), strict=True):
            norms[source.source][t] = mean / sigma[t]
    return norms
