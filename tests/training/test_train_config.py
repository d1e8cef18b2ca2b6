"""Settings: sparsify's defaults are kept, what contradicts itself or is not there is refused."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
from sparsify.config import SparseCoderConfig
from sparsify.config import TrainConfig as UpstreamTrainConfig
from toy_source import toy_config

from sparsify_vlm.errors import UserError
from sparsify_vlm.training import CoderConfig, TrainConfig


@pytest.mark.parametrize(
    ("ours", "upstream"), [(CoderConfig, SparseCoderConfig), (TrainConfig, UpstreamTrainConfig)]
)
def test_defaults_are_those_of_sparsify(ours: Any, upstream: Any) -> None:
    mine = {f.name: f for f in fields(ours)}
    for field in fields(upstream):
        if field.name == "log_to_wandb":  # off here: most runs have no account at hand
            continue
        assert mine[field.name].default == field.default
        if field.default_factory is not MISSING:
            made = mine[field.name].default_factory
            assert made is not MISSING
            assert made() == field.default_factory()


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"cross_layer": -1}, "--cross_layer -1"),
        ({"transcode": False}, "--transcode"),
        ({"k": 33}, "--k 33"),
        ({"k": 0}, "--k 0"),
        ({"target_offset": 1, "cross_layer": 0}, "--target_offset"),
        ({"target_offset": 2}, "--target_offset 2"),
        ({"num_latents": -5}, "--num_latents"),
        ({"activation": "relu"}, "--activation relu is not sparse of itself: give --penalty"),
        ({"activation": "jumprelu"}, "give --penalty l1 or tanh, or l0"),
        ({"penalty": "l0"}, "--penalty l0"),
        ({"activation": "groupmax", "k_decay_steps": 3}, "--k_decay_steps"),
        ({"penalty": "l1", "secondary_target_tied": True}, "--secondary_target_tied"),
        ({"penalty_coefficient": -1.0}, "--penalty_coefficient"),
        ({"penalty_warmup_steps": -1}, "--penalty_warmup_steps"),
        ({"bf16_selection": True, "activation": "groupmax"}, "--bf16_selection"),
        ({"multi_topk": True}, "--multi_topk is not supported yet"),
        ({"loss_fn": "kl", "activations": "store"}, "leave --activations out"),
        ({"auxk_alpha": -0.1}, "--auxk_alpha"),
        ({"distribute_modules": True}, "--distribute_modules is not supported yet"),
        ({"save_best": True}, "--save_best is not supported yet"),
        ({"init_seeds": [0, 1]}, "--init_seeds is not supported yet"),
        ({"init_seeds": []}, "--init_seeds"),
        ({"dead_feature_threshold": 2**63}, "--dead_feature_threshold 9223372036854775808: too"),
        ({"batch_size": 10**20}, "--batch_size 100000000000000000000: too large"),
        ({"exclude_tokens": [-1]}, "--exclude_tokens"),
        ({"num_latents": 10**20}, "--num_latents 100000000000000000000: 1000000000000 is the most"),
        ({"num_latents": 0, "expansion_factor": 10**9}, "--expansion_factor 1000000000: "),
        ({"jumprelu_init_threshold": 1e300}, "--jumprelu_init_threshold"),
        ({"init_seeds": [2**63]}, "a seed has 64 bits"),
        ({"lr": 1e300}, "must be positive and finite"),
        ({"optimizer": "signum", "bf16_moments": True}, "--bf16_moments is about the two moments"),
        ({"layers": [0], "hookpoints": ["a"]}, "--hookpoints"),
        ({"layers": [0], "layer_stride": 2}, "--layer_stride"),
        ({"layers": [1, 1]}, "--layers"),
        ({"batch_size": 0}, "--batch_size 0"),
        ({"grad_acc_steps": 0}, "--grad_acc_steps 0"),
        ({"max_steps": 0}, "--max_steps 0"),
        ({"lr": -1.0}, "--lr -1.0"),
        ({"lr": float("nan")}, "--lr nan"),
        ({"lr_warmup_steps": -1}, "--lr_warmup_steps -1"),
        ({"resume": True, "overwrite": True}, "--resume"),
    ],
    ids=str,
)
def test_bad_settings_are_named(tmp_path: Path, changed: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named) as caught:
        toy_config(tmp_path, **changed)
    assert "\n" not in str(caught.value)


def test_settings_are_read_without_torch() -> None:
    code = "import sys, sparsify_vlm.training as t; t.RunConfig(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
