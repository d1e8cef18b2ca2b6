"""metrics.jsonl, the progress line, and what logging services are given."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from toy_source import ToySource, toy_config, toy_trainer

from sparsify_vlm.errors import UserError
from sparsify_vlm.models import Role
from sparsify_vlm.training.metrics import read_metrics
from sparsify_vlm.training.sources import TokenBatch
from sparsify_vlm.training.trainer import _shown


def test_every_line_has_every_figure(tmp_path: Path) -> None:
    trainer = toy_trainer(toy_config(tmp_path, target_offset=1, cross_layer=2, log_every=5))
    trainer.fit()
    lines = read_metrics(trainer.run.metrics)
    assert [line["step"] for line in lines] == [5, 10, 12]
    for line in lines:
        assert list(line) == [
            *("step", "tokens", "seconds", "tokens_per_s", "loss", "penalty", "auxk", "lr", "k"),
            *("fvu", "fvu_layers", "l0", "l0_layers", "dead", "dead_layers"),
        ]
        assert line["tokens"] == line["step"] * 48
        assert line["k"] == 4
        for group in ("all", "image", "text"):
            first, *rest = line["fvu_layers"][group]
            assert first is None  # nothing writes to the first layer
            assert line["fvu"][group] == pytest.approx(sum(rest) / 2)
        for name in ("l0", "dead"):
            of_coders = line[f"{name}_layers"]
            of_coders = of_coders["all"] if name == "l0" else of_coders
            assert len(of_coders) == len(trainer.clt.cfg.source_layers())
            assert line[name] == pytest.approx(sum(of_coders) / len(of_coders))
        assert line["loss"] == pytest.approx(sum(line["fvu_layers"]["all"][1:]))


def test_text_has_no_image_figures(tmp_path: Path) -> None:
    def text_only(_: int, batch: TokenBatch) -> None:
        batch.role[:] = Role.TEXT

    trainer = toy_trainer(toy_config(tmp_path), ToySource(spoil=text_only))
    trainer.fit()
    line = read_metrics(trainer.run.metrics)[-1]
    assert line["fvu"]["image"] is None
    assert set(_shown(line)) == {"FVU", "text", "L0", "dead", "tokens/s"}


class FakeService(ModuleType):
    """A module like wandb and trackio, which keeps what it is told."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.started: dict[str, Any] = {}
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.ended = False

    def init(self, **options: Any) -> Any:
        self.started = options
        return SimpleNamespace(log=self.log, finish=self.finish)

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.ended = True


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_services_get_every_so_many_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    service = FakeService(name)
    monkeypatch.setitem(sys.modules, name, service)
    options: dict[str, Any] = {f"log_to_{name}": True, "wandb_log_frequency": 4}
    trainer = toy_trainer(toy_config(tmp_path, run_name="mine", **options))
    trainer.fit()
    assert service.started["name"] == "mine"
    assert service.ended
    assert [step for step, _ in service.logged] == [4, 8, 12]
    values = service.logged[-1][1]
    line = read_metrics(trainer.run.metrics)[-1]
    assert values["fvu/image"] == line["fvu"]["image"]
    assert values["fvu_text/layers.2.mlp"] == line["fvu_layers"]["text"][2]
    assert values["loss"] == line["loss"]
    json.dumps(values, allow_nan=False)


def test_wandb_run_goes_on_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = []
    for resume in (False, True):
        monkeypatch.setitem(sys.modules, "wandb", service := FakeService("wandb"))
        cfg = toy_config(tmp_path, log_to_wandb=True, resume=resume, max_steps=20 if resume else 5)
        toy_trainer(cfg).fit()
        ids.append(service.started["id"])
    assert ids[0] == ids[1]


@pytest.mark.parametrize(
    ("name", "module"),
    [("wandb", "wandb"), ("trackio", "trackio"), ("tensorboard", "torch.utils.tensorboard")],
)
def test_missing_package_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    options: dict[str, Any] = {f"log_to_{name}": True}
    with pytest.raises(UserError, match=rf"--log_to_{name} .*sparsify-vlm\[log\]"):
        toy_trainer(toy_config(tmp_path, **options)).fit()
