"""Steering vectors and other image tokens, against hooks written here and against other prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from families import D_MODEL, FAMILIES, picture, shared
from prompts import one_prompt, random_coder
from torch import Tensor

from sparsify_vlm import UserError, attribute
from sparsify_vlm.data import ShapesDataset
from sparsify_vlm.data.encoding import encode
from sparsify_vlm.data.images import ImageRef
from sparsify_vlm.data.rows import Sample, Turn
from sparsify_vlm.models import LoadedModel, load_model
from sparsify_vlm.replacement import (
    Intervention,
    LocalModel,
    PatchIntervention,
    SteeringVector,
    VLMReplacementModel,
)

TINY = ["gemma3", "qwen3_vl"]
"""Of these the second has image features that are added behind a layer."""


def tiny_llava_prompt(loaded: LoadedModel, scene: int) -> dict[str, Any]:
    row = ShapesDataset("heldout", scene + 1)[scene]
    return asked(loaded, row["image"], row["question"])


def asked(loaded: LoadedModel, image: Any, question: str) -> dict[str, Any]:
    sample = Sample("x", (Turn("user", question, 1),), (ImageRef("x", image=image),))
    return encode(loaded, [sample], 256, with_answer=False).inputs


def case(name: str, other: bool = False) -> tuple[VLMReplacementModel, dict[str, Any]]:
    """A model with a random coder and a prompt, or one of another picture."""
    if name != "tiny-llava":
        loaded = shared(name)
        inputs = one_prompt(loaded)
        if other:
            text = f"{FAMILIES[name].image} what colour is the thing ? it is"
            images = [[picture(40, 24, seed=9)]]
            inputs = dict(loaded.processor(images=images, text=[text], return_tensors="pt"))
        return VLMReplacementModel(loaded, random_coder(loaded)), inputs
    loaded = load_model("tiny-llava")
    from sparsify_vlm.coders import Clt, CltConfig

    cfg = CltConfig(loaded.stack.d_model, loaded.stack.hookpoints, n_targets=3, num_latents=40, k=4)
    clt = Clt(cfg).requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    for parameter in clt.parameters():
        parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return VLMReplacementModel(loaded, clt), tiny_llava_prompt(loaded, 7 if other else 4)


@contextmanager
def hooked(
    model: VLMReplacementModel, layer: int, fn: Callable[[Tensor], Tensor], before: bool = False
) -> Iterator[None]:
    """`fn` in the way of a layer's output, or of its input."""
    module = model.loaded.model.get_decoder().layers[layer]

    def enter(_: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return (fn(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": fn(kwargs["hidden_states"])}

    def leave(_: Any, args: Any, out: Any) -> Any:
        return fn(out) if isinstance(out, Tensor) else (fn(out[0]), *out[1:])

    if before:
        handle = module.register_forward_pre_hook(enter, with_kwargs=True)
    else:
        handle = module.register_forward_hook(leave)
    yield
    handle.remove()


@torch.no_grad()
def logits(model: VLMReplacementModel, inputs: dict[str, Any]) -> Tensor:
    made: Tensor = model.loaded.model(**inputs, use_cache=False).logits[0]
    return made


# ---- steering


@pytest.mark.parametrize("name", ["tiny-llava", *TINY])
@pytest.mark.parametrize("position", [None, 5, -2])
def test_a_vector_is_added_to_the_stream(name, position):
    model, inputs = case(name)
    vector = torch.randn(model.loaded.stack.d_model)
    places = slice(None) if position is None else [position]

    def add(h: Tensor) -> Tensor:
        h = h.clone()
        h[:, places] += 1.5 * vector
        return h

    with hooked(model, 1, add):
        expected = logits(model, inputs)
    steer = SteeringVector(1, vector, position, strength=1.5)
    found = model.intervene(inputs, [steer], "free").logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert float((expected - logits(model, inputs)).abs().max()) > 1e-2
    frozen = model.intervene(inputs, [steer], "freeze_attention").logits
    assert float((frozen - logits(model, inputs)).abs().max()) > 1e-2


@pytest.mark.parametrize("name", ["tiny-llava", "gemma3"])
def test_generation_is_steered_at_new_tokens_too(name):
    """With the cache, against the whole prompt run anew for each token."""
    model, inputs = case(name)
    vector = 4 * torch.randn(model.loaded.stack.d_model, generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    with model.intervening([SteeringVector(1, vector)]):
        steered = model.loaded.model.generate(**inputs, **options)
    ids, n = inputs["input_ids"], inputs["input_ids"].shape[1]
    with hooked(model, 1, lambda h: h + vector):
        for _ in range(5):
            more = ids.shape[1] - n
            extended = {k: _longer(v, more, n) for k, v in inputs.items()}
            nxt = logits(model, extended | {"input_ids": ids})[-1].argmax()
            ids = torch.cat([ids, nxt.view(1, 1)], dim=1)
    assert torch.equal(steered, ids)
    plain = model.loaded.model.generate(**inputs, **options)
    assert not torch.equal(plain, steered)


def _longer(value: Any, more: int, n: int) -> Any:
    """Masks and token types for `more` new tokens."""
    if isinstance(value, Tensor) and value.ndim == 2 and value.shape[1] == n:
        last = torch.ones if bool(value.all()) else torch.zeros
        return torch.cat([value, last(1, more, dtype=value.dtype)], dim=1)
    return value


@pytest.mark.parametrize("name", ["tiny-llava", "qwen3_vl"])
def test_a_features_vector_is_its_decoder_row(name):
    model, _ = case(name)
    clt = model.clt
    for k, target in enumerate(clt.cfg.targets(0)):
        one = SteeringVector.from_feature(model, 0, 7, target, value=2.5, position=3)
        torch.testing.assert_close(one.vector, 2.5 * clt.W_dec[0][k][7].detach())
        assert (one.layer, one.position) == (target, 3)
    assert SteeringVector.from_feature(model, 0, 7).layer == 0


def test_steering_with_all_its_vectors_is_setting_a_silent_feature():
    model, inputs = case("tiny-llava")
    local = LocalModel(model, inputs)
    position = 40
    there = set(local.latents[2].indices[position].tolist())
    latent = next(i for i in range(40) if i not in there)
    vectors = [
        SteeringVector.from_feature(model, 2, latent, t, value=3.0, position=position)
        for t in (2, 3, 4)
    ]
    for mode in ("constrained", "freeze_attention", "free"):
        setting = model.intervene(local, [Intervention(2, position, latent, 3.0)], mode)
        steered = model.intervene(local, vectors, mode)
        torch.testing.assert_close(steered.logits, setting.logits, rtol=0, atol=1e-4)


# ---- image patches


@pytest.mark.parametrize("name", ["tiny-llava", "gemma3", "paligemma"])
@pytest.mark.parametrize("by", ["zero", "mean"])
def test_patches_are_taken_away_before_the_first_layer(name, by):
    model, inputs = case(name)
    at = (inputs["input_ids"][0] == model.loaded.stack.image_token_id).nonzero()[:, 0]
    columns = 6 if name == "tiny-llava" else int(len(at) ** 0.5)
    wanted = [(0, 1), (1, 0)]
    positions = at[[row * columns + column for row, column in wanted]]

    def take(h: Tensor) -> Tensor:
        h = h.clone()
        h[0, positions] = 0 if by == "zero" else h[0, at].mean(0)
        return h

    with hooked(model, 0, take, before=True):
        expected = logits(model, inputs)
    found = model.intervene(inputs, [PatchIntervention(wanted, by=by)], "free").logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert float((expected - logits(model, inputs)).abs().max()) > 1e-3
    with model.intervening([PatchIntervention(wanted, by=by)]):
        made = model.loaded.model.generate(**inputs, max_new_tokens=1, do_sample=False)
    assert int(made[0, -1]) == int(expected[-1].argmax())


@pytest.mark.parametrize("name", ["tiny-llava", *TINY, "llava_next"])
def test_another_pictures_tokens_are_another_picture(name):
    """All tokens of the image exchanged, where its places in the prompt are the same."""
    model, inputs = case(name)
    _, other = case(name, other=True)
    other = other | {"input_ids": inputs["input_ids"]}
    expected = logits(model, other)
    assert float((expected - logits(model, inputs)).abs().max()) > 1e-2
    whole = PatchIntervention.from_image(model, other)
    found = model.intervene(inputs, [whole], "free").logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    with model.intervening([whole]):
        options = {"max_new_tokens": 4, "do_sample": False}
        mine = model.loaded.model.generate(**inputs, **options)
    assert torch.equal(mine, model.loaded.model.generate(**other, **options))
    assert torch.equal(logits(model, inputs), logits(model, inputs))


def test_two_pictures_of_a_prompt_are_swapped():
    loaded = shared("llava")
    model = VLMReplacementModel(loaded, random_coder(loaded))
    text = "<image> and <image> what colour"
    first, second = picture(32, 32, seed=1), picture(32, 32, seed=2)

    def prompt(*images: Any) -> dict[str, Any]:
        return dict(loaded.processor(images=[list(images)], text=[text], return_tensors="pt"))

    inputs = prompt(first, second)
    swap = [
        PatchIntervention.from_image(model, inputs, image=0, other_image=1),
        PatchIntervention.from_image(model, inputs, image=1, other_image=0),
    ]
    found = model.intervene(inputs, swap, "free").logits
    expected = logits(model, prompt(second, first))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert float((found - logits(model, inputs)).abs().max()) > 1e-2


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen3_vl"])
def test_the_graph_predicts_what_a_patch_does(name):
    """Constrained: without a patch every node loses its edge from the patch's token."""
    loaded = shared(name)
    model = VLMReplacementModel(loaded, random_coder(loaded))
    local = LocalModel(model, one_prompt(loaded))
    graph = attribute(model, local)
    plain = model.intervene(local, [])
    for patch in ([0, 0], [1, 1]):
        (at,) = (graph.patches == torch.tensor(patch)).all(1).nonzero()[:, 0].tolist()
        without = model.intervene(local, [PatchIntervention([tuple(patch)])])
        edges = graph.adjacency[:, graph.token_nodes.start + at]
        moved = without.features(graph.features) - plain.features(graph.features)
        torch.testing.assert_close(moved, -edges[: graph.n_features], rtol=0, atol=2e-4)
        change = (without.unembedded - plain.unembedded)[-1]
        change = change[graph.logit_token_ids] - change.mean()
        torch.testing.assert_close(change, -edges[graph.target_nodes], rtol=0, atol=2e-4)
        assert float(moved.abs().max()) > 1e-3


def test_the_answer_changes_with_the_asked_object():
    """On tiny-llava, whose scenes are known: without the asked object's patches it says another."""
    model, _ = case("tiny-llava")
    rows = ShapesDataset("heldout", 200, types=("colour",))
    changed = 0
    for i in range(40):
        scene, question = rows.scene(i), rows.question(i)
        inputs = asked(model.loaded, rows[i]["image"], question.text)
        cell = scene.objects[question.asked[0]].cell
        patches = [(2 * (cell // 3) + r, 2 * (cell % 3) + c) for r in (0, 1) for c in (0, 1)]
        with model.intervening([PatchIntervention(patches, by="mean")]):
            without = int(logits(model, inputs)[-1].argmax())
        changed += without != int(logits(model, inputs)[-1].argmax())
    assert changed > 20


# ---- refusals


def test_one_clear_line():
    model, inputs = case("llava")
    d = model.loaded.stack.d_model
    assert d == D_MODEL
    cases: list[tuple[Any, str]] = [
        (SteeringVector(9, torch.zeros(d)), "the model has the layers 0 to 2"),
        (SteeringVector(1, torch.zeros(3)), "the stream is 32 wide"),
        (SteeringVector(1, torch.full((d,), torch.nan)), "holds NaN"),
        (SteeringVector(1, torch.zeros(d), 99), "position 99: the prompt has"),
        (PatchIntervention([(4, 0)]), "it has 4 rows and 4 columns of image tokens"),
        (PatchIntervention(image=1), "image 1: the prompt has 1 images"),
        ("red", "str is no intervention"),
        (PatchIntervention([(0, 0)], by={-1: torch.zeros(2, d)}), r"have the shape \(2, 32\)"),
        (PatchIntervention([(0, 0)], by="median"), "zero, mean or tokens, not by 'median'"),
    ]
    for change, line in cases:
        with pytest.raises(UserError, match=line):
            model.intervene(inputs, [change], "free")
    with pytest.raises(UserError, match=r"a list of changes: \[SteeringVector"):
        model.intervene(inputs, SteeringVector(1, torch.zeros(d)), "free")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="writes to the layers 1 to 2, not to 0"):
        SteeringVector.from_feature(model, 1, 3, 0)
    with pytest.raises(UserError, match="a coder has 40 latents"):
        SteeringVector.from_feature(model, 1, 400)
    for nothing in ([], [PatchIntervention([])], [PatchIntervention([], by="mean")]):
        out = model.intervene(inputs, nothing, "free")
        torch.testing.assert_close(logits(model, inputs), out.logits)
