"""Single latents taken out of the model, against hooks written here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sparsify_vlm.analysis.activity import activity
from sparsify_vlm.analysis.causal import causal_scores, random_latents
from sparsify_vlm.analysis.tokens import ModelTokens, token_batches
from sparsify_vlm.coders import Clt, CltConfig
from sparsify_vlm.data import DataConfig, ShapesDataset
from sparsify_vlm.errors import UserError
from sparsify_vlm.models import load_model
from sparsify_vlm.replacement import VLMReplacementModel

N, L, F, K = 5, 8, 24, 4


@pytest.fixture(scope="module")
def model() -> VLMReplacementModel:
    """Latent 0 of layer 1 writes to its own layer only, latent 1 to later layers only; latent 2
    is never active."""
    loaded = load_model("tiny-llava", "cpu")
    cfg = CltConfig(loaded.stack.d_model, loaded.stack.hookpoints, num_latents=F, k=K, n_targets=L)
    clt = Clt(cfg).requires_grad_(False)
    generator = torch.Generator().manual_seed(5)
    for parameter in clt.parameters():
        parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    clt.b_enc[1][:2] += 3.0
    clt.b_enc[1][2] -= 1e4
    for k, W in enumerate(clt.W_dec[1]):
        W[0 if k else 1] = 0.0
    return VLMReplacementModel(loaded, clt)


@pytest.fixture(scope="module")
def tokens(model: VLMReplacementModel) -> ModelTokens:
    data = DataConfig(dataset="shapes", split="heldout", max_examples=N)
    found = token_batches(data, model, batch_size=3)
    assert isinstance(found, ModelTokens)
    return found


LATENTS = [(1, 0), (1, 1), (1, 2), (0, 5), (3, 7), (6, 11), (7, 3)]


def test_scores_are_those_of_one_latent_and_one_sample_at_a_time(
    model: VLMReplacementModel, tokens: ModelTokens
) -> None:
    table = causal_scores(model, LATENTS, tokens, quiet=True)
    assert list(zip(table["source"], table["latent"], strict=True)) == LATENTS
    for (s, i), row in zip(LATENTS, table.rows(), strict=True):
        kl, active, n = by_hand(model, s, i)
        assert row["n_tokens"] == active
        if active == 0:
            assert row["ratio"] is row["kl_without_any"] is None
            continue
        assert row["kl_without_any"] == pytest.approx(kl[1].sum() / n, rel=1e-3, abs=1e-9)
        assert row["kl_without_cross"] == pytest.approx(kl[0].sum() / n, rel=1e-3, abs=1e-9)
        assert row["ratio"] == pytest.approx(kl[0].sum() / kl[1].sum(), rel=1e-2)
    ratio = dict(zip(LATENTS, table["ratio"], strict=True))
    assert ratio[1, 0] == pytest.approx(0, abs=1e-6)
    assert ratio[1, 1] == 1.0
    assert ratio[7, 3] == pytest.approx(0, abs=1e-6)  # the last layer has no other to write to
    assert table["n_tokens"][2] == 0


def by_hand(model: VLMReplacementModel, s: int, i: int) -> tuple[np.ndarray, int, int]:
    """KL [2, samples] without cross and without any writes; active tokens; scored predictions of
    the samples with an active token."""
    loaded, clt = model.loaded, model.clt
    blocks = loaded.model.model.language_model.layers
    kl, active, n = np.zeros((2, N)), 0, 0
    for number, row in enumerate(ShapesDataset("heldout", N)):
        text = f"USER: <image>\n{row['question']} ASSISTANT: {row['answer']}</s>"
        inputs = dict(loaded.processor(text=text, images=row["image"], return_tensors="pt"))
        answer = loaded.tokenizer(f" {row['answer']}</s>", add_special_tokens=False)["input_ids"]
        seen: list[torch.Tensor] = []
        handle = blocks[s].mlp.register_forward_pre_hook(lambda m, args: seen.append(args[0][0]))  # noqa: B023
        own = logits(loaded, inputs, len(answer))
        handle.remove()
        pre = (seen[0] @ clt.W_enc[s].T + clt.b_enc[s]).relu()
        a = torch.where(pre >= pre.topk(K, dim=1).values[:, -1:], pre, 0.0)[:, i]
        a[inputs["input_ids"][0] == loaded.tokenizer.bos_token_id] = 0
        if not bool((a > 0).any()):
            continue
        active, n = active + int((a > 0).sum()), n + len(answer)
        for j, first in enumerate((s + 1, s)):
            handles = []
            for t in range(first, L):
                write = a[:, None] * clt.W_dec[s][t - s][i]
                handles.append(
                    blocks[t].mlp.register_forward_hook(lambda m, args, out, w=write: out - w)
                )
            other = logits(loaded, inputs, len(answer))
            for hook in handles:
                hook.remove()
            kl[j, number] = float((own.exp() * (own - other)).sum())
    return kl, active, n


@torch.no_grad()
def logits(loaded: Any, inputs: Any, n: int) -> torch.Tensor:
    values: torch.Tensor = loaded.model(**inputs).logits[0, -n - 1 : -1].double().log_softmax(-1)
    return values


def test_intervals_are_over_samples_and_the_model_is_left_as_it_was(
    model: VLMReplacementModel, tokens: ModelTokens
) -> None:
    before = torch.cat([b.logits for b in tokens.with_logits(1) if b.logits is not None])
    table = causal_scores(model, [(0, 5)], tokens, quiet=True)
    after = torch.cat([b.logits for b in tokens.with_logits(1) if b.logits is not None])
    assert torch.equal(before, after)
    (row,) = table.rows()
    assert row["low"] <= row["ratio"] <= row["high"]
    (fewer,) = causal_scores(model, [(0, 5)], tokens, max_samples=1, quiet=True).rows()
    assert fewer["n_tokens"] < row["n_tokens"]
    assert fewer["low"] is None  # one sample has no interval


def test_what_is_no_more_than_rounding_has_no_ratio(
    model: VLMReplacementModel, tokens: ModelTokens
) -> None:
    """A latent whose writes are too small to be seen in float32."""
    s, i = 0, 5
    (before,) = causal_scores(model, [(s, i)], tokens, quiet=True).rows()
    assert 1e4 * abs(before["kl_of_rounding"]) < before["kl_without_any"]
    kept = [W[i].clone() for W in model.clt.W_dec[s]]
    for W in model.clt.W_dec[s]:
        W[i] *= 1e-7
    (after,) = causal_scores(model, [(s, i)], tokens, quiet=True).rows()
    for W, row in zip(model.clt.W_dec[s], kept, strict=True):
        W[i] = row
    assert after["n_tokens"] == before["n_tokens"]
    assert after["ratio"] is after["low"] is after["high"] is None


def test_random_latents_are_alive(model: VLMReplacementModel, tokens: ModelTokens) -> None:
    alive = activity(model.clt, tokens).alive()
    drawn = random_latents(alive, 3, seed=2)
    assert len(drawn) == len(set(drawn)) == sum(min(3, int(row.sum())) for row in alive)
    assert all(bool(alive[s, i]) for s, i in drawn)
    assert drawn != random_latents(alive, 3, seed=3)


def test_latents_that_do_not_exist(model: VLMReplacementModel, tokens: ModelTokens) -> None:
    for latent in ((8, 0), (0, F), (0, -1)):
        with pytest.raises(UserError, match="there is no latent"):
            causal_scores(model, [latent], tokens)
