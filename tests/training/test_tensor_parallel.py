"""`--tp`: coders that several processes hold together train like those of one process."""

from __future__ import annotations

import multiprocessing as mp
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from process_of_a_divided_run import STEPS, Run
from safetensors.torch import load_file

from sparsify_vlm.coders import load_clt
from sparsify_vlm.training.distributed import World, joined_world
from sparsify_vlm.training.metrics import read_metrics

pytestmark = pytest.mark.slow

ALL_IN_ONE = {"skip_connection": True, "post_encoder_scale": True, "train_post_encoder": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "topk": {},
    "topk, micro": {"grad_acc_steps": 2, "micro_acc_steps": 2, **ALL_IN_ONE},
    "skip and post-encoder": ALL_IN_ONE,
    "signum": {"optimizer": "signum", "target_offset": 1, "lr": 1e-3},
    "relu, tanh": {"activation": "relu", "penalty": "tanh", **ALL_IN_ONE},
    "relu, l1 sum": {"activation": "relu", "penalty": "l1", "penalty_norm": "sum"},
    "jumprelu, tanh": {"activation": "jumprelu", "penalty": "tanh", "jumprelu_bandwidth": 0.1},
    "jumprelu, l0": {"activation": "jumprelu", "penalty": "l0", "jumprelu_bandwidth": 0.5},
    "batchtopk": {"activation": "batchtopk", **ALL_IN_ONE},
    "groupmax": {"activation": "groupmax"},
    "concat, topk": {"coalesce_topk": "concat", "topk_coalesced": True, **ALL_IN_ONE},
    "per-layer, batchtopk": {
        "coalesce_topk": "per-layer",
        "topk_coalesced": True,
        "activation": "batchtopk",
    },
    "per source tied": {"per_source_tied": True, "penalty": "l1"},
    "both tied": {"per_source_tied": True, "secondary_target_tied": True},
    "normalised": {"normalize_io": True, "divide_cross_layer": True},
    "auxk": {"auxk_alpha": 0.1, "dead_feature_threshold": 50, "k": 2, "skip_connection": True},
    "autoencoder": {"transcode": False, "cross_layer": 0},
}
KINDS = ("feature", "column")


def process(work: Callable[[World], None], variables: dict[str, str], output: Path) -> None:
    with output.open("ab") as file:
        os.dup2(file.fileno(), 2)
    os.environ.update(variables)
    torch.set_num_threads(1)
    with joined_world() as world:
        work(world)


def together(size: int, work: Callable[[World], None], output: Path) -> None:
    """Have `size` processes do `work`."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["process_of_a_divided_run"])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_WORLD_SIZE": str(size)}
    processes = []
    for rank in map(str, range(size)):
        variables = {**common, "WORLD_SIZE": str(size), "RANK": rank, "LOCAL_RANK": rank}
        processes.append(context.Process(target=process, args=(work, variables, output)))
        processes[-1].start()
    for one in processes:
        one.join(120)
    assert [one.exitcode for one in processes] == [0] * size, output.read_text()


class Runs:
    """Several runs, one after the other."""

    def __init__(self, runs: list[Run]) -> None:
        self.runs = runs

    def __call__(self, world: World) -> None:
        for run in self.runs:
            run.fit(world)


def alone(folder: Path, name: str, settings: dict[str, Any]) -> Path:
    Run(folder, name, settings=settings).fit(World())
    return folder / name


def assert_same(found: Path, expected: Path, what: str, tolerance: float = 1e-7) -> None:
    """Loss curves, FVU, L0 and published weights; the state to resume from."""
    curves = [read_metrics(path / "metrics.jsonl") for path in (found, expected)]
    assert [line["step"] for line in curves[0]] == [line["step"] for line in curves[1]]
    assert len(curves[0]) == STEPS
    for ours, theirs in zip(*curves, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=tolerance), what
        assert ours["fvu"]["image"] == pytest.approx(theirs["fvu"]["image"], rel=1e-6), what
        assert ours["l0"] == theirs["l0"], what
        assert ours["dead"] == theirs["dead"], what
    weights = [load_clt(path).state_dict() for path in (found, expected)]
    states = [
        load_file(next(path.glob("resume/step-*/tensors.safetensors")))
        for path in (found, expected)
    ]
    for ours, theirs in (weights, states):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            if key != "rng":
                torch.testing.assert_close(
                    ours[key], value, rtol=tolerance, atol=tolerance, msg=f"{what}: {key}"
                )


@pytest.fixture(scope="module")
def singles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every variant, trained by one process."""
    folder = tmp_path_factory.mktemp("one")
    for name, settings in VARIANTS.items():
        alone(folder, name, settings)
    return folder


def variants_for(kind: str) -> list[str]:
    return [name for name in VARIANTS if kind == "feature" or name != "autoencoder"]


@pytest.mark.parametrize("size", [2, 4])
def test_divided_coders_train_like_whole_ones(size: int, singles: Path, tmp_path: Path) -> None:
    runs = []
    for kind in KINDS:
        names = variants_for(kind)
        for number, name in enumerate(names):
            tp = 2 if size == 2 or number % 2 else 4  # in turn: four parts, two by two
            if name == "groupmax" or name == "topk":
                tp = min(size, 4)
            runs.append(Run(tmp_path, f"{kind} {name}", tp, kind, VARIANTS[name]))
    together(size, Runs(runs), tmp_path / "err.txt")
    for run in runs:
        name = run.name.partition(" ")[2]
        assert_same(tmp_path / run.name, singles / name, f"{run.name}, tp {run.tp} of {size}")
