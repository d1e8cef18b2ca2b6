"""The joint step against a float64 reference that loops over sources and targets."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from sparsify_vlm.coders import Clt, CltConfig, forward_backward, joint_loss, kernels
from sparsify_vlm.errors import UserError

L, B, S, D, F, K = 4, 3, 17, 10, 40, 4


def make(dtype: torch.dtype = torch.float64, seed: int = 0, **options) -> Clt:
    """A coder whose every table has been moved away from its starting value."""
    options = {"k": K, "n_targets": 3} | options
    cfg = CltConfig(
        d_model=D, hookpoints=[f"layers.{i}.mlp" for i in range(L)], num_latents=F, **options
    )
    clt = Clt(cfg, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in clt.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter += (0.4 * noise).to(dtype)
    return clt


def activations(seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """x, y [L, B, S, d] with padding at both ends of different rows, and the mask [B, S]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(L, B, S, D, generator=generator, dtype=torch.float64)
    y = torch.randn(L, B, S, D, generator=generator, dtype=torch.float64) + 0.5
    counted = torch.ones(B, S, dtype=torch.bool)
    counted[0, 12:] = False
    counted[2, :5] = False
    return x, y, counted


def reference_loss(clt: Clt, tables: dict[str, Tensor], x: Tensor, y: Tensor, counted: Tensor):
    """Σ_t FVU_t over the padded batch, straight from the definition: dense [B, S, F] activations,
    one loop over targets and one over sources, every token weighted by the mask."""
    cfg = clt.cfg
    mask = counted.double().unsqueeze(-1)
    loss = torch.zeros((), dtype=torch.float64)
    for t in range(L):
        y_hat = tables[f"b_dec.{t}"].expand_as(y[t])
        written = False
        for s in range(L):
            distance = t - s - cfg.target_offset
            if not 0 <= distance < cfg.n_targets:
                continue
            written = True
            centred = x[s] if cfg.transcode else x[s] - tables[f"b_dec.{s}"]
            pre = centred @ tables[f"W_enc.{s}"].T + tables[f"b_enc.{s}"]
            if cfg.activation == "topk":
                kth = pre.sort(descending=True, dim=-1).values[..., cfg.k - 1, None]
                pre = torch.where(pre >= kth, pre, torch.zeros_like(pre))
            a = pre.clamp(min=0)
            u = a
            if cfg.train_post_encoder:
                u = u + tables[f"post_enc.{s}.{distance}"] * (a > 0)
            if cfg.post_encoder_scale:
                u = u * tables[f"post_scale.{s}.{distance}"]
            y_hat = y_hat + u @ tables[f"W_dec.{s}.{distance}"]
            if cfg.skip_connection:
                y_hat = y_hat + x[s] @ tables[f"W_skip.{s}.{distance}"].T
        if written:
            mean = (y[t] * mask).sum((0, 1)) / mask.sum()
            variance = (((y[t] - mean) * mask) ** 2).sum()
            loss = loss + (((y[t] - y_hat) * mask) ** 2).sum() / variance
    return loss


def reference(clt: Clt, x: Tensor, y: Tensor, counted: Tensor) -> tuple[float, dict[str, Tensor]]:
    tables = {
        name: parameter.detach().double().requires_grad_(parameter.requires_grad)
        for name, parameter in clt.named_parameters()
    }
    loss = reference_loss(clt, tables, x, y, counted)
    wanted = [name for name, parameter in clt.named_parameters() if parameter.requires_grad]
    grads = torch.autograd.grad(loss, [tables[name] for name in wanted])
    return loss.item(), dict(zip(wanted, grads, strict=True))


def gradients(clt: Clt) -> dict[str, Tensor]:
    return {name: p.grad for name, p in clt.named_parameters() if p.grad is not None}


VARIANTS = [
    {
        "target_offset": offset,
        "skip_connection": skip,
        "train_post_encoder": bias,
        "post_encoder_scale": scale,
    }
    for offset, skip, bias, scale in itertools.product((0, 1), *[(False, True)] * 3)
]
VARIANTS += [
    {"n_targets": 1},
    {"n_targets": 1, "transcode": False, "input_site": "mlp_out"},
    {"n_targets": 16, "activation": "relu"},
    {"k": F},
]


@pytest.mark.parametrize("dense_below", [0.0, 1e9], ids=["sparse", "dense"])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_equals_the_reference(options, dense_below, monkeypatch):
    monkeypatch.setitem(kernels.DENSE_BELOW, "cpu", dense_below)
    x, y, counted = activations()
    if not options.get("transcode", True):
        y = x
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        clt = make(dtype, **options)
        loss, expected = reference(clt, x, y, counted)
        stats = forward_backward(clt, x[:, counted], y[:, counted])
        found = gradients(clt)
        assert abs(stats.loss.item() - loss) <= tolerance * loss
        assert found.keys() == expected.keys()
        for name, grad in expected.items():
            assert (found[name].double() - grad).norm() <= tolerance * grad.norm(), name


@pytest.mark.parametrize("options", [{}, {"target_offset": 1, "skip_connection": True}], ids=str)
def test_parts_of_a_batch_sum_to_the_whole(options):
    x, y, counted = activations()
    x, y = x[:, counted], y[:, counted]
    whole, parts = make(**options), make(**options)
    stats = forward_backward(whole, x, y, weight=0.5)
    losses, sse = 0.0, torch.zeros(L, dtype=torch.float64)
    for rows in torch.arange(x.shape[1]).split([11, 1, x.shape[1] - 12]):
        part = forward_backward(parts, x[:, rows], y[:, rows], variance=stats.variance, weight=0.5)
        losses += part.loss.item()
        sse += part.sse
    assert losses == pytest.approx(stats.loss.item(), rel=1e-12)
    torch.testing.assert_close(sse, stats.sse, equal_nan=True)
    for name, grad in gradients(whole).items():
        torch.testing.assert_close(gradients(parts)[name], grad, rtol=1e-10, atol=1e-12)


def test_gradients_add_to_those_already_there_and_scale_with_weight():
    x, y, counted = activations()
    once, thrice = make(), make()
    forward_backward(once, x[:, counted], y[:, counted])
    forward_backward(thrice, x[:, counted], y[:, counted])
    forward_backward(thrice, x[:, counted], y[:, counted], weight=2.0)
    for name, grad in gradients(once).items():
        torch.testing.assert_close(gradients(thrice)[name], 3 * grad)


@pytest.mark.parametrize("offset", [0, 1])
def test_statistics_are_those_of_the_definition(offset):
    clt = make(target_offset=offset)
    x, y, counted = activations()
    x, y = x[:, counted], y[:, counted]
    stats = forward_backward(clt, x, y)
    for t in range(L):
        if t < offset:
            assert stats.fvu[t].isnan()
            assert stats.errors[t].isnan().all()
            continue
        y_hat = clt.decode_target(t, clt.encode(x), x).detach()
        errors = (y[t] - y_hat).square().sum(1)
        torch.testing.assert_close(stats.errors[t], errors)
        torch.testing.assert_close(stats.sse[t], errors.sum())
        spread = (y[t] - y[t].mean(0)).square().sum()
        torch.testing.assert_close(stats.fvu[t], errors.sum() / spread)
    assert stats.loss.item() == pytest.approx(stats.fvu[offset:].sum().item())
    for s in clt.cfg.source_layers():
        dense = clt.encode_layer(s, x[s]).dense(F)
        assert stats.l0[s].item() == pytest.approx((dense > 0).sum(1).double().mean().item())
        assert torch.equal(stats.fired[s], (dense > 0).any(0))
    assert len(stats.fired) == L - offset


def test_k_and_mean_y_override_the_batch_s_own():
    clt = make()
    x, y, counted = activations()
    x, y = x[:, counted], y[:, counted]
    stats = forward_backward(clt, x, y, k=9, mean_y=torch.zeros(L, D))
    torch.testing.assert_close(stats.variance, y.square().sum((1, 2)))
    assert (stats.l0 > K).all()
    assert (stats.l0 <= 9).all()


def test_autograd_twin_and_bfloat16_agree():
    x, y, counted = activations()
    x, y = x[:, counted], y[:, counted]
    clt = make()
    joint_loss(clt, x, y).backward()
    expected = {name: grad.clone() for name, grad in gradients(clt).items()}
    clt.zero_grad()
    forward_backward(clt, x, y)
    for name, grad in gradients(clt).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-10, atol=1e-13)
    stats = forward_backward(make(torch.bfloat16), x, y)
    assert stats.loss.item() == pytest.approx(joint_loss(clt, x, y).item(), rel=0.05)


def test_targets_without_variance_are_an_error():
    x, y, _ = activations()
    with pytest.raises(UserError, match=r"layers\.0\.mlp have no variance over this batch's 1 "):
        forward_backward(make(), x[:, :1, 0], y[:, :1, 0])
    y[2, 0, 0, 0] = torch.nan
    with pytest.raises(UserError, match=r"layers\.2\.mlp hold NaN"):
        forward_backward(make(), x.flatten(1, 2), y.flatten(1, 2))
