"""The replacement model against modules that compute the same sums densely and in the open."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager

import pytest
import torch
from families import D_MODEL, N_LAYERS, VLMS, example, load, shared
from torch import nn

from sparsify_vlm.coders import Clt, CltConfig, save_clt
from sparsify_vlm.data import ShapesDataset
from sparsify_vlm.errors import UserError
from sparsify_vlm.models import Role
from sparsify_vlm.replacement import Ablation, ExcludedTokens, VLMReplacementModel

F, K = 40, 6
FEW = ["llava", "gemma3", "llama", "gpt2", "gemma2", "granite"]
NOTHING = ExcludedTokens()


def random_clt(loaded, *, hookpoints=None, **options) -> Clt:
    """A coder whose every weight is random, biases and skips included."""
    options = {"n_targets": N_LAYERS, "num_latents": F, "k": K} | options
    cfg = CltConfig(D_MODEL, hookpoints or loaded.stack.hookpoints, **options)
    clt = Clt(cfg)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in clt.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * (0.3 if parameter.ndim > 1 else 0.1))
    return clt


class DenseSum(nn.Module):
    """Stands where an MLP stood: dense float64 sums over all the sources below."""

    def __init__(self, clt: Clt, layer: int, shared_a: dict, shared_x: dict, drop) -> None:
        super().__init__()
        self.clt, self.layer, self.a, self.x, self.drop = clt, layer, shared_a, shared_x, drop

    def forward(self, x):
        clt, cfg, t = self.clt, self.clt.cfg, self.layer
        rows = x.double().flatten(0, 1)
        if t < cfg.n_layers - cfg.target_offset:
            pre = (rows @ clt.W_enc[t].double().T + clt.b_enc[t].double()).relu()
            a = torch.zeros_like(pre)
            for token, values in enumerate(pre):
                best = values.argsort(descending=True)[:K]
                a[token, best] = values[best]
            self.a[t], self.x[t] = a, rows
        out = clt.b_dec[t].double().expand(len(rows), -1).clone()
        for s in range(cfg.n_layers):
            k = t - s - cfg.target_offset
            if not 0 <= k < cfg.n_targets or self.drop(s, t):
                continue
            u = self.a[s]
            if clt.post_enc is not None:
                u = u + clt.post_enc[s][k].double() * (u > 0)
            if clt.post_scale is not None:
                u = u * clt.post_scale[s][k].double()
            out += u @ clt.W_dec[s][k].double()
            if clt.W_skip is not None:
                out += self.x[s] @ clt.W_skip[s][k].double().T
        return out.view(x.shape).to(x.dtype)


@contextmanager
def dense(loaded, clt, *, drop=lambda s, t: False):
    """The model with its MLP modules exchanged for `DenseSum`s, post-norms for the identity."""
    a, x = {}, {}
    with ExitStack() as stack:
        for layer, block in enumerate(loaded.stack._blocks):
            if layer < clt.cfg.target_offset:
                spy = DenseSum(clt, layer, a, x, drop)
                hook = block.mlp.register_forward_pre_hook(
                    lambda m, args, spy=spy: [spy(args[0]), None][1]
                )
                stack.callback(hook.remove)
                continue
            scale = block.scale

            class Scaled(DenseSum):
                def forward(self, x, scale=scale):
                    return super().forward(x) / scale

            for module, new in [
                (block.mlp, Scaled(clt, layer, a, x, drop)),
                *((post, nn.Identity()) for post in block.post),
            ]:
                stack.callback(_exchange(loaded.model, module, new))
        yield


def _exchange(model, module, new):
    for parent in model.modules():
        for name, child in parent.named_children():
            if child is module:
                setattr(parent, name, new)
                return lambda: setattr(parent, name, module)
    raise AssertionError("module not found")


def present(loaded, inputs):
    return loaded.stack.roles(inputs) != Role.PAD


@pytest.mark.parametrize("name", FEW)
def test_whole_prompts_are_the_dense_sums_on_the_changed_stream(name):
    loaded = shared(name)
    clt, inputs = random_clt(loaded), example(loaded)
    with dense(loaded, clt):
        expected = loaded.forward(inputs, logits=True).logits
    found = VLMReplacementModel(loaded, clt, NOTHING)(**inputs).logits
    here = present(loaded, inputs)
    torch.testing.assert_close(found[here], expected[here], rtol=1e-4, atol=1e-4)
    own = loaded.forward(inputs, logits=True).logits
    assert (found - own)[here].abs().max() > 0.1  # and it is another model


@pytest.mark.parametrize(
    "options",
    [
        {"n_targets": 1},
        {"n_targets": 2, "skip_connection": True},
        {"train_post_encoder": True, "post_encoder_scale": True},
    ],
)
def test_variants_of_the_coder(options):
    loaded = shared("llava")
    clt, inputs = random_clt(loaded, **options), example(loaded)
    with dense(loaded, clt):
        expected = loaded.forward(inputs, logits=True).logits
    found = VLMReplacementModel(loaded, clt, NOTHING)(**inputs).logits
    here = present(loaded, inputs)
    torch.testing.assert_close(found[here], expected[here], rtol=1e-4, atol=1e-4)


def test_with_offset_one_the_first_layer_keeps_its_mlp():
    loaded = shared("llama")
    clt, inputs = random_clt(loaded, target_offset=1), example(loaded)
    model = VLMReplacementModel(loaded, clt, NOTHING)
    seen = {}

    def look(layer, x, y):
        seen[layer] = (x, y)

    with model.replaced(), loaded.stack.reading(look):
        model.loaded.forward(inputs)
    x0, y0 = seen[0]
    torch.testing.assert_close(y0, loaded.stack._blocks[0].mlp(x0))
    x = torch.stack([seen[layer][0].flatten(0, 1) for layer in range(N_LAYERS)])
    for t in (1, 2):
        wanted = clt.decode_target(t, clt.encode(x), x)
        torch.testing.assert_close(seen[t][1].flatten(0, 1), wanted, rtol=1e-5, atol=1e-5)


ABLATIONS = [
    (Ablation(cross=True), lambda s, t: s != t),
    (Ablation(same=True), lambda s, t: s == t),
    (Ablation(sources=[0, 2]), lambda s, t: s in (0, 2)),
    (Ablation(reach=1), lambda s, t: t - s > 1),
    (Ablation(sources={1}, reach=1), lambda s, t: s == 1 or t - s > 1),
    (Ablation(cross=True, same=True), lambda s, t: True),
]


@pytest.mark.parametrize(("ablate", "drop"), ABLATIONS)
def test_ablations_leave_out_exactly_what_they_name(ablate, drop):
    loaded = shared("llava")
    clt, inputs = random_clt(loaded, skip_connection=True), example(loaded)
    with dense(loaded, clt, drop=drop):
        expected = loaded.forward(inputs, logits=True).logits
    model = VLMReplacementModel(loaded, clt, NOTHING)
    here = present(loaded, inputs)
    found = model(ablate, **inputs).logits
    torch.testing.assert_close(found[here], expected[here], rtol=1e-4, atol=1e-4)
    assert (found - model(**inputs).logits)[here].abs().max() > 1e-2


@pytest.mark.parametrize(
    ("ablate", "drop"),
    [
        (Ablation(cross=True), lambda s, t: t - s != 1),
        (Ablation(reach=1), lambda s, t: t - s > 1),
        (Ablation(), lambda s, t: False),
    ],
)
def test_with_offset_one_the_first_target_is_the_next_layer(ablate, drop):
    loaded = shared("llava")
    clt, inputs = random_clt(loaded, target_offset=1), example(loaded)
    with dense(loaded, clt, drop=drop):
        expected = loaded.forward(inputs, logits=True).logits
    model = VLMReplacementModel(loaded, clt, NOTHING)
    here = present(loaded, inputs)
    found = model(ablate, **inputs).logits
    torch.testing.assert_close(found[here], expected[here], rtol=1e-4, atol=1e-4)


def test_ablated_layers_keep_their_mlp_and_their_coders_go_on_writing():
    loaded = shared("llava")
    clt, inputs = random_clt(loaded), example(loaded)
    model, seen = VLMReplacementModel(loaded, clt, NOTHING), {}
    with (
        model.replaced(Ablation(layers=[1])),
        loaded.stack.reading(lambda layer, x, y: seen.update({layer: (x, y)})),
    ):
        loaded.forward(inputs)
    torch.testing.assert_close(seen[1][1], loaded.stack._blocks[1].mlp(seen[1][0]))
    x = torch.stack([seen[layer][0].flatten(0, 1) for layer in range(N_LAYERS)])
    full = clt.reconstruct(x)
    torch.testing.assert_close(seen[2][1].flatten(0, 1), full[2], rtol=1e-5, atol=1e-5)
    every = Ablation(layers=range(N_LAYERS))
    own = loaded.forward(inputs, logits=True).logits
    assert torch.equal(model(every, **inputs).logits, own)


def test_an_ablation_of_a_layer_that_is_not_there_is_refused():
    loaded = shared("llama")
    model = VLMReplacementModel(loaded, random_clt(loaded))
    with pytest.raises(UserError, match="layer 3"):
        model(Ablation(sources=[3]), **example(loaded))


class TrueWrite(Clt):
    """Test double: the coder that knows the true y of every layer."""

    def __init__(self, clt, y):
        super().__init__(clt.cfg)
        self.y = y

    def decode_target(self, t, latents, x=None, keep=None):
        return self.y[t]


@pytest.mark.parametrize("name", [*VLMS, "llama", "gpt2", "gemma2", "qwen3"])
def test_a_coder_that_returns_the_true_y_gives_the_models_own_logits(name):
    loaded = shared(name)
    inputs, y = example(loaded), {}
    with loaded.stack.reading(lambda layer, x, out: y.update({layer: out.flatten(0, 1).clone()})):
        own = loaded.forward(inputs, logits=True).logits
    model = VLMReplacementModel(loaded, TrueWrite(random_clt(loaded), y), NOTHING)
    torch.testing.assert_close(model(**inputs).logits, own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "llama", "gpt2"])
@pytest.mark.parametrize("excluded", [NOTHING, None])
def test_generating_with_the_cache_equals_generating_without(name, excluded):
    loaded = shared(name)
    model = VLMReplacementModel(loaded, random_clt(loaded, skip_connection=True), excluded)
    inputs = example(loaded, side="left")
    options = {
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "do_sample": False,
        "suppress_tokens": list(loaded.stack.special_ids | {loaded.stack.image_token_id or 0}),
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    cached = model.generate(**inputs, **options, use_cache=True)
    plain = model.generate(**inputs, **options, use_cache=False)
    assert torch.equal(cached.sequences, plain.sequences)
    for a, b in zip(cached.logits, plain.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    whole = _longer(inputs, cached.sequences[:, :-1])
    if name == "gpt2":  # its forward counts padding as positions, its generate does not
        whole["position_ids"] = (whole["attention_mask"].cumsum(1) - 1).clamp(min=0)
    again = model.forward(**whole).logits[:, -1]
    torch.testing.assert_close(again, cached.logits[-1], rtol=1e-4, atol=1e-4)


def _longer(inputs, ids):
    """The batch with the tokens of `ids` appended."""
    old = inputs["input_ids"].shape
    new = {k: v for k, v in inputs.items() if getattr(v, "shape", None) != old}
    for key, value in inputs.items():
        if key not in new:
            more = ids.shape[1] - old[1]
            new[key] = torch.cat(
                [value, value.new_full((old[0], more), int(key == "attention_mask"))], 1
            )
    return new | {"input_ids": ids}


@pytest.mark.parametrize("name", FEW)
def test_nothing_of_the_original_mlps_is_computed(name):
    loaded = shared(name)
    model = VLMReplacementModel(loaded, random_clt(loaded), NOTHING)
    inputs = example(loaded)
    expected = model(**inputs).logits
    with poisoned(loaded):
        found = model(**inputs).logits
        assert loaded.forward(inputs, logits=True).logits.isnan().any()
    assert torch.equal(found, expected)


@contextmanager
def poisoned(loaded, layers=range(N_LAYERS)):
    blocks = [loaded.stack._blocks[layer] for layer in layers]
    parameters = [p for b in blocks for m in (b.mlp, *b.post) for p in m.parameters()]
    saved = [p.clone() for p in parameters]
    with torch.no_grad():
        for p in parameters:
            p.fill_(torch.nan)
        yield
        for p, value in zip(parameters, saved, strict=True):
            p.copy_(value)


@pytest.mark.parametrize("name", ["llava", "gemma2", "granite"])
def test_at_bos_the_original_mlp_writes_and_is_computed_for_bos_alone(name):
    loaded = shared(name)
    inputs, seen, widths = example(loaded), {}, []
    model = VLMReplacementModel(loaded, random_clt(loaded))
    hooks = []
    for block in loaded.stack._blocks:
        own = block.mlp.forward

        def counting(x, own=own):
            widths.append(tuple(x.shape))
            return own(x)

        block.mlp.forward = counting
        hooks.append(block.mlp)
    try:
        with (
            model.replaced(),
            loaded.stack.reading(lambda layer, x, y: seen.update({layer: (x, y)})),
        ):
            loaded.forward(inputs)
    finally:
        for mlp in hooks:
            del mlp.__dict__["forward"]
    bos = inputs["input_ids"] == loaded.tokenizer.bos_token_id
    assert bos.sum() == 2
    assert widths == [(1, 2, D_MODEL)] * N_LAYERS
    clt = model.clt
    x = torch.stack([seen[layer][0].flatten(0, 1) for layer in range(N_LAYERS)])
    for layer, wanted in enumerate(clt.reconstruct(x)):
        block, (x_l, y_l) = loaded.stack._blocks[layer], seen[layer]
        torch.testing.assert_close(y_l[~bos], wanted[~bos.flatten()], rtol=1e-5, atol=1e-5)
        true = block.mlp(x_l)
        for post in block.post:
            true = post(true)
        torch.testing.assert_close(y_l[bos], (true * block.scale)[bos], rtol=1e-5, atol=1e-5)


def test_the_rule_of_excluded_tokens_comes_from_the_training_summary():
    tokenizer = shared("llama").tokenizer
    bos = tokenizer.bos_token_id
    assert ExcludedTokens.as_trained({}, tokenizer) == ExcludedTokens(bos)
    assert ExcludedTokens.as_trained({"filter_bos": False}, tokenizer) == NOTHING
    rule = ExcludedTokens.as_trained(
        {"filter_bos": False, "remove_first_token": True, "exclude_tokens": [9]}, tokenizer
    )
    ids = torch.tensor([[0, 0, 5, 9], [4, 9, 5, 6]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    expected = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0]]).bool()
    assert torch.equal(rule.in_forward((), {"input_ids": ids, "attention_mask": mask}), expected)
    step = {"input_ids": ids[:, -1:], "attention_mask": mask}
    assert torch.equal(rule.in_forward((), step), expected[:, -1:])
    assert rule.in_forward((), {"input_ids": ids[1:, 2:], "attention_mask": mask[1:]}) is None
    with pytest.raises(UserError, match="input_ids"):
        rule.in_forward((), {"inputs_embeds": torch.zeros(1, 2, 3)})


def test_a_coder_of_some_layers_replaces_those():
    loaded = shared("llava")
    names = [loaded.stack.hookpoints[i] for i in (0, 2)]
    clt, inputs, seen = random_clt(loaded, hookpoints=names, n_targets=2), example(loaded), {}
    model = VLMReplacementModel(loaded, clt, NOTHING)
    assert model.layers == [0, 2]
    with model.replaced(), loaded.stack.reading(lambda i, x, y: seen.update({i: (x, y)})):
        loaded.forward(inputs)
    torch.testing.assert_close(seen[1][1], loaded.stack._blocks[1].mlp(seen[1][0]))
    x = torch.stack([seen[layer][0].flatten(0, 1) for layer in (0, 2)])
    for layer, wanted in zip((0, 2), clt.reconstruct(x), strict=True):
        torch.testing.assert_close(seen[layer][1].flatten(0, 1), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("site", "transcode"), [("resid_mid", True), ("mlp_out", False)])
def test_coders_of_other_sites(site, transcode):
    loaded = shared("gemma2")
    n = N_LAYERS if transcode else 1
    clt = random_clt(loaded, input_site=site, transcode=transcode, n_targets=n)
    inputs, seen = example(loaded), {}
    model = VLMReplacementModel(loaded, clt, NOTHING)
    with (
        model.replaced(Ablation(layers=[1, 2])),
        loaded.stack.reading(lambda i, x, y: seen.setdefault(i, (x, y)), site),
    ):
        loaded.forward(inputs)
    read = {}
    with loaded.stack.reading(lambda i, x, y: read.setdefault(i, x), site):
        loaded.forward(inputs)
    wanted = clt.decode_target(0, clt.encode(torch.stack([read[0].flatten(0, 1)] * N_LAYERS)))
    torch.testing.assert_close(seen[0][1].flatten(0, 1), wanted, rtol=1e-5, atol=1e-5)


def test_afterwards_the_model_is_as_before():
    loaded = shared("llava")
    inputs = example(loaded)
    before = loaded.forward(inputs, logits=True).logits
    model = VLMReplacementModel(loaded, random_clt(loaded))
    model(**inputs)
    with pytest.raises(RuntimeError, match="broken"), model.replaced():
        raise RuntimeError("broken")
    assert torch.equal(loaded.forward(inputs, logits=True).logits, before)


def test_coders_of_another_model_are_refused():
    loaded = shared("llama")
    other = Clt(CltConfig(D_MODEL + 1, ["layers.0.mlp"], num_latents=F, k=K))
    with pytest.raises(UserError, match="33 wide"):
        VLMReplacementModel(loaded, other)
    with pytest.raises(UserError, match="matches no MLP"):
        VLMReplacementModel(loaded, random_clt(loaded, hookpoints=["layers.7.mlp"]))
    names = ["layers.1.mlp", "layers.0.mlp"]
    with pytest.raises(UserError, match="order"):
        VLMReplacementModel(loaded, random_clt(loaded, hookpoints=names))
    with pytest.raises(UserError, match="give --model"):
        VLMReplacementModel.from_pretrained(None, random_clt(loaded))


def test_from_names_and_of_a_model_in_bfloat16(tmp_path):
    names = [f"language_model.model.layers.{i}.mlp" for i in range(8)]
    clt = Clt(CltConfig(96, names, num_latents=F, k=K, n_targets=8, model="tiny-llava"))
    save_clt(clt, tmp_path)
    model = VLMReplacementModel.from_pretrained(None, tmp_path, "cpu", "bfloat16")
    assert model.loaded.name == "tiny-llava"
    assert (model.loaded.dtype, model.clt.dtype) == (torch.bfloat16, torch.float32)
    row = ShapesDataset("heldout", 1)[0]
    text = f"USER: <image>\n{row['question']} ASSISTANT:"
    inputs = dict(model.loaded.processor(text=text, images=row["image"], return_tensors="pt"))
    logits = model(**inputs).logits
    assert logits.dtype == torch.bfloat16
    # All weights are zero, so all MLPs but those at BOS write zeros.
    keep = (inputs["input_ids"] == model.loaded.tokenizer.bos_token_id)[..., None]
    own = {}
    with model.loaded.stack.reading(lambda i, x, y: own.update({i: y.clone()})):
        model.loaded.forward(inputs)
    with model.loaded.stack.replacing(lambda i, x: own[i] * keep):
        expected = model.loaded.forward(inputs, logits=True).logits
    torch.testing.assert_close(logits, expected, rtol=0.02, atol=0.05)


def test_gradients_reach_the_coder_through_the_changed_stream(tmp_path):
    loaded = load("gpt2", tmp_path, dtype=torch.float64)  # whose norms stay in float64
    clt = random_clt(loaded, skip_connection=True).double()
    model = VLMReplacementModel(loaded, clt)
    inputs = loaded.to_device(example(loaded))
    here = present(loaded, inputs)

    def loss():
        with model.replaced():
            return loaded.model(**inputs, use_cache=False).logits[here].log_softmax(-1)[:, 3].sum()

    loss().backward()
    for parameter in (clt.W_enc[0], clt.W_dec[0][2], clt.b_dec[1], clt.W_skip[0][1]):
        way, step = torch.randn_like(parameter), 1e-6
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                parameter += sign * step * way
                values.append(float(loss()))
                parameter -= sign * step * way
        expected = (values[0] - values[1]) / (2 * step)
        assert float((parameter.grad * way).sum()) == pytest.approx(expected, rel=1e-5)
