"""Tokens to measure a coder on, with what each is to its sample: of a model, or of a store.

    image      image tokens
    text       text after the first image token of its sample
    text_only  text of samples without an image
    other      the rest (text before an image, special tokens): counts in "all" only

The tokens a coder was not trained on (BOS unless its checkpoint says otherwise) are left out, as in
training and in `evaluate`. Batches hold whole samples, so that sums can be kept per sample.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from sparsify_vlm.coders import Clt, CltConfig
from sparsify_vlm.data import (
    ActivationStore,
    DataConfig,
    EncodedBatch,
    batches,
    open_samples,
    prefetched,
)
from sparsify_vlm.data.store import StoreBatch
from sparsify_vlm.errors import UserError
from sparsify_vlm.models import Role, record_tokens
from sparsify_vlm.progress import Progress
from sparsify_vlm.replacement import ExcludedTokens, VLMReplacementModel
from sparsify_vlm.replacement.evaluate import check_finite, held_out, with_masks

GROUPS = ("other", "image", "text", "text_only")
"""What a token's `group` counts."""
ROLES = ("all", *GROUPS[1:])
"""What figures are given for."""
STORE_BYTES = 128 << 20
"""x and y of a store that are in memory at a time, as float32."""
BLOCK = 256
"""Neighbouring rows that count as a sample where a store does not know its samples."""


@dataclass
class TokenBatch:
    """The counted tokens of whole samples; L layers (the coder's hookpoints), T tokens."""

    x: Tensor
    """What the coders read, [L, T, d]."""
    y: Tensor
    """What the MLPs write, [L, T, d]."""
    group: Tensor
    """Place in `GROUPS`, [T] uint8."""
    sample: Tensor
    """Number of the token's sample, [T] int64, ascending."""
    rows: Tensor
    """Samples of this batch, in order, [B] int64. One may have no counted token."""
    encoded: EncodedBatch | None = None
    """The model's inputs, and where the tokens are in them; None for a store."""
    counted: Tensor | None = None
    """bool [B, S]: the tokens of `encoded` that are here, in the order of its rows."""
    logits: Tensor | None = None
    """[B, S, V] of the model, where asked for."""

    def __len__(self) -> int:
        return len(self.group)

    @property
    def members(self) -> Tensor:
        """float64 [4, T]: 1 where a token counts for a role of `ROLES`."""
        every = torch.ones_like(self.group, dtype=torch.bool)
        rows = [every] + [self.group == GROUPS.index(role) for role in ROLES[1:]]
        return torch.stack(rows).double()

    @property
    def local(self) -> Tensor:
        """Index of each token's sample in `rows`, [T]."""
        return torch.searchsorted(self.rows, self.sample)


def token_groups(role: Tensor, sample: Tensor) -> Tensor:
    """Place in `GROUPS` of every token, [T] uint8, of whole samples one after the other.

    role: [T], see `Role`; sample: [T], ascending numbers, -1 where not known. All tokens of a
    sample must be there, the excluded ones too.
    """
    first = torch.ones_like(sample, dtype=torch.bool)
    first[1:] = sample[1:] != sample[:-1]
    slot = first.long().cumsum(0) - 1
    known = sample >= 0
    image = role == Role.IMAGE
    seen = torch.zeros(int(first.sum()), dtype=torch.long, device=role.device)
    per_sample = seen.index_add(0, slot, image.long())
    before = image.long().cumsum(0) - image.long()
    before -= before[first][slot]
    text = (role == Role.TEXT) & known
    group = torch.zeros_like(role, dtype=torch.uint8)
    group[image] = GROUPS.index("image")
    group[text & (before > 0)] = GROUPS.index("text")
    group[text & (per_sample[slot] == 0)] = GROUPS.index("text_only")
    return group


class Tokens(ABC):
    """Batches of tokens, the same at every iteration.

    Attributes:
        name: the dataset as notes call it.
        model: the model behind them; None for a store.
        size: samples at most, None if not known.
    """

    name: str
    model: VLMReplacementModel | None = None
    size: int | None

    @abstractmethod
    def __iter__(self) -> Iterator[TokenBatch]: ...


class Watched(Tokens):
    """The same tokens, with progress shown while they are used."""

    def __init__(self, tokens: Tokens, label: str, quiet: bool = False) -> None:
        self.tokens, self.label, self.quiet = tokens, label, quiet
        self.name, self.model, self.size = tokens.name, tokens.model, tokens.size

    def __iter__(self) -> Iterator[TokenBatch]:
        with Progress(self.label, self.size, unit="samples", quiet=self.quiet) as progress:
            for batch in self.tokens:
                yield batch
                progress.update(len(batch.rows))


def token_batches(
    data: DataConfig | ActivationStore | str | Path,
    coder: VLMReplacementModel | Clt | CltConfig,
    *,
    batch_size: int = 32,
    max_samples: int | None = None,
) -> Tokens:
    """The tokens of a dataset that `coder`'s model is run on, or those of an activation store.

    Of a dataset without a split, the one that `evaluate` takes. Raises `UserError` for data that
    is not for this coder: images for a text model, a store of another model, layers that are not
    stored, another input site.
    """
    model = coder if isinstance(coder, VLMReplacementModel) else None
    if isinstance(data, DataConfig):
        if model is None:
            raise UserError("a dataset needs a model to run on: give a model, or a store")
        return ModelTokens(data, model, batch_size, max_samples)
    store = data if isinstance(data, ActivationStore) else ActivationStore(data)
    clt = coder.clt if isinstance(coder, VLMReplacementModel) else coder
    if isinstance(clt, Clt):
        return StoreTokens(store, clt.cfg, clt.device, max_samples)
    return StoreTokens(store, clt, "cpu", max_samples)


class ModelTokens(Tokens):
    """Tokens of a model that is run on a dataset; with its `logits` if asked for."""

    def __init__(
        self,
        data: DataConfig,
        model: VLMReplacementModel,
        batch_size: int = 32,
        max_samples: int | None = None,
        logits: bool = False,
    ) -> None:
        known = [n for n in (data.max_examples, max_samples) if n is not None]
        self.data = replace(data, max_examples=min(known) if known else None)
        self.model, self.batch_size, self.logits = model, batch_size, logits
        self.source = open_samples(held_out(self.data, model.loaded.name), model.loaded)
        split = "" if data.dataset_mix else f" ({self.source.cfg.split})"  # a mix has several
        self.name, self.size = f"{self.source.name}{split}", self.source.size

    def with_logits(self, max_samples: int | None = None) -> ModelTokens:
        """The tokens of the first `max_samples` samples, and the model's logits."""
        assert self.model is not None
        return ModelTokens(self.data, self.model, self.batch_size, max_samples, logits=True)

    def __iter__(self) -> Iterator[TokenBatch]:
        assert self.model is not None
        made = batches(self.source, self.model.loaded, self.batch_size, self.source.cfg.ctx_len)
        first = 0
        with closing(prefetched(with_masks(made))) as ahead:
            for encoded in ahead:
                yield self._recorded(self.model, encoded, first)
                first += len(encoded)

    def _recorded(
        self, model: VLMReplacementModel, encoded: EncodedBatch, first: int
    ) -> TokenBatch:
        loaded, device = model.loaded, model.clt.device
        table = record_tokens(
            loaded, encoded.inputs, model.input_site, model.layers, logits=self.logits
        )
        check_finite(table.x, table.y, model.clt.cfg.hookpoints)
        kept = ~model.excluded.of(table.input_ids, table.position)
        counted = loaded.stack.roles(loaded.to_device(encoded.inputs)) != Role.PAD
        counted[counted.clone()] = kept
        return TokenBatch(
            x=table.x[:, kept].to(device),
            y=table.y[:, kept].to(device),
            group=token_groups(table.role, table.sample)[kept].to(device),
            sample=table.sample[kept].long().to(device) + first,
            rows=torch.arange(first, first + len(encoded), device=device),
            encoded=encoded,
            counted=counted,
            logits=table.logits,
        )


class StoreTokens(Tokens):
    """Tokens of an activation store, sample after sample in the order they were captured.

    Where a store does not know its samples, blocks of neighbouring rows take their place.
    """

    def __init__(
        self,
        store: ActivationStore,
        cfg: CltConfig,
        device: torch.device | str = "cpu",
        max_samples: int | None = None,
    ) -> None:
        self.store, self.cfg, self.device = store, cfg, device
        self.layers = store_layers(store, cfg)
        self.max_samples, self.name = max_samples, str(store.path)
        self.size = min(store.n_samples, max_samples or store.n_samples)
        self.excluded = ExcludedTokens.as_trained(cfg.training, store)
        self._block = max(64, STORE_BYTES // (8 * len(store.hookpoints) * store.d_model))

    def __iter__(self) -> Iterator[TokenBatch]:
        start = 0
        while start < len(self.store):
            batch = self._whole_samples(start)
            sample = self._samples(batch, start)
            if self.max_samples is not None and int(sample[0]) >= self.max_samples:
                return
            start += len(batch)
            yield self._counted(batch, sample)

    def _whole_samples(self, start: int) -> StoreBatch:
        """Rows from `start`, where a sample begins, to the last end of a sample in a block."""
        wanted = self._block
        while True:
            stop = min(start + wanted, len(self.store))
            batch = self.store.rows(range(start, stop))
            if stop == len(self.store):
                return batch
            sample = self._samples(batch, start)
            end = sample[1:] != sample[:-1]
            if bool(end.any()):
                return _head(batch, int(end.nonzero()[-1, 0]) + 1)
            wanted *= 2

    def _samples(self, batch: StoreBatch, start: int) -> Tensor:
        blocks = torch.arange(start, start + len(batch)) // BLOCK
        return torch.where(batch.sample >= 0, batch.sample.long(), blocks)

    def _counted(self, batch: StoreBatch, sample: Tensor) -> TokenBatch:
        wanted = torch.ones_like(sample, dtype=torch.bool)
        if self.max_samples is not None:
            wanted = sample < self.max_samples
        kept = wanted & ~self.excluded.of(batch.input_ids, batch.position)
        y = batch.y[self.layers][:, kept]
        x = y if self.cfg.input_site == "mlp_out" else batch.x[self.layers][:, kept]
        for values, stored in ((x, self.store.x_layers), (y, self.store.y_layers)):
            values[[i for i, layer in enumerate(self.layers) if layer not in stored]] = 0
        check_finite(x, y, self.cfg.hookpoints)
        return TokenBatch(
            x=x.to(self.device),
            y=y.to(self.device),
            group=token_groups(batch.role, batch.sample.long())[kept].to(self.device),
            sample=sample[kept].to(self.device),
            rows=sample[wanted].unique().to(self.device),
        )


def _head(batch: StoreBatch, n: int) -> StoreBatch:
    """The first `n` rows."""
    table = {f.name: getattr(batch, f.name)[:n] for f in fields(StoreBatch)[2:]}
    return StoreBatch(batch.x[:, :n], batch.y[:, :n], **table)


def store_layers(store: ActivationStore, cfg: CltConfig) -> list[int]:
    """The store's layer behind each of the coder's hookpoints.

    Names may be written from the base model or from the decoder on: the end of a name counts.
    Raises `UserError` unless the store holds what the coder reads and writes.
    """
    store.check_model(cfg.model or store.model or "the coder", cfg.d_model, store.hookpoints)
    if cfg.input_site not in (store.input_site, "mlp_out"):
        raise UserError(
            f"{store.path} holds x at {store.input_site}; the coder reads {cfg.input_site}"
        )
    layers = []
    for name in cfg.hookpoints:
        found = [i for i, full in enumerate(store.hookpoints) if _same_end(full, name)]
        if len(found) != 1:
            raise UserError(
                f"{store.path} does not hold the coder's layer {name}; it has "
                f"{store.hookpoints[0]} … {store.hookpoints[-1]}"
            )
        layers += found
    sources = [layers[s] for s in cfg.source_layers()]
    reads = [] if cfg.input_site == "mlp_out" else sources
    store.check_layers(reads, [layers[t] for t in cfg.target_layers()])
    return layers


def _same_end(one: str, other: str) -> bool:
    short, long = sorted((one, other), key=len)
    return long == short or long.endswith("." + short)
