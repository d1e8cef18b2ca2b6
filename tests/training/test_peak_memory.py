"""What a run really takes against what `estimate` says: within 10 %.

Compared are resident bytes, above those of the program with everything imported and the model
loaded, without the pages of the store's files (the system takes them back when it needs them). The
runs are made with glibc told to give large blocks back when they are freed. By default it keeps
them for the next tensor, which is faster and takes up to a third more, not twice the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Forks
from transformers import LlamaConfig

from sparsify_vlm.data.store_writer import StoreWriter, TokenRows
from sparsify_vlm.training.estimate import EstimateConfig, EstimatedCoder, estimate

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures on Linux"),
]

LAYERS, WIDTH, ROWS = 4, 256, 4096
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of made-up rows in bfloat16, and beside it the configuration of its model."""
    folder = tmp_path_factory.mktemp("memory")
    LlamaConfig(hidden_size=WIDTH, num_hidden_layers=LAYERS).save_pretrained(folder / "model")
    layers = list(range(LAYERS))
    sheet = {
        **{"model": "made-up", "revision": None, "dtype": "bfloat16", "d_model": WIDTH},
        **{"dataset": {"name": "made-up", "fingerprint": "f"}, "bos_token_id": None},
        **{"hookpoints": [f"layers.{i}.mlp" for i in layers], "shard_tokens": ROWS},
        **{"n_targets": LAYERS, "target_offset": 0, "sites": {"x": "mlp_in", "y": "mlp_out"}},
        **{"x_layers": layers, "y_layers": layers},
    }
    x = torch.randn(LAYERS, ROWS, WIDTH)
    count = torch.arange(ROWS, dtype=torch.int32)
    with StoreWriter(folder / "store", sheet, ROWS) as writer:
        writer.add(
            TokenRows(
                x=x.bfloat16(),
                y=(x / 2 + torch.randn(x.shape)).bfloat16(),
                input_ids=count,
                position=count,
                sample=torch.zeros(ROWS, dtype=torch.int32),
                role=torch.ones(ROWS, dtype=torch.uint8),
                patch=torch.full((ROWS, 2), -1, dtype=torch.int16),
                samples=["s0"],
            )
        )
        writer.finish()
    return folder


@pytest.fixture(scope="module")
def processes() -> Iterator[Forks]:
    forks = Forks(Path(__file__).with_name("process_of_a_measured_run.py"), ALLOCATOR)
    yield forks
    forks.end()


def predicted(model: str, coder: dict[str, Any], options: dict[str, Any]) -> int:
    """What `estimate` says, without the model."""
    cfg = EstimateConfig(model, EstimatedCoder(**coder), device="cpu", **options)
    found = estimate(cfg, probe=False)["bytes"]
    return int(found["peak"] - found["model"])


WIDE: dict[str, Any] = {"num_latents": 8192, "k": 16}
ADAM = {"optimizer": "adam"}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "adam": (WIDE, ADAM, {}),
    "adam, bfloat16 moments": (WIDE, {**ADAM, "bf16_moments": True}, {}),
    "adam, two micro-batches": (WIDE, {**ADAM, "micro_acc_steps": 2}, {}),
    "signum": (WIDE, {"optimizer": "signum"}, {}),
    "muon": ({"num_latents": 12288, "k": 16}, {"optimizer": "muon"}, {}),
    "tied": ({**WIDE, "per_source_tied": True}, ADAM, {}),
    "torch's kernels": (WIDE, ADAM, {"SPARSIFY_VLM_KERNELS": "torch"}),
    "batch top-k": ({**WIDE, "activation": "batchtopk"}, ADAM, {}),
    "many active latents": ({"num_latents": 4096, "k": 512}, ADAM, {}),
    "jumprelu": (
        {"num_latents": 2048, "activation": "jumprelu"},
        {**ADAM, "penalty": "l0"},
        {},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_takes_what_is_predicted(
    case: str, store: Path, tmp_path: Path, processes: Forks, monkeypatch: pytest.MonkeyPatch
) -> None:
    coder, options, environment = CASES[case]
    coder = {"transcode": True, "cross_layer": LAYERS, **coder}
    options = {"batch_tokens": 1024, "activations": str(store / "store"), **options}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    rates = {"max_steps": 4, "lr": 1e-3, "lr_warmup_steps": 0}
    run = {**options, **rates, "save_dir": str(tmp_path)}
    taken = processes.ask({"coder": coder, "train": run, "environment": environment})
    taken -= sum(file.stat().st_size for file in (store / "store").iterdir())
    expected = predicted(str(store / "model"), coder, options)
    print(f"{case}: {taken / 1e6:.0f} MB, predicted {expected / 1e6:.0f}: {expected / taken:.3f}")
    assert expected == pytest.approx(taken, rel=0.1)
    assert taken > 200e6  # so that the program's own memory does not matter


@pytest.mark.parametrize("stream", [False, True])
def test_a_run_on_the_model_takes_what_is_predicted(
    stream: bool, tmp_path: Path, processes: Forks
) -> None:
    coder = {"transcode": True, "cross_layer": 8, "num_latents": 8192, "k": 16}
    options: dict[str, Any] = {"optimizer": "adam", "batch_size": 64}
    if stream:
        options |= {"micro_acc_steps": 4, "stream_activations": True}
    rates = {"max_steps": 2, "lr": 1e-3, "lr_warmup_steps": 0}
    run = {"coder": coder, "train": {**options, **rates, "save_dir": str(tmp_path)}}
    data = {"dataset": "shapes", "max_examples": 256}
    taken = processes.ask({**run, "model": "tiny-llava", "data": data, "environment": {}})
    (line, *_) = (tmp_path / "unnamed" / "metrics.jsonl").read_text().splitlines()
    length = round(json.loads(line)["tokens"] / options["batch_size"])
    expected = predicted("tiny-llava", coder, {**options, "ctx_len": length})
    print(f"{stream}: {taken / 1e6:.0f} MB, predicted {expected / 1e6:.0f}: {expected / taken:.3f}")
    # What a model takes besides differs from machine to machine: .97 on one, .88 on another.
    assert expected == pytest.approx(taken, rel=0.15)
