"""Every variant of a coder against a loop over tokens, sources and latents in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from sparsify_vlm.coders import Clt, CltConfig
from sparsify_vlm.coders.activations import batch_top, group_max, jump, step_above, survivors
from sparsify_vlm.errors import UserError

L, T, D, F, K = 4, 7, 4, 12, 3

ACTIVATIONS = [{"activation": name} for name in ("topk", "batchtopk", "groupmax", "relu")]
POST = {"train_post_encoder": True, "post_encoder_scale": True, "skip_connection": True}
DECODERS = [
    {"per_source_tied": True},
    {"coalesce_topk": "concat"},
    {"coalesce_topk": "per-layer"},
    {"coalesce_topk": "concat", "topk_coalesced": True},
    {"coalesce_topk": "per-layer", "topk_coalesced": True},
    {"coalesce_topk": "per-layer", "topk_coalesced": True, "activation": "batchtopk"},
    {"coalesce_topk": "concat", "topk_coalesced": True, "activation": "groupmax"},
    {"secondary_target_tied": True},
    {"secondary_target_tied": True, "per_source_tied": True},
    {"divide_cross_layer": True},
    {"divide_cross_layer": True, "target_offset": 1},
    {"normalize_io": True},
    {"normalize_io": True, "divide_cross_layer": True, "per_source_tied": True},
    {"normalize_io": True, "coalesce_topk": "concat", "topk_coalesced": True},
    {"normalize_io": True, "secondary_target_tied": True},
]
OTHERS = [
    {"activation": "jumprelu", "normalize_io": True},
    {"per_source_tied": True, "target_offset": 1},
    {"normalize_io": True, "transcode": False, "n_targets": 1, "input_site": "mlp_out"},
]
CASES = [*ACTIVATIONS, *[case | POST for case in DECODERS], *OTHERS]


def make(dtype: torch.dtype = torch.float64, **options) -> Clt:
    """A coder with random tables."""
    options = {"d_model": D, "num_latents": F, "k": K, "n_targets": 3} | options
    clt = Clt(CltConfig(hookpoints=[f"layers.{i}.mlp" for i in range(L)], **options), dtype=dtype)
    with torch.no_grad():
        for name, parameter in clt.named_parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, dtype=torch.float64)
            if name.startswith("threshold"):
                parameter.abs_()
        if clt.cfg.normalize_io:
            clt.in_norm.copy_(torch.rand(L) + 1)
            clt.out_norm.copy_(torch.rand(L) + 1)
    return clt


def largest(values: list[float], k: int) -> set[int]:
    return set(sorted(range(len(values)), key=lambda i: -values[i])[:k])


def activations(clt: Clt, s: int, x_s: Tensor) -> list[dict[int, float]]:
    """Per token the activation of each stored latent, by definition."""
    cfg = clt.cfg
    pre = []
    for token in range(T):
        x = x_s[token] - (0 if cfg.transcode else clt.b_dec[s])
        pre.append([float(clt.W_enc[s][i] @ x + clt.b_enc[s][i]) for i in range(F)])
    flat = largest([value for row in pre for value in row], K * T)
    result = []
    for token, row in enumerate(pre):
        if cfg.activation == "topk":
            held = largest(row, K)
        elif cfg.activation == "batchtopk":
            held = {i for i in range(F) if token * F + i in flat}
        elif cfg.activation == "groupmax":
            held = {max(range(g, g + F // K), key=lambda i: row[i]) for g in range(0, F, F // K)}
        elif cfg.activation == "relu":
            held = set(range(F))
        else:
            held = {i for i in range(F) if row[i] > clt.threshold[s][i]}
        result.append({i: max(row[i], 0.0) for i in held})
    return result


def expected(clt: Clt, x: Tensor) -> list[Tensor | None]:
    """ŷ by the definitions of docs/coders.md."""
    cfg, offset = clt.cfg, clt.cfg.target_offset
    if cfg.normalize_io:
        x = torch.stack([x[s] * math.sqrt(D) / clt.in_norm[s] for s in range(L)])
    a = [activations(clt, s, x[s]) for s in range(L - offset)]
    outputs: list[Tensor | None] = [None] * offset
    for t in range(offset, L):
        sources = [s for s in range(L - offset) if offset <= t - s < offset + cfg.n_targets]
        y = clt.b_dec[t].repeat(T, 1)
        for token in range(T):
            u = {}
            for s in sources:
                for i, value in a[s][token].items():
                    if clt.post_enc is not None and value > 0:
                        value = (value + float(clt.post_enc[s][t - s - offset][i])) * float(
                            clt.post_scale[s][t - s - offset][i]
                        )
                    u[s, i] = value
            if cfg.topk_coalesced:
                zeros = [0.0] * K if cfg.activation == "batchtopk" else []
                names, kept = list(u), largest([*zeros, *u.values()], K)
                u = {
                    names[i - len(zeros)]: u[names[i - len(zeros)]] for i in kept if i >= len(zeros)
                }
            for s in sources:
                own = s == t
                part = torch.zeros(D, dtype=torch.float64)
                for (source, i), value in u.items():
                    if source == s:
                        part = part + value * clt.W_dec[s][t - s - offset][i]
                        if cfg.secondary_target_tied:
                            part = part + value * clt.W_dec[t][0][i]
                if clt.W_skip is not None and (own or cfg.coalesce_topk == "none"):
                    part = part + clt.W_skip[s][t - s - offset] @ x[s][token]
                if cfg.divide_cross_layer and not own:
                    part = part / max(1, len([r for r in sources if r != t]))
                y[token] += part
        outputs.append(y * clt.out_norm[t] / math.sqrt(D) if cfg.normalize_io else y)
    return outputs


@pytest.mark.parametrize("options", CASES, ids=str)
@torch.no_grad()
def test_forward_is_the_definition(options):
    clt = make(**options)
    x = torch.randn(L, T, D, dtype=torch.float64)
    training = clt.decode(clt.encode(x, training=True), x)
    for found, used, wanted in zip(training, clt.reconstruct(x), expected(clt, x), strict=True):
        if wanted is None:
            assert found is None
            assert used is None
        else:
            torch.testing.assert_close(found, wanted)
            torch.testing.assert_close(used, wanted)


@pytest.mark.parametrize("options", CASES, ids=str)
def test_gradients_are_those_of_finite_differences(options):
    clt = make(**options)
    x = torch.randn(L, T, D, dtype=torch.float64)
    weights = torch.randn(L, T, D, dtype=torch.float64)

    def loss() -> Tensor:
        outputs = clt.decode(clt.encode(x, training=True), x)
        pairs = zip(weights, outputs, strict=True)
        return torch.stack([(w * y).sum() for w, y in pairs if y is not None]).sum()

    loss().backward()
    for name, parameter in clt.named_parameters():
        if not parameter.requires_grad or name.startswith("threshold"):
            continue
        step = 1e-6 * torch.randn_like(parameter)
        with torch.no_grad():
            parameter += step
            after = loss()
            parameter -= 2 * step
            change = (after - loss()) / 2
            parameter += step
        found = 0.0 if parameter.grad is None else (parameter.grad * step).sum().item()
        assert change.item() == pytest.approx(found, rel=1e-4, abs=1e-11), name


@pytest.mark.parametrize("options", CASES, ids=str)
@torch.no_grad()
def test_parts_of_a_target_add_up(options):
    clt = make(**(options | POST if options.get("transcode", True) else options))
    x = torch.randn(L, T, D, dtype=torch.float64)
    latents, t = clt.encode(x), L - 1
    whole = clt.decode_target(t, latents, x)
    bias = clt.decode_target(t, latents, x, keep=lambda s: False)
    torch.testing.assert_close(bias, (clt.b_dec[t] * clt.out_scale(t)).expand(T, -1))
    sources = [s for s, _ in clt.cfg.sources(t)]
    parts = [clt.decode_target(t, latents, x, keep=lambda s, r=r: s == r) for r in sources]
    torch.testing.assert_close(sum(part - bias for part in parts) + bias, whole)
    for part, (s, k), u in zip(parts, clt.cfg.sources(t), clt.written_to(t, latents), strict=True):
        matrix = torch.zeros(T, F, dtype=torch.float64).scatter_add(1, latents[s].indices, u)
        wanted = bias + matrix @ clt.decoder_matrix(s, k)
        if (W_skip := clt.skip(s, k)) is not None:
            factor = clt.write_factor(s, t) * clt.out_scale(t)
            wanted = wanted + factor * clt.skip_input(s, x[s]) @ W_skip.T
        torch.testing.assert_close(part, wanted)


def test_batch_top_has_no_cap_per_token_and_keeps_negatives_out():
    pre = torch.tensor([[5.0, 4.0, 3.0, 2.0], [1.0, -1.0, -1.0, -1.0], [-1.0] * 4])
    dense = batch_top(pre, 2).dense(4)
    assert torch.equal(dense, pre.relu())
    assert torch.equal(batch_top(pre, 1).dense(4), pre * (pre >= 3))
    assert batch_top(pre[:0], 2).values.shape == (0, 1)


def test_one_threshold_replaces_the_batch_once_it_is_learned():
    clt = make(activation="batchtopk", n_targets=1)
    x = torch.randn(L, T, D, dtype=torch.float64)
    by_batch = clt.encode_layer(1, x[1])
    torch.testing.assert_close(by_batch.dense(F), clt.encode_layer(1, x[1], training=True).dense(F))
    assert (by_batch.values > 0).sum() == K * T
    with torch.no_grad():
        clt.threshold[1].fill_(0.7)
    pre = clt.pre_activations(1, x[1])
    for tokens in (T, 1):  # no longer depends on the other tokens
        found = clt.encode_layer(1, x[1][:tokens]).dense(F)
        torch.testing.assert_close(found, (pre * (pre > 0.7))[:tokens])
    assert (clt.encode_layer(1, x[1], training=True).values > 0).sum() == K * T
    assert not clt.threshold[1].requires_grad


def test_groups_are_neighbours_and_must_divide():
    pre = torch.tensor([[1.0, 3.0, -1.0, -2.0, 0.5, 0.2]])
    latents = group_max(pre, 3)
    assert latents.indices.tolist() == [[1, 2, 4]]
    assert latents.values.tolist() == [[3.0, 0.0, 0.5]]
    with pytest.raises(UserError, match="4 groups do not divide 6 latents"):
        group_max(pre, 4)


def test_threshold_gradients_are_the_straight_through_estimate():
    width = 0.5
    threshold = torch.tensor([1.0, 0.2, 0.0], dtype=torch.float64, requires_grad=True)
    pre = torch.randn(200, 3, dtype=torch.float64, requires_grad=True)
    G = torch.randn(200, 3, dtype=torch.float64)
    latents = jump(pre, threshold, width)
    assert torch.equal(latents.dense(3), pre * (pre > threshold))
    (latents.values * G.gather(1, latents.indices)).sum().backward()
    by_pre, by_threshold = pre.grad.clone(), threshold.grad.clone()
    steps = step_above(pre, threshold, width)
    assert torch.equal(steps, (pre > threshold).double())
    threshold.grad = pre.grad = None
    (steps * G).sum().backward()
    assert pre.grad is None
    pre, at, G = pre.tolist(), threshold.tolist(), G.tolist()
    for i in range(3):
        a_grad = step_grad = 0.0
        for token in range(200):
            p, theta, g = pre[token][i], at[i], G[token][i]
            assert float(by_pre[token, i]) == (g if p > theta else 0.0)
            if abs(p - theta) < width / 2:
                a_grad -= theta / width * g
                step_grad -= g / width
        assert float(by_threshold[i]) == pytest.approx(a_grad)
        assert float(threshold.grad[i]) == pytest.approx(step_grad)


def test_thresholds_are_trained_and_kept_from_becoming_negative():
    clt = make(activation="jumprelu", jumprelu_bandwidth=2.0)
    x = torch.randn(L, T, D, dtype=torch.float64)
    clt.decode(clt.encode(x, training=True), x)[0].sum().backward()
    pre = clt.pre_activations(0, x[0])
    near = (pre - clt.threshold[0]).abs() < 1.0
    wanted = -(clt.threshold[0] / 2.0) * near.sum(0) * clt.W_dec[0][0].sum(1)
    torch.testing.assert_close(clt.threshold[0].grad, wanted)
    with torch.no_grad():
        clt.threshold[0][0] = -1.0
    others = clt.threshold[0][1:].clone()
    clt.project()
    assert clt.threshold[0][0] == 0
    assert torch.equal(clt.threshold[0][1:], others)


def test_survivors_are_the_largest_over_all_sources():
    u = [torch.tensor([[3.0, -1.0], [0.0, -1.0]]), torch.tensor([[2.0, 4.0], [-2.0, 5.0]])]
    kept = torch.cat(survivors(u, 3, positive=False), dim=1)
    assert kept.tolist() == [[True, False, True, True], [True, True, False, True]]
    kept = torch.cat(survivors(u, 3, positive=True), dim=1)
    assert kept.tolist() == [[True, False, True, True], [False, False, False, True]]
    assert all(mask.all() for mask in survivors(u, 99, positive=False))


def test_k_of_coalesced_selection_can_be_overridden():
    clt = make(coalesce_topk="concat", topk_coalesced=True)
    x = torch.randn(L, T, D, dtype=torch.float64)
    for k in (1, 5):
        written = clt.written_to(3, clt.encode(x, k), k)
        assert [u.shape for u in written] == [(T, k)] * 3
        assert (torch.cat(written, 1) != 0).sum(1).max() <= k
    with pytest.raises(ValueError, match="depends on the others"):
        clt.decode_source(3, 0, clt.encode_layer(3, x[3]), x[3])


@torch.no_grad()
def test_negative_writes_survive_only_where_the_number_of_places_is_fixed():
    options = {"coalesce_topk": "concat", "topk_coalesced": True, "post_encoder_scale": True}
    x = torch.randn(L, 1, D, dtype=torch.float64)  # one token: no unused places
    for activation, kept in (("topk", True), ("batchtopk", False)):
        clt = make(activation=activation, **options)
        for s in range(L):
            clt.b_enc[s].fill_(100.0)  # all latents are active
            for scale in clt.post_scale[s]:
                scale.fill_(-1.0)
        written = torch.cat(clt.written_to(3, clt.encode(x)), dim=1)
        assert bool((written < 0).any()) is kept
        assert (written != 0).sum(1).tolist() == ([K] if kept else [0])


@pytest.mark.parametrize(
    ("options", "distinct"),
    [
        ({}, 9),
        ({"per_source_tied": True}, 4),
        ({"coalesce_topk": "concat"}, 4),
        ({"coalesce_topk": "per-layer"}, 9),
    ],
    ids=str,
)
def test_shared_decoders_are_one_parameter(options, distinct):
    clt = make(skip_connection=True, **options)

    def check(clt: Clt) -> None:
        for s in range(L):
            for k, W in enumerate(clt.W_dec[s]):
                if "per_source_tied" in options:
                    assert W is clt.W_dec[s][0]
                if options.get("coalesce_topk") == "concat":
                    assert W is clt.W_dec[s + k][0]
                assert clt.skip(s, k) is None or k == 0 or not options.get("coalesce_topk")
        names = [name for name, _ in clt.named_parameters() if name.startswith("W_dec")]
        assert len(names) == distinct

    check(clt)
    check(copy.deepcopy(clt))
    check(clt.to(torch.float32))
    other = make(skip_connection=True, **options)
    other.load_state_dict(clt.state_dict())
    check(other)
    x = torch.randn(L, T, D)
    found = other.to(torch.float32).reconstruct(x)
    assert all(torch.equal(a, b) for a, b in zip(found, clt.reconstruct(x), strict=True))


def test_norms_are_kept_with_the_weights():
    clt = make(normalize_io=True)
    assert {"in_norm", "out_norm"} <= clt.state_dict().keys()
    assert not {"in_norm", "out_norm"} & make().state_dict().keys()
    other = Clt(clt.cfg, dtype=torch.float64)
    other.load_state_dict(clt.state_dict())
    assert torch.equal(other.in_norm, clt.in_norm)


@pytest.mark.parametrize("transcode", [True, False])
def test_normalised_coders_start_by_predicting_the_mean(transcode):
    x = 3 * torch.randn(L, 50, D, dtype=torch.float64) + 2
    y = x if not transcode else torch.randn(L, 50, D, dtype=torch.float64) - 1
    site = {} if transcode else {"n_targets": 1, "transcode": False, "input_site": "mlp_out"}
    clt = make(normalize_io=True, **site)
    with pytest.raises(ValueError, match="normalize_io needs"):
        clt.initialise(x.mean(1), y.mean(1))
    norms = x.norm(dim=2).mean(1), y.norm(dim=2).mean(1)
    Clt.initialise(fresh := Clt(clt.cfg, dtype=torch.float64), x.mean(1), y.mean(1), 0, *norms)
    for s in range(L):
        assert fresh.skip_input(s, x[s]).norm(dim=1).mean().item() == pytest.approx(D**0.5)
        if transcode:
            assert fresh.pre_activations(s, x[s].mean(0)[None]).abs().max() < 1e-6
            torch.testing.assert_close(
                fresh.decode_target(s, fresh.encode(x), x), y[s].mean(0).expand(50, -1)
            )
        else:
            torch.testing.assert_close(fresh.b_dec[s] * fresh.out_scale(s), y[s].mean(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coalesce_topk": "group"}, "--coalesce_topk group is not supported"),
        ({"topk_coalesced": True}, "--topk_coalesced needs --coalesce_topk"),
        (
            {"topk_coalesced": True, "coalesce_topk": "concat", "activation": "relu"},
            "--topk_coalesced needs a k",
        ),
        ({"per_source_tied": True, "coalesce_topk": "concat"}, "--per_source_tied"),
        ({"secondary_target_tied": True, "coalesce_topk": "concat"}, "--secondary_target_tied"),
        ({"divide_cross_layer": True, "coalesce_topk": "per-layer"}, "--divide_cross_layer"),
        ({"divide_cross_layer": True, "secondary_target_tied": True}, "--divide_cross_layer"),
        ({"coalesce_topk": "concat", "target_offset": 1}, "concat needs --target_offset 0"),
        ({"secondary_target_tied": True, "target_offset": 1}, "needs --target_offset 0"),
        (
            {"secondary_target_tied": True, "transcode": False, "n_targets": 1},
            "--secondary_target_tied needs --transcode",
        ),
        ({"activation": "groupmax", "k": 5}, "--k 5: groupmax needs a divisor"),
        ({"activation": "batchtopk", "k": 13}, "--k 13"),
        ({"jumprelu_bandwidth": 0.0}, "--jumprelu_bandwidth"),
        ({"jumprelu_init_threshold": -1.0}, "--jumprelu_init_threshold"),
    ],
)
def test_contradicting_variants_are_user_errors(options, message):
    with pytest.raises(UserError, match=message):
        make(**options)
