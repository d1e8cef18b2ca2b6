"""Tokens from the running model and from a store of it: the same tokens, the same loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import shared

from sparsify_vlm.data import ActivationStore, CaptureConfig, DataConfig
from sparsify_vlm.data.capture import capture
from sparsify_vlm.errors import UserError
from sparsify_vlm.models import Role, record_tokens
from sparsify_vlm.training import CoderConfig, RunConfig, TrainConfig, train
from sparsify_vlm.training.distributed import World
from sparsify_vlm.training.metrics import read_metrics
from sparsify_vlm.training.sources import LiveSource, StoreSource
from sparsify_vlm.training.step import moments

SAMPLES = 12
SHAPES = DataConfig(dataset="shapes", max_examples=SAMPLES)
CPU = torch.device("cpu")


def config(**changed: Any) -> TrainConfig:
    of_coder = CoderConfig.__dataclass_fields__
    coder: dict[str, Any] = {"transcode": True, "cross_layer": 3, "num_latents": 64, "k": 8}
    coder |= {name: value for name, value in changed.items() if name in of_coder}
    rest = {name: value for name, value in changed.items() if name not in of_coder}
    return TrainConfig(sae=CoderConfig(**coder), **{"batch_size": SAMPLES, **rest})


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    cfg = CaptureConfig(
        dataset="shapes",
        max_examples=SAMPLES,
        model=shared("llava").name,
        output_dir=str(folder),
        dtype="float32",
        quiet=True,
    )
    return capture(cfg, shared("llava"))


@pytest.mark.parametrize(
    "counted", [{}, {"remove_first_token": True}, {"filter_bos": False}], ids=str
)
def test_the_same_tokens_live_and_stored(stored: Path, counted: dict[str, Any]) -> None:
    cfg = config(batch_tokens=10**6, **counted)
    (live,) = LiveSource(cfg, SHAPES, shared("llava"), World()).batches(0, 0)
    (kept,) = StoreSource(cfg, ActivationStore(stored), 1, World(), CPU).batches(0, 0)
    assert live.x.shape == kept.x.shape
    assert live.role.bincount().tolist() == kept.role.bincount().tolist()
    a, b = (moments(batch, torch.float64, World()) for batch in (live, kept))
    for name in ("mean_x", "mean_y", "variance"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("variant", [{}, {"transcode": False, "cross_layer": 0}], ids=str)
def test_the_same_losses_live_and_stored(
    stored: Path, tmp_path: Path, variant: dict[str, Any]
) -> None:
    common = {"max_steps": 3, "optimizer": "adam", "lr": 1e-2, "lr_warmup_steps": 0, **variant}
    lines = []
    for name, extra in (("live", {}), ("store", {"activations": str(stored)})):
        cfg = config(batch_tokens=10**6, save_dir=str(tmp_path), run_name=name, **common, **extra)
        live = {} if extra else {"data": SHAPES, "loaded": shared("llava")}
        lines.append(read_metrics(train(cfg, quiet=True, **live) / "metrics.jsonl"))
    for live_line, store_line in zip(*lines, strict=True):
        assert live_line["loss"] == pytest.approx(store_line["loss"], rel=2e-4)
        assert live_line["fvu"] == pytest.approx(store_line["fvu"], rel=2e-4)
        assert live_line["tokens"] == store_line["tokens"]
    assert lines[0][0]["loss"] == pytest.approx(lines[1][0]["loss"], rel=1e-5)


def test_what_is_counted() -> None:
    """No padding, no BOS, no excluded token; roles as the model's own."""
    loaded = shared("llava")
    text_id = loaded.tokenizer("red").input_ids[-1]
    cfg = config(exclude_tokens=[text_id])
    source = LiveSource(cfg, SHAPES, loaded, World())
    (batch,) = source.batches(0, 0)
    from sparsify_vlm.data import batches

    (encoded,) = batches(source.samples, loaded, SAMPLES, SHAPES.ctx_len)
    table = record_tokens(loaded, encoded.inputs)
    ids = table.input_ids
    wanted = (ids != loaded.tokenizer.bos_token_id) & (ids != text_id)
    assert batch.x.shape[1] == int(wanted.sum()) < len(ids)
    assert torch.equal(batch.x, table.x[:, wanted])
    assert torch.equal(batch.role, table.role[wanted])
    assert not (batch.role == Role.PAD).any()


def source_of(kind: str, stored: Path, world: World) -> Any:
    """Global batches of 6 samples or 240 tokens, for any number of processes."""
    if kind == "live":
        cfg = config(batch_size=6 // world.size)
        return LiveSource(cfg, SHAPES, shared("llava"), world)
    cfg = config(batch_tokens=240 // world.size)
    return StoreSource(cfg, ActivationStore(stored), 1, world, CPU)


def in_order(x: torch.Tensor) -> torch.Tensor:
    """Tokens sorted, for comparing sets of them."""
    return x[:, x[0, :, 0].argsort()]


@pytest.mark.parametrize("kind", ["live", "store"])
@pytest.mark.parametrize("size", [2, 3])
def test_processes_share_the_global_batches(stored: Path, kind: str, size: int) -> None:
    alone = source_of(kind, stored, World())
    expected = list(alone.batches(0, 1))
    assert alone.n_batches == len(expected) + 1
    shares = [source_of(kind, stored, World(rank, size)) for rank in range(size)]
    assert [share.n_batches for share in shares] == [alone.n_batches] * size
    parts = [list(share.batches(0, 1)) for share in shares]
    assert [len(part) for part in parts] == [len(expected)] * size
    for number, whole in enumerate(expected):
        x = torch.cat([part[number].x for part in parts], dim=1)
        torch.testing.assert_close(in_order(x), in_order(whole.x), rtol=1e-3, atol=1e-5)


def test_layers_are_chosen_by_name_number_and_stride(stored: Path) -> None:
    loaded, store = shared("llava"), ActivationStore(stored)
    name = "language_model.model.layers.{}.mlp"
    for options, layers in (
        ({}, [0, 1, 2]),
        ({"layers": [2, 0]}, [0, 2]),
        ({"layer_stride": 2}, [0, 2]),
        ({"hookpoints": ["*layers.1.mlp"]}, [1]),
        ({"hookpoints": [name.format("[12]")]}, [1, 2]),
    ):
        cfg = config(**options)
        live = LiveSource(cfg, SHAPES, loaded, World())
        kept = StoreSource(cfg, store, 1, World(), CPU)
        assert live.hookpoints == kept.hookpoints == [name.format(i) for i in layers]
        row = next(kept.batches(0, 0))
        assert row.x.shape[0] == len(layers)
    for source in (
        lambda cfg: LiveSource(cfg, SHAPES, loaded, World()),
        lambda cfg: StoreSource(cfg, store, 1, World(), CPU),
    ):
        with pytest.raises(UserError, match=r"nowhere.*layers\.0\.mlp"):
            source(config(hookpoints=["nowhere"]))
        with pytest.raises(UserError, match="--layers 3"):
            source(config(layers=[3]))


def test_a_store_is_checked(stored: Path, tmp_path: Path) -> None:
    where = {"activations": str(stored), "save_dir": str(tmp_path)}
    with pytest.raises(UserError, match="--input_site is resid_mid"):
        train(config(input_site="resid_mid", **where))
    with pytest.raises(UserError, match="holds activations of"):
        train(config(**where), run=RunConfig(model="tiny-llama"))
    with pytest.raises(UserError, match="leave the dataset out"):
        train(config(**where), SHAPES)
    with pytest.raises(UserError, match="--k 65"):
        train(config(num_latents=0, expansion_factor=2, k=65, **where))
    assert not any(tmp_path.iterdir())


def test_cross_layer_beyond_the_depth_is_clamped_and_said(
    stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for offset, taken in ((0, 3), (1, 2)):
        cfg = config(
            activations=str(stored),
            save_dir=str(tmp_path),
            run_name=f"offset{offset}",
            cross_layer=50,
            target_offset=offset,
            max_steps=1,
        )
        folder = train(cfg)
        assert f"taking {taken}." in capsys.readouterr().out
        sheet = (folder / "clt.json").read_text()
        assert f'"n_targets": {taken}' in sheet


def test_training_goes_on_from_another_coder(stored: Path, tmp_path: Path) -> None:
    common = {"activations": str(stored), "save_dir": str(tmp_path), "max_steps": 3}
    first = train(config(run_name="a", optimizer="adam", **common), quiet=True)
    second = train(config(run_name="b", finetune=str(first), **common), quiet=True)
    last, start = (read_metrics(run / "metrics.jsonl") for run in (first, second))
    assert start[0]["loss"] < last[0]["loss"]
    with pytest.raises(UserError, match="--finetune"):
        train(config(run_name="c", finetune=str(first), num_latents=32, **common), quiet=True)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"cross_layer": 2}, "n_targets 3, asked for is 2"),
        ({"target_offset": 1, "cross_layer": 3}, "n_targets 3, asked for is 2"),
        ({"target_offset": 1, "cross_layer": 2, "start": 2}, "target_offset 0, asked for is 1"),
        ({"per_source_tied": True}, "per_source_tied False, asked for is True"),
        ({"secondary_target_tied": True}, "secondary_target_tied False, asked for is True"),
        ({"coalesce_topk": "concat"}, "coalesce_topk none, asked for is concat"),
        ({"layers": [0, 2], "cross_layer": 2, "start": 2}, "are of layers 0, 1, 2, asked for are"),
        ({"layers": [1, 2], "cross_layer": 1, "start": 1}, "are of layers 0, 1, 2, asked for are"),
    ],
    ids=str,
)
def test_coders_whose_tensors_mean_something_else_are_no_start(
    stored: Path, tmp_path: Path, changed: dict[str, Any], named: str
) -> None:
    """Their shapes alone would let them pass."""
    common = {"activations": str(stored), "save_dir": str(tmp_path), "max_steps": 1}
    settings = {"cross_layer": 3} | changed
    targets = settings.pop("start", 3)
    first = train(config(run_name="a", cross_layer=targets, **common), quiet=True)
    with pytest.raises(UserError, match=named):
        train(config(run_name="c", finetune=str(first), **settings, **common), quiet=True)
    assert not (tmp_path / "c").exists()


def test_when_latents_are_dead_must_stay_where_auxk_trains_them(
    stored: Path, tmp_path: Path
) -> None:
    common = {"activations": str(stored), "save_dir": str(tmp_path), "max_steps": 1}
    for name, alpha in (("figure", 0.0), ("loss", 0.1)):
        common |= {"run_name": name, "auxk_alpha": alpha}
        train(config(dead_feature_threshold=500, **common), quiet=True)
        changed = config(dead_feature_threshold=5, resume=True, **common)
        if alpha:
            with pytest.raises(UserError, match="dead_feature_threshold was 500"):
                train(changed, quiet=True)
        else:
            train(changed, quiet=True)


def test_resume_on_other_data_names_it(stored: Path, tmp_path: Path) -> None:
    common = {"save_dir": str(tmp_path), "max_steps": 2, "batch_size": 4}
    train(config(**common), SHAPES, loaded=shared("llava"), quiet=True)
    for changed, named in (
        ({"data": DataConfig(dataset="shapes", max_examples=10)}, r"data\.max_examples was 12"),
        ({"k": 7}, "k was 8"),
        ({"batch_size": 6}, "batch_size over all processes was 4"),
        ({"filter_bos": False}, "filter_bos was true"),
    ):
        data = changed.pop("data", SHAPES)
        cfg = config(resume=True, **{**common, **changed})
        with pytest.raises(UserError, match=named):
            train(cfg, data, loaded=shared("llava"), quiet=True)
