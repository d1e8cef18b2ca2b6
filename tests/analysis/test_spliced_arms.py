"""Spliced predictions against hooks written here, one sample at a time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sparsify_vlm.analysis.ablation import Ablated, ablation
from sparsify_vlm.analysis.activity import activity
from sparsify_vlm.analysis.deletion import random_deletion, write_energies
from sparsify_vlm.analysis.tokens import ModelTokens, token_batches
from sparsify_vlm.coders import Clt, CltConfig
from sparsify_vlm.data import DataConfig, ShapesDataset
from sparsify_vlm.models import load_model
from sparsify_vlm.replacement import VLMReplacementModel

N, L, F, K, ONE = 6, 8, 24, 4, 3
DATA = DataConfig(dataset="shapes", split="heldout", max_examples=N)
Write = Callable[[int, Tensor], "Tensor | None"]


@pytest.fixture(scope="module")
def model() -> VLMReplacementModel:
    loaded = load_model("tiny-llava", "cpu")
    cfg = CltConfig(loaded.stack.d_model, loaded.stack.hookpoints, num_latents=F, k=K, n_targets=L)
    clt = Clt(cfg).requires_grad_(False)
    generator = torch.Generator().manual_seed(5)
    for parameter in clt.parameters():
        parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return VLMReplacementModel(loaded, clt)


@pytest.fixture(scope="module")
def tokens(model: VLMReplacementModel) -> ModelTokens:
    found = token_batches(DATA, model, batch_size=ONE)
    assert isinstance(found, ModelTokens)
    return found


@pytest.fixture(scope="module")
def found(model: VLMReplacementModel, tokens: ModelTokens) -> Ablated:
    return ablation(
        model, tokens, reach=[2], draws=2, ridge=[1e-2], one_layer_samples=ONE, quiet=True
    )


@contextmanager
def hooked(model: VLMReplacementModel, write: Write, keep: Tensor) -> Any:
    """Every MLP of the decoder writes `write(layer, x)`, but its own at `keep` [S]."""
    layers = model.loaded.model.model.language_model.layers

    def hook(layer: int) -> Callable[..., Tensor]:
        def swap(module: Any, args: Any, output: Tensor) -> Tensor:
            y_hat = write(layer, args[0])
            return output if y_hat is None else torch.where(keep[:, None], output, y_hat)

        return swap

    handles = [block.mlp.register_forward_hook(hook(i)) for i, block in enumerate(layers)]
    yield
    for handle in handles:
        handle.remove()


class Stream:
    """ŷ of one arm along the stream, with dense latents."""

    def __init__(self, clt: Clt, keep: Callable[[int, int], Any], shift: Tensor | None = None):
        self.clt, self.keep, self.shift = clt, keep, shift
        self.acts: list[Tensor] = []

    def __call__(self, layer: int, x: Tensor) -> Tensor:
        if layer == 0:
            self.acts = []
        pre = x[0] @ self.clt.W_enc[layer].T + self.clt.b_enc[layer]
        cut = pre.topk(K, dim=1).values[:, -1:]
        self.acts.append(torch.where(pre >= cut, pre.relu(), 0.0))
        y_hat = self.clt.b_dec[layer].expand_as(x[0])
        for s, a in enumerate(self.acts):
            kept = self.keep(s, layer)
            if kept is not False:
                y_hat = y_hat + (a * kept) @ self.clt.W_dec[s][layer - s]
        return (y_hat if self.shift is None else y_hat + self.shift[layer])[None]


def scores(model: VLMReplacementModel, make: Callable[[], Write], samples: int) -> dict[str, float]:
    """Mean cross-entropy, KL and top-1 match of the spliced model, at the answers."""
    loaded, sums, n = model.loaded, np.zeros(3), 0
    for row in list(ShapesDataset("heldout", N))[:samples]:
        text = f"USER: <image>\n{row['question']} ASSISTANT: {row['answer']}</s>"
        inputs = dict(loaded.processor(text=text, images=row["image"], return_tensors="pt"))
        answer = loaded.tokenizer(f" {row['answer']}</s>", add_special_tokens=False)["input_ids"]
        keep = inputs["input_ids"][0] == loaded.tokenizer.bos_token_id
        place = slice(-len(answer) - 1, -1)
        with torch.no_grad():
            own = loaded.model(**inputs).logits[0, place].double().log_softmax(-1)
            with hooked(model, make(), keep):
                other = loaded.model(**inputs).logits[0, place].double().log_softmax(-1)
        sums[0] -= float(other[range(len(answer)), answer].sum())
        sums[1] += float((own.exp() * (own - other)).sum())
        sums[2] += float((own.argmax(-1) == other.argmax(-1)).sum())
        n += len(answer)
    return dict(zip(("ce", "kl", "top1"), sums / n, strict=True))


def check(found: Ablated, arm: str, expected: dict[str, float]) -> None:
    for name, value in expected.items():
        assert found.estimates[f"{name}.{arm}"].value == pytest.approx(value, rel=1e-3, abs=1e-6)
    (row,) = found.tables["delta_loss"].where(arm=arm, scope="all_layers").rows()
    assert row["layer"] == -1
    assert (row["ce"], row["kl"]) == (
        pytest.approx(expected["ce"], rel=1e-3),
        pytest.approx(expected["kl"], rel=1e-3),
    )
    own = found.estimates["ce.model"].value
    assert row["delta_ce"] == pytest.approx(expected["ce"] - own, rel=1e-3)
    assert row["low"] < row["delta_ce"] < row["high"]


KEEPS: dict[str, Callable[[int, int], bool]] = {
    "full": lambda s, t: True,
    "same_only": lambda s, t: s == t,
    "cross_only": lambda s, t: s < t,
    "reach_2": lambda s, t: t - s <= 2,
}


@pytest.mark.parametrize("arm", KEEPS)
def test_all_layers_at_once(arm: str, model: VLMReplacementModel, found: Ablated) -> None:
    check(found, arm, scores(model, lambda: Stream(model.clt, KEEPS[arm]), N))


def test_arms_with_means(model: VLMReplacementModel, found: Ablated, tokens: ModelTokens) -> None:
    clt, batches = model.clt, list(tokens)
    x, y = (torch.cat([getattr(b, name) for b in batches], 1) for name in ("x", "y"))
    full = torch.stack([v for v in clt.reconstruct(x) if v is not None])
    latents = clt.encode(x)
    same = torch.stack(
        [clt.decode_target(t, latents, keep=lambda s, t=t: s == t) for t in range(L)]
    )
    shift = (full - same).double().mean(1).float()
    check(found, "cross_mean", scores(model, lambda: Stream(clt, KEEPS["same_only"], shift), N))
    mean = y.double().mean(1).float()
    check(found, "mean", scores(model, lambda: lambda t, x: mean[t].expand_as(x), N))
    check(found, "zero", scores(model, lambda: lambda t, x: torch.zeros_like(x), N))


def test_random_deletions_are_averaged(
    model: VLMReplacementModel, found: Ablated, tokens: ModelTokens
) -> None:
    measured = activity(model.clt, tokens)
    energies = write_energies(model.clt, measured.energy["all"], measured.sigma)
    parts = []
    for seed in (0, 1):
        kept = random_deletion(model.clt, energies, seed).kept
        stream = lambda kept=kept: Stream(model.clt, lambda s, t: kept[s, t - s])  # noqa: E731
        parts.append(scores(model, stream, N))
    check(found, "random_deletion", {k: (parts[0][k] + parts[1][k]) / 2 for k in parts[0]})


@pytest.mark.parametrize("arm", ["full", "same_only", "zero"])
def test_one_layer_on_clean_inputs(arm: str, model: VLMReplacementModel, found: Ablated) -> None:
    table = found.tables["delta_loss"].where(arm=arm, scope="one_layer")
    assert list(table["layer"]) == list(range(L))
    means = []
    for layer in range(L):

        def make(layer: int = layer) -> Write:
            stream = Stream(model.clt, KEEPS.get(arm, lambda s, t: True))

            def write(t: int, x: Tensor) -> Tensor | None:
                y_hat = torch.zeros_like(x) if arm == "zero" else stream(t, x)
                return y_hat if t == layer else None

            return write

        expected, row = scores(model, make, ONE), table.rows()[layer]
        assert row["ce"] == pytest.approx(expected["ce"], rel=1e-3, abs=1e-6)
        assert row["kl"] == pytest.approx(expected["kl"], rel=1e-2, abs=1e-6)
        assert row["top1_match"] == pytest.approx(expected["top1"])
        means.append(expected["kl"])
    one = found.estimates[f"kl_one_layer.{arm}"].value
    assert one == pytest.approx(np.mean(means), rel=1e-2, abs=1e-6)


def test_every_sample_meets_the_refit_of_the_other_half(
    model: VLMReplacementModel, found: Ablated, tokens: ModelTokens
) -> None:
    """Samples of one half alone, with the decoders fitted on the other by hand."""
    clt, batches = model.clt, list(tokens)
    x, y = (torch.cat([getattr(b, name) for b in batches], 1).double() for name in ("x", "y"))
    odd = torch.cat([b.sample for b in batches]) % 2 == 1
    fits = []
    for t in range(L):
        a = clt.encode_layer(t, x[t].float()).dense(F).double()[odd]
        about, target = a - a.mean(0), y[t][odd] - y[t][odd].mean(0)
        gram = about.T @ about
        gram += 1e-2 * gram.diagonal().mean() * torch.eye(F)
        start = clt.W_dec[t][0].double()
        W = start + torch.linalg.solve(gram, about.T @ (target - about @ start))
        fits.append((W.float(), (y[t][odd].mean(0) - a.mean(0) @ W).float()))
    even = ablation(model, DATA, draws=0, ridge=[1e-2], one_layer_samples=0, quiet=True)
    assert even.spliced is not None

    def make() -> Write:
        stream = Stream(clt, lambda s, t: s == t)

        def write(t: int, x: Tensor) -> Tensor:
            stream(t, x)
            return stream.acts[t] @ fits[t][0] + fits[t][1]

        return write

    arm = even.spliced.arms.index("refit")
    first = even.spliced.all_layers[0, arm]
    expected = scores(model, make, 1)  # sample 0 is even: its decoders are those of the odd ones
    assert first[2] / first[0] == pytest.approx(expected["kl"], rel=1e-3)


def test_fewer_samples_to_splice(model: VLMReplacementModel) -> None:
    found = ablation(
        model, DATA, draws=0, refitting=False, spliced_samples=2, one_layer_samples=0, quiet=True
    )
    assert found.spliced is not None
    assert len(found.spliced.model) == 2
    assert set(found.tables["delta_loss"]["scope"]) == {"all_layers"}
    assert found.estimates["fvu.full"].n == N
    assert found.estimates["kl.full"].n == 2
