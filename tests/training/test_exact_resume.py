"""A run that was stopped and resumed ends in the same bits as one that was not."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toy_source import Killed, ToySource, killed_at, toy_config, toy_trainer

from sparsify_vlm.coders import load_clt
from sparsify_vlm.errors import UserError
from sparsify_vlm.training import state
from sparsify_vlm.training.metrics import read_metrics
from sparsify_vlm.training.trainer import Trainer


def everything(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The last state and the published coders, as they lie on the disk."""
    folder = trainer.run.path
    (state,) = (folder / "resume").iterdir()
    files = {"state": state / "tensors.safetensors"}
    files |= {h: folder / h / "sae.safetensors" for h in trainer.clt.cfg.hookpoints}
    return {
        f"{name} {key}": tensor.clone()
        for name, file in files.items()
        for key, tensor in load_file(file).items()
    }


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


VARIANTS: list[dict[str, Any]] = [
    {"optimizer": "signum"},
    {"optimizer": "adam"},
    {"optimizer": "muon", "skip_connection": True},
    {"optimizer": "adam", "grad_acc_steps": 2, "micro_acc_steps": 3, "k_decay_steps": 9},
    {"optimizer": "signum", "post_encoder_scale": True, "train_post_encoder": True},
    {"optimizer": "signum", "transcode": False, "cross_layer": 0},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_resumed_run_ends_in_the_same_bits(tmp_path: Path, variant: dict[str, Any]) -> None:
    undisturbed = toy_trainer(toy_config(tmp_path / "a", **variant))
    undisturbed.fit()
    cfg = toy_config(tmp_path / "b", **variant)
    with pytest.raises(Killed):
        toy_trainer(cfg, on_step=killed_at(3)).fit()  # before the first state
    cfg = toy_config(tmp_path / "b", resume=True, **variant)
    for step in (7, 11):
        with pytest.raises(Killed):
            toy_trainer(cfg, on_step=killed_at(step)).fit()
    resumed = toy_trainer(cfg)
    assert resumed.step == 10
    resumed.fit()
    assert_same_bits(everything(undisturbed), everything(resumed))
    timeless = [
        [
            {k: v for k, v in line.items() if not k.startswith(("seconds", "tokens_per"))}
            for line in t
        ]
        for t in (read_metrics(undisturbed.run.metrics), read_metrics(resumed.run.metrics))
    ]
    assert timeless[0] == timeless[1]
    assert [line["step"] for line in timeless[0]] == list(range(1, 13))


def test_published_coders_are_the_averaged_weights_and_publishing_changes_nothing(
    tmp_path: Path,
) -> None:
    trainer = toy_trainer(toy_config(tmp_path))
    trainer.fit()
    states = trainer.optimizers.state()[0]
    trained = [p for p in trainer.clt.parameters() if p.requires_grad]
    iterates = {p: states[f"{i}.z"] for i, p in enumerate(trained)}
    before = [p.detach().clone() for p in trainer.clt.parameters()]
    published = load_clt(trainer.run.path)
    for p, y, loaded in zip(trainer.clt.parameters(), before, published.parameters(), strict=True):
        if not p.requires_grad:
            continue
        z = iterates[p].double()
        average = (y.double() - 0.05 * z) / 0.95  # y = 0.95 x + 0.05 z
        torch.testing.assert_close(loaded.double(), average, rtol=1e-5, atol=1e-6)
        assert not torch.equal(loaded, y)
    state.publish(trainer)
    for p, y in zip(trainer.clt.parameters(), before, strict=True):
        assert torch.equal(p, y)


def test_what_a_model_draws_is_the_same_after_a_resume(tmp_path: Path) -> None:
    """A model that draws from torch's own generator, as dropout does."""

    def source() -> ToySource:
        return ToySource(spoil=lambda _, batch: batch.x.add_(torch.randn(batch.x.shape)))

    undisturbed = toy_trainer(toy_config(tmp_path / "a"), source())
    undisturbed.fit()
    cfg = toy_config(tmp_path / "b", save_every=1)
    with pytest.raises(Killed):
        toy_trainer(cfg, source(), on_step=killed_at(7)).fit()
    torch.manual_seed(5)
    resumed = toy_trainer(toy_config(tmp_path / "b", save_every=1, resume=True), source())
    assert resumed.step == 6
    resumed.fit()
    assert_same_bits(everything(undisturbed), everything(resumed))


def test_a_finished_run_says_so_and_publishes_again(tmp_path: Path) -> None:
    trainer = toy_trainer(toy_config(tmp_path))
    trainer.fit()
    before = everything(trainer)
    (trainer.run.path / "layers.1.mlp" / "sae.safetensors").write_bytes(b"half")
    again = toy_trainer(toy_config(tmp_path, resume=True))
    assert again.finished
    assert_same_bits(before, everything(again))


def test_state_with_a_missing_tensor_is_refused(tmp_path: Path) -> None:
    toy_trainer(toy_config(tmp_path)).fit()
    with pytest.raises(UserError, match="another shape"):
        toy_trainer(toy_config(tmp_path, resume=True, num_latents=64))


def test_a_stream_ends_when_its_data_does(tmp_path: Path) -> None:
    trainer = toy_trainer(toy_config(tmp_path, max_steps=None), ToySource(n_batches=None))
    assert trainer.total is None
    trainer.fit()
    assert trainer.step == 7
    again = toy_trainer(
        toy_config(tmp_path, max_steps=None, resume=True), ToySource(n_batches=None)
    )
    assert again.step == 7


def test_decaying_learning_rate_needs_a_length(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--max_steps"):
        toy_trainer(
            toy_config(tmp_path, max_steps=None, optimizer="adam"), ToySource(n_batches=None)
        )


def test_passes_follow_each_other(tmp_path: Path) -> None:
    source = ToySource(n_batches=5)
    trainer = toy_trainer(toy_config(tmp_path, max_steps=None, epochs=3, grad_acc_steps=2), source)
    assert trainer.total == 7
    seen = [number for number, _ in zip(trainer._numbered_batches(), range(12), strict=False)]
    assert [number for number, _ in seen] == list(range(12))
    trainer.step = 3  # batch 6 is the second of the second pass
    number, batch = next(trainer._numbered_batches())
    assert number == 6
    assert torch.equal(batch.x, source.global_batch(1).x)


def test_killed_at_any_change_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop before the n-th renaming or removal, for every n, and resume."""
    settings: dict[str, Any] = {"max_steps": 4, "save_every": 2, "cross_layer": 1}
    undisturbed = toy_trainer(toy_config(tmp_path / "whole", **settings))
    undisturbed.fit()
    left = 0

    def counted(change: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed
            return change(*args, **kwargs)

        return wrapped

    monkeypatch.setattr(os, "replace", counted(os.replace))
    monkeypatch.setattr(shutil, "rmtree", counted(shutil.rmtree))
    for moment in range(1, 100):
        left, folder = moment, tmp_path / str(moment)
        try:
            toy_trainer(toy_config(folder, **settings)).fit()
            break
        except Killed:
            resumed = toy_trainer(toy_config(folder, resume=True, **settings))
        if not resumed.finished:
            resumed.fit()
        assert_same_bits(everything(undisturbed), everything(resumed))
    assert moment > 20  # two states, their coders, and what is removed
