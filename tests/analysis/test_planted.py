"""Trained coders with a known answer: the controls tell deleted cross writes from none needed.

Both coders write to their own layer only, so every arm that takes cross writes away is the full
one for both. One was trained so; the other was trained with all targets and had its cross writes
deleted afterwards. Refitting the own decoders repairs the second and leaves the first.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparsify_vlm.analysis.ablation import Ablated, ablation
from sparsify_vlm.analysis.bootstrap import unpaired_difference
from sparsify_vlm.coders import Clt, load_clt
from sparsify_vlm.data import CaptureConfig
from sparsify_vlm.data.capture import capture
from sparsify_vlm.models import load_model
from sparsify_vlm.training import CoderConfig, TrainConfig, train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def coders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Clt, Clt, Path]:
    """Trained with all targets, trained with --cross_layer 1, and a store of other scenes."""
    folder, loaded = tmp_path_factory.mktemp("runs"), load_model("tiny-llava", "cpu")
    stores = {"train": 500, "heldout": 80}
    for split, scenes in stores.items():
        options = {"split": split, "data_args": f"size={scenes}", "n_targets": 8}
        capture(
            CaptureConfig(
                model="tiny-llava",
                dataset="shapes",
                output_dir=str(folder / split),
                quiet=True,
                **options,  # type: ignore[arg-type]
            ),
            loaded,
        )
    for cross_layer in (8, 1):
        coder = CoderConfig(transcode=True, cross_layer=cross_layer, num_latents=192, k=12)
        cfg = TrainConfig(
            sae=coder,
            activations=str(folder / "train"),
            batch_tokens=2048,
            max_steps=60,
            epochs=1000,
            optimizer="adam",
            lr=4e-3,
            lr_warmup_steps=10,
            dead_feature_threshold=100_000,
            save_every=60,
            save_dir=str(folder),
            run_name=str(cross_layer),
        )
        train(cfg, quiet=True)
    clt, plt = (load_clt(folder / name).requires_grad_(False) for name in ("8", "1"))
    return clt, plt, folder / "heldout"


def value(found: Ablated, name: str) -> float:
    number = found.estimates[name].value
    assert number is not None
    return number


def test_deleted_cross_writes_are_told_from_cross_writes_never_there(
    coders: tuple[Clt, Clt, Path],
) -> None:
    clt, plt, store = coders
    whole = ablation(clt, store, draws=1)
    with torch.no_grad():
        for tables in clt.W_dec:
            for W in list(tables)[1:]:
                W.zero_()
    deleted, never = (ablation(coder, store, draws=1, plt=plt) for coder in (clt, plt))

    for found in (deleted, never):  # without the refit nothing tells them apart
        for arm in ("same_only", "cross_mean", "random_deletion"):
            assert value(found, f"fvu_difference.{arm}") == pytest.approx(0, abs=1e-9)
        assert found.estimates["refit_recovers"].value is None
    assert value(deleted, "fvu.full") == pytest.approx(value(whole, "fvu.same_only"), rel=1e-6)

    gains = [found.intervals["refit_gain"] for found in (deleted, never)]
    assert float(gains[0].low) > 0.5  # most of what is missing comes back
    assert abs(float(gains[1].value)) < 0.05  # there is nothing to bring back
    assert float(unpaired_difference(*gains).low) > 0.4
    # Beside a per-layer coder trained alike: one is far worse, the other is that coder.
    assert value(deleted, "fvu_difference.plt") < -0.2
    assert value(never, "fvu_difference.plt") == pytest.approx(0, abs=1e-9)


def test_the_controls_are_in_their_order(coders: tuple[Clt, Clt, Path]) -> None:
    _, plt, store = coders
    found = ablation(plt, store, draws=0)
    order = ("full", "random_init", "mean", "zero")
    values = [value(found, f"fvu.{arm}") for arm in order]
    assert values == sorted(values)
    assert values[0] < 0.2
    assert values[1] < 0.6
