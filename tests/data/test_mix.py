from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparsify_vlm.data import BadSample, DataConfig, SampleSource, batches, open_samples
from sparsify_vlm.data.mix import turns
from sparsify_vlm.errors import UserError
from sparsify_vlm.models import LoadedModel

CTX_LEN = 64
CORPUS = ["there is a red circle at the top left"] * 100


@pytest.fixture
def folder(pictures: Path) -> Path:
    rows = [{"image": f"p{i}.png", "question": "what colour?", "answer": "red"} for i in range(10)]
    (pictures / "asked.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (pictures / "corpus.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in CORPUS))
    return pictures


STREAMS: list[dict[str, Any]] = [
    {"dataset": "asked.jsonl", "weight": 2},
    {"dataset": "asked.jsonl", "name": "seen", "kind": "image"},
    {"dataset": "corpus.jsonl", "kind": "text", "weight": 3},
]


def opened(vlm: LoadedModel, folder: Path, streams: Any = STREAMS, **flags: Any) -> SampleSource:
    path = folder / "mix.yaml"
    path.write_text(yaml.safe_dump({"streams": streams}))
    return open_samples(DataConfig(dataset_mix=str(path), ctx_len=16, **flags), vlm)


@pytest.mark.parametrize("weights", [[1], [1, 1], [2, 1, 3], [0.7, 0.2, 0.1], [1, 3.14159, 0.02]])
def test_every_stream_gets_its_share_all_along(weights: list[float]) -> None:
    """After any number of turns, a stream is never more than one turn away from its share."""
    order = turns(weights).tolist()
    for n in (len(order), *range(1, min(len(order), 60))):
        counts = Counter(order[:n])
        for stream, weight in enumerate(weights):
            assert abs(counts[stream] - n * weight / sum(weights)) <= 1 + n / 1000


def test_kinds_take_what_they_are_named_for(vlm: LoadedModel, folder: Path) -> None:
    samples = list(islice(opened(vlm, folder), 12))
    by_stream = {stream: [s for s in samples if s.id.startswith(f"{stream}:")] for stream in
                 ("asked.jsonl", "seen", "corpus.jsonl")}  # fmt: skip
    assert [len(found) for found in by_stream.values()] == [4, 2, 6]
    assert all(s.answer == "red" and len(s.images) == 1 for s in by_stream["asked.jsonl"])
    assert all(s.turns[0].text == "" and len(s.turns) == 1 for s in by_stream["seen"])
    assert all(len(s.input_ids or ()) == 16 and not s.images for s in by_stream["corpus.jsonl"])


def test_any_start_continues_the_same_sequence(vlm: LoadedModel, folder: Path) -> None:
    source = opened(vlm, folder)
    order = [sample.id for sample in source]
    assert len(order) == source.size == len(set(order))
    for start in range(len(order) + 1):
        assert [sample.id for sample in source.from_index(start)] == order[start:]


def test_it_ends_with_the_first_stream_that_ends(vlm: LoadedModel, folder: Path) -> None:
    """Ten rows at a share of 2 in 6: the eleventh would be needed after 30 turns or so."""
    source = opened(vlm, folder)
    counts = Counter(sample.id.split(":")[0] for sample in source)
    assert counts["asked.jsonl"] == 10
    assert 29 <= len(source) <= 32
    assert len(opened(vlm, folder, max_examples=7)) == len(
        list(opened(vlm, folder, max_examples=7))
    )


def test_streamed_datasets_mix_alike(vlm: LoadedModel, folder: Path) -> None:
    from datasets import Dataset

    Dataset.from_dict({"text": CORPUS}).to_parquet(folder / "corpus.parquet")
    streams = [STREAMS[0], {"dataset": "corpus.parquet", "streaming": True, "shuffle_seed": -1}]
    source = opened(vlm, folder, streams)
    assert source.size is None
    order = [sample.id for sample in source]
    assert Counter(id.split(":")[0] for id in order)["asked.jsonl"] == 10
    assert [sample.id for sample in source.from_index(8)] == order[8:]
    assert len(list(opened(vlm, folder, streams, max_examples=5))) == 5


def test_mixed_batches_for_every_rank(vlm: LoadedModel, folder: Path) -> None:
    source = opened(vlm, folder)
    order = [sample.id for sample in source]
    both = [list(batches(source, vlm, 3, CTX_LEN, rank=r, world=2)) for r in range(2)]
    seen = [id for pair in zip(*both, strict=True) for batch in pair for id in batch.ids]
    assert seen == order
    vlm.forward(both[0][0].inputs)


def test_bad_samples_are_named_by_stream(vlm: LoadedModel, folder: Path) -> None:
    (folder / "p4.png").write_text("no image")
    source = opened(vlm, folder, skip_bad=True)
    assert sum(len(batch) for batch in batches(source, vlm, 4, CTX_LEN)) == len(source) - 2 + (
        sum("seen:" in line for line in source.bad) == 0
    )
    assert source.bad[0].startswith(("asked.jsonl:asked.jsonl#4: ", "seen:asked.jsonl#4: "))
    with pytest.raises(BadSample, match=r":asked\.jsonl#4: p4\.png is not an image"):
        list(batches(opened(vlm, folder), vlm, 4, CTX_LEN))


def test_the_fingerprint_follows_weights_and_data(vlm: LoadedModel, folder: Path) -> None:
    before = opened(vlm, folder).fingerprint
    assert opened(vlm, folder).fingerprint == before
    assert opened(vlm, folder, STREAMS[:2]).fingerprint != before
    heavier = [{**STREAMS[0], "weight": 5}, *STREAMS[1:]]
    assert opened(vlm, folder, heavier).fingerprint != before


MISTAKES: list[tuple[Any, str]] = [
    ([], "give a list called streams"),
    ([{"weight": 1}], "stream 0: give at least a `dataset`"),
    ([{"dataset": "asked.jsonl", "weight": -1}], "weight -1 is not a positive number"),
    ([{"dataset": "asked.jsonl", "kind": "sound"}], "kind 'sound' is none of image, text"),
    ([{"dataset": "asked.jsonl", "splitt": "x"}], "no option splitt; did you mean split"),
    ([{"dataset": "asked.jsonl", "skip_bad": True}], "no option skip_bad"),
    ([STREAMS[0], STREAMS[0]], "two streams have one name"),
    ([{"dataset": "corpus.jsonl", "kind": "image"}], "kind image"),
    ([{"dataset": "corpus.jsonl", "kind": "conversation"}], "kind conversation"),
    ([{"dataset": "asked.jsonl", "kind": "text"}], "kind text"),
    ([STREAMS[0], {**STREAMS[1], "weight": 1e-4}], "less than 1/1000"),
    ([{"dataset": "asked.jsonl", "max_examples": 0}], "stream 0: --max_examples"),
    ([{"dataset": "asked.jsonl", "max_examples": "many"}], "stream 0: "),
]


@pytest.mark.parametrize(("streams", "message"), MISTAKES)
def test_mistakes_in_the_file(vlm: LoadedModel, folder: Path, streams: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        opened(vlm, folder, streams)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_missing_or_no_yaml(vlm: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--dataset_mix .*No such file"):
        open_samples(DataConfig(dataset_mix=str(tmp_path / "away.yaml")), vlm)
    (tmp_path / "mix.yaml").write_text("streams: [")
    with pytest.raises(UserError, match="is not YAML") as caught:
        open_samples(DataConfig(dataset_mix=str(tmp_path / "mix.yaml")), vlm)
    assert "\n" not in str(caught.value)


def test_the_example_is_understood() -> None:
    from sparsify_vlm.data.mix import read_mix

    path = Path(__file__).parents[2] / "configs/vlm_mix.yaml"
    streams = read_mix(path, DataConfig(dataset_mix=str(path)))
    assert {stream.kind for stream in streams} == {"image", "text", "conversation"}
