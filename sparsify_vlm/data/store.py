"""Reading activations that were captured before: `ActivationStore`."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sparsify_vlm.data.row_order import RowOrder
from sparsify_vlm.data.store_format import (
    Shard,
    canonical_model,
    read_manifest,
    read_shards,
    tensor_path,
)
from sparsify_vlm.errors import UserError
from sparsify_vlm.files import sha256

if TYPE_CHECKING:
    from sparsify_vlm.models import InputSite

OPEN_SHARDS = 32
"""Shards whose files are mapped at the same time."""
TABLE = ("input_ids", "position", "sample", "role", "patch")


@dataclass
class StoreBatch:
    """Whole rows of a store: L layers, T tokens, in the store's dtype, on the CPU.

    Layers that an imported store does not have are NaN in x or y (`x_layers`, `y_layers`).
    """

    x: Tensor
    """[L, T, d_model]."""
    y: Tensor
    """[L, T, d_model]."""
    input_ids: Tensor
    """[T] int32; -1 if not known."""
    position: Tensor
    """Index within the sample, [T] int32; -1 if not known."""
    sample: Tensor
    """Number of the sample within the store, [T] int32; -1 if not known."""
    role: Tensor
    """[T] uint8, see `models.Role`; 255 if not known."""
    patch: Tensor
    """(row, column) of image tokens in their image, [T, 2] int16; -1 elsewhere."""

    def __len__(self) -> int:
        return len(self.input_ids)


class ActivationStore:
    """Captured activations on disk, mapped into memory and read where they are used.

    A shard's files are checked against their checksum when it is first touched; `verify=False`
    leaves that out. `incomplete=True` opens a capture that has not ended, with its finished shards.

    Raises `UserError` for a folder that is no store, is incomplete, or is damaged.
    """

    def __init__(self, path: str | Path, *, verify: bool = True, incomplete: bool = False) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        self.shards = read_shards(self.path)
        self._check_complete(incomplete)
        self._verified: set[str] = set() if verify else {shard.name for shard in self.shards}
        self._mapped: OrderedDict[int, _Mapped] = OrderedDict()
        self._starts = np.cumsum([0, *(shard.tokens for shard in self.shards)])

    def _check_complete(self, incomplete: bool) -> None:
        if not self.manifest.get("complete"):
            if not incomplete:
                raise UserError(
                    f"the capture in {self.path} has not ended: run the same capture command "
                    "again, it continues where it stopped"
                )
        elif len(self.shards) != self.manifest["shards"]:
            raise UserError(
                f"{self.path} is damaged: {len(self.shards)} shards are listed, "
                f"{self.manifest['shards']} were written"
            )

    def __len__(self) -> int:
        """Tokens."""
        return int(self._starts[-1])

    @property
    def n_samples(self) -> int:
        """Samples."""
        return sum(shard.samples for shard in self.shards)

    @property
    def roles(self) -> dict[str, int]:
        """Tokens by role."""
        counts: dict[str, int] = {}
        for shard in self.shards:
            for role, n in shard.roles.items():
                counts[role] = counts.get(role, 0) + n
        return counts

    @property
    def model(self) -> str | None:
        """Name of the model that was captured; None if an import did not name it."""
        model: str | None = self.manifest["model"]
        return model

    @property
    def revision(self) -> str | None:
        """Its commit on the Hub, where known."""
        revision: str | None = self.manifest["revision"]
        return revision

    @property
    def hookpoints(self) -> list[str]:
        """Canonical names of the captured layers, in order."""
        return list(self.manifest["hookpoints"])

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.manifest["d_model"])

    @property
    def dtype(self) -> torch.dtype:
        """Of x and y."""
        dtype: torch.dtype = getattr(torch, self.manifest["dtype"])
        return dtype

    @property
    def n_targets(self) -> int:
        """Targets of a source layer at most, as given when capturing."""
        return int(self.manifest["n_targets"])

    @property
    def target_offset(self) -> int:
        """0 if a layer's first target is its own y, 1 if it is the next layer's."""
        return int(self.manifest["target_offset"])

    @property
    def input_site(self) -> InputSite:
        """Where x was read."""
        site: InputSite = self.manifest["sites"]["x"]
        return site

    @property
    def x_layers(self) -> list[int]:
        """Layers that x is stored of: all, unless the store was imported."""
        return list(self.manifest["x_layers"])

    @property
    def y_layers(self) -> list[int]:
        """Layers that y is stored of: all, unless the store was imported."""
        return list(self.manifest["y_layers"])

    @property
    def bos_token_id(self) -> int | None:
        """The tokenizer's beginning-of-sequence token, if it has one."""
        token: int | None = self.manifest["bos_token_id"]
        return token

    @cached_property
    def fingerprint(self) -> str:
        """Of what is stored: two stores with the same one give the same batches."""
        shards = [json.loads(shard.line()) for shard in self.shards]
        text = json.dumps([self.hookpoints, self.input_site, shards], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def check_model(self, name: str, d_model: int, hookpoints: Sequence[str]) -> None:
        """Raise `UserError` unless the store is of this model.

        The last part of a name counts, so that a model's local copy is taken for the model.
        """
        if self.model is not None and _last_part(self.model) != _last_part(name):
            raise UserError(f"{self.path} holds activations of {self.model}, not of {name}")
        if self.d_model != d_model:
            raise UserError(
                f"{self.path} holds activations of width {self.d_model}; {name} has {d_model}"
            )
        if strange := [hookpoint for hookpoint in self.hookpoints if hookpoint not in hookpoints]:
            raise UserError(f"{self.path} holds {strange[0]}, which {name} does not have")

    def check_layers(self, x: Iterable[int], y: Iterable[int]) -> None:
        """Raise `UserError` unless x of the one layers and y of the others are stored."""
        for kind, wanted, stored in (("x", x, self.x_layers), ("y", y, self.y_layers)):
            if missing := sorted(set(wanted) - set(stored)):
                raise UserError(
                    f"{self.path} does not hold {kind} of {self.hookpoints[missing[0]]}: it was "
                    f"imported with --target_offset {self.target_offset}"
                )

    def batches(
        self, tokens: int, seed: int, start: int = 0, rank: int = 0, world: int = 1
    ) -> Iterator[StoreBatch]:
        """All rows once, shuffled, in global batches of `tokens · world` rows.

        Of every global batch this is the `rank`-th of `world` contiguous parts, so that the global
        batches hold the same rows for every number of processes. Starting at batch `start` costs
        no reading. The order is a function of the seed and the store; see `row_order.py`.
        """
        order = RowOrder([shard.tokens for shard in self.shards], seed)
        together = tokens * world
        for begin in range(start * together, len(self), together):
            rows = order.slice(begin, begin + together)
            n = len(rows)
            yield self.rows(rows[n * rank // world : n * (rank + 1) // world])

    def rows(self, rows: Iterable[int] | np.ndarray) -> StoreBatch:
        """Rows by their number, in ascending order (neighbours on the disk are read together)."""
        index = np.sort(np.fromiter(rows, np.int64) if not isinstance(rows, np.ndarray) else rows)
        layers, shape = len(self.hookpoints), (len(index), self.d_model)
        x, y = (torch.empty(layers, *shape, dtype=self.dtype) for _ in range(2))
        for stacked, stored in ((x, self.x_layers), (y, self.y_layers)):
            stacked[sorted(set(range(layers)) - set(stored))] = torch.nan
        table: dict[str, list[Tensor]] = {name: [] for name in TABLE}
        for mapped, local, place in self._by_shard(index):
            mapped.gather("x", self.x_layers, local, x[:, place])
            mapped.gather("y", self.y_layers, local, y[:, place])
            for name, parts in table.items():
                parts.append(mapped.table(name)[local])
        return StoreBatch(x, y, **{name: _joined(name, parts) for name, parts in table.items()})

    def view(
        self, layer: int, n_targets: int | None = None, target_offset: int | None = None
    ) -> StoreView:
        """One source layer's x and the y of its targets; by default as the store was captured.

        `layer` counts the store's hookpoints. Raises `UserError` if there is no such layer.
        """
        n = self.n_targets if n_targets is None else n_targets
        offset = self.target_offset if target_offset is None else target_offset
        if not 0 <= layer < len(self.hookpoints):
            raise UserError(f"{self.path} has layers 0 to {len(self.hookpoints) - 1}, not {layer}")
        targets = range(layer + offset, min(layer + offset + n, len(self.hookpoints)))
        self.check_layers([layer], targets)
        return StoreView(self, layer, list(targets))

    def layer_rows(self, kind: str, layer: int, rows: np.ndarray) -> Tensor:
        """x or y of one layer, [len(rows), d_model], in the order of `rows`."""
        ascending = np.argsort(rows, kind="stable")
        out = torch.empty(len(rows), self.d_model, dtype=self.dtype)
        slot = {"x": self.x_layers, "y": self.y_layers}[kind].index(layer)
        for mapped, local, place in self._by_shard(rows[ascending]):
            out[torch.from_numpy(ascending[place])] = mapped.values[kind][slot][local]
        return out

    def _by_shard(self, rows: np.ndarray) -> Iterator[tuple[_Mapped, Tensor, slice]]:
        """Ascending `rows` by the shard they are in: the shard, rows within it, their places."""
        if len(rows) and not 0 <= rows[0] <= rows[-1] < len(self):
            raise IndexError(f"rows {rows[0]} to {rows[-1]} of a store of {len(self)}")
        bounds = np.searchsorted(rows, self._starts)
        for shard in np.flatnonzero(np.diff(bounds)):
            place = slice(int(bounds[shard]), int(bounds[shard + 1]))
            yield self._map(int(shard)), torch.from_numpy(rows[place] - self._starts[shard]), place

    def _map(self, number: int) -> _Mapped:
        if number not in self._mapped:
            self._verify(self.shards[number])
            if len(self._mapped) >= OPEN_SHARDS:
                self._mapped.popitem(last=False)
            self._mapped[number] = self._opened(self.shards[number])
        self._mapped.move_to_end(number)
        return self._mapped[number]

    def _opened(self, shard: Shard) -> _Mapped:
        mapped = _Mapped(self.path, shard)
        for kind, layers in (("x", self.x_layers), ("y", self.y_layers)):
            values, wanted = mapped.values[kind], (len(layers), shard.tokens, self.d_model)
            if tuple(values.shape) != wanted or values.dtype != self.dtype:
                raise UserError(
                    f"{tensor_path(self.path, shard.name, kind)} holds {list(values.shape)} "
                    f"{values.dtype}, manifest.json says {list(wanted)} {self.dtype}"
                )
        return mapped

    def _verify(self, shard: Shard) -> None:
        if shard.name in self._verified:
            return
        for kind, expected in shard.sha256.items():
            path = tensor_path(self.path, shard.name, kind)
            if not path.exists():
                raise UserError(f"{path} is missing: capture into an empty folder again")
            if sha256(path) != expected:
                raise UserError(
                    f"{path} is damaged: its checksum is not the one of {self.path}/shards.jsonl; "
                    "capture into an empty folder again"
                )
        self._verified.add(shard.name)


class StoreView:
    """One source layer of a store; `view[rows]` is (x, [y of every target]).

    rows: a slice, or integers in any order. `x` and each `y` can also be indexed alone.
    """

    def __init__(self, store: ActivationStore, layer: int, targets: list[int]) -> None:
        self.layer, self.targets = layer, targets
        self.x = LayerRows(store, "x", layer)
        self.y = [LayerRows(store, "y", target) for target in targets]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: slice | Iterable[int]) -> tuple[Tensor, list[Tensor]]:
        index = self.x.numbers(rows)
        return self.x[index], [y[index] for y in self.y]


class LayerRows:
    """x or y of one layer, [tokens, d_model], read when it is indexed."""

    def __init__(self, store: ActivationStore, kind: str, layer: int) -> None:
        self.store, self.kind, self.layer = store, kind, layer

    def __len__(self) -> int:
        return len(self.store)

    @property
    def shape(self) -> tuple[int, int]:
        """(tokens, d_model)."""
        return len(self.store), self.store.d_model

    def numbers(self, rows: slice | Iterable[int]) -> np.ndarray:
        """The row numbers that `rows` means."""
        if isinstance(rows, slice):
            return np.arange(len(self))[rows]
        index = np.asarray(rows if isinstance(rows, np.ndarray) else list(rows), dtype=np.int64)
        return np.where(index < 0, index + len(self), index)

    def __getitem__(self, rows: slice | Iterable[int]) -> Tensor:
        return self.store.layer_rows(self.kind, self.layer, self.numbers(rows))


class _Mapped:
    """A shard's two files, mapped: pages are read from disk when their values are."""

    def __init__(self, folder: Path, shard: Shard) -> None:
        from safetensors import safe_open

        self._tables: dict[str, Tensor] = {}
        self.values: dict[str, Tensor] = {}
        for kind in ("x", "y"):
            path = tensor_path(folder, shard.name, kind)
            with safe_open(path, framework="pt") as file:
                names = file.keys()
                tensors = {name: file.get_tensor(name) for name in names}
            if kind not in tensors:
                raise UserError(f"{path} does not hold {kind}")
            self.values[kind] = tensors.pop(kind)
            self._tables |= tensors

    def table(self, name: str) -> Tensor:
        """A column of the token table."""
        return self._tables[name]

    def gather(self, kind: str, layers: Sequence[int], rows: Tensor, out: Tensor) -> None:
        """Copy `rows` of every stored layer into out [L, len(rows), d]."""
        for slot, layer in enumerate(layers):
            torch.index_select(self.values[kind][slot], 0, rows, out=out[layer])


def _last_part(model: str) -> str:
    return canonical_model(model).rstrip("/").split("/")[-1].lower()


def _joined(name: str, parts: list[Tensor]) -> Tensor:
    if parts:
        return torch.cat(parts)
    empty: dict[str, Any] = {"role": torch.uint8, "patch": torch.int16}
    shape = (0, 2) if name == "patch" else (0,)
    return torch.empty(shape, dtype=empty.get(name, torch.int32))
