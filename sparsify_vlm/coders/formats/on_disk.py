"""Coders read from safetensors files layer by layer, whatever the order they are stored in."""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparsify_vlm.coders.clt import Clt
from sparsify_vlm.coders.formats.checked import CheckedTensors
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
    """A coder in safetensors files. A format says where each tensor is and how it is turned."""

    dtype: torch.dtype
    """Of the stored weights."""

    @abstractmethod
    def stored_encoder(self, s: int) -> Tensor:
        """W_enc [F, d] of layer `s`, without `in_scale`."""

    @abstractmethod
    def decoder_segments(self, s: int) -> list[Segment]:
        """Where the decoders of layer `s` are stored."""

    @abstractmethod
    def arrange(self, s: int, first: int, tables: Tensor) -> Tensor:
        """[rows, n_targets, d] from what is stored of the latents from `first` on, which is
        [len(segment.tables), rows, …]; without `out_scale`."""

    def in_scale(self, s: int) -> float:
        """What x of layer `s` is multiplied with before the coder sees it."""
        return 1.0

    def out_scale(self, t: int) -> float:
        """What the coder's sum for target `t` is multiplied with to give ŷ."""
        return 1.0

    # ---- reading

    def encoder(self, s: int) -> Tensor:
        W, scale = self.stored_encoder(s), self.in_scale(s)
        return W if scale == 1 else W * scale

    def decoder_blocks(
        self, s: int, max_bytes: int = BLOCK_BYTES, check: bool = True
    ) -> Iterator[tuple[int, Tensor]]:
        for first, W in self.stored_blocks(s, max_bytes, check):
            scale = self.decoder_scale(s, first, len(W))
            yield first, W if scale is None else W * scale

    def stored_blocks(self, s: int, max_bytes: int, check: bool) -> Iterator[tuple[int, Tensor]]:
        """`decoder_blocks` without `decoder_scale`."""
        segments = self.decoder_segments(s)
        pieces = [piece for segment in segments for piece in segment.pieces(max_bytes)]
        first = 0
        for tables in read_in_turn(pieces):
            if check and not is_finite(tables):
                raise self.not_finite(s)
            yield first, self.arrange(s, first, tables)
            first += tables.shape[1]

    def decoder_scale(self, s: int, first: int, rows: int) -> Tensor | None:
        """Factors that turn `rows` stored decoder rows from `first` on into what one unit of an
        activation adds to ŷ, [rows or 1, n_targets, 1]; None if they are all 1."""
        scales = [self.out_scale(t) for t in self.cfg.targets(s)]
        return None if set(scales) == {1.0} else torch.tensor(scales).view(1, -1, 1)

    def not_finite(self, s: int) -> UserError:
        for segment in self.decoder_segments(s):
            for rows in segment.tables:
                for piece in read_in_turn([*Segment([rows]).pieces(BLOCK_BYTES)]):
                    if not bool(torch.isfinite(piece).all()):
                        return UserError(
                            f"{rows.path}: tensor '{rows.key}' holds NaN or infinite values"
                        )
        return UserError(f"{self.path}: a decoder of layer {s} is too large for float32")

    def note_unknown(self, file: CheckedTensors, known: Collection[str]) -> None:
        """Remember by name the tensors of a file that this program knows nothing of."""
        for key in sorted(file.keys - set(known)):
            self.warnings.append(f"{file.path.name}: tensor '{key}' is not known and not used")


class Assembled(OnDisk):
    """A format whose `Clt` is put together from what is read layer by layer."""

    @abstractmethod
    def stored_bias(self, t: int) -> Tensor:
        """b_dec [d] of target `t`, without `out_scale`."""

    def stored_skip(self, s: int, k: int) -> Tensor | None:
        """W_skip [d, d] of layer `s` to its k-th target, without `in_scale` and `out_scale`."""
        return None

    def output_bias(self, t: int) -> Tensor:
        return self.stored_bias(t) * self.out_scale(t)

    def skip(self, s: int, k: int) -> Tensor | None:
        W, t = self.stored_skip(s, k), self.cfg.targets(s)[k]
        return None if W is None else W * (self.in_scale(s) * self.out_scale(t))

    @torch.no_grad()
    def load(self, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Clt:
        clt = Clt(self.cfg, device, dtype or self.dtype)
        for s in self.cfg.source_layers():
            clt.W_enc[s].copy_(self.stored_encoder(s))
            clt.b_enc[s].copy_(self.encoder_bias(s))
            if (threshold := self.threshold(s)) is not None:
                clt.threshold[s].copy_(threshold)
            for first, rows in self.stored_blocks(s, BLOCK_BYTES, check=True):
                for k, W in enumerate(clt.W_dec[s]):
                    W[first : first + len(rows)] = rows[:, k]
            for k in range(len(self.cfg.targets(s))):
                stored, W_skip = self.stored_skip(s, k), clt.skip(s, k)
                if stored is not None and W_skip is not None:
                    W_skip.copy_(stored)
        for t in self.cfg.target_layers():
            clt.b_dec[t].copy_(self.stored_bias(t))
        root = math.sqrt(self.cfg.d_model)
        for i in range(self.cfg.n_layers):
            if clt.in_norm is not None and clt.out_norm is not None:
                clt.in_norm[i] = root / self.in_scale(i)
                clt.out_norm[i] = root * self.out_scale(i)
        return clt


def numbered_files(folder: Path, pattern: str) -> list[int]:
    """The numbers in the names of files that match `pattern`, which has one group, sorted."""
    names = [re.fullmatch(pattern, child.name) for child in folder.iterdir()]
    return sorted(int(match[1]) for match in names if match)


def check_numbers(folder: Path, numbers: Sequence[int], count: int, name: str) -> None:
    """Raise `UserError` unless the files `name` (with {}) are numbered 0 … count − 1."""
    for number in range(count):
        if number not in numbers:
            raise UserError(
                f"{folder / name.format(number)}: the file is missing; {count} layers are expected"
            )
    if extra := [number for number in numbers if number >= count]:
        raise UserError(
            f"{folder / name.format(extra[0])}: the other files are of a coder of {count} layers"
        )
