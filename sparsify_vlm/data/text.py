"""Plain text to chunks of exactly `ctx_len` tokens, as upstream's `chunk_and_tokenize` makes them.

Documents are joined in groups of 2048 by EOS, which also opens each group, and the tokens cut into
chunks; a group's last chunk, which is shorter, is dropped. Unlike upstream's, a last group too
short for one chunk is dropped instead of ending the run. As upstream's, several processes each join
the documents of their own part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsify_vlm.data.config import DataConfig
from sparsify_vlm.data.local import LineRows, Rows, SliceRows
from sparsify_vlm.data.reading import Stream, TableRows
from sparsify_vlm.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

GROUP = 2048
"""Documents that are joined, as upstream has it."""


def chunk(texts: Sequence[str], tokenizer: Any, ctx_len: int) -> list[list[int]]:
    """The chunks of one group of documents, each `min(ctx_len, model_max_length)` tokens long."""
    size = min(tokenizer.model_max_length, ctx_len)
    separator = tokenizer.eos_token or "<|endoftext|>"
    encoded = tokenizer(
        separator.join(["", *texts]),
        max_length=size,
        truncation=True,
        return_overflowing_tokens=True,
        return_attention_mask=False,
    )
    chunks: list[list[int]] = encoded["input_ids"]
    return chunks[:-1]


class ChunkStream(Stream):
    """Chunks of a stream of documents, tokenised as they come."""

    def __init__(self, stream: Stream, column: str, tokenizer: Any, cfg: DataConfig) -> None:
        super().__init__(stream.name, stream.dataset, ["input_ids"], None, stream.identity)
        self._column, self._tokenizer, self._ctx_len = column, tokenizer, cfg.ctx_len

    def __iter__(self) -> Iterator[dict[str, Any]]:
        documents = (row[self._column] for row in self.dataset)
        while group := list(islice(documents, GROUP)):
            for ids in chunk(group, self._tokenizer, self._ctx_len):
                yield {"input_ids": ids}


class TokenFileRows(Rows):
    """A file of uint16 tokens, cut into rows of `ctx_len`; upstream's memory-mapped datasets."""

    def __init__(self, path: Path, ctx_len: int) -> None:
        size = path.stat().st_size
        if size % 2:
            raise UserError(f"{path} is no file of 16-bit tokens: it has {size} bytes")
        tokens = np.memmap(path, dtype=np.uint16, mode="r") if size else np.empty(0)
        n = len(tokens) // ctx_len
        self._rows = tokens[: n * ctx_len].reshape(n, ctx_len)
        identity = f"{path.name} {len(tokens)} {ctx_len}"
        super().__init__(path.name, ["input_ids"], None, identity)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self._rows[index].tolist()}


def chunked(rows: Rows | Stream, column: str, tokenizer: Any, cfg: DataConfig) -> Rows | Stream:
    """The chunks of a column of text, from `datasets`' cache when they were made before.

    Raises:
        UserError: a cell is not text, or all text together is too short for one chunk.
    """
    if isinstance(rows, Stream):
        return ChunkStream(rows, column, tokenizer, cfg)
    dataset = _dataset(rows, column)
    processes = cfg.data_preprocessing_num_proc
    try:
        tokenised = dataset.map(
            _chunk_columns,
            fn_kwargs={"column": column, "tokenizer": tokenizer, "ctx_len": cfg.ctx_len},
            batched=True,
            batch_size=GROUP,
            num_proc=processes if processes > 1 else None,
            remove_columns=dataset.column_names,
            desc="Tokenizing",
        )
    except TypeError as error:
        raise UserError(f"{rows.name}: column {column} does not hold text: {error}") from None
    if len(tokenised) == 0:
        raise UserError(
            f"{rows.name}: all its text is shorter than one chunk of {cfg.ctx_len} tokens; "
            "lower --ctx_len"
        )
    return TableRows(rows.name, tokenised, None, f"{rows.identity} {column} {processes}")


def _chunk_columns(
    batch: dict[str, list[Any]], column: str, tokenizer: Any, ctx_len: int
) -> dict[str, list[list[int]]]:
    return {"input_ids": chunk(batch[column], tokenizer, ctx_len)}


def _dataset(rows: Rows, column: str) -> Dataset:
    """The rows' text as a `datasets.Dataset`."""
    from datasets import Dataset, load_dataset

    if isinstance(rows, TableRows):
        return rows.dataset
    if isinstance(rows, SliceRows):
        return _dataset(rows.rows, column).select(rows.range)
    if isinstance(rows, LineRows):  # not into memory: text corpora come as large JSONL files
        try:
            return load_dataset("json", data_files=str(rows.path), split="train")
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"dataset {rows.path} cannot be read: {error}") from None
    return Dataset.from_dict({column: [rows[i][column] for i in range(len(rows))]})
