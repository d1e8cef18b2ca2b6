"""Reading an activation store: rows, shuffled batches, views, damage."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from stores import LAYERS, WIDTH, Made, make, write

from sparsify_vlm.data import ActivationStore
from sparsify_vlm.data.row_order import BLOCK_ROWS, BUFFER_ROWS, WINDOW_SHARDS, RowOrder
from sparsify_vlm.data.store_writer import TokenRows
from sparsify_vlm.errors import UserError


@pytest.fixture(scope="module")
def made() -> Made:
    return make(30)


@pytest.fixture
def folder(made: Made, tmp_path: Path) -> Path:
    return write(tmp_path / "store", made)


def test_files_are_plain_safetensors(folder: Path, made: Made) -> None:
    """Read with the safetensors library alone."""
    x = [load_file(p) for p in sorted(folder.glob("batch_*_x.safetensors"))]
    y = [load_file(p) for p in sorted(folder.glob("batch_*_y.safetensors"))]
    assert len(x) > 5
    assert torch.equal(torch.cat([f["x"] for f in x], 1), made.x)
    assert torch.equal(torch.cat([f["y"] for f in y], 1), made.y)
    assert torch.equal(torch.cat([f["input_ids"] for f in x]), made.input_ids)
    assert x[0]["role"].dtype == torch.uint8
    assert x[0]["patch"].dtype == torch.int16
    with safe_open(folder / "batch_00001_x.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["version"] == "1"
    first = json.loads(folder.joinpath("shards.jsonl").read_text().splitlines()[0])
    assert json.loads(metadata["sample_ids"])[0] == f"s{first['samples']}"


def test_shard_ends_with_the_batch_that_reaches_its_tokens(folder: Path, made: Made) -> None:
    lines = [json.loads(line) for line in folder.joinpath("shards.jsonl").read_text().splitlines()]
    batch = 0
    for line in lines[:-1]:
        sizes = [len(b) for b in made.batches[batch : batch + line["batches"]]]
        assert sum(sizes) == line["tokens"] >= 40 > sum(sizes[:-1])
        batch += line["batches"]


def test_counts(folder: Path, made: Made) -> None:
    store = ActivationStore(folder)
    assert len(store) == len(made.input_ids)
    assert store.n_samples == 60
    roles = torch.cat([b.role for b in made.batches])
    expected = {"image": 1, "text": 2, "special": 3}
    assert store.roles == {name: int((roles == role).sum()) for name, role in expected.items()}
    assert store.manifest["skipped"] == ["bad1: broken"]
    assert store.dtype == torch.bfloat16
    assert store.bos_token_id == 1


def test_rows_are_whole_and_samples_are_numbered_through(folder: Path, made: Made) -> None:
    store = ActivationStore(folder)
    rows = store.rows([200, 3, 77, 41])
    index = torch.tensor([3, 41, 77, 200])
    assert torch.equal(rows.input_ids.long(), index)
    assert torch.equal(rows.x, made.x[:, index])
    assert torch.equal(rows.y, made.y[:, index])
    samples = torch.cat([b.sample + 2 * i for i, b in enumerate(made.batches)])
    assert torch.equal(rows.sample, samples[index])
    with pytest.raises(IndexError):
        store.rows([len(store)])


def test_batches_give_every_row_once(folder: Path, made: Made) -> None:
    store = ActivationStore(folder)
    batches = list(store.batches(64, seed=1))
    ids = torch.cat([b.input_ids for b in batches]).long()
    assert torch.equal(ids.sort()[0], torch.arange(len(store)))
    assert [len(b) for b in batches[:-1]] == [64] * (len(store) // 64)
    assert torch.equal(torch.cat([b.x for b in batches], 1), made.x[:, ids])
    assert torch.equal(torch.cat([b.y for b in batches], 1), made.y[:, ids])


def test_batches_follow_from_the_seed(folder: Path) -> None:
    def ids(seed: int, start: int = 0) -> list[list[int]]:
        return [
            b.input_ids.tolist() for b in ActivationStore(folder).batches(50, seed, start=start)
        ]

    assert ids(3) == ids(3)
    assert ids(3)[4:] == ids(3, start=4)
    assert {*ids(3)[0]} != {*ids(4)[0]}


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_global_batches(folder: Path, world: int) -> None:
    store = ActivationStore(folder)
    whole = [set(b.input_ids.tolist()) for b in store.batches(20 * world, seed=5)]
    ranks = [list(store.batches(20, seed=5, rank=r, world=world)) for r in range(world)]
    assert {len(rank) for rank in ranks} == {len(whole)}
    for number, together in enumerate(whole):
        parts = [rank[number].input_ids.tolist() for rank in ranks]
        assert {row for part in parts for row in part} == together
        assert sum(map(len, parts)) == len(together)


def test_batches_mix_samples_of_many_shards(folder: Path) -> None:
    store = ActivationStore(folder)
    batch = next(store.batches(64, seed=0))
    assert len(batch.sample.unique()) > 25
    shards = np.searchsorted(store._starts, batch.input_ids.numpy(), side="right")
    assert len(set(shards.tolist())) > len(store.shards) // 2


@pytest.mark.parametrize("offset", [0, 1])
def test_view_gives_x_and_the_targets(folder: Path, made: Made, offset: int) -> None:
    store = ActivationStore(folder)
    for layer in range(LAYERS):
        view = store.view(layer, n_targets=2, target_offset=offset)
        wanted = [t for t in (layer + offset, layer + offset + 1) if t < LAYERS]
        assert view.targets == wanted
        x, ys = view[30:130]
        assert torch.equal(x, made.x[layer, 30:130])
        assert len(ys) == len(wanted)
        for y, target in zip(ys, wanted, strict=True):
            assert torch.equal(y, made.y[target, 30:130])
    mixed = [90, -1, 2, 90]
    assert torch.equal(store.view(1).x[mixed], made.x[1][mixed])
    assert store.view(1).x.shape == (len(store), WIDTH)


def test_damaged_shard_is_named_when_it_is_first_read(folder: Path) -> None:
    path = folder / "batch_00002_y.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-3] ^= 1
    path.write_bytes(damaged)
    store = ActivationStore(folder)
    assert len(store.rows(range(10))) == 10
    with pytest.raises(UserError, match=r"batch_00002_y.safetensors is damaged"):
        list(store.batches(64, seed=0))
    assert len(list(ActivationStore(folder, verify=False).batches(64, seed=0)))


def test_truncated_and_missing_shards_are_named(folder: Path) -> None:
    path = folder / "batch_00001_x.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"batch_00001_x.safetensors is damaged"):
        ActivationStore(folder).rows(range(100))
    path.unlink()
    with pytest.raises(UserError, match=r"batch_00001_x.safetensors is missing"):
        ActivationStore(folder).rows(range(100))


def test_lost_lines_are_noticed(folder: Path) -> None:
    path = folder / "shards.jsonl"
    path.write_text("".join(path.read_text().splitlines(True)[:-1]))
    with pytest.raises(UserError, match=r"is damaged: .* shards are listed"):
        ActivationStore(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2 is not known"),
        ({"format": "other"}, "format is 'other'"),
        ({"dtype": "int8"}, "dtype 'int8' is none of"),
        ({"complete": False}, "has not ended"),
        ({"shards": 99}, "shards are listed"),
        ({"hookpoints": None}, "its hookpoints is None"),
        ({"d_model": "8"}, "its d_model is '8'"),
        ({"sites": 5}, "its sites is 5"),
        ({"x_layers": ["a"]}, "its x_layers is"),
        ({"y_layers": [0, LAYERS]}, "its y_layers is"),
        ({"bos_token_id": "<s>"}, "its bos_token_id is '<s>'"),
    ],
)
def test_what_is_not_known_is_refused(folder: Path, change: dict, message: str) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        ActivationStore(folder)


@pytest.mark.parametrize(
    "change", [{"d_model": WIDTH // 2}, {"dtype": "float32"}, {"x_layers": [0]}]
)
def test_manifest_that_contradicts_the_files_is_refused(folder: Path, change: dict) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=r"_x\.safetensors holds \[3, .* manifest.json says"):
        ActivationStore(folder).rows(range(8))


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no activation store"):
        ActivationStore(tmp_path)


def test_store_of_another_model_is_refused(folder: Path) -> None:
    store = ActivationStore(folder)
    store.check_model("/local/copies/Some-Model", WIDTH, store.hookpoints)
    with pytest.raises(UserError, match="activations of org/some-model, not of org/other"):
        store.check_model("org/other", WIDTH, store.hookpoints)
    with pytest.raises(UserError, match="width 8; org/some-model has 16"):
        store.check_model("org/some-model", 16, store.hookpoints)
    with pytest.raises(UserError, match=r"holds language_model.model.layers.2.mlp"):
        store.check_model("org/some-model", WIDTH, store.hookpoints[:2])


def _anonymous_memory() -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if "RssAnon" in line).split()[1]) * 1024


def test_reading_does_not_load_shards(tmp_path: Path) -> None:
    """Anonymous memory; pages of mapped files belong to the page cache."""
    n, width = 20_000, 256
    table = torch.zeros(n, dtype=torch.int32)
    values = torch.zeros(LAYERS, n, width, dtype=torch.bfloat16)
    rows = TokenRows(
        values, values, table, table, table, table.byte(), torch.zeros(n, 2).short(), ["s"]
    )
    made = Made([rows], values, values, table)
    write(tmp_path / "large", made, shard_tokens=n, d_model=width)
    size = (tmp_path / "large" / "batch_00000_x.safetensors").stat().st_size
    store = ActivationStore(tmp_path / "large")
    store.rows(range(8))
    before = _anonymous_memory()
    for _, batch in zip(range(20), store.batches(64, seed=0), strict=False):
        assert len(batch) == 64
    assert _anonymous_memory() - before < size / 4


def test_row_order_is_a_permutation_in_runs() -> None:
    lengths = np.random.default_rng(0).integers(500, 3000, 50)
    order = RowOrder(lengths, seed=9)
    rows = order.slice(0, len(order))
    assert np.array_equal(np.sort(rows), np.arange(lengths.sum()))
    assert np.array_equal(order.slice(12_345, 54_321), rows[12_345:54_321])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    shard = np.searchsorted(starts, rows, side="right")
    window = int(np.sort(lengths)[-WINDOW_SHARDS:].sum())
    for begin in range(0, len(rows) - BUFFER_ROWS, BUFFER_ROWS):
        part = rows[begin : begin + BUFFER_ROWS]
        near = part[:BUFFER_ROWS:7]
        assert np.abs(np.diff(near)).mean() > 1000  # not in the order of the disk
        assert len(set(shard[begin : begin + BUFFER_ROWS])) <= 2 * WINDOW_SHARDS
    assert set(shard[:2000]) <= set(shard[:window])
    runs = np.diff(np.sort(rows[:BUFFER_ROWS])) > 1
    assert runs.sum() < 1.2 * BUFFER_ROWS / BLOCK_ROWS


def test_row_order_depends_on_the_seed() -> None:
    rows = [RowOrder([1000] * 3, seed).slice(0, 3000) for seed in (1, 1, 2, -1)]
    assert np.array_equal(rows[0], rows[1])
    assert not np.array_equal(rows[0], rows[2])
    assert np.array_equal(np.sort(rows[3]), np.arange(3000))
