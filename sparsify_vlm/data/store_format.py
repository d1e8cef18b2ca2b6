"""The activation store on disk: names, `manifest.json`, the lines of `shards.jsonl`, tensor files.

    manifest.json                what was captured, and whether the capture is complete
    shards.jsonl                 one line per finished shard, with the sha256 of its two files
    batch_00000_x.safetensors    x [layers, tokens, d_model] and the token table:
                                 input_ids, position, sample, role [tokens], patch [tokens, 2]
    batch_00000_y.safetensors    y [layers, tokens, d_model]

A shard exists once its line does: the line is written after both files are safe on the disk.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify_vlm.aliases import HUB_ALIASES
from sparsify_vlm.data.direct_file import direct_file
from sparsify_vlm.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT, VERSION = "sparsify-vlm activations", 1
SHARD_FORMAT = "sparsify-vlm activation shard"
MANIFEST, SHARDS = "manifest.json", "shards.jsonl"
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""Stored types of x and y, with safetensors' names."""
UNKNOWN_ROLE = 255
"""Role of tokens that were imported without their ids; no member of `models.Role`."""
ABOUT_PROGRESS = ("complete", "shards", "samples", "tokens", "skipped", "times")
"""Keys of the manifest that change while capturing; the others say what is captured."""


@dataclass(frozen=True)
class Shard:
    """A line of `shards.jsonl`."""

    name: str
    batches: int
    """Batches of the model that it holds; a resumed capture starts after their sum."""
    samples: int
    tokens: int
    roles: dict[str, int]
    """Tokens by role."""
    skipped: list[str]
    """Samples left out, as "id: reason"."""
    sha256: dict[str, str]
    """Of the two files, by "x" and "y"."""
    numbers: list[int] | None = None
    """Which batches it holds, where several processes captured; None: the next ones."""
    format: str = field(default=SHARD_FORMAT)
    version: int = field(default=VERSION)

    def line(self) -> str:
        """As it stands in the file."""
        values = asdict(self)
        if self.numbers is None:
            del values["numbers"]
        return json.dumps(values, ensure_ascii=False) + "\n"


def shard_name(number: int) -> str:
    """`batch_00000` and so on."""
    return f"batch_{number:05d}"


def tensor_path(folder: Path, shard: str, kind: str) -> Path:
    """The file of a shard's x or y."""
    return folder / f"{shard}_{kind}.safetensors"


def canonical_model(name: str) -> str:
    """A model's name in manifests: the Hub id of an alias, else as given."""
    return HUB_ALIASES.get(name, name)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises `UserError` if `folder` has no manifest that this version reads."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} is no activation store: it has no {MANIFEST}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    _check_format(path, manifest, FORMAT)
    if manifest.get("dtype") not in DTYPES:
        raise UserError(
            f"{path}: dtype {manifest.get('dtype')!r} is none of {', '.join(DTYPES)}, which this "
            "version reads"
        )
    _check_fields(path, manifest)
    return dict(manifest)


def _check_fields(path: Path, manifest: Mapping[str, Any]) -> None:
    """Raise `UserError` for a field that readers rely on and that is missing or of another type."""
    whole = (
        "d_model",
        "n_targets",
        "target_offset",
        *(("shards",) * bool(manifest.get("complete"))),
    )
    good = {name: type(manifest.get(name)) is int for name in whole}
    for name, kind in (("hookpoints", str), ("x_layers", int), ("y_layers", int)):
        value = manifest.get(name)
        good[name] = isinstance(value, list) and all(type(v) is kind for v in value)
    for name in ("x_layers", "y_layers"):
        layers = range(len(manifest["hookpoints"])) if good["hookpoints"] else ()
        good[name] = good[name] and all(layer in layers for layer in manifest[name])
    sites = manifest.get("sites")
    good["sites"] = isinstance(sites, dict) and {"x", "y"} <= sites.keys()
    for name, kind in (("model", str), ("revision", str), ("bos_token_id", int)):
        good[name] = name in manifest and isinstance(manifest[name], kind | None)
    for name in good:
        if not good[name]:
            raise UserError(f"{path} is damaged: its {name} is {manifest.get(name)!r}")


def read_shards(folder: Path) -> list[Shard]:
    """The finished shards. A last line without its end, left by a kill, is not counted."""
    path = folder / SHARDS
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    shards = [_parse_shard(path, i, line) for i, line in enumerate(text.split("\n")[:-1])]
    for number, shard in enumerate(shards):
        if shard.name != shard_name(number):
            raise UserError(f"{path}, line {number + 1}: {shard.name} is out of order")
    return shards


def _parse_shard(path: Path, index: int, line: str) -> Shard:
    try:
        values = json.loads(line)
        _check_format(path, values, SHARD_FORMAT)
        return Shard(**values)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}, line {index + 1} cannot be read: {error}") from None


def _check_format(path: Path, values: Any, format: str) -> None:
    found = values.get("format") if isinstance(values, dict) else None
    if found != format:
        raise UserError(f"{path}: format is {found!r}, not {format!r}")
    if values.get("version") != VERSION:
        raise UserError(
            f"{path}: version {values.get('version')} is not known here (only {VERSION}); "
            "a newer sparsify-vlm may have written it"
        )


def write_tensor_file(
    path: Path,
    pieces: Mapping[str, Sequence[Tensor]],
    axis: dict[str, int],
    metadata: dict[str, str],
) -> str:
    """Write a safetensors file whose tensors lie in pieces, and return its sha256.

    Each tensor is the concatenation of its `pieces` (CPU, contiguous) along `axis[name]`, 0 or 1.
    Nothing is concatenated in memory, and the file is not read again for its hash.
    """
    import torch

    header = _header(pieces, axis, metadata)
    with direct_file(path) as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for name, tensors in pieces.items():
            for rows in _in_order(tensors, axis[name]):
                if rows.numel():
                    file.write(rows.reshape(-1).view(torch.uint8).numpy().data)
        return file.hexdigest()


def _in_order(tensors: Sequence[Tensor], axis: int) -> Sequence[Tensor]:
    """Contiguous parts whose bytes, one after the other, are the concatenation's."""
    if axis == 0:
        return tensors
    return [piece[i] for i in range(len(tensors[0])) for piece in tensors]


def _header(
    pieces: Mapping[str, Sequence[Tensor]], axis: dict[str, int], metadata: dict[str, str]
) -> bytes:
    names = {"torch.uint8": "U8", "torch.int16": "I16", "torch.int32": "I32"}
    names |= {f"torch.{name}": short for name, short in DTYPES.items()}
    entries: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, tensors in pieces.items():
        shape = list(tensors[0].shape)
        shape[axis[name]] = sum(piece.shape[axis[name]] for piece in tensors)
        size = sum(piece.numel() * piece.element_size() for piece in tensors)
        entries[name] = {
            "dtype": names[str(tensors[0].dtype)],
            "shape": shape,
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(entries, ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
