"""Batches whose x and y are made piece by piece train the same coders as whole ones."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import shared
from safetensors.torch import load_file
from toy_source import TOKENS, ToySource, toy_config, toy_trainer

from sparsify_vlm.data import DataConfig
from sparsify_vlm.errors import UserError
from sparsify_vlm.models import Role
from sparsify_vlm.training import CoderConfig, TrainConfig, train
from sparsify_vlm.training.distributed import World
from sparsify_vlm.training.metrics import read_metrics
from sparsify_vlm.training.sources import (
    Inputs,
    LiveSource,
    StreamedBatch,
    TokenBatch,
    compacted,
)
from sparsify_vlm.training.step import mean_norms, moments

UNEVEN = [slice(0, 7), slice(7, 7), slice(7, 40), slice(40, TOKENS)]


class Streaming(ToySource):
    """The same tokens in pieces of 7, 0, 33 and 8; none may be made while another one lives."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.made = 0

    def batches(self, epoch: int, start: int) -> Iterator[StreamedBatch]:  # type: ignore[override]
        for batch in super().batches(epoch, start):
            yield self.streamed(batch)

    def streamed(self, batch: TokenBatch) -> StreamedBatch:
        parts = iter(())
        last: list[weakref.ref[torch.Tensor]] = []

        def record(inputs: Inputs) -> TokenBatch:
            nonlocal parts
            assert all(piece() is None for piece in last)
            part = next(parts, None)
            if part is None:
                parts = iter(UNEVEN)
                part = next(parts)
            x, y = batch.x[:, part].clone(), batch.y[:, part].clone()
            last[:] = [weakref.ref(x), weakref.ref(y)]
            self.made += 1
            return TokenBatch(x, y, batch.role[part])

        return StreamedBatch([{}] * len(UNEVEN), record)


def test_moments_of_pieces_are_those_of_the_whole() -> None:
    batch = ToySource(dtype=torch.float64).global_batch(0)
    batch.role[:7] = Role.IMAGE  # a piece without text
    streamed = Streaming().streamed(batch)
    found = moments(streamed, torch.float64, World())
    assert found.tokens == TOKENS
    for row, wanted in enumerate((None, Role.IMAGE, Role.TEXT)):
        y = batch.y if wanted is None else batch.y[:, batch.role == wanted]
        expected = (y - y.mean(1, keepdim=True)).square().sum((1, 2))
        torch.testing.assert_close(found.variance[row], expected)
    torch.testing.assert_close(found.mean_x, batch.x.mean(1))
    torch.testing.assert_close(found.mean_y, batch.y.mean(1))
    norms = mean_norms(streamed, found, World())
    torch.testing.assert_close(norms[0], batch.x.norm(dim=2).mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(norms[1], batch.y.norm(dim=2).mean(1), rtol=1e-6, atol=0)


def test_moments_of_pieces_are_exact_far_from_zero() -> None:
    batch = ToySource(dtype=torch.float64).global_batch(0)
    far = TokenBatch(batch.x, (batch.y + 1000).float(), batch.role)
    found = moments(Streaming().streamed(far), torch.float32, World()).variance
    expected = moments(batch, torch.float64, World()).variance
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "variant",
    [
        {"optimizer": "adam"},
        {"optimizer": "adam", "normalize_io": True, "penalty": "tanh", "grad_acc_steps": 2},
        {"optimizer": "muon", "auxk_alpha": 0.1, "dead_feature_threshold": 10},
    ],
    ids=str,
)
def test_the_same_weights(tmp_path: Path, variant: dict[str, Any]) -> None:
    runs = []
    for name, kind in (("whole", ToySource), ("pieces", Streaming)):
        source = kind(dtype=torch.float64)
        cfg = toy_config(tmp_path, run_name=name, micro_acc_steps=len(UNEVEN), **variant)
        runs.append(toy_trainer(cfg, source, dtype=torch.float64))
        runs[-1].fit()
    whole, pieces = runs
    for a, b in zip(whole.clt.parameters(), pieces.clt.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    lines = [read_metrics(run.run.metrics) for run in runs]
    for a, b in zip(*lines, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-9)
        assert a["l0_layers"] == b["l0_layers"]


# ---- the running model

SHAPES = DataConfig(dataset="shapes", max_examples=11)


def config(tmp_path: Path, **changed: Any) -> TrainConfig:
    coder = CoderConfig(transcode=True, cross_layer=3, num_latents=64, k=8)
    values: dict[str, Any] = {
        "batch_size": 6,
        "micro_acc_steps": 3,
        "optimizer": "adam",
        "lr": 1e-2,
        "lr_warmup_steps": 0,
        "max_steps": 4,
        "save_dir": str(tmp_path),
    }
    return TrainConfig(sae=coder, **(values | changed))


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("start", [0, 1])
def test_pieces_hold_the_batches_tokens(tmp_path: Path, size: int, start: int) -> None:
    """Of 11 samples the second batch has 5: pieces of 2, 2 and 1."""
    loaded = shared("llava")
    (whole, *_) = LiveSource(config(tmp_path), SHAPES, loaded, World()).batches(0, start)
    cfg = config(tmp_path, batch_size=6 // size, stream_activations=True)
    if size == 2:
        cfg.micro_acc_steps = 3
    found = []
    for rank in range(size):
        (batch, *_) = LiveSource(cfg, SHAPES, loaded, World(rank, size)).batches(0, start)
        assert len(batch.inputs) == 3
        for _ in range(2):  # as often as asked
            pieces = list(batch.pieces(1))
        found += pieces
    assert isinstance(whole, TokenBatch)
    order = [whole.x[0, :, 0].argsort(), torch.cat([p.x[0, :, 0] for p in found]).argsort()]
    for name in ("x", "y"):
        together = torch.cat([getattr(piece, name) for piece in found], dim=1)
        torch.testing.assert_close(
            getattr(whole, name)[:, order[0]], together[:, order[1]], rtol=1e-3, atol=1e-5
        )
    assert sum(len(p.role) for p in found) == len(whole.role)


@pytest.mark.parametrize("loss_fn", ["fvu", "kl-fvu"])
def test_a_streamed_run_is_the_same_and_resumes_exactly(tmp_path: Path, loss_fn: str) -> None:
    loaded, lines = shared("llava"), {}
    for name, options in {
        "whole": {},
        "streamed": {"stream_activations": True},
        "stopped": {"stream_activations": True, "save_every": 2},
    }.items():
        cfg = config(tmp_path, run_name=name, loss_fn=loss_fn, **options)
        if name == "stopped":
            stopping: list[int] = []

            def stop(line: dict[str, Any], seen: list[int] = stopping) -> None:
                seen.append(line["step"])
                if line["step"] == 3:
                    raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt):
                train(cfg, SHAPES, loaded=loaded, quiet=True, on_step=stop)
            cfg.resume = True
        lines[name] = read_metrics(train(cfg, SHAPES, loaded=loaded, quiet=True) / "metrics.jsonl")
    for whole, streamed in zip(lines["whole"], lines["streamed"], strict=True):
        assert whole["loss"] == pytest.approx(streamed["loss"], rel=2e-4)
        assert whole["tokens"] == streamed["tokens"]
    states = [
        load_file(next((tmp_path / name / "resume").iterdir()) / "tensors.safetensors")
        for name in ("streamed", "stopped")
    ]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_a_run_may_be_resumed_with_streaming(tmp_path: Path) -> None:
    loaded = shared("llava")
    train(config(tmp_path, max_steps=2, optimizer="signum"), SHAPES, loaded=loaded, quiet=True)
    cfg = config(tmp_path, resume=True, stream_activations=True, optimizer="signum")
    folder = train(cfg, SHAPES, loaded=loaded, quiet=True)
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"micro_acc_steps": 1}, "from 2 on"),
        ({"micro_acc_steps": 4}, "4 does not divide --batch_size 6"),
        ({"activations": "store"}, "--batch_tokens"),
    ],
    ids=str,
)
def test_streaming_needs_equal_parts(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        config(tmp_path, stream_activations=True, **options)


def test_compacted_keeps_memory() -> None:
    values = torch.randn(3, 10, 4)
    counted = torch.tensor([1, 0, 0, 1, 1, 0, 1, 1, 1, 0], dtype=torch.bool)
    expected = values[:, counted]
    found = compacted(values, counted)
    assert torch.equal(found, expected)
    assert found.data_ptr() == values.data_ptr()
    assert all(layer.is_contiguous() for layer in found)
