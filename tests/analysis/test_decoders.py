"""Norms and products from one pass, against whole matrices."""

from __future__ import annotations

import pytest
import torch

from sparsify_vlm.analysis import decoders
from sparsify_vlm.analysis.decoders import (
    compiled_products,
    mean_write_norms,
    products,
    read_decoders,
)
from sparsify_vlm.coders import Clt, CltConfig
from sparsify_vlm.coders.formats.stored import InMemory
from sparsify_vlm.errors import UserError

CALLS = [products]
if decoders.compiled.available():
    CALLS.append(compiled_products)


def random_coder(**options) -> Clt:
    cfg = CltConfig(8, ["a", "b", "c", "d"], num_latents=50, k=4, **options)
    clt = Clt(cfg)
    with torch.no_grad():
        for parameter in clt.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    return clt


@pytest.mark.parametrize("block_bytes", [100, 2000, 1 << 20])
@pytest.mark.parametrize("options", [{"n_targets": 4}, {"n_targets": 2, "target_offset": 1}])
def test_against_whole_matrices(options, block_bytes, monkeypatch):
    monkeypatch.setattr(decoders, "BLOCK_BYTES", block_bytes)
    clt = random_coder(**options)
    found = read_decoders(InMemory(clt))
    assert [one.source for one in found.sources] == list(clt.cfg.source_layers())
    for one in found.sources:
        assert one.targets == clt.cfg.targets(one.source)
        W = torch.stack([clt.decoder_matrix(one.source, k) for k in range(len(one.targets))], 1)
        W = W.double()
        assert torch.allclose(one.squared.double(), (W**2).sum(2), rtol=1e-5)
        assert torch.allclose(one.with_first.double(), (W * W[:, :1]).sum(2), atol=1e-4)
        cosine = torch.nn.functional.cosine_similarity(W, W[:, :1], dim=2)
        assert torch.allclose(one.cosine(), cosine, atol=1e-5)
        norms = clt.W_enc[one.source].detach().norm(dim=1)
        assert torch.allclose(one.encoder_norm, norms, rtol=1e-6)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("order", ["rows first", "targets first", "columns apart"])
def test_products_of_any_layout(call, dtype, order):
    """Blocks are views of what was read: a part of the targets, or targets one after another."""
    generator = torch.Generator().manual_seed(0)
    if order == "rows first":
        W = torch.randn(7, 5, 33, generator=generator).to(dtype)[:, 2:]
    elif order == "targets first":
        W = torch.randn(3, 7, 33, generator=generator).to(dtype).transpose(0, 1)
    else:
        W = torch.randn(7, 3, 66, generator=generator).to(dtype)[:, :, ::2]
    held = torch.float64 if dtype == torch.float64 else torch.float32
    squared, with_first = torch.empty(7, 3, dtype=held), torch.empty(7, 3, dtype=held)
    call(W, squared, with_first)
    exact = W.double()
    assert torch.allclose(squared.double(), (exact**2).sum(2), rtol=1e-5)
    assert torch.allclose(with_first.double(), (exact * exact[:, :1]).sum(2), atol=1e-4)


def test_what_is_not_finite_is_refused():
    clt = random_coder(n_targets=4)
    with torch.no_grad():
        clt.W_dec[2][1][17, 3] = torch.nan
    with pytest.raises(UserError, match="c holds NaN"):
        read_decoders(clt)


def test_read_once():
    found = read_decoders(random_coder(n_targets=4))
    assert read_decoders(found) is found


@pytest.mark.parametrize(
    "options",
    [{}, {"secondary_target_tied": True}, {"divide_cross_layer": True}, {"normalize_io": True}],
    ids=str,
)
@torch.no_grad()
def test_norms_are_of_what_a_written_unit_adds(options):
    cfg = CltConfig(4, ["a", "b", "c"], num_latents=6, k=6, n_targets=3, **options)
    clt = Clt(cfg, dtype=torch.float64)
    for parameter in clt.parameters():
        parameter.normal_()
    for norms in (clt.in_norm, clt.out_norm):
        if norms is not None:
            norms.uniform_(1, 2)
    sigma = [0.5, 2.0, 3.0]
    found = mean_write_norms(clt, sigma)
    latents = clt.encode(torch.randn(3, 6, 4, dtype=torch.float64))
    for active in latents:  # token i has latent i alone, with activation 1
        active.values.zero_()[:, 0] = 1
        active.indices.copy_((torch.arange(6)[:, None] + torch.arange(6)) % 6)
    for t in range(3):
        for s in range(3):
            if s > t:
                assert found[s][t] is None
                continue
            added = clt.decode_target(t, latents, keep=lambda r, s=s: r == s)
            added = added - clt.decode_target(t, latents, keep=lambda r: False)
            assert found[s][t] == pytest.approx(float(added.norm(dim=1).mean()) / sigma[t])
