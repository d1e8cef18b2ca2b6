"""Decoders read from safetensors files in pieces, whatever the order they are stored in."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify_vlm.coders.clt import Clt
from sparsify_vlm.coders.formats.rows import Rows, read_in_turn
from sparsify_vlm.coders.formats.stored import BLOCK_BYTES, StoredClt, is_finite
from sparsify_vlm.errors import UserError


@dataclass(frozen=True)
class Segment:
    """Where the decoders of some neighbouring latents are stored: tensors with equal rows."""

    tables: Sequence[Rows]

    @property
    def count(self) -> int:
        return self.tables[0].count

    def pieces(self, max_bytes: int) -> Iterator[Sequence[Rows]]:
        """The same rows in pieces of at most `max_bytes`, but at least one row."""
        step = max(1, max_bytes // sum(rows.row_bytes for rows in self.tables))
        for first in range(0, self.count, step):
            count = min(step, self.count - first)
            yield [rows.part(first, count) for rows in self.tables]


class OnDisk(StoredClt):
    """A coder in safetensors files."""

    dtype: torch.dtype
    """Of the stored weights."""

    def output_bias(self, t: int) -> Tensor:
        """b_dec [d] of target `t`."""
        raise NotImplementedError

    def skip(self, s: int, k: int) -> Tensor | None:
        """W_skip [d, d] of layer `s` to its k-th target, as in W_skip x."""
        return None

    @torch.no_grad()
    def load(self, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Clt:
        """The whole coder, read layer by layer."""
        clt = Clt(self.cfg, device, dtype or self.dtype)
        for s in self.cfg.source_layers():
            clt.W_enc[s].copy_(self.encoder(s))
            clt.b_enc[s].copy_(self.encoder_bias(s))
            if (threshold := self.threshold(s)) is not None:
                clt.threshold[s].copy_(threshold)
            for first, rows in self.decoder_blocks(s):
                for k, W in enumerate(clt.W_dec[s]):
                    W[first : first + len(rows)] = rows[:, k]
        for t in self.cfg.target_layers():
            clt.b_dec[t].copy_(self.output_bias(t))
        return clt

    @abstractmethod
    def decoder_segments(self, s: int) -> list[Segment]:
        """Where the decoders of layer `s` are stored, in the order of the latents."""

    @abstractmethod
    def arrange(self, s: int, first: int, tables: Tensor) -> Tensor:
        """[rows, n_targets, d] from the stored [len(segment.tables), rows, …] of the latents from
        `first` on."""

    def decoder_blocks(
        self, s: int, max_bytes: int = BLOCK_BYTES, check: bool = True
    ) -> Iterator[tuple[int, Tensor]]:
        segments = self.decoder_segments(s)
        pieces = [piece for segment in segments for piece in segment.pieces(max_bytes)]
        first = 0
        for tables in read_in_turn(pieces):
            if check and not is_finite(tables):
                raise self.not_finite(s)
            yield first, self.arrange(s, first, tables)
            first += tables.shape[1]

    def not_finite(self, s: int) -> UserError:
        for segment in self.decoder_segments(s):
            for rows in segment.tables:
                for piece in read_in_turn([*Segment([rows]).pieces(BLOCK_BYTES)]):
                    if not bool(torch.isfinite(piece).all()):
                        return UserError(
                            f"{rows.path}: tensor '{rows.key}' holds NaN or infinite values"
                        )
        return UserError(f"{self.path}: a decoder of layer {s} is too large for float32")
