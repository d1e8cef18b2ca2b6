"""What patches of pixels add, against finite differences, a tower written by hand, and pictures
whose patches are known."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import FAMILIES, VLMS, load, picture, shared
from PIL import Image
from prompts import one_prompt, random_coder

from sparsify_vlm import AttributionGraph, UserError, VLMReplacementModel, attribute
from sparsify_vlm.graphs import Difference
from sparsify_vlm.graphs.effects import total_effects
from sparsify_vlm.graphs.pixels import EMBEDDINGS, _by_patch, patches_of, pixel_effects
from sparsify_vlm.models.pixels import PixelGrid, pixel_grid
from sparsify_vlm.replacement import LocalModel
from sparsify_vlm.replacement.frozen import Freezer

WHOLE: dict[str, dict[str, Any]] = defaultdict(dict, internvl={"crop_to_patches": False})
"""How a processor is told to show a picture in one piece, where its tiles' places are not known."""


# ---- where pixels lie


def painted(name: str, spot: tuple[float, float] | None) -> dict[str, Any]:
    """The batch of a grey picture, with a white square around `spot` (down, across) of it."""
    size = (64, 64) if name != "llava_next" else (96, 48)  # of the others the first is cropped
    image = Image.new("RGB", size, (128, 128, 128))
    if spot is not None:
        y, x = spot[0] * size[1], spot[1] * size[0]
        image.paste((255, 255, 255), (int(x - 4), int(y - 4), int(x + 4), int(y + 4)))
    loaded = shared(name)
    text = f"{FAMILIES[name].image} what colour"
    return dict(loaded.processor(images=[[image]], text=[text], return_tensors="pt", **WHOLE[name]))


@pytest.mark.parametrize("name", VLMS)
@pytest.mark.parametrize("spot", [(0.2, 0.8), (0.7, 0.4)])
def test_pixels_lie_where_the_picture_has_them(name, spot):
    """What changes in the processor's pixels where the picture changes has its centre there."""
    plain, changed = painted(name, None), painted(name, spot)
    grid = pixel_grid(shared(name).stack.layout, changed)
    difference = (changed["pixel_values"] - plain["pixel_values"]).abs().double()
    sums, outside = grid.sums(difference)
    ((rows, columns),) = grid.sizes
    table = sums.view(rows, columns)
    assert float(outside) == 0
    assert rows > 2 < columns
    middle = (torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns
    found = [float((table.sum(1 - i) * middle[i]).sum() / table.sum()) for i in (0, 1)]
    assert found == pytest.approx(spot, abs=0.6 / min(rows, columns))
    share = table[int(spot[0] * rows), int(spot[1] * columns)] / table.sum()
    assert float(share) > 0.1


def test_several_pictures_are_counted_one_after_the_other():
    loaded = shared("qwen2_5_vl")
    text = f"{FAMILIES['qwen2_5_vl'].image} and {FAMILIES['qwen2_5_vl'].image}"
    pictures = [[picture(40, 24), picture(24, 40)]]
    inputs = dict(loaded.processor(images=pictures, text=[text], return_tensors="pt"))
    grid = pixel_grid(loaded.stack.layout, inputs)
    (first, second) = grid.sizes
    assert first == second[::-1]
    assert first[0] < first[1]
    assert sorted(grid.cells.tolist()) == list(range(grid.n_patches))
    sums, _ = grid.sums(torch.ones_like(inputs["pixel_values"]))
    assert bool((sums == inputs["pixel_values"].shape[1]).all())


def test_unknown_places_are_refused(tmp_path):
    loaded = shared("internvl")
    text = f"{FAMILIES['internvl'].image} what"
    inputs = dict(loaded.processor(images=[[picture(96, 48)]], text=[text], return_tensors="pt"))
    with pytest.raises(UserError, match="how an InternVL picture was cut into tiles"):
        pixel_grid(loaded.stack.layout, inputs)
    other = replace(shared("llava").stack.layout, config=SimpleNamespace(model_type="aria"))
    with pytest.raises(UserError, match="where the pixels of aria models lie"):
        pixel_grid(other, inputs)
    with pytest.raises(UserError, match="has no picture"):
        pixel_grid(shared("llava").stack.layout, {"input_ids": inputs["input_ids"]})


# ---- the gradient through the tower


@cache
def double(name: str) -> LocalModel:
    """A prompt of the family in float64."""
    with TemporaryDirectory() as folder:
        loaded = load(name, Path(folder), dtype=torch.float64)
    model = VLMReplacementModel(loaded, random_coder(loaded))
    return LocalModel(model, one_prompt(loaded, **WHOLE[name]))


def read_of_pixels(local: LocalModel, pixels: torch.Tensor) -> dict[int, torch.Tensor]:
    """What the layers are given beside each other's outputs, in a run of the whole model."""
    layers = local.loaded.model.get_decoder().layers
    starts: list[torch.Tensor] = []
    ends: list[torch.Tensor] = []
    handles = []
    for layer in layers:
        handles.append(
            layer.register_forward_pre_hook(
                lambda _, args, kwargs: starts.append(args[0] if args else kwargs["hidden_states"]),
                with_kwargs=True,
            )
        )
        handles.append(
            layer.register_forward_hook(
                lambda _, args, out: ends.append(out if isinstance(out, torch.Tensor) else out[0])
            )
        )
    with torch.no_grad():
        given = local.loaded.to_device({**local.inputs, "pixel_values": pixels})
        local.loaded.model(**given, use_cache=False)
    for handle in handles:
        handle.remove()
    return {EMBEDDINGS: starts[0]} | {i: starts[i + 1] - ends[i] for i in local.injected}


def random_gradients(local: LocalModel) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (local.n_positions, 2, local.stack.d_model)
    return {
        place: torch.randn(shape, generator=generator, dtype=torch.float64)
        for place in (EMBEDDINGS, *local.injected)
    }


def slope_along(
    local: LocalModel,
    grid: PixelGrid,
    cells: list[int],
    given: dict[int, torch.Tensor],
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> torch.Tensor:
    """How Σ ⟨given, what is read⟩ [T] grows with the pixels of some patches, by finite differences
    of runs in the context `around`."""
    pixels = local.inputs["pixel_values"].double()
    channel = -1 if pixels.ndim == 2 else -3
    inside = torch.isin(grid.cells, torch.tensor(cells)).view(pixels.select(channel, 0).shape)
    direction = pixels * inside.unsqueeze(channel)

    def value(step: float) -> torch.Tensor:
        with around():
            read = read_of_pixels(local, pixels + step * direction)
        return sum(torch.einsum("std,sd->t", given[p], read[p][0]) for p in given)

    step = 1e-3  # some norms and softmaxes compute in float32, whatever they are given
    return (value(step) - value(-step)) / (2 * step)


@pytest.mark.parametrize("name", VLMS)
def test_the_plain_gradient_is_that_of_finite_differences(name):
    """Of one patch, of another, and of all pixels together."""
    local = double(name)
    grid = patches_of(local)
    given = random_gradients(local)
    found = _by_patch(local, grid, given, "plain").double()
    scale = _by_patch(local, grid, given, "frozen").double().abs().sum(1)
    strongest = int(found[0, 1:].abs().argmax())

    for cells in ([strongest], [grid.n_patches // 2], range(-1, grid.n_patches)):
        slope = slope_along(local, grid, list(cells), given)
        mine = found[:, [one + 1 for one in cells]].sum(1)
        assert bool(((slope - mine).abs() <= 1e-3 * scale).all()), cells
    # Pixtral's patches are normed without a bias before: along a patch's own pixels all is flat.
    flat = name in ("pixtral", "mistral3")
    assert bool((found.abs().sum(1) < 1e-3 * scale).all()) == flat


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "gemma3", "glm4v", "pixtral"])
def test_the_frozen_gradient_is_that_of_runs_with_its_patterns_and_scales(name):
    """Runs on other pixels, with the patterns and scales of the run on these put in."""
    local = double(name)
    grid = patches_of(local)
    given = random_gradients(local)
    found = _by_patch(local, grid, given, "frozen").double()
    decoder = set(local.loaded.model.get_decoder().modules())
    others = [m for m in local.loaded.model.modules() if m not in decoder]
    freezer = Freezer(local.loaded, others)
    with freezer.recording() as record:
        read_of_pixels(local, local.inputs["pixel_values"].double())
    assert record.norms
    for cell in (int(found[0, 1:].abs().argmax()), grid.n_patches // 2):
        slope = slope_along(local, grid, [cell], given, lambda: freezer.replaying(record))
        error = (slope - found[:, cell + 1]).abs()
        assert bool((error <= 1e-3 * found[:, 1:].abs().sum(1)).all()), (error, found[:, cell + 1])


def frozen_clip(local: LocalModel, pixels: torch.Tensor) -> torch.Tensor:
    """Image tokens [n, d] of the llava family with frozen patterns and scales, by hand."""
    weights = dict(local.loaded.model.named_parameters())

    def w(name: str) -> torch.Tensor:
        (found,) = [v for k, v in weights.items() if k.endswith(name)]
        return found

    def linear(h: torch.Tensor, name: str) -> torch.Tensor:
        return h @ w(f"{name}.weight").T + w(f"{name}.bias")

    def norm(h: torch.Tensor, name: str) -> torch.Tensor:
        centred = h - h.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt().detach()
        return centred * scale * w(f"{name}.weight") + w(f"{name}.bias")

    patches = pixels[0].unfold(1, 8, 8).unfold(2, 8, 8)  # [3, 4, 4, 8, 8]
    kernel = w("patch_embedding.weight")
    h = torch.einsum("crsij,dcij->rsd", patches, kernel).flatten(0, 1)
    h = torch.cat([w("class_embedding")[None], h]) + w("position_embedding.weight")
    h = norm(h, "pre_layrnorm")
    for layer in range(2):
        at = f"encoder.layers.{layer}"
        x = norm(h, f"{at}.layer_norm1")
        q, k, v = (linear(x, f"{at}.self_attn.{n}_proj").view(-1, 4, 8) for n in "qkv")
        pattern = (torch.einsum("qhe,khe->hqk", q, k) / 8**0.5).softmax(-1).detach()
        mixed = torch.einsum("hqk,khe->qhe", pattern, v).flatten(1)
        h = h + linear(mixed, f"{at}.self_attn.out_proj")
        inner = linear(norm(h, f"{at}.layer_norm2"), f"{at}.mlp.fc1")
        h = h + linear(inner * torch.sigmoid(1.702 * inner), f"{at}.mlp.fc2")
    made = linear(h[1:], "multi_modal_projector.linear_1")
    return linear(torch.nn.functional.gelu(made), "multi_modal_projector.linear_2")


def test_the_frozen_gradient_is_that_of_a_tower_written_by_hand():
    local = double("llava")
    grid = patches_of(local)
    pixels = local.inputs["pixel_values"].double().requires_grad_()
    tokens = frozen_clip(local, pixels)
    image = (local.input_ids == local.stack.image_token_id).nonzero()[:, 0]
    torch.testing.assert_close(tokens, local.embeddings[image])
    generator = torch.Generator().manual_seed(1)
    shape = (local.n_positions, 1, local.stack.d_model)
    given = torch.randn(shape, generator=generator, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((given[image, 0] * tokens).sum(), pixels)
    values = (gradient * pixels)[0].sum(0).detach()
    expected = values.view(4, 8, 4, 8).sum((1, 3)).flatten()
    found = _by_patch(local, grid, {EMBEDDINGS: given}, "frozen")[0]
    assert float(found[0]) == 0
    torch.testing.assert_close(found[1:].double(), expected, rtol=1e-5, atol=1e-6)
    plain = _by_patch(local, grid, {EMBEDDINGS: given}, "plain")[0]
    assert float((plain - found).abs().max()) > 0.01 * float(found.abs().max())


@pytest.mark.parametrize("name", VLMS)
def test_every_tower_can_be_frozen(name):
    """Frozen, the image tokens are what they are; so a gradient through them is of the same run."""
    from sparsify_vlm.graphs.pixels import embedded

    local = double(name)
    with embedded(local, "frozen") as (pixels, read):
        torch.testing.assert_close(read[EMBEDDINGS][0], local.embeddings, rtol=0, atol=1e-5)
        for place in local.injected:
            assert read[place].requires_grad
        (found,) = torch.autograd.grad(read[EMBEDDINGS].square().sum(), pixels)
    assert bool(found.any())


# ---- the gradient at the tokens


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llava", {}),
        ("gemma3", {"activation": "relu"}),
        ("qwen3_vl", {}),
        ("qwen2_5_vl", {"skip_connection": True}),
    ],
)
def test_over_tokens_it_adds_up_to_the_graphs_own_effects(name, options, monkeypatch):
    """With the identity in the place of the tower, tokens' effects and edges come out."""
    loaded = shared(name)
    model = VLMReplacementModel(loaded, random_coder(loaded, **options))
    local = LocalModel(model, one_prompt(loaded))
    targets = [3, Difference(3, 4)]
    graph = attribute(model, local, targets=targets)

    def tokens(local, grid, given, gradient):
        made = torch.einsum("std,sd->ts", given[EMBEDDINGS], local.embeddings.to(given[EMBEDDINGS]))
        for place, added in local.injected.items():
            made += torch.einsum("std,sd->ts", given[place], added.to(given[place]))
        return torch.nn.functional.pad(made, (1, 0)).float()

    monkeypatch.setattr("sparsify_vlm.graphs.pixels._by_patch", tokens)
    found = pixel_effects(local, graph, targets)
    torch.testing.assert_close(
        found.effects.double(), total_effects(graph)[:, graph.token_nodes], rtol=0, atol=2e-4
    )
    edges = graph.adjacency[graph.target_nodes, graph.token_nodes]
    torch.testing.assert_close(found.direct, edges, rtol=0, atol=1e-4)


# ---- the whole


def test_a_graph_keeps_its_patches(tmp_path):
    loaded = shared("gemma3")
    model = VLMReplacementModel(loaded, random_coder(loaded))
    local = LocalModel(model, one_prompt(loaded))
    graph = attribute(model, local, targets=[3, 4])
    graph.pixels = pixel_effects(local, graph)
    assert graph.pixels.grids.tolist() == [[4, 4]]  # of 2 × 2 image tokens
    graph.save(tmp_path)
    again = AttributionGraph.load(tmp_path)
    assert again.pixels is not None
    for field in ("effects", "direct", "outside", "grids"):
        assert torch.equal(getattr(again.pixels, field), getattr(graph.pixels, field))
    assert again.pixels.gradient == "frozen"
    assert again.info == {k: v for k, v in graph.info.items() if k != "patch_gradient"}
    assert torch.equal(again.pixels.table().flatten(1), graph.pixels.effects)
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "graph.safetensors")
    tensors["pixel_grids"] += 1
    save_file(tensors, tmp_path / "graph.safetensors")
    with pytest.raises(UserError, match="'pixel_grids' does not fit"):
        AttributionGraph.load(tmp_path)
    del tensors["pixel_grids"]
    save_file(tensors, tmp_path / "graph.safetensors")
    with pytest.raises(UserError, match="'pixel_grids' is missing"):
        AttributionGraph.load(tmp_path)


def test_targets_that_are_no_tokens_must_be_given_again():
    loaded = shared("llava")
    model = VLMReplacementModel(loaded, random_coder(loaded))
    local = LocalModel(model, one_prompt(loaded))
    graph = attribute(model, local, targets=[Difference(3, 4)])
    with pytest.raises(UserError, match="targets that are no tokens"):
        pixel_effects(local, graph)
    with pytest.raises(UserError, match="2 targets for a graph with 1"):
        pixel_effects(local, graph, [3, 4])
