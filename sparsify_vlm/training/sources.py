"""Where a step's tokens come from: the running model, or an activation store.

Both number their batches globally, so that a run can start at any of them, and give each process
its own part. Only counted tokens are handed on (no padding, no excluded ones).

With `stream_activations` the model runs on `micro_acc_steps` parts of a batch, one after the other,
whenever the batch's pieces are asked for: x and y of one part at a time are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from sparsify_vlm.data import DataConfig, batches, open_samples, prefetched
from sparsify_vlm.errors import UserError
from sparsify_vlm.models import record_tokens
from sparsify_vlm.training.config import TrainConfig
from sparsify_vlm.training.distributed import World

if TYPE_CHECKING:
    from sparsify_vlm.data import ActivationStore
    from sparsify_vlm.models import LoadedModel


Inputs = dict[str, Tensor]
"""A processor's batch; empty where it has no samples."""


class Batch(Protocol):
    """One process's counted tokens of one global batch."""

    inputs: Sequence[Inputs]
    """The processor's batches that the tokens come from, for losses on predictions."""

    def pieces(self, count: int) -> Iterator[TokenBatch]:
        """The tokens in about `count` pieces, at least one (which may be empty); a batch that is
        streamed has its own number of them. Forget a piece before asking for the next one."""
        ...


@dataclass
class TokenBatch:
    """Tokens in memory; L layers, T tokens (T may be 0).

    x, y: [L, T, d_model] in the model's dtype, each layer contiguous; role: [T] uint8, see
    `models.Role`.
    """

    x: Tensor
    y: Tensor
    role: Tensor
    inputs: Sequence[Inputs] = ()

    def pieces(self, count: int) -> Iterator[TokenBatch]:
        """See `Batch`."""
        tokens = len(self.role)
        size = -(-tokens // count) or 1
        for first in range(0, max(tokens, 1), size):
            part = slice(first, first + size)
            yield TokenBatch(self.x[:, part], self.y[:, part], self.role[part])


@dataclass
class StreamedBatch:
    """Tokens that are made a piece at a time, anew whenever they are asked for."""

    inputs: Sequence[Inputs]
    """One per piece."""
    record: Callable[[Inputs], TokenBatch]
    """Runs the model."""

    def pieces(self, count: int) -> Iterator[TokenBatch]:
        """See `Batch`; `count` is not heeded."""
        for inputs in self.inputs:
            yield self.record(inputs)


class TokenSource(Protocol):
    """What the trainer needs to know of its data."""

    hookpoints: list[str]
    """Names of the chosen layers, in order."""
    d_model: int
    device: torch.device
    n_batches: int | None
    """Global batches in one pass; None: not known."""

    @property
    def identity(self) -> dict[str, Any]:
        """What decides which tokens come in which order; a resumed run must have the same."""
        ...

    @property
    def skipped(self) -> list[str]:
        """The samples left out so far as "id: reason"."""
        ...

    def batches(self, epoch: int, start: int) -> Iterator[Batch]:
        """This process's part of the global batches of one pass, from number `start` on."""
        ...


def chosen_layers(
    cfg: TrainConfig, n_layers: int, match: Callable[[Sequence[str]], list[int]]
) -> list[int]:
    """Layers named by `--hookpoints` or `--layers` (default: all), every `--layer_stride`-th.

    Raises `UserError` for a layer or hookpoint that is not there.
    """
    if beyond := [layer for layer in cfg.layers if layer >= n_layers]:
        raise UserError(f"--layers {beyond[0]}: there are {n_layers} layers, counted from 0")
    if cfg.hookpoints:
        layers = match(cfg.hookpoints)
    else:
        layers = sorted(cfg.layers) or list(range(n_layers))
    return layers[:: cfg.layer_stride]


class LiveSource:
    """Tokens of a model that is run on a dataset.

    The next batches are decoded and encoded in a thread while the model and the coders compute.
    """

    def __init__(
        self, cfg: TrainConfig, data: DataConfig, loaded: LoadedModel, world: World
    ) -> None:
        self.cfg, self.data, self.loaded, self.world = cfg, data, loaded, world
        self.layers = chosen_layers(cfg, loaded.stack.n_layers, loaded.stack.match)
        self.hookpoints = [loaded.stack.hookpoints[layer] for layer in self.layers]
        self.d_model = loaded.stack.d_model
        self.device = loaded.device
        self.input_site = cfg.sae.input_site if cfg.sae.transcode else "mlp_out"
        self.samples = open_samples(data, loaded)
        self._excluded = torch.tensor(cfg.exclude_tokens, dtype=torch.int32, device=self.device)
        size, together = self.samples.size, cfg.batch_size * world.size
        self.n_batches = None if size is None else -(-size // together)

    @property
    def identity(self) -> dict[str, Any]:
        """Dataset, order and batch, apart from how many processes share a batch."""
        data = asdict(self.data)
        del data["data_preprocessing_num_proc"]
        return {
            "data": data,
            "dataset": self.samples.fingerprint,
            "batch_size over all processes": self.cfg.batch_size * self.world.size,
            "dtype": str(self.loaded.dtype).removeprefix("torch."),
        }

    @property
    def skipped(self) -> list[str]:
        """The samples left out so far as "id: reason"."""
        return self.samples.bad

    def batches(self, epoch: int, start: int) -> Iterator[Batch]:
        """See `TokenSource`; every pass has the same order."""
        parts = self.cfg.micro_acc_steps if self.cfg.stream_activations else 1
        numbered = batches(
            self.samples,
            self.loaded,
            self.cfg.batch_size // parts,
            self.data.ctx_len,
            start=start * parts,
            rank=self.world.rank,
            world=self.world.size,
        )
        with closing(prefetched(numbered)) as ahead:
            if self.cfg.stream_activations:
                while together := [encoded.inputs for encoded in islice(ahead, parts)]:
                    yield StreamedBatch(together, self._record)
                return
            for encoded in ahead:
                yield self._record(encoded.inputs)

    def _record(self, inputs: Inputs) -> TokenBatch:
        if not inputs:
            return self._nothing()
        table = record_tokens(self.loaded, inputs, self.input_site, self.layers)
        counted = table.counted(
            self.cfg.filter_bos, self.cfg.remove_first_token, self.loaded.tokenizer.bos_token_id
        )
        counted &= torch.isin(table.input_ids, self._excluded, invert=True)
        x, y = (compacted(values, counted) for values in (table.x, table.y))
        return TokenBatch(x, y, table.role[counted], [inputs])

    def _nothing(self) -> TokenBatch:
        none = torch.empty(len(self.layers), 0, self.d_model, device=self.device)
        return TokenBatch(none, none, torch.empty(0, dtype=torch.uint8, device=self.device))


class StoreSource:
    """Tokens of an activation store, in whole rows (all layers of a token), shuffled anew for
    every pass."""

    def __init__(
        self,
        cfg: TrainConfig,
        store: ActivationStore,
        seed: int,
        world: World,
        device: torch.device,
    ) -> None:
        self.cfg, self.store, self.seed, self.world = cfg, store, seed, world
        self.device = device
        self.layers = chosen_layers(cfg, len(store.hookpoints), self._match)
        self.hookpoints = [store.hookpoints[layer] for layer in self.layers]
        self.d_model = store.d_model
        self.n_batches: int | None = -(-len(store) // (cfg.batch_tokens * world.size))
        offset = cfg.sae.target_offset
        if cfg.sae.transcode and store.input_site != cfg.sae.input_site:
            raise UserError(
                f"{store.path} holds x at {store.input_site}, but --input_site is "
                f"{cfg.sae.input_site}"
            )
        sources, targets = self.layers[: -offset or None], self.layers[offset:]
        store.check_layers(sources if cfg.sae.transcode else [], targets)
        self._excluded = torch.tensor(cfg.exclude_tokens, dtype=torch.int32)

    def _match(self, patterns: Sequence[str]) -> list[int]:
        names = self.store.hookpoints
        found: set[int] = set()
        for pattern in patterns:
            hits = {i for i, name in enumerate(names) if fnmatchcase(name, pattern)}
            if not hits:
                raise UserError(
                    f"hookpoint '{pattern}' matches nothing in {self.store.path}, which has "
                    f"{names[0]} … {names[-1]}"
                )
            found |= hits
        return sorted(found)

    @property
    def identity(self) -> dict[str, Any]:
        """Store, order and batch, apart from how many processes share a batch."""
        return {
            "activations": self.store.fingerprint,
            "shuffle_seed": self.seed,
            "batch_tokens over all processes": self.cfg.batch_tokens * self.world.size,
        }

    @property
    def skipped(self) -> list[str]:
        """Nothing: a store holds only what could be captured."""
        return []

    def batches(self, epoch: int, start: int) -> Iterator[TokenBatch]:
        """See `TokenSource`."""
        rows = self.store.batches(
            self.cfg.batch_tokens,
            self.seed + epoch,
            start=start,
            rank=self.world.rank,
            world=self.world.size,
        )
        with closing(prefetched(rows)) as ahead:
            for batch in ahead:
                yield self._counted(batch)

    def _counted(self, batch: Any) -> TokenBatch:
        counted = torch.isin(batch.input_ids, self._excluded, invert=True)
        bos = self.store.bos_token_id
        if self.cfg.filter_bos and bos is not None:
            counted &= batch.input_ids != bos
        if self.cfg.remove_first_token:
            counted &= batch.position != 0
        y = self._chosen(batch.y, counted)
        x = self._chosen(batch.x, counted) if self.cfg.sae.transcode else y
        return TokenBatch(x, y, batch.role[counted].to(self.device))

    def _chosen(self, values: Tensor, counted: Tensor) -> Tensor:
        if len(self.layers) < len(values):
            values = values[self.layers]
        return compacted(values, counted).to(self.device)


def compacted(values: Tensor, counted: Tensor) -> Tensor:
    """values[:, counted] of values [L, T, d] in the same memory, which is overwritten."""
    n = int(counted.sum())
    if n < len(counted):
        for layer in values:
            layer[:n] = layer[counted]
    return values[:, :n]
