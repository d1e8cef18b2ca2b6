"""Activity against explicit float64 sums over all tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from made_up_tokens import D, F, L, MadeUp, array, random_clt, top_activations

from sparsify_vlm.analysis.activity import activity
from sparsify_vlm.analysis.tokens import ROLES
from sparsify_vlm.errors import UserError


@pytest.mark.parametrize("offset", [0, 1])
def test_activity_is_that_of_explicit_sums(offset: int) -> None:
    clt, tokens = random_clt(target_offset=offset), MadeUp()
    found = activity(clt, tokens)
    x, y = array(tokens.x), array(tokens.y)
    sources = range(L - offset)
    acts = {s: top_activations(clt, s, x[s]) for s in sources}
    assert found.samples == 30
    for role in ROLES:
        chosen = tokens.chosen(role)
        assert found.tokens[role] == chosen.sum()
        for s in sources:
            a = acts[s][chosen]
            np.testing.assert_allclose(found.energy[role][s], (a**2).mean(0), rtol=1e-5)
            np.testing.assert_allclose(found.frequency[role][s], (a > 0).mean(0))
        spread = ((y[:, chosen] - y[:, chosen].mean(1, keepdims=True)) ** 2).sum(2).mean(1)
        np.testing.assert_allclose(found.sigma_by_role[role], np.sqrt(spread), rtol=1e-6)
        for t in range(offset, L):
            part = {
                s: acts[s][chosen] @ array(clt.W_dec[s][t - s - offset])
                for s in range(t - offset + 1)
            }
            total = sum(part.values())
            for s in range(L):
                if s in part:
                    share = (part[s] * total).sum() / (total**2).sum()
                    assert float(found.block_share[role][s, t]) == pytest.approx(share, rel=1e-4)
                else:
                    assert np.isnan(float(found.block_share[role][s, t]))
            assert float(found.block_share[role][:, t].nansum()) == pytest.approx(1)
    assert torch.equal(found.sigma, found.sigma_by_role["all"])
    for t in range(offset, L):
        written = [acts[s] @ array(clt.W_dec[s][t - s - offset]) for s in range(t - offset)]
        np.testing.assert_allclose(
            found.mean_cross[t], sum(written, np.zeros((1, D))).mean(0), rtol=1e-4, atol=1e-6
        )
    for role in ROLES:
        of_role = y[:, tokens.chosen(role)]
        np.testing.assert_allclose(found.mean_y[role], of_role.mean(1), rtol=1e-7)
    np.testing.assert_allclose(found.mean_x, x.mean(1), atol=1e-7)
    alive = [len(set(np.nonzero(a)[1])) for a in acts.values()]
    assert found.alive().sum(1).tolist() == alive + [0] * offset
    assert found.mean_l0() == pytest.approx(np.mean([(a > 0).sum(1).mean() for a in acts.values()]))


def test_a_role_without_tokens_is_undefined_and_nothing_at_all_is_an_error() -> None:
    tokens = MadeUp()
    tokens.group[:] = 1
    found = activity(random_clt(), tokens)
    assert found.tokens == {"all": len(tokens.group), "image": len(tokens.group)} | {
        "text": 0,
        "text_only": 0,
    }
    assert bool(found.energy["text"].isnan().all())
    assert bool(found.sigma_by_role["text_only"].isnan().all())
    with pytest.raises(UserError, match="no token"):
        activity(random_clt(), MadeUp(samples=0))


@pytest.mark.parametrize(
    "variant",
    [
        {"activation": "jumprelu", "skip_connection": True},
        {"coalesce_topk": "per-layer", "topk_coalesced": True},
        {"normalize_io": True, "train_post_encoder": True, "post_encoder_scale": True},
    ],
    ids=str,
)
def test_the_shares_of_every_kind_of_coder_sum_to_one(variant: dict[str, object]) -> None:
    clt, tokens = random_clt(**variant), MadeUp()
    found = activity(clt, tokens)
    shares = found.block_share["all"]
    torch.testing.assert_close(shares.nansum(0), torch.ones(L, dtype=torch.float64))
    # The share of layer 0 in target 2, from the coder run without the other sources.
    x = tokens.x
    alone = {}
    bias = clt.decode_target(2, clt.encode(x), x, keep=lambda s: False)
    for s in range(3):
        written = clt.decode_target(2, clt.encode(x), x, keep=lambda i, s=s: i == s) - bias
        skip = 0.0 if clt.W_skip is None else x[s] @ clt.W_skip[s][2 - s].T
        alone[s] = array(written - skip)
    total = sum(alone.values())
    expected = (alone[0] * total).sum() / (total**2).sum()
    assert float(shares[0, 2]) == pytest.approx(expected, rel=1e-4)
    assert found.energy["all"].shape == (L, F)
    assert found.mean_y["all"].shape == (L, D)
