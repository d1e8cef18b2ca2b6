"""Stores of made-up activations, for the tests of writing and reading them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch

from sparsify_vlm.data import store_writer
from sparsify_vlm.data.store_writer import StoreWriter, TokenRows, disk_errors_told

LAYERS, WIDTH = 3, 8


def manifest(**changes: Any) -> dict[str, Any]:
    """What is captured, without progress."""
    return {
        "model": "org/some-model",
        "revision": "abc",
        "dataset": {"name": "scenes", "fingerprint": "f"},
        "hookpoints": [f"language_model.model.layers.{i}.mlp" for i in range(LAYERS)],
        "d_model": WIDTH,
        "dtype": "bfloat16",
        "n_targets": 2,
        "target_offset": 0,
        "sites": {"x": "mlp_in", "y": "mlp_out"},
        "x_layers": list(range(LAYERS)),
        "y_layers": list(range(LAYERS)),
        "bos_token_id": 1,
        "shard_tokens": 40,
    } | changes


@dataclass
class Made:
    """Batches of samples of 5 to 9 tokens, and all their rows, one after the other."""

    batches: list[TokenRows]
    x: torch.Tensor
    y: torch.Tensor
    input_ids: torch.Tensor


def make(n_batches: int, samples: int = 2, seed: int = 0, dtype: Any = torch.bfloat16) -> Made:
    """Random batches. Token i of the whole has input id i."""
    generator = torch.Generator().manual_seed(seed)
    batches, first = [], 0
    for number in range(n_batches):
        lengths = torch.randint(5, 10, (samples,), generator=generator)
        n = int(lengths.sum())
        batches.append(
            TokenRows(
                x=torch.randn(LAYERS, n, WIDTH, generator=generator).to(dtype),
                y=torch.randn(LAYERS, n, WIDTH, generator=generator).to(dtype),
                input_ids=torch.arange(first, first + n, dtype=torch.int32),
                position=torch.cat([torch.arange(k, dtype=torch.int32) for k in (0, *lengths)]),
                sample=torch.arange(samples, dtype=torch.int32).repeat_interleave(lengths),
                role=torch.randint(1, 4, (n,), generator=generator).to(torch.uint8),
                patch=torch.full((n, 2), -1, dtype=torch.int16),
                samples=[f"s{number * samples + i}" for i in range(samples)],
                skipped=[f"bad{number}: broken"] if number == 1 else [],
            )
        )
        first += n
    return Made(
        batches,
        torch.cat([b.x for b in batches], 1),
        torch.cat([b.y for b in batches], 1),
        torch.cat([b.input_ids for b in batches]),
    )


def die_before(moment: int) -> Callable[[Callable], Callable]:
    """Have this process die without any clean-up before its `moment`-th fsync, rename or append;
    returns what makes other functions count as well."""
    moments = count(1)  # next() is atomic: two threads write

    def mortal(function: Callable) -> Callable:
        def call(*args: object, **kwargs: object) -> object:
            if next(moments) == moment:
                os._exit(9)
            return function(*args, **kwargs)

        return call

    os.fsync, os.replace = mortal(os.fsync), mortal(os.replace)
    store_writer.append = mortal(store_writer.append)
    return mortal


def write(folder: Path, made: Made, shard_tokens: int = 40, **changes: Any) -> Path:
    """Write, or go on writing, the whole store."""
    about = manifest(shard_tokens=shard_tokens, **changes)
    writer = StoreWriter(folder, about, shard_tokens)
    with disk_errors_told(writer), writer:
        if not writer.complete:
            for batch in made.batches[writer.batches :]:
                writer.add(batch)
            writer.finish()
    return folder


def contents(folder: Path) -> dict[str, Any]:
    """Every file's bytes; of the manifest all but its times."""
    files: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir()}
    if "manifest.json" in files:
        files["manifest.json"] = json.loads(files["manifest.json"])
        del files["manifest.json"]["times"]
    return files
