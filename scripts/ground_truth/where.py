"""Does a traced answer lead to the object that was asked about? Values of the nine grid cells."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ground_truth.scenes import Case, Scenes
from sparsify_vlm import AttributionGraph, attribute
from sparsify_vlm.data.shapes import GRID
from sparsify_vlm.graphs.effects import patch_grid, total_effects
from sparsify_vlm.graphs.influence import influence
from sparsify_vlm.graphs.pixels import pixel_effects
from sparsify_vlm.models.pixels import pixel_grid
from sparsify_vlm.replacement import LocalModel

MEANS = 200
"""Scenes over which image tokens are averaged."""
WHERE = {
    "effect": "signed total effect through the local replacement model",
    "influence": "influence (absolute, normalised)",
    "pruned_effect": "pruned graph (0.8 / 0.98): signed total effect",
    "pruned_influence": "pruned graph: influence",
    "patches": "`--patches`: total effect of pixels, frozen vision tower",
    "patches_plain": "`--patches --patch_gradient plain`",
    "gradient": "gradient × input on the plain model",
    "pixel_gradient": "gradient × pixels on the plain model",
    "ablation": "ablating a cell's image tokens (causal ceiling)",
}


class Where:
    """Sums over the image tokens of each cell, by the graph and by other methods."""

    def __init__(self, scenes: Scenes, nodes: int) -> None:
        self.scenes, self.nodes = scenes, nodes
        self.means = self._means()

    def measure(self, case: Case) -> dict[str, Any]:
        """By method: values of the nine cells; and the asked one."""
        wanted = [self.scenes.tokens[case.colour]]
        local = LocalModel(self.scenes.model, case.inputs)
        graph = attribute(self.scenes.model, local, targets=wanted, max_feature_nodes=self.nodes)
        pruned = replace(graph, edges=_kept(graph))
        by_token = {
            "effect": total_effects(graph)[0, graph.token_nodes],
            "influence": graph.node_influence()[graph.token_nodes],
            "pruned_effect": total_effects(pruned)[0, graph.token_nodes],
            "pruned_influence": influence(pruned.edges, graph.weights)[graph.token_nodes],
            "patches": self._at_tokens(case, pixel_effects(local, graph).effects[0]),
            "patches_plain": self._at_tokens(
                case, pixel_effects(local, graph, gradient="plain").effects[0]
            ),
            "gradient": self._gradient(case),
            "pixel_gradient": self._pixel_gradient(case),
        }
        values = {name: cell_sums(graph, v).tolist() for name, v in by_token.items()}
        values["ablation"], flips = self._ablation(case)
        grid = patch_grid(graph, 0).of(by_token["effect"]).flatten()
        patch_hit = int(cell_of_patch().flatten()[int(grid.argmax())]) == case.cell
        return {
            "cell": case.cell,
            "n_objects": len(case.scene.objects),
            "other_cells": [o.cell for o in case.scene.objects if o.cell != case.cell],
            "values": values,
            "best_patch_in_cell": patch_hit,
            "ablation_flips": flips,
        }

    def _means(self) -> Tensor:
        """Mean image token [36, d] by place."""
        total = 0
        for i in range(MEANS):
            case = self.scenes.case(self.scenes.rows.scene(i), "what colour is the circle?", 0)
            total = total + self.scenes.embedded(case.inputs)[self._image(case)]
        return total / MEANS  # type: ignore[operator]

    def _image(self, case: Case) -> Tensor:
        return (case.inputs["input_ids"][0] == self.scenes.loaded.config.image_token_id).nonzero()[
            :, 0
        ]

    def _after(self, case: Case, embeddings: Tensor) -> Tensor:
        """The answer's logits over the mean [n], for embeddings [n, S, d]."""
        logits = self.scenes.loaded.model(inputs_embeds=embeddings, use_cache=False).logits[:, -1]
        return logits[:, self.scenes.tokens[case.colour]] - logits.mean(-1)

    def _gradient(self, case: Case) -> Tensor:
        embeddings = self.scenes.embedded(case.inputs)[None].requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(self._after(case, embeddings).sum(), embeddings)
        return (gradient * embeddings)[0].sum(-1).detach()

    def _pixel_gradient(self, case: Case) -> Tensor:
        pixels = case.inputs["pixel_values"].clone().requires_grad_()
        with torch.enable_grad():
            logits = self.scenes.loaded.model(**case.inputs | {"pixel_values": pixels}).logits[
                0, -1
            ]
            wanted = logits[self.scenes.tokens[case.colour]] - logits.mean()
            (gradient,) = torch.autograd.grad(wanted, pixels)
        grid = pixel_grid(self.scenes.loaded.stack.layout, case.inputs)
        return self._at_tokens(case, grid.sums((gradient * pixels).detach())[0])

    def _at_tokens(self, case: Case, patches: Tensor) -> Tensor:
        """Values [S] of the patches' own tokens: in this model each patch is one."""
        values = torch.zeros(case.inputs["input_ids"].shape[1])
        values[self._image(case)] = patches
        return values

    @torch.no_grad()
    def _ablation(self, case: Case) -> tuple[list[float], bool]:
        """What the answer loses [9] without each cell; whether it changes without the asked one."""
        plain, image = self.scenes.embedded(case.inputs), self._image(case)
        changed = plain.repeat(GRID * GRID, 1, 1)
        cells = cell_of_patch().flatten()
        for cell in range(GRID * GRID):
            here = cells == cell
            changed[cell, image[here]] = self.means[here]
        lost = self._after(case, plain[None]) - self._after(case, changed)
        out = self.scenes.loaded.model(inputs_embeds=changed[case.cell][None], use_cache=False)
        return lost.tolist(), self.scenes.says(out.logits[0, -1]) != case.colour


def _kept(graph: AttributionGraph) -> Any:
    """The edges of the pruned graph."""
    keys = graph.edges.target * graph.n_nodes + graph.edges.source
    kept = graph.prune().edges
    return graph.edges.at(torch.isin(keys, kept[:, 0] * graph.n_nodes + kept[:, 1]))


def cell_of_patch() -> Tensor:
    """[6, 6]: the grid cell of each patch."""
    cells = torch.arange(GRID * GRID).view(GRID, GRID)
    return cells.repeat_interleave(2, 0).repeat_interleave(2, 1)


def cell_sums(graph: AttributionGraph, values: Tensor) -> Tensor:
    """Sums [9] over the image tokens of each cell of `values` [S]."""
    grid = patch_grid(graph, 0).of(values.double())
    return grid.view(GRID, 2, GRID, 2).sum((1, 3)).flatten()
