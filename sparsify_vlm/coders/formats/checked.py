"""Reading tensors and JSON of a checkpoint so that every fault names its file and key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsify_vlm.coders.formats.rows import Rows, stored_rows
from sparsify_vlm.errors import UserError


class CheckedTensors:
    """A safetensors file of which every tensor read must have the expected shape.

    Tensors are read one by one, to the CPU. Raises `UserError` if the file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise UserError(f"{path}: the file is missing; the checkpoint is incomplete")
        try:
            self._file = safe_open(str(path), framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a readable safetensors file ({error})") from error
        self.keys = set(self._file.keys())

    def read(self, key: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor `key`; `UserError` if it is missing, of another shape or not finite."""
        self.check(key, shape)
        return self.finite(key, self._file.get_tensor(key))

    def read_row(self, key: str, row: int, shape: tuple[int, ...]) -> Tensor:
        """Entry `row` of the first axis of the tensor `key`, which is of `shape`; as `read`."""
        self.check(key, shape)
        return self.finite(key, self._file.get_slice(key)[row])

    def finite(self, key: str, tensor: Tensor) -> Tensor:
        """The tensor; `UserError` if a value of it is not finite."""
        quick = torch.isfinite(tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)))
        if not bool(quick) and not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{self.path}: tensor '{key}' holds NaN or infinite values")
        return tensor

    def check(self, key: str, shape: tuple[int, ...]) -> None:
        """Raise `UserError` unless the tensor is there and has this shape."""
        if key not in self.keys:
            raise UserError(f"{self.path}: tensor '{key}' is missing")
        found = tuple(self._file.get_slice(key).get_shape())
        if found != shape:
            raise UserError(
                f"{self.path}: tensor '{key}' has shape {list(found)}, expected {list(shape)}"
            )

    def rows(self, key: str, shape: tuple[int, ...]) -> Rows:
        """Where the rows of a tensor lie in the file; its values are not looked at."""
        self.check(key, shape)
        return stored_rows(self.path, key)

    def dtype(self, key: str) -> torch.dtype:
        """The stored dtype of a tensor known to be there."""
        return self._file.get_tensor(key).dtype

    def shape(self, key: str) -> tuple[int, ...]:
        """The stored shape; `UserError` if the tensor is missing."""
        if key not in self.keys:
            raise UserError(f"{self.path}: tensor '{key}' is missing")
        return tuple(self._file.get_slice(key).get_shape())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; `UserError` if the file is missing, damaged or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: the file is missing; the checkpoint is incomplete") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value


def positive(values: dict[str, Any], name: str, path: Path) -> int:
    """A positive whole number from a JSON object; `UserError` naming file and field otherwise."""
    value = values.get(name)
    if type(value) is not int or value < 1:
        raise UserError(f"{path}: field '{name}' is {value!r}, not a positive whole number")
    return value
