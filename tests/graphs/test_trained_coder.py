"""Predictions with a coder that was trained as the demo's is, on the embedded model and a scene.

Every change is measured by running the model forwards with patterns, scales and all else that MLPs
write frozen; nothing of the backward pass that made the graph is in it.
"""

from __future__ import annotations

import pytest
import torch

from sparsify_vlm.coders import Clt, CltConfig, forward_backward
from sparsify_vlm.data.shapes import ShapesDataset
from sparsify_vlm.graphs import AttributionGraph, Feature, attribute
from sparsify_vlm.models import LoadedModel, Role, load_model
from sparsify_vlm.replacement import Intervention, LocalModel, VLMReplacementModel

LATENTS, K = 768, 16
SCENES, STEPS, TOKENS, LR = 24, 40, 128, 5e-3
SET, OTHERS, TOLERANCE = 200, 300, 3e-5


def prompt(loaded: LoadedModel, split: str, i: int) -> dict:
    """A scene with its question, as a processor's batch."""
    row = ShapesDataset(split, i + 1)[i]
    content = [{"type": "image"}, {"type": "text", "text": row["question"]}]
    text = loaded.processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    return dict(loaded.processor(images=row["image"], text=text, return_tensors="pt"))


def captured(loaded: LoadedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """What the MLPs of every layer read and write on training scenes, each [L, tokens, d]."""
    x: list[list[torch.Tensor]] = [[] for _ in loaded.stack.hookpoints]
    y: list[list[torch.Tensor]] = [[] for _ in loaded.stack.hookpoints]

    def keep(layer: int, read: torch.Tensor, written: torch.Tensor) -> None:
        x[layer].append(read[0])
        y[layer].append(written[0])

    with torch.no_grad(), loaded.stack.reading(keep, "mlp_in"):
        for i in range(SCENES):
            loaded.forward(prompt(loaded, "train", i))
    both = [torch.stack([torch.cat(part) for part in each]) for each in (x, y)]
    return both[0], both[1]


def trained(loaded: LoadedModel) -> Clt:
    """The demo's coder after a few steps: cross-layer, top-k, Adam."""
    hookpoints = loaded.stack.hookpoints
    cfg = CltConfig(
        loaded.stack.d_model, hookpoints, num_latents=LATENTS, k=K, n_targets=len(hookpoints)
    )
    clt, (x, y) = Clt(cfg), captured(loaded)
    generator = torch.Generator().manual_seed(0)
    clt.initialise(x.mean(1), y.mean(1))
    optimizer = torch.optim.Adam(clt.parameters(), lr=LR)
    for _ in range(STEPS):
        chosen = torch.randint(x.shape[1], (TOKENS,), generator=generator)
        optimizer.zero_grad()
        stats = forward_backward(clt, x[:, chosen], y[:, chosen])
        optimizer.step()
    assert float(stats.fvu.mean()) < 0.2  # it has learnt much of it
    return clt.requires_grad_(False)


@pytest.fixture(scope="module")
def traced() -> tuple[VLMReplacementModel, LocalModel, AttributionGraph]:
    """A held-out scene: all active features as nodes, and as targets all logits and the
    pre-activations of random latents, nearly all of them inactive."""
    loaded = load_model("tiny-llava", "cpu")
    model = VLMReplacementModel(loaded, trained(loaded))
    local = LocalModel(model, prompt(loaded, "heldout", 0))
    generator = torch.Generator().manual_seed(1)
    sizes = (local.n_layers, local.n_positions, LATENTS)
    places = [torch.randint(size, (OTHERS,), generator=generator).tolist() for size in sizes]
    others = [Feature(*place) for place in zip(*places, strict=True)]
    vocabulary = local.unembedded.shape[1]
    return model, local, attribute(model, local, targets=[*range(vocabulary), *others])


def test_features_set_to_0_change_everything_downstream_as_the_graph_says(traced):
    model, local, graph = traced
    n, vocabulary = graph.n_features, len(graph.logits)
    read = torch.tensor(
        [[int(part) for part in _numbers(text)] for text in graph.target_labels[vocabulary:]]
    )
    read = torch.cat([graph.features, read])
    chosen = torch.randperm(n, generator=torch.Generator().manual_seed(2))[:SET]
    at_image = (graph.roles == Role.IMAGE)[graph.features[chosen, 1]]
    assert SET // 5 < int(at_image.sum()) < SET
    plain = model.intervene(local, [])
    before, logits = plain.features(read), centred(plain.unembedded[-1])
    adjacency, worst, moved = graph.adjacency, 0.0, []
    for node in chosen.tolist():
        out = model.intervene(local, [Intervention(*graph.features[node].tolist(), 0.0)])
        found = torch.cat([out.features(read) - before, centred(out.unembedded[-1]) - logits])
        column = -adjacency[:, node]
        targets = column[graph.target_nodes]
        expected = torch.cat([column[:n], targets[vocabulary:], targets[:vocabulary]])
        worst = max(worst, float((found - expected).abs().max()))
        moved.append(float(expected.abs().max()))
    assert worst < TOLERANCE
    assert sum(each > 30 * TOLERANCE for each in moved) > SET // 2
    assert max(moved) > 1000 * TOLERANCE


def centred(logits: torch.Tensor) -> torch.Tensor:
    """Logits minus their mean: what targets are made of."""
    return logits - logits.mean()


def _numbers(label: str) -> list[str]:
    """Layer, position and index in "feature 3/41 at 7"."""
    layer, rest = label.removeprefix("feature ").split("/")
    index, position = rest.split(" at ")
    return [layer, position, index]
