"""Every variant of the coder trains on tiny-llava, is killed, resumed, saved and loaded again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_source import Killed, killed_at

from sparsify_vlm.coders import load_clt
from sparsify_vlm.data import DataConfig
from sparsify_vlm.data.capture import CaptureConfig, capture
from sparsify_vlm.errors import UserError
from sparsify_vlm.training import CoderConfig, TrainConfig, train
from sparsify_vlm.training.config import RunConfig

STEPS = 30
SHAPES = DataConfig(dataset="shapes", max_examples=24)

ACTIVATIONS: dict[str, dict[str, Any]] = {
    "topk": {},
    "bf16 selection": {"bf16_selection": True},
    "batchtopk": {"activation": "batchtopk"},
    "groupmax": {"activation": "groupmax"},
    "relu, l1": {"activation": "relu", "penalty": "l1"},
    "relu, tanh": {"activation": "relu", "penalty": "tanh", "penalty_warmup_steps": 20},
    "relu, l1 sum": {"activation": "relu", "penalty": "l1", "penalty_norm": "sum"},
    "jumprelu, tanh": {"activation": "jumprelu", "penalty": "tanh"},
    "jumprelu, l0": {"activation": "jumprelu", "penalty": "l0", "jumprelu_bandwidth": 0.05},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "skip and post-encoder": {
        "skip_connection": True,
        "post_encoder_scale": True,
        "train_post_encoder": True,
    },
    "offset 1": {"target_offset": 1},
    "concat": {"coalesce_topk": "concat"},
    "concat, topk": {"coalesce_topk": "concat", "topk_coalesced": True},
    "per-layer": {"coalesce_topk": "per-layer"},
    "per-layer, topk": {"coalesce_topk": "per-layer", "topk_coalesced": True},
    "per source tied": {"per_source_tied": True},
    "both tied": {"per_source_tied": True, "secondary_target_tied": True},
    "normalised": {"normalize_io": True},
    "divided": {"divide_cross_layer": True},
    "auxk": {"auxk_alpha": 0.03, "dead_feature_threshold": 2000},
    "bfloat16 moments": {"bf16_moments": True},
    "signum": {"optimizer": "signum", "lr": 3e-3},
    "muon": {"optimizer": "muon", "lr": 1e-2},
    "autoencoder": {"transcode": False, "cross_layer": 0},
}
VARIANTS = ACTIVATIONS | LAYOUTS


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Activations of tiny-llava on a few scenes."""
    cfg = CaptureConfig(
        dataset="shapes",
        max_examples=24,
        model="tiny-llava",
        device="cpu",
        output_dir=str(tmp_path_factory.mktemp("store") / "s"),
        quiet=True,
    )
    return capture(cfg)


def settings(save_dir: Path, **changed: Any) -> TrainConfig:
    coder = {"transcode": True, "cross_layer": 3, "num_latents": 128, "k": 8}
    values: dict[str, Any] = {
        "optimizer": "adam",
        "lr": 3e-3,
        "lr_warmup_steps": 2,
        "max_steps": STEPS,
        "save_every": 12,
        "layers": [0, 3, 6, 7],
        "save_dir": str(save_dir),
    }
    of_coder = CoderConfig.__dataclass_fields__
    coder |= {name: value for name, value in changed.items() if name in of_coder}
    values |= {name: value for name, value in changed.items() if name not in of_coder}
    return TrainConfig(sae=CoderConfig(**coder), **values)


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize("name", VARIANTS)
def test_variant(name: str, store: Path, tmp_path: Path) -> None:
    common = {"activations": str(store), "batch_tokens": 256} | VARIANTS[name]
    whole = train(settings(tmp_path, run_name="whole", **common), quiet=True)
    found = losses(whole)
    assert len(found) == STEPS
    last = json.loads((whole / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert (last["penalty"] > 0) == ("penalty" in common)
    assert (last["auxk"] > 0) <= ("auxk_alpha" in common)
    if "penalty_warmup_steps" not in common:  # there the loss has a part that grows
        assert sum(found[-5:]) < 0.9 * sum(found[:5])
    parts = settings(tmp_path, run_name="parts", **common)
    with pytest.raises(Killed):
        train(parts, quiet=True, on_step=killed_at(19))
    parts.resume = True
    train(parts, quiet=True)
    assert losses(tmp_path / "parts") == found
    one, other = (load_clt(tmp_path / run) for run in ("whole", "parts"))
    assert one.cfg.activation == parts.sae.activation
    assert one.state_dict().keys() == other.state_dict().keys()
    for key, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


@pytest.mark.parametrize("loss_fn", ["ce", "kl", "kl-fvu"])
def test_losses_on_predictions_fall(loss_fn: str, tmp_path: Path) -> None:
    """Loss and gradient go through the frozen model; test_spliced.py holds their values."""
    cfg = settings(
        tmp_path, loss_fn=loss_fn, max_steps=30, layers=[0, 7], cross_layer=2, batch_size=8
    )
    folder = train(cfg, SHAPES, RunConfig(model="tiny-llava", device="cpu"), quiet=True)
    found = losses(folder)
    assert sum(found[-5:]) < 0.8 * sum(found[:5])


def test_a_clt_starts_from_per_layer_transcoders(store: Path, tmp_path: Path) -> None:
    """Encoders and own-layer decoders are theirs, so the first loss is their last."""
    common: dict[str, Any] = {"activations": str(store), "batch_tokens": 256}
    first = train(settings(tmp_path, run_name="plt", cross_layer=1, **common), quiet=True)
    cfg = settings(tmp_path, run_name="clt", finetune=str(first), max_steps=1, lr=1e-9, **common)
    second = train(cfg, quiet=True)
    before, after = load_clt(first), load_clt(second)
    x = torch.randn(4, 30, before.cfg.d_model)
    for a, b in zip(before.reconstruct(x), after.reconstruct(x), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert after.cfg.n_targets == 3
    cfg = settings(tmp_path, run_name="n", finetune=str(first), normalize_io=True, **common)
    with pytest.raises(UserError, match="normalize_io False, asked for is True"):
        train(cfg, quiet=True)
