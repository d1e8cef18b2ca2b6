"""Losses on the spliced model's predictions against a plain reading of their definition."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import shared
from toy_source import toy_config

from sparsify_vlm.coders import Clt, CltConfig
from sparsify_vlm.data import DataConfig, batches, open_samples
from sparsify_vlm.models import Role
from sparsify_vlm.replacement import VLMReplacementModel
from sparsify_vlm.training.distributed import World
from sparsify_vlm.training.spliced import SplicedLoss


@pytest.fixture(scope="module")
def case():
    """A tiny random LLaVA, a coder with random tables for it, and a padded batch."""
    loaded = shared("llava")
    stack = loaded.stack
    cfg = CltConfig(stack.d_model, stack.hookpoints, num_latents=64, k=64, n_targets=2)
    clt = Clt(cfg)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in clt.parameters():
            parameter.normal_(std=0.2)
    samples = open_samples(DataConfig(dataset="shapes", max_examples=5), loaded)
    return loaded, clt, next(iter(batches(samples, loaded, 5, 2048))).inputs


def plain_loss(kind: str, loaded, clt, inputs) -> float:
    """Token by token, in float64."""
    spliced = VLMReplacementModel(loaded, clt)(**inputs).logits.double().log_softmax(-1)
    own = loaded.forward(inputs, logits=True).logits.double().log_softmax(-1)
    roles, ids = loaded.stack.roles(inputs), inputs["input_ids"]
    terms = []
    for b in range(len(ids)):
        for i in range(ids.shape[1] - 1):
            if roles[b, i] == Role.PAD or roles[b, i + 1] != Role.TEXT:
                continue
            q, p = spliced[b, i], own[b, i]
            terms.append(-q[ids[b, i + 1]] if kind == "ce" else (p.exp() * (p - q)).sum())
    return float(torch.stack(terms).mean())


@pytest.mark.parametrize("kind", ["ce", "kl"])
def test_value_and_gradient(kind: str, case, tmp_path: Path) -> None:
    loaded, clt, inputs = case
    cfg = toy_config(tmp_path, loss_fn=kind, kl_coeff=2.0)
    spliced = SplicedLoss(loaded, clt, cfg, World())
    clt.zero_grad()
    loss = spliced.backward([inputs], 0.5)
    assert loss.item() == pytest.approx(2 * plain_loss(kind, loaded, clt, inputs), rel=1e-4)
    assert all(not p.requires_grad for p in loaded.model.parameters())
    for parameter in (clt.W_dec[0][1], clt.W_enc[1], clt.b_dec[0]):
        direction = parameter.grad * (2e-2 / parameter.grad.norm())
        expected = float((parameter.grad * direction).sum()) / 0.5
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * direction
            values.append(2 * plain_loss(kind, loaded, clt, inputs))
            with torch.no_grad():
                parameter -= sign * direction
        assert expected == pytest.approx((values[0] - values[1]) / 2, rel=0.05)


def test_a_process_without_samples_adds_nothing(case, tmp_path: Path) -> None:
    loaded, clt, _ = case
    spliced = SplicedLoss(loaded, clt, toy_config(tmp_path, loss_fn="kl"), World())
    clt.zero_grad()
    assert spliced.backward([{}], 1.0).item() == 0
    assert all(p.grad is None for p in clt.parameters())
