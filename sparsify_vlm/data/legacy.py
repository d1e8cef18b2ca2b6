"""Import of activations stored per source layer: `L{layer}/batch_{i}_x.pt` and `…_y.pt`.

In that layout x is [tokens, d] or [batch, seq, d], and y holds the targets of the source layer,
stacked before or after the tokens or as a list, padded with zeros where the model has no further
layer. An activation that several sources share stands in several files: it is stored once here,
after checking that the copies agree. Which tokens these were is not known.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify_vlm.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from sparsify_vlm.data.store_writer import TokenRows

SHARD_BYTES = 64 << 20
_LAYER = re.compile(r"L(\d+)")
_BATCH = re.compile(r"batch_(\d+)_x\.pt")


@dataclass
class ImportActivationsConfig:
    """Activations in L{layer}/batch_{i}_{x,y}.pt, and the store they become."""

    src: str
    """Folder that holds L0, L1 and so on."""

    dst: str
    """Folder of the activation store. The same command continues an import that was cut off."""

    model: str | None = None
    """Model that the activations are of, if a later training is to check it."""

    target_offset: int = 1
    """Layer of a source's first target: 1 for the next layer's MLP output, 0 for its own."""

    hookpoint: str = "language_model.model.layers.{}.mlp"
    """Name of a layer; {} stands for its number."""

    input_site: str = "mlp_in"
    """Where x was read: mlp_in (the MLP's input, after its norm) or resid_mid (before the norm)."""

    def __post_init__(self) -> None:
        if self.target_offset not in (0, 1):
            raise UserError(f"--target_offset must be 0 or 1, not {self.target_offset}")
        if "{}" not in self.hookpoint:
            raise UserError(f"--hookpoint {self.hookpoint} needs {{}} for the layer's number")
        if self.input_site not in ("mlp_in", "resid_mid"):
            raise UserError(f"--input_site {self.input_site} is neither mlp_in nor resid_mid")


@dataclass
class LegacyBatch:
    """One batch of all source layers: x by source layer, y by target layer, each [tokens, d]."""

    x: dict[int, Tensor]
    y: dict[int, Tensor]
    rows: tuple[int, int] | None = None
    """(batch, seq), where x has them."""
    n_targets: int = 0
    """Targets of the source that has most, padding not counted."""


def import_activations(cfg: ImportActivationsConfig) -> Path:
    """Write the activation store `cfg.dst` and return its folder.

    Raises:
        UserError: a file is missing, cannot be read (`weights_only=True`) or has another shape than
            its neighbours; copies of the same activation differ; `cfg.dst` holds something else.
    """
    from sparsify_vlm.data.store_writer import StoreWriter, disk_errors_told
    from sparsify_vlm.progress import Progress

    layers, numbers = _inventory(Path(cfg.src))
    first = _read_batch(cfg, layers, numbers[0])
    x = next(iter(first.x.values()))
    per_token = (len(first.x) + len(first.y)) * x.shape[1] * x.itemsize
    shard_tokens = max(1, SHARD_BYTES // per_token)
    writer = StoreWriter(cfg.dst, _manifest(cfg, first, len(numbers), shard_tokens), shard_tokens)
    with disk_errors_told(writer), writer:
        if not writer.complete:
            todo = numbers[writer.batches :]
            with Progress("Importing", len(numbers), unit="batches", initial=writer.batches) as bar:
                for number in todo:
                    batch = _read_batch(cfg, layers, number)
                    _check_same_kind(cfg, first, batch, number)
                    writer.add(_token_rows(batch, number))
                    bar.update()
                writer.finish()
    print(f"{cfg.dst}: {writer.tokens:,} tokens, x of {len(first.x)} layers, y of {len(first.y)}")
    return writer.path


def _inventory(src: Path) -> tuple[list[int], list[int]]:
    """Source layers and batch numbers, each in numerical order."""
    if not src.is_dir():
        raise UserError(f"there is no folder {src}")
    found = {int(m[1]): p for p in src.iterdir() if (m := _LAYER.fullmatch(p.name))}
    if not found:
        raise UserError(f"{src} has no folders L0, L1, … with activations")
    batches = {
        layer: {int(m[1]) for p in folder.iterdir() if (m := _BATCH.fullmatch(p.name))}
        for layer, folder in found.items()
    }
    every = set().union(*batches.values())
    if not every:
        raise UserError(f"the folders in {src} hold no batch_0_x.pt, batch_1_x.pt, …")
    for layer in sorted(found):
        if missing := sorted(every - batches[layer]):
            raise UserError(f"{found[layer]}/batch_{missing[0]}_x.pt is missing")
    return sorted(found), sorted(every)


def _read_batch(cfg: ImportActivationsConfig, layers: list[int], number: int) -> LegacyBatch:
    batch = LegacyBatch({}, {})
    origin: dict[int, Path] = {}
    for layer in layers:
        path = Path(cfg.src) / f"L{layer}" / f"batch_{number}_x.pt"
        x = _load(path)
        if not hasattr(x, "dim") or x.dim() not in (2, 3):
            raise UserError(f"{path} holds {_shape(x)}, not [tokens, d] or [batch, seq, d]")
        if x.numel() == 0:
            raise UserError(f"{path} holds no activations: {_shape(x)}")
        batch.rows = (x.shape[0], x.shape[1]) if x.dim() == 3 else None
        batch.x[layer] = x.flatten(0, -2).contiguous()
        _check_alike(path, batch.x[layer], next(iter(batch.x.values())))
        path = path.with_name(f"batch_{number}_y.pt")
        targets = _without_padding(_targets(path, _load(path), x))
        batch.n_targets = max(batch.n_targets, len(targets))
        for target, y in enumerate(targets, layer + cfg.target_offset):
            _add_target(batch.y, origin, target, y, path)
    return batch


def _add_target(
    known: dict[int, Tensor], origin: dict[int, Path], layer: int, y: Tensor, path: Path
) -> None:
    import torch

    if layer not in known:
        known[layer], origin[layer] = y.contiguous(), path
    elif not torch.equal(known[layer], y):
        raise UserError(
            f"{path} and {origin[layer]} differ in the output of layer {layer}: they are not of "
            "one run, or --target_offset is wrong"
        )


def _load(path: Path) -> Any:
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        # Not torch's message: it advises to load without `weights_only`, which can run code.
        raise UserError(
            f"{path} cannot be read as tensors ({type(error).__name__}): it is damaged, or holds "
            "other Python objects, which are not loaded"
        ) from None


def _targets(path: Path, y: Any, x: Tensor) -> Iterator[Tensor]:
    """The targets in y, each [tokens, d], in order."""
    tokens = x.shape[:-1].numel()
    parts = list(y) if isinstance(y, (list, tuple)) else _unstacked(path, y, x)
    for part in parts:
        if not hasattr(part, "shape") or part.shape[-1:] != x.shape[-1:]:
            raise UserError(f"{path} holds {_shape(part)} where x is {_shape(x)}")
        if part.shape[:-1].numel() != tokens:
            raise UserError(f"{path} has {part.shape[:-1].numel()} tokens, its x {tokens}")
        _check_alike(path, part, x)
        yield part.reshape(tokens, -1)


def _unstacked(path: Path, y: Any, x: Tensor) -> list[Tensor]:
    """Targets stacked along the first axis or the last but one, whichever fits x."""
    flat, whole = (x.shape[:-1].numel(),), tuple(x.shape[:-1])
    if not hasattr(y, "shape"):
        raise UserError(f"{path} holds {_shape(y)}, not a tensor or a list of them")
    lead = tuple(y.shape[:-1])
    if lead in (flat, whole):
        return [y]
    first, last = lead[1:] in (flat, whole), lead[:-1] in (flat, whole)
    if first == last:
        why = "could be read in two ways" if first else "does not fit"
        raise UserError(f"{path}: y {_shape(y)} {why} with x {_shape(x)}")
    return list(y.unbind(0 if first else -2))


def _without_padding(targets: Iterator[Tensor]) -> list[Tensor]:
    """Targets up to the last that is not all zeros."""
    parts = list(targets)
    while parts and not bool(parts[-1].any()):
        parts.pop()
    return parts


def _check_alike(path: Path, tensor: Tensor, other: Tensor) -> None:
    if tensor.dtype != other.dtype or tensor.shape[-1] != other.shape[-1]:
        raise UserError(
            f"{path} holds {_shape(tensor)} {tensor.dtype}, its neighbours {_shape(other)} "
            f"{other.dtype}"
        )


def _check_same_kind(
    cfg: ImportActivationsConfig, first: LegacyBatch, batch: LegacyBatch, number: int
) -> None:
    """All batches must have the tokens of all layers, the same targets and one dtype."""
    lengths = {len(x) for x in batch.x.values()}
    if len(lengths) > 1:
        raise UserError(f"batch {number} of {cfg.src} has {sorted(lengths)} tokens in its layers")
    if batch.y.keys() != first.y.keys():
        odd = min(batch.y.keys() ^ first.y.keys())
        raise UserError(f"{cfg.src}: layer {odd} is a target in some batches and not in {number}")
    ours, theirs = next(iter(batch.x.values())), next(iter(first.x.values()))
    _check_alike(Path(cfg.src) / f"batch {number}", ours, theirs)


def _manifest(
    cfg: ImportActivationsConfig, first: LegacyBatch, n_batches: int, shard_tokens: int
) -> dict[str, Any]:
    from sparsify_vlm.data.store_format import DTYPES, canonical_model

    x = next(iter(first.x.values()))
    dtype = str(x.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise UserError(f"{cfg.src} holds {dtype}; only {', '.join(DTYPES)} can be stored")
    if not first.y:
        raise UserError(f"{cfg.src}: every target is zero")
    return {
        "model": None if cfg.model is None else canonical_model(cfg.model),
        "revision": None,
        "imported": {"from": cfg.src, "batches": n_batches},
        "hookpoints": [cfg.hookpoint.format(i) for i in range(max([*first.x, *first.y]) + 1)],
        "d_model": x.shape[1],
        "dtype": dtype,
        "n_targets": first.n_targets,
        "target_offset": cfg.target_offset,
        "sites": {"x": cfg.input_site, "y": "mlp_out"},
        "x_layers": sorted(first.x),
        "y_layers": sorted(first.y),
        "bos_token_id": None,
        "shard_tokens": shard_tokens,
    }


def _token_rows(batch: LegacyBatch, number: int) -> TokenRows:
    import torch

    from sparsify_vlm.data.store_format import UNKNOWN_ROLE
    from sparsify_vlm.data.store_writer import TokenRows

    x = torch.stack([batch.x[layer] for layer in sorted(batch.x)])
    y = torch.stack([batch.y[layer] for layer in sorted(batch.y)])
    tokens = x.shape[1]
    unknown = torch.full((tokens,), -1, dtype=torch.int32)
    position, sample, samples = unknown, unknown, []
    if batch.rows is not None:
        n, seq = batch.rows
        position = torch.arange(seq, dtype=torch.int32).repeat(n)
        sample = torch.arange(n, dtype=torch.int32).repeat_interleave(seq)
        samples = [f"batch_{number}#{row}" for row in range(n)]
    return TokenRows(
        x=x,
        y=y,
        input_ids=unknown,
        position=position,
        sample=sample,
        role=torch.full((tokens,), UNKNOWN_ROLE, dtype=torch.uint8),
        patch=torch.full((tokens, 2), -1, dtype=torch.int16),
        samples=samples,
    )


def _shape(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else str(list(shape))
