"""Total effects: autograd through the local replacement model, and sums over all paths by hand."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from families import shared
from prompts import one_prompt, random_coder
from reference_graphs import CASES, inputs, model

from sparsify_vlm.coders import Latents
from sparsify_vlm.graphs import Difference, attribute
from sparsify_vlm.graphs.effects import PatchGrid, patch_grid, total_effects
from sparsify_vlm.replacement import LocalModel, VLMReplacementModel
from sparsify_vlm.replacement.local import run


def gradient_times_input(
    replaced: VLMReplacementModel, prompt: dict, directions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of `directions` [targets, V] of the logits at the last position, with respect to tokens
    [targets, S] and errors [targets, L·S], features being recomputed."""
    local = LocalModel(replaced, prompt)
    clt, zeroed = replaced.clt, local.zeroed
    embeddings = local.embeddings[None].clone().requires_grad_()
    errors = local.errors.clone().requires_grad_()
    biases = local._rest - local.errors
    latents: list[Latents | None] = [None] * clt.cfg.n_layers
    reads: list[torch.Tensor | None] = [None] * clt.cfg.n_layers

    def write(layer: int, x: torch.Tensor) -> torch.Tensor:
        made = clt.encode_layer(layer, x[0])
        values = made.values.masked_fill(zeroed[:, None], 0)
        latents[layer], reads[layer] = Latents(values, made.indices), x[0]
        y_hat = clt.decode_target(layer, latents, reads)
        return (y_hat + errors[layer] + biases[layer])[None]

    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(local.freezer.replaying(local.record))
        stack.enter_context(replaced.loaded.stack.replacing(write, replaced.input_site))
        ids = prompt["input_ids"]
        out = run(replaced.loaded, {"input_ids": ids, "inputs_embeds": embeddings})
    torch.testing.assert_close(out.logits[0], local.logits, rtol=0, atol=1e-4)
    of_tokens, of_errors = [], []
    for direction in directions:
        at = (out.logits[0, -1] * direction).sum()
        got = torch.autograd.grad(at, (embeddings, errors), retain_graph=True)
        of_tokens.append((got[0] * embeddings)[0].sum(-1))
        of_errors.append((got[1] * errors).sum(-1).flatten())
    return torch.stack(of_tokens).detach(), torch.stack(of_errors).detach()


@pytest.mark.parametrize("case", CASES)
def test_autograd_through_recomputed_features(case):
    graph = attribute(model(case), inputs(case))
    vocabulary = len(graph.logits)
    directions = torch.eye(vocabulary)[graph.logit_token_ids] - 1 / vocabulary
    tokens, errors = gradient_times_input(model(case), inputs(case), directions)
    found = total_effects(graph).float()
    torch.testing.assert_close(found[:, graph.token_nodes], tokens, rtol=0, atol=1e-4)
    torch.testing.assert_close(found[:, graph.errors], errors, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "exact"),
    [
        ({}, True),
        ({"post_encoder_scale": True}, True),
        ({"train_post_encoder": True}, False),
        ({"skip_connection": True}, True),
    ],
)
def test_effects_of_errors_by_autograd_for_variants_of_coders(options, exact):
    """Only a post-encoder bias makes total effects an approximation, as documented."""
    loaded = shared("llama")
    replaced = VLMReplacementModel(loaded, random_coder(loaded, activation="relu", **options))
    prompt = one_prompt(loaded)
    graph = attribute(replaced, prompt)
    vocabulary = len(graph.logits)
    directions = torch.eye(vocabulary)[graph.logit_token_ids] - 1 / vocabulary
    tokens, errors = gradient_times_input(replaced, prompt, directions)
    effects = total_effects(graph).float()
    found = torch.cat([effects[:, graph.token_nodes], effects[:, graph.errors]], 1)
    expected = torch.cat([tokens, errors], 1)
    assert bool((found - expected).abs().max() < 1e-4 * expected.abs().max()) == exact


def test_sums_over_paths_in_a_loop():
    graph = attribute(model("llama_relu"), inputs("llama_relu"), targets=[7, Difference(7, 9)])
    A, n = graph.adjacency.double(), graph.n_features
    a = graph.activation_values.double()
    expected = A[graph.target_nodes].clone()
    step = expected
    while bool(step.any()):
        step = (step[:, :n] / a) @ A[:n]
        expected += step
    found = total_effects(graph)
    assert torch.equal(found[:, graph.target_nodes], torch.eye(2, dtype=torch.float64))
    found[:, graph.target_nodes] = 0
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_effects_of_a_graph_of_chosen_features():
    chosen = attribute(model("llama_relu"), inputs("llama_relu"), max_feature_nodes=40)
    found = total_effects(chosen)
    assert found.shape == (len(chosen.logit_token_ids), chosen.n_nodes)
    assert bool(found.isfinite().all())


def test_patches_are_summed_where_they_lie():
    grid = PatchGrid(
        2, 2, torch.tensor([1, 2, 3, 4]), torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1])
    )
    made = grid.of(torch.tensor([9.0, 1.0, 2.0, 3.0, 4.0, 9.0]))
    assert made.tolist() == [[1, 2], [0, 7]]


def test_a_prompt_without_images_has_no_grid():
    graph = attribute(model("llama_relu"), inputs("llama_relu"))
    grid = patch_grid(graph, 0)
    assert (grid.rows, grid.columns) == (0, 0)
    assert grid.of(torch.ones(12)).shape == (0, 0)
