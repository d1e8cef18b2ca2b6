"""Reading and replacing what the MLPs write, on every family."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import pytest
import torch
from families import FAMILIES, N_LAYERS, TEXTS, example, load, shared
from torch import Tensor

from sparsify_vlm.errors import UserError
from sparsify_vlm.models import INPUT_SITES, LoadedModel, resolve_stack


def logits(loaded: LoadedModel, inputs: dict[str, Any]) -> Tensor:
    """Logits of the tokens that are not padding, [T, V]."""
    return loaded.forward(inputs, logits=True).logits[inputs["attention_mask"].bool()]


def written(loaded: LoadedModel, inputs: dict[str, Any], site: Any = "mlp_in") -> list[Tensor]:
    """Each layer's y, [B, S, d]."""
    found: list[Tensor] = []
    with loaded.stack.reading(lambda layer, x, y: found.append(y.clone()), site):
        loaded.forward(inputs)
    assert len(found) == loaded.stack.n_layers
    return found


def layers_of(loaded: LoadedModel) -> list[Any]:
    """The decoder layers, found without the stack: each family's own path."""
    model = loaded.model
    base = getattr(model, "model", None) or model.transformer
    for name in ("language_model", "text_model"):
        base = getattr(base, name, base)
    return list(getattr(base, "layers", None) or base.h)


def post_norm(layer: Any) -> Any | None:
    """The norm between the MLP and the stream, under the families' own names."""
    for name in ("post_feedforward_layernorm", "post_mlp_layernorm"):
        if hasattr(layer, name):
            return getattr(layer, name)
    return None


@contextmanager
def poisoned(loaded: LoadedModel) -> Iterator[None]:
    """NaN in every parameter of the MLPs and of the norms behind them."""
    modules = [layer.mlp for layer in layers_of(loaded)]
    modules += [norm for layer in layers_of(loaded) if (norm := post_norm(layer)) is not None]
    parameters = [p for module in modules for p in module.parameters()]
    kept = [p.detach().clone() for p in parameters]
    for p in parameters:
        p.fill_(float("nan"))
    try:
        yield
    finally:
        for p, old in zip(parameters, kept, strict=True):
            p.copy_(old)


@pytest.mark.parametrize("site", INPUT_SITES)
@pytest.mark.parametrize("name", FAMILIES)
def test_local_sum(name: str, site: Any) -> None:
    """The true y in every MLP's place gives the model's logits; zeros do not."""
    loaded = shared(name)
    inputs = example(loaded)
    expected = logits(loaded, inputs)
    y = written(loaded, inputs)
    with loaded.stack.replacing(lambda layer, x: y[layer], site):
        torch.testing.assert_close(logits(loaded, inputs), expected, rtol=0, atol=1e-5)
    with loaded.stack.replacing(lambda layer, x: torch.zeros_like(x), site):
        assert (logits(loaded, inputs) - expected).abs().max() > 0.1
    torch.testing.assert_close(logits(loaded, inputs), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_replaced_mlps_are_not_computed(name: str) -> None:
    loaded = shared(name)
    inputs = example(loaded)
    expected = logits(loaded, inputs)
    y = written(loaded, inputs)
    with poisoned(loaded):
        assert logits(loaded, inputs).isnan().any()
        with loaded.stack.replacing(lambda layer, x: y[layer]):
            torch.testing.assert_close(logits(loaded, inputs), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_x_and_y_are_what_the_layers_read_and_write(name: str) -> None:
    """Against hooks on the layers themselves: out = resid_mid + y, and x = norm(resid_mid)."""
    loaded = shared(name)
    inputs = example(loaded)
    outputs: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(
            lambda module, args, out: outputs.append(out if isinstance(out, Tensor) else out[0])
        )
        for layer in layers_of(loaded)
    ]
    streams: list[Tensor] = []
    with loaded.stack.reading(lambda layer, x, y: streams.append(x.clone()), "resid_mid"):
        y = written(loaded, inputs)
    for hook in hooks:
        hook.remove()
    reads: list[Tensor] = []
    with loaded.stack.reading(lambda layer, x, y: reads.append(x.clone())):
        loaded.forward(inputs)
    for layer, module in enumerate(layers_of(loaded)):
        torch.testing.assert_close(streams[layer] + y[layer], outputs[layer])
        torch.testing.assert_close(reads[layer], _norm_before_mlp(module)(streams[layer]))


def _norm_before_mlp(layer: Any) -> Any:
    if type(layer).__name__.startswith("Olmo2"):
        return lambda stream: stream
    for name in ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2"):
        if hasattr(layer, name):
            return getattr(layer, name)
    raise AssertionError(type(layer))


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "paligemma2"])
def test_y_of_gemma_is_the_post_norm_of_the_mlp(name: str) -> None:
    loaded = shared(name)
    inputs = example(loaded)
    pairs: list[tuple[Tensor, Tensor]] = []
    with loaded.stack.reading(lambda layer, x, y: pairs.append((x.clone(), y.clone()))):
        loaded.forward(inputs)
    for (x, y), layer in zip(pairs, layers_of(loaded), strict=True):
        z = layer.mlp(x)
        z64 = z.double()  # RMSNorm with Gemma's (1 + weight), in float64
        scale = (z64.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        weight = layer.post_feedforward_layernorm.weight.double()
        torch.testing.assert_close(y.double(), z64 * scale * (1 + weight), rtol=1e-5, atol=1e-5)
        assert (y - z).abs().max() > 0.1


@pytest.mark.parametrize("name", FAMILIES)
def test_generate_with_cache(name: str) -> None:
    """Copies of the MLPs as replacement generate what the model generates, a token at a time."""
    loaded = shared(name)
    inputs = dict(example(loaded, side="left"))
    inputs.pop("labels", None)
    copies = [deepcopy(layer) for layer in layers_of(loaded)]
    factor = getattr(loaded.config, "residual_multiplier", 1.0)
    lengths: list[int] = []

    def copy(layer: int, x: Tensor) -> Tensor:
        lengths.append(x.shape[1])
        y = copies[layer].mlp(x)
        norm = post_norm(copies[layer])
        return (y if norm is None else norm(y)) * factor

    def generate() -> Tensor:
        settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
        return loaded.model.generate(**inputs, **settings)

    expected = generate()
    with poisoned(loaded), loaded.stack.replacing(copy):
        assert generate().tolist() == expected.tolist()
    prompt = inputs["input_ids"].shape[1]
    assert lengths == [prompt] * N_LAYERS + [1] * N_LAYERS * 4


def test_none_keeps_the_mlp_and_reading_sees_what_is_written() -> None:
    loaded = shared("gemma2")
    inputs = example(loaded)
    expected = logits(loaded, inputs)
    with loaded.stack.replacing(lambda layer, x: None):
        torch.testing.assert_close(logits(loaded, inputs), expected, rtol=0, atol=0)
    with loaded.stack.replacing(lambda layer, x: torch.full_like(x, 0.5) if layer == 1 else None):
        y = written(loaded, inputs)
    assert (y[1] == 0.5).all()
    assert (y[0] != 0.5).any()
    with loaded.stack.replacing(lambda layer, x: torch.full_like(x, 0.5), layers=[2]):
        y = written(loaded, inputs)
    assert [(v == 0.5).all().item() for v in y] == [False, False, True]


def test_scaled_write_is_replaced_whole() -> None:
    """Granite multiplies the MLP's output by 0.3: y is the product, and so is its replacement."""
    loaded = shared("granite")
    inputs = example(loaded)
    with loaded.stack.replacing(lambda layer, x: torch.full_like(x, 0.5)):
        y = written(loaded, inputs)
    torch.testing.assert_close(torch.stack(y), torch.full_like(torch.stack(y), 0.5))


@pytest.mark.parametrize("site", INPUT_SITES)
def test_replacement_gets_the_site_it_asked_for(site: Any) -> None:
    loaded = shared("gemma2")
    inputs = example(loaded)
    expected: list[Tensor] = []
    given: list[Tensor] = []
    with loaded.stack.reading(lambda layer, x, y: expected.append(x.clone()), site):
        loaded.forward(inputs)

    def keep(layer: int, x: Tensor) -> None:
        given.append(x.clone())

    with loaded.stack.replacing(keep, site):
        loaded.forward(inputs)
    torch.testing.assert_close(torch.stack(given), torch.stack(expected), rtol=0, atol=0)


def test_everything_is_put_back_after_an_error() -> None:
    loaded = shared("llama")
    inputs = example(loaded)
    expected = logits(loaded, inputs)

    def fail(layer: int, x: Tensor) -> Tensor:
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"), loaded.stack.replacing(fail):
        loaded.forward(inputs)
    torch.testing.assert_close(logits(loaded, inputs), expected, rtol=0, atol=0)
    assert all("forward" not in m.__dict__ for m in loaded.model.modules())


def test_bfloat16_residual_stream_keeps_its_dtype(tmp_path: Any) -> None:
    loaded = load("llama", tmp_path, dtype="bf16")
    inputs = example(loaded)
    with loaded.stack.replacing(lambda layer, x: torch.zeros(x.shape)):
        assert loaded.forward(inputs).logits.dtype == torch.bfloat16


def test_hookpoint_names() -> None:
    for name in FAMILIES:
        first = shared(name).stack.hookpoints[0]
        if name == "gpt2":
            assert first == "h.0.mlp"
        elif name in TEXTS:
            assert first == "layers.0.mlp"
        else:
            assert first == "language_model.model.layers.0.mlp"


def test_match() -> None:
    stack = shared("llava").stack
    assert stack.match(["language_model.model.layers.1.mlp"]) == [1]
    assert stack.match(["model.language_model.layers.*.mlp"]) == [0, 1, 2]
    assert stack.match(["language_model.layers.[02].mlp"]) == [0, 2]
    assert stack.match(["layers.2.mlp", "layers.0.mlp"]) == [0, 2]
    assert shared("gpt2").stack.match(["h.1.mlp", "transformer.h.1.*"]) == [1]


@pytest.mark.parametrize("pattern", ["layers.*.self_attn", "language_model.model.layers.3.mlp", ""])
def test_unknown_hookpoint_lists_what_there_is(pattern: str) -> None:
    with pytest.raises(UserError) as caught:
        shared("llava").stack.match(["*.0.mlp", pattern])
    message = str(caught.value)
    assert f"'{pattern}'" in message
    assert "language_model.model.layers.0.mlp" in message
    assert "language_model.model.layers.2.mlp" in message
    assert "\n" not in message


def test_unknown_site_and_layer() -> None:
    stack = shared("llama").stack
    wrong: Any = "attn_out"
    with (
        pytest.raises(UserError, match=r"attn_out.*mlp_in, resid_mid, mlp_out"),
        stack.reading(lambda layer, x, y: None, wrong),
    ):
        pass
    with (
        pytest.raises(UserError, match="layer 3 is not one of the 3"),
        stack.replacing(lambda layer, x: None, layers=[3]),
    ):
        pass


def test_resolving_leaves_the_model_as_it_was() -> None:
    model = deepcopy(shared("llama").model).train()

    def hooks() -> list[int]:
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]

    before = hooks()
    resolve_stack(model)
    assert model.training
    assert hooks() == before
