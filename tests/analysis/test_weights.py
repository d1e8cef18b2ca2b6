"""Decoder norms between layers."""

from __future__ import annotations

import pytest
import torch

from sparsify_vlm.analysis.weights import decoder_norms
from sparsify_vlm.coders import Clt, CltConfig


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
    found = decoder_norms(clt, sigma)
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
