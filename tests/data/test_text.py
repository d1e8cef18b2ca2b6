from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from sparsify.data import MemmapDataset, chunk_and_tokenize

from sparsify_vlm.data import DataConfig, SampleSource, encode, open_samples
from sparsify_vlm.errors import UserError
from sparsify_vlm.models import LoadedModel

CTX_LEN = 16


def documents(n: int = 60) -> list[str]:
    words = ["there", "is", "a", "red", "circle", "at", "the", "top", "left", "one", "blue"]
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(words, rng.integers(3, 30))) for _ in range(n)]


def opened(model: LoadedModel, path: Path, **flags: Any) -> SampleSource:
    return open_samples(DataConfig(dataset=str(path), ctx_len=CTX_LEN, **flags), model)


def as_jsonl(folder: Path) -> Path:
    lines = (json.dumps({"text": text, "meta": i}) for i, text in enumerate(documents()))
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    return folder / "corpus.jsonl"


def as_json(folder: Path) -> Path:
    (folder / "corpus.json").write_text(json.dumps([{"text": text} for text in documents()]))
    return folder / "corpus.json"


def as_parquet(folder: Path) -> Path:
    Dataset.from_dict({"text": documents()}).to_parquet(folder / "corpus.parquet")
    return folder / "corpus.parquet"


def as_text_file(folder: Path) -> Path:
    (folder / "corpus.txt").write_text("\n".join(documents()))
    return folder / "corpus.txt"


def upstream(tokenizer: Any, processes: int = 1) -> Dataset:
    return chunk_and_tokenize(
        Dataset.from_dict({"text": documents()}),
        tokenizer,
        num_proc=processes,
        max_seq_len=CTX_LEN,
    )


@pytest.mark.parametrize("kind", [as_jsonl, as_json, as_parquet, as_text_file])
def test_chunks_and_their_order_are_upstreams(llm: LoadedModel, tmp_path: Path, kind: Any) -> None:
    expected = upstream(llm.tokenizer).shuffle(42).select(range(20))["input_ids"]
    samples = list(opened(llm, kind(tmp_path), max_examples=20))
    assert [list(sample.input_ids or ()) for sample in samples] == [
        row.tolist() for row in expected
    ]


def test_several_processes_chunk_as_upstreams_do(llm: LoadedModel, tmp_path: Path) -> None:
    expected = upstream(llm.tokenizer, 2)["input_ids"]
    source = opened(llm, as_parquet(tmp_path), shuffle_seed=-1, data_preprocessing_num_proc=2)
    assert [list(sample.input_ids or ()) for sample in source] == [row.tolist() for row in expected]
    single = opened(llm, as_parquet(tmp_path), shuffle_seed=-1)
    assert source.fingerprint != single.fingerprint


def test_streams_are_chunked_alike(llm: LoadedModel, tmp_path: Path) -> None:
    expected = [tuple(row.tolist()) for row in upstream(llm.tokenizer)["input_ids"]]
    source = opened(llm, as_parquet(tmp_path), streaming=True, shuffle_seed=-1)
    assert [sample.input_ids for sample in source] == expected
    assert [sample.input_ids for sample in source.from_index(7)] == expected[7:]


def test_a_vlm_reads_plain_text_too(vlm: LoadedModel, tmp_path: Path) -> None:
    source = opened(vlm, as_jsonl(tmp_path), max_examples=3)
    batch = encode(vlm, list(source), CTX_LEN)
    assert batch.inputs["input_ids"].tolist() == [list(s.input_ids or ()) for s in batch.samples]
    assert set(batch.inputs) == {"input_ids", "attention_mask"}
    assert not batch.answer_mask.any()  # type: ignore[union-attr]


def test_tokenised_datasets_are_taken_as_they_are(llm: LoadedModel, tmp_path: Path) -> None:
    tokens = [[1, 5, 6], [1, 7], [1, 8, 9, 10]]
    Dataset.from_dict({"input_ids": tokens}).save_to_disk(tmp_path / "tokens")
    source = opened(llm, tmp_path / "tokens", shuffle_seed=-1)
    batch = encode(llm, list(source), CTX_LEN)
    assert batch.inputs["attention_mask"].sum(1).tolist() == [3, 2, 4]
    assert batch.inputs["input_ids"][2].tolist() == tokens[2]


def test_token_files_are_upstreams(llm: LoadedModel, tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 40, CTX_LEN * 9).astype(np.uint16)
    tokens.tofile(tmp_path / "tokens.bin")
    expected = MemmapDataset(str(tmp_path / "tokens.bin"), CTX_LEN)
    source = opened(llm, tmp_path / "tokens.bin", shuffle_seed=-1)
    assert [list(s.input_ids or ()) for s in source] == [
        row["input_ids"].tolist() for row in expected
    ]


def test_a_last_group_too_short_for_a_chunk_is_dropped(llm: LoadedModel, tmp_path: Path) -> None:
    """Upstream ends here with "Not enough data"; 2048 documents are joined at a time."""
    texts = ["red circle"] * 2048 + ["blue"]
    Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "corpus.parquet")
    with pytest.raises(ValueError, match="Not enough data"):
        chunk_and_tokenize(
            Dataset.from_dict({"text": texts}), llm.tokenizer, num_proc=1, max_seq_len=CTX_LEN
        )
    assert len(opened(llm, tmp_path / "corpus.parquet")) == 2048 * 3 // (CTX_LEN - 1)


def test_too_little_text_says_so(llm: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "short.jsonl").write_text('{"text": "red"}\n')
    with pytest.raises(UserError, match=r"short\.jsonl: .*16 tokens; lower --ctx_len"):
        opened(llm, tmp_path / "short.jsonl")


def test_tokens_of_another_model_are_refused(llm: LoadedModel, tmp_path: Path) -> None:
    Dataset.from_dict({"input_ids": [[1, 50_000]]}).save_to_disk(tmp_path / "tokens")
    with pytest.raises(UserError, match=r"token 50000 .* another model"):
        encode(llm, list(opened(llm, tmp_path / "tokens")), CTX_LEN)


def test_text_that_contains_the_image_token_is_refused(vlm: LoadedModel, tmp_path: Path) -> None:
    image = vlm.tokenizer.convert_tokens_to_ids("<image>")
    Dataset.from_dict({"input_ids": [[1, image, 5]]}).save_to_disk(tmp_path / "tokens")
    with pytest.raises(UserError, match="image token <image> 1 times for 0 images"):
        encode(vlm, list(opened(vlm, tmp_path / "tokens")), CTX_LEN)
