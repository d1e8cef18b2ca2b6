"""`--tp`: coders that several processes hold together train like those of one process."""

from __future__ import annotations

import multiprocessing as mp
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from process_of_a_divided_run import BROKEN_OFF, STEPS, Run, Runs
from safetensors.torch import load_file
from toy_source import toy_config

from sparsify_vlm.coders import CltConfig, load_clt
from sparsify_vlm.errors import UserError
from sparsify_vlm.training.distributed import World, joined_world
from sparsify_vlm.training.divided import divided, settled
from sparsify_vlm.training.metrics import read_metrics
from sparsify_vlm.training.parallel import Layout, mesh

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
    if size > 2:  # more processes than most machines have cores for the loading of numba's code
        common["SPARSIFY_VLM_KERNELS"] = "torch"
    processes = []
    for rank in map(str, range(size)):
        variables = {**common, "WORLD_SIZE": str(size), "RANK": rank, "LOCAL_RANK": rank}
        processes.append(context.Process(target=process, args=(work, variables, output)))
        processes[-1].start()
    for one in processes:
        one.join(120)
    assert [one.exitcode for one in processes] == [0] * size, output.read_text()


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


def assert_like_one_process(size: int, runs: list[Run], singles: Path) -> None:
    together(size, Runs(runs), singles / "err.txt")
    for run in runs:
        what = f"{run.name} {run.kind}, tp {run.tp} of {size}"
        assert_same(run.folder / run.name, singles / run.name, what)


def test_two_parts_train_like_the_whole(singles: Path, tmp_path: Path) -> None:
    runs = [
        Run(tmp_path / kind, name, 2, kind, settings)
        for kind in KINDS
        for name, settings in VARIANTS.items()
        if kind == "feature" or name != "autoencoder"
    ]
    assert_like_one_process(2, runs, singles)


def test_four_processes_train_like_one(singles: Path, tmp_path: Path) -> None:
    """Two by two, and four parts.

    Batch top-k only where tokens are not shared out: it takes the largest of each process's.
    """
    names = {"topk, micro": 2, "relu, tanh": 2, "jumprelu, l0": 4, "per-layer, batchtopk": 4}
    runs = [
        Run(tmp_path / kind, name, tp, kind, VARIANTS[name])
        for kind in KINDS
        for name, tp in names.items()
    ]
    assert_like_one_process(4, runs, singles)


def test_a_state_goes_on_in_every_layout(singles: Path, tmp_path: Path) -> None:
    """Saved by two processes with a coder together, taken up by one, by four, and by four parts."""
    settings = VARIANTS["skip and post-encoder"]
    starts = [Run(tmp_path, kind, 2, kind, settings, breaks_off=True) for kind in KINDS]
    together(2, Runs(starts), tmp_path / "err.txt")
    after: dict[int, list[Run]] = {1: [], 4: []}
    for start, other in zip(starts, reversed(KINDS), strict=True):
        assert load_clt(tmp_path / start.name).cfg.training["step"] == BROKEN_OFF
        for size, tp in ((1, 1), (4, 1), (4, 4)):
            name = f"{start.name}, then {tp} of {size}"
            shutil.copytree(tmp_path / start.name, tmp_path / name)
            after[size].append(Run(tmp_path, name, tp, other, {**settings, "resume": True}))
    for run in after[1]:
        run.fit(World())
    together(4, Runs(after[4]), tmp_path / "err.txt")
    for run in after[1] + after[4]:
        assert_same(tmp_path / run.name, singles / "skip and post-encoder", run.name)


def test_one_part_holds_its_share_only() -> None:
    cfg = CltConfig(
        8, ["a", "b"], num_latents=16, k=4, n_targets=2, coalesce_topk="concat",
        skip_connection=True, post_encoder_scale=True,
    )  # fmt: skip
    clt = divided(cfg, Layout("column", 1, 4), "cpu")
    shapes = {name: tuple(value.shape) for name, value in clt.named_parameters()}
    assert shapes["W_enc.0"] == (4, 8)
    assert shapes["W_dec.0.1"] == (16, 2)
    assert shapes["W_skip.1.0"] == (2, 8)
    assert shapes["b_dec.0"] == (2,)
    assert clt.W_dec[0][1] is clt.W_dec[1][0], "one decoder per target"
    assert clt.post_scale is not None
    assert bool((clt.post_scale[0][0] == 1).all())
    by_latent = divided(cfg, Layout("feature", 0, 4), "cpu")
    assert by_latent.W_dec[0][0].shape == (4, 8)
    assert by_latent.b_dec[0].shape == (8,)


# ---- what can be asked for

REFUSED = {
    "--tp 0": {"tp": 0},
    "--optimizer muon": {"tp": 2, "optimizer": "muon"},
    "--loss_fn kl": {"tp": 2, "loss_fn": "kl"},
    "--tp_layout column needs --transcode": {
        "tp": 2,
        "tp_layout": "column",
        "transcode": False,
        "cross_layer": 0,
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_divided_is_refused(message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        toy_config(tmp_path, **REFUSED[message])


def test_layout_that_is_taken(tmp_path: Path) -> None:
    def kind(parts: int, d_model: int, *, layout: str = "auto", **coder: Any) -> str:
        cfg = toy_config(tmp_path, tp=parts, tp_layout=layout)
        clt = CltConfig(d_model, ["a"], **{"num_latents": 64, "k": 4, **coder})
        return settled(Layout(parts=parts), cfg, clt).kind

    assert kind(2, 1024) == "column"
    assert kind(2, 1024, transcode=False) == "feature"
    assert kind(2, 64) == "feature"
    assert kind(2, 64, layout="column") == "column"
    with pytest.raises(UserError, match="--tp 3 does not divide 64 latents"):
        kind(3, 64)
    with pytest.raises(UserError, match="--tp 4 does not divide 18 columns"):
        kind(4, 18, layout="column")
    with pytest.raises(UserError, match="--tp 4 does not divide the 2 groups"):
        kind(4, 64, activation="groupmax", k=2)
    with pytest.raises(UserError, match="--tp 2 does not divide the 1 processes"):
        mesh(World(), 2)
