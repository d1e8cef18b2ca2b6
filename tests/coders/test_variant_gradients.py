"""Every variant's step against autograd through the plain forward pass in float64.

That plain forward pass is held to loops over sources and targets by test_variants.py and
test_joint_step.py.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from sparsify_vlm.coders import Clt, CltConfig, Objective, forward_backward, joint_loss, kernels
from sparsify_vlm.coders.config import WITHOUT_K
from sparsify_vlm.errors import UserError

L, T, D, F, K = 4, 23, 10, 40, 4

ACTIVATIONS = {
    "topk": {},
    "batchtopk": {"activation": "batchtopk"},
    "groupmax": {"activation": "groupmax"},
    "relu": {"activation": "relu"},
    "jumprelu": {"activation": "jumprelu", "jumprelu_bandwidth": 0.6},
}
LAYOUTS = {
    "untied": {},
    "offset 1": {"target_offset": 1},
    "one target": {"n_targets": 1},
    "concat": {"coalesce_topk": "concat"},
    "per-layer": {"coalesce_topk": "per-layer"},
    "concat topk": {"coalesce_topk": "concat", "topk_coalesced": True},
    "per-layer topk": {"coalesce_topk": "per-layer", "topk_coalesced": True},
    "per source": {"per_source_tied": True},
    "both tied": {"per_source_tied": True, "secondary_target_tied": True},
    "divided": {"divide_cross_layer": True},
    "normalised": {"normalize_io": True},
    "divided, normalised, tied": {
        "divide_cross_layer": True,
        "normalize_io": True,
        "per_source_tied": True,
    },
}
EXTRAS = {
    "plain": {},
    "skip": {"skip_connection": True},
    "post-encoder": {"train_post_encoder": True, "post_encoder_scale": True},
    "all": {"skip_connection": True, "train_post_encoder": True, "post_encoder_scale": True},
}
OBJECTIVES = {
    "fvu": Objective(),
    "l1": Objective("l1", 0.1),
    "l1 sum": Objective("l1", 0.1, penalty_norm="sum"),
    "tanh": Objective("tanh", 0.1, tanh_scale=0.3),
    "tanh sum": Objective("tanh", 0.1, 0.3, "sum"),
    "l0": Objective("l0", 0.1),
    "auxk": Objective(auxk_alpha=0.3),
    "auxk and tanh": Objective("tanh", 0.1, 0.3, auxk_alpha=0.3),
}


def make(dtype: torch.dtype, options: dict) -> Clt:
    """A coder with random tables; norms and thresholds as after training."""
    hookpoints = [f"layers.{i}.mlp" for i in range(L)]
    cfg = CltConfig(D, hookpoints, **({"num_latents": F, "k": K, "n_targets": 3} | options))
    clt = Clt(cfg, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in clt.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += (0.4 * noise).to(dtype)
        for t in range(cfg.target_offset):
            clt.b_dec[t].zero_()
        for threshold in clt.threshold:
            threshold.abs_()
        if clt.in_norm is not None:
            clt.in_norm.copy_(torch.linspace(1.5, 4, L))
            clt.out_norm.copy_(torch.linspace(5, 2, L))
    return clt


def activations() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(L, T, D, generator=generator, dtype=torch.float64)
    return x, torch.randn(L, T, D, generator=generator, dtype=torch.float64) + 0.5


def dead_latents(clt: Clt) -> list[Tensor]:
    """A third of the latents of every layer but the first, which has none."""
    dead = torch.zeros(F, dtype=torch.bool)
    dead[::3] = True
    return [dead if s else torch.zeros_like(dead) for s in clt.cfg.source_layers()]


def check(options: dict, objective: Objective) -> None:
    x, y = activations()
    reference = make(torch.float64, options)
    dead = dead_latents(reference)
    loss = joint_loss(reference, x, y, objective=objective, dead=dead)
    loss.backward()
    expected = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        clt = make(dtype, options)
        stats = forward_backward(clt, x, y, objective=objective, dead=dead)
        found = {n: p.grad for n, p in clt.named_parameters() if p.grad is not None}
        assert stats.loss.item() == pytest.approx(loss.item(), rel=tolerance)
        assert found.keys() == expected.keys()
        scale = max(grad.norm() for grad in expected.values())
        for name, grad in expected.items():
            error = (found[name].double() - grad).norm()
            assert error <= tolerance * max(grad.norm(), 1e-3 * scale), (name, dtype)


GRID = [
    pytest.param(a | layout | extra, id=f"{a_name}, {layout_name}, {extra_name}")
    for (a_name, a), (layout_name, layout), (extra_name, extra) in itertools.product(
        ACTIVATIONS.items(), LAYOUTS.items(), EXTRAS.items()
    )
    if not (layout.get("topk_coalesced") and a_name in WITHOUT_K)  # refused: there is no k
]


@pytest.mark.parametrize("options", GRID)
def test_gradient_of_every_variant(options: dict) -> None:
    check(options, OBJECTIVES["fvu"])


@pytest.mark.parametrize("path", ["eager", "torch", "compiled", "dense"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradient_of_every_objective(
    activation: str, objective: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "dense":
        monkeypatch.setitem(kernels.DENSE_BELOW, "cpu", 1e9)
    else:
        monkeypatch.setitem(kernels.DENSE_BELOW, "cpu", 0.0)
        monkeypatch.setenv(kernels.VARIABLE, path)
    check(ACTIVATIONS[activation], OBJECTIVES[objective])


@pytest.mark.parametrize("layout", [n for n in LAYOUTS if n != "both tied"])
@pytest.mark.parametrize("objective", ["tanh", "l1 sum", "auxk and tanh"])
def test_gradient_of_penalties_on_shared_tables(layout: str, objective: str) -> None:
    check(LAYOUTS[layout] | EXTRAS["all"], OBJECTIVES[objective])


def test_parts_of_a_batch_sum_to_the_whole() -> None:
    """Micro-batches and processes: the penalty is a mean over all tokens."""
    x, y = activations()
    objective = Objective("tanh", 0.1, auxk_alpha=0.2)
    whole, parts = (make(torch.float64, {"activation": "relu"}) for _ in range(2))
    dead = dead_latents(whole)
    stats = forward_backward(whole, x, y, objective=objective, dead=dead)
    losses = [
        forward_backward(
            parts, x[:, rows], y[:, rows], objective=objective, dead=dead,
            variance=stats.variance, tokens=T,
        ).loss
        for rows in (slice(0, 9), slice(9, T))
    ]  # fmt: skip
    assert sum(losses).item() == pytest.approx(stats.loss.item(), rel=1e-12)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_auxk_moves_the_encoder_of_dead_latents() -> None:
    """Their gradient is 0 without AuxK, and points to what is left unexplained with it."""
    x, y = activations()
    dead = torch.zeros(F, dtype=torch.bool)
    dead[7] = True
    for alpha in (0.0, 1.0):
        clt = make(torch.float64, {"n_targets": 1})
        with torch.no_grad():
            for bias in clt.b_enc:
                bias[7] = -20.0  # never among the k largest
            for W in clt.W_enc:
                W[7] = 50 * x[0, 0] / x[0, 0].norm()  # but above 0 for some tokens
        forward_backward(clt, x, y, objective=Objective(auxk_alpha=alpha), dead=[dead] * L, k=1)
        for s in range(L):
            moved = clt.W_enc[s].grad[7].abs().max() > 0
            fired = (clt.encode_layer(s, x[s], 1).indices == 7).any()
            assert bool(moved) == (alpha > 0 or bool(fired))


def test_bfloat16_candidates_give_the_exact_selection() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(L, 400, 64), torch.randn(L, 400, 64)
    hookpoints = [f"layers.{i}.mlp" for i in range(L)]
    cfg = CltConfig(64, hookpoints, num_latents=1024, k=16, n_targets=2)
    exact, rough = (Clt(cfg).initialise(x.mean(1), y.mean(1)) for _ in range(2))
    found = forward_backward(exact, x, y)
    fast = forward_backward(rough, x, y, bf16_selection=True)
    assert fast.loss.item() == pytest.approx(found.loss.item(), rel=1e-6)
    for a, b in zip(exact.W_enc, rough.W_enc, strict=True):
        assert (a.grad - b.grad).norm() <= 1e-2 * a.grad.norm()


def test_batch_top_is_exact_whatever_the_learned_threshold_is() -> None:
    x, y = activations()
    losses = []
    for threshold in (0.0, 0.5, 1.0, 50.0):
        clt = make(torch.float64, {"activation": "batchtopk"})
        with torch.no_grad():
            for value in clt.threshold:
                value.fill_(threshold)
        stats = forward_backward(clt, x, y)
        losses.append(stats.loss.item())
        assert stats.active.sum(1).tolist() == [K * T] * L
        assert all(low is not None and low > 0 for low in stats.lowest)
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-12)


@pytest.mark.parametrize(("penalty", "norm"), [("l2", "concat"), ("l1", "max")])
def test_unknown_penalties_are_refused(penalty: str, norm: str) -> None:
    with pytest.raises(UserError, match="--penalty"):
        Objective(penalty, 1.0, penalty_norm=norm)
