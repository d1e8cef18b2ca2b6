"""Shape of a coder, selection of its latents, starting weights, decoding of parts."""

from __future__ import annotations

import pytest
import torch

from sparsify_vlm.coders import Clt, CltConfig
from sparsify_vlm.coders.sparse_ops import select_positive, select_top
from sparsify_vlm.errors import UserError


def config(layers: int = 5, **options) -> CltConfig:
    options = {"d_model": 6, "num_latents": 24, "k": 3} | options
    return CltConfig(hookpoints=[f"layers.{i}.mlp" for i in range(layers)], **options)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("n_targets", [1, 2, 16])
def test_sources_and_targets_are_each_other_s_inverse(n_targets, offset):
    cfg = config(n_targets=n_targets, target_offset=offset)
    pairs = {(s, t) for s in range(5) for t in range(5) if offset <= t - s < offset + n_targets}
    assert {(s, t) for s in range(5) for t in cfg.targets(s)} == pairs
    assert {(s, t) for t in range(5) for s, _ in cfg.sources(t)} == pairs
    for t in range(5):
        for s, k in cfg.sources(t):
            assert cfg.targets(s)[k] == t
    assert list(cfg.source_layers()) == sorted({s for s, _ in pairs})
    assert list(cfg.target_layers()) == sorted({t for _, t in pairs})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 25}, "--k 25"),
        ({"k": 0}, "--k 0"),
        ({"n_targets": 0}, "n_targets is 0"),
        ({"target_offset": 2}, "--target_offset 2"),
        ({"activation": "gelu"}, "'gelu' is not supported"),
        ({"transcode": False, "n_targets": 2}, "need --transcode"),
        ({"input_site": "attn"}, "input_site 'attn'"),
        ({"layers": 1, "target_offset": 1}, "single layer"),
        ({"layers": 0}, "at least one hookpoint"),
    ],
)
def test_contradictions_are_user_errors(options, message):
    with pytest.raises(UserError, match=message):
        config(**options)


@pytest.mark.parametrize(("width", "k"), [(24, 3), (512, 3), (512, 32), (509, 7), (40, 40)])
def test_selection_is_exactly_the_top_k(width, k):
    pre = torch.randn(50, width, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    latents = select_top(pre, k)
    expected = pre.topk(k).values.relu()
    assert torch.equal(latents.values.sort(descending=True).values, expected)
    assert torch.equal(pre.gather(1, latents.indices).relu(), latents.values)
    assert all(len(row.unique()) == k for row in latents.indices)


def test_threshold_is_strict_and_never_lets_negatives_through():
    pre = torch.tensor([[0.5, 0.2, -0.1, 0.0], [-1.0, -1.0, -1.0, -1.0]])
    threshold = torch.tensor([0.5, 0.1, -0.5, -0.5])
    dense = select_positive(pre, threshold).dense(4)
    assert torch.equal(dense, torch.tensor([[0.0, 0.2, 0.0, 0.0], [0.0] * 4]))
    dense = select_positive(pre).dense(4)
    assert torch.equal(dense, torch.tensor([[0.5, 0.2, 0.0, 0.0], [0.0] * 4]))


def test_encoding_in_pieces_changes_nothing(monkeypatch):
    clt = Clt(config(), dtype=torch.float64).initialise(torch.zeros(5, 6), torch.zeros(5, 6))
    x = torch.randn(37, 6, dtype=torch.float64)
    whole = clt.encode_layer(2, x).dense(24)
    monkeypatch.setattr("sparsify_vlm.coders.clt.PRE_ACTIVATIONS_AT_ONCE", {"cpu": 24 * 10})
    torch.testing.assert_close(clt.encode_layer(2, x).dense(24), whole)


def test_transcoders_start_by_predicting_the_mean():
    generator = torch.Generator().manual_seed(3)
    mean_x, mean_y = torch.randn(2, 5, 6, generator=generator).unbind()
    clt = Clt(config(n_targets=3)).initialise(mean_x, mean_y, seed=7)
    x = torch.randn(5, 20, 6, generator=generator)
    for t, y_hat in enumerate(clt.reconstruct(x)):
        torch.testing.assert_close(y_hat, mean_y[t].expand(20, -1))
    for s in range(5):
        assert clt.pre_activations(s, mean_x[s][None]).abs().max() < 1e-6
        assert clt.W_enc[s].abs().max() <= 6**-0.5
        assert clt.W_enc[s].std().item() == pytest.approx((3 * 6) ** -0.5, rel=0.2)
    again = Clt(config(n_targets=3)).initialise(mean_x, mean_y, seed=7)
    other = Clt(config(n_targets=3)).initialise(mean_x, mean_y, seed=8)
    assert torch.equal(clt.W_enc[4], again.W_enc[4])
    assert not torch.equal(clt.W_enc[4], other.W_enc[4])
    assert not torch.equal(clt.W_enc[0], clt.W_enc[1])


def test_autoencoders_start_with_decoder_equal_to_encoder_at_unit_norm():
    cfg = config(transcode=False, input_site="mlp_out")
    clt = Clt(cfg).initialise(torch.zeros(5, 6), torch.ones(5, 6))
    W_enc = clt.W_enc[1].detach()
    torch.testing.assert_close(clt.W_dec[1][0], W_enc / W_enc.norm(dim=1, keepdim=True))
    clt.W_dec[1][0].grad = torch.randn(24, 6)
    clt.remove_gradient_parallel_to_decoder_directions()
    assert (clt.W_dec[1][0].grad * clt.W_dec[1][0]).sum(1).abs().max() < 1e-5


def filled(**options) -> Clt:
    clt = Clt(config(**options), dtype=torch.float64)
    with torch.no_grad():
        for parameter in clt.parameters():
            parameter += torch.randn(parameter.shape, dtype=torch.float64)
    return clt


def test_leaving_sources_out_subtracts_exactly_what_they_write():
    clt = filled(n_targets=3, skip_connection=True)
    x = torch.randn(5, 9, 6, dtype=torch.float64)
    latents = clt.encode(x)
    full = clt.decode_target(4, latents, x)
    own = clt.decode_target(4, latents, x, keep=lambda s: s == 4)
    cross = clt.decode_target(4, latents, x, keep=lambda s: s != 4)
    torch.testing.assert_close(own + cross - clt.b_dec[4], full)
    written = clt.decode_source(4, 0, latents[4], x[4])
    torch.testing.assert_close(own, written + clt.b_dec[4])
    nothing = clt.decode_target(4, latents, x, keep=lambda s: False)
    torch.testing.assert_close(nothing, clt.b_dec[4].expand(9, -1))


def test_layers_without_coder_or_writer():
    clt = filled(n_targets=2, target_offset=1)
    x = torch.randn(5, 9, 6, dtype=torch.float64)
    latents = clt.encode(x)
    assert [active is None for active in latents] == [False] * 4 + [True]
    assert [y is None for y in clt.decode(latents, x)] == [True] + [False] * 4
    with pytest.raises(ValueError, match=r"no coder writes to layer 0 \(layers\.0\.mlp\)"):
        clt.decode_target(0, latents, x)


def test_decoding_is_differentiable_in_activations_and_tables():
    clt = filled(n_targets=2, train_post_encoder=True, post_encoder_scale=True)
    x = torch.randn(5, 4, 6, dtype=torch.float64, requires_grad=True)

    def total(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([y.square().sum() for y in clt.reconstruct(x)]).sum()

    total(x).backward()
    W = clt.W_dec[1][1]
    dx, dW = 1e-6 * torch.randn_like(x), 1e-6 * torch.randn_like(W)
    with torch.no_grad():
        change_x = (total(x + dx) - total(x - dx)) / 2
        W += dW
        after = total(x)
        W -= 2 * dW
        change_W = (after - total(x)) / 2
    assert change_x.item() == pytest.approx((x.grad * dx).sum().item(), rel=1e-5)
    assert change_W.item() == pytest.approx((W.grad * dW).sum().item(), rel=1e-5)
