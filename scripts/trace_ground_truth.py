"""Does a traced answer lead to the object that was asked about? Measured on scenes that are known.

    python scripts/trace_ground_truth.py --output_dir runs/ground-truth          # trains its coder
    python scripts/trace_ground_truth.py --clt checkpoints/t --scenes 200 --swaps 100

Held-out scenes with two objects or more, "what colour is the <shape>?" answered rightly by
tiny-llava. Where: the share of scenes in which the asked object's grid cell has the largest sum
over its image tokens, by the graph's signed total effects and influences, by gradient × input, and
by replacing a cell's image tokens by their means over scenes.

Swaps: the asked object is given a colour that is not in the scene. In the unchanged model, which
sees the first picture, features take on the values they have on the second: those for which the
graph of the first scene, or of either, predicts the largest change (target: second colour minus
first), or as many random active ones, or random others of the same layers and positions. The share
of scenes in which the answer becomes the second colour. Prints Markdown tables with Wilson's
95 % intervals.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify_vlm import AttributionGraph, Intervention, VLMReplacementModel, attribute
from sparsify_vlm.data.config import DataConfig
from sparsify_vlm.data.encoding import encode
from sparsify_vlm.data.images import ImageRef
from sparsify_vlm.data.rows import Sample, Turn
from sparsify_vlm.data.shapes import COLOURS, GRID, Scene, ShapesDataset, render
from sparsify_vlm.graphs import Difference
from sparsify_vlm.graphs.effects import patch_grid, total_effects
from sparsify_vlm.graphs.influence import influence
from sparsify_vlm.graphs.pixels import pixel_effects
from sparsify_vlm.models.pixels import pixel_grid
from sparsify_vlm.replacement import LocalModel
from sparsify_vlm.training import CoderConfig, RunConfig, TrainConfig, train

MODEL, LATENTS, K, LAYERS = "tiny-llava", 768, 16, 8
SWAPPED = (5, 10, 25)
"""Features of each scene that are swapped together."""
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

ARMS = {
    "own": "{n} largest of this scene's graph",
    "own-random": "{n} random active ones of this scene",
    "each": "{n} largest of each scene's graph",
    "each-random": "{n} random active ones of each scene",
    "each-beside": "as many random others of the same layers and positions (for {n} of each)",
}


def main() -> None:
    """Train or load the coder, then measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clt", default=None, help="a coder of tiny-llava; default: train one")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/ground-truth"))
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--swaps", type=int, default=100, help="of those scenes, with swaps")
    parser.add_argument("--steps", type=int, default=300, help="training steps of the coder")
    parser.add_argument("--nodes", type=int, default=1500, help="features that are nodes at most")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    model = VLMReplacementModel.from_pretrained(MODEL, args.clt or _trained(args))
    study = Study(model, args.nodes, args.seed)
    found: list[dict[str, Any]] = []
    start = time.monotonic()
    for case in study.cases():
        one = study.where(case)
        if len(found) < args.swaps:
            one["swaps"] = study.swaps(case)
        found.append(one)
        if len(found) % 10 == 0:
            print(f"{len(found)} scenes, {time.monotonic() - start:.0f} s", flush=True)
            (args.output_dir / "scenes.json").write_text(json.dumps(found))
        if len(found) == args.scenes:
            break
    (args.output_dir / "scenes.json").write_text(json.dumps(found))
    print(_tables(found, study))


def _trained(args: argparse.Namespace) -> Path:
    settings = TrainConfig(
        CoderConfig(transcode=True, cross_layer=LAYERS, num_latents=LATENTS, k=K),
        batch_size=64,
        max_steps=args.steps,
        epochs=1000,
        optimizer="adam",
        lr=2e-3,
        lr_warmup_steps=20,
        dead_feature_threshold=100_000,
        init_seeds=[args.seed],
        log_every=20,
        save_every=args.steps,
        save_dir=str(args.output_dir),
        run_name="clt",
        overwrite=True,
    )
    data = DataConfig(dataset="shapes", data_args="size=5000")
    return Path(train(settings, run=RunConfig(model=MODEL), data=data))


# ---- scenes


@dataclass
class Case:
    """A scene with its question, as the model takes it."""

    scene: Scene
    question: str
    asked: int
    inputs: dict[str, Tensor]

    @property
    def colour(self) -> str:
        """The right answer."""
        return self.scene.objects[self.asked].colour

    @property
    def cell(self) -> int:
        """Where the right answer is."""
        return self.scene.objects[self.asked].cell


class Study:
    """The model, and what is measured on each scene."""

    def __init__(self, model: VLMReplacementModel, nodes: int, seed: int) -> None:
        self.model, self.loaded, self.nodes = model, model.loaded, nodes
        self.random = random.Random(seed)
        self.tokens = {c: self._token(c) for c in COLOURS}
        self.seen: Counter[str] = Counter()
        self.rows = ShapesDataset("heldout", 10_000, types=("colour",))
        self.rgb = {o.colour: o.rgb for i in range(50) for o in self.rows.scene(i).objects}
        self.means = self._means()

    def _token(self, word: str) -> int:
        (id,) = self.loaded.tokenizer.encode(word, add_special_tokens=False)
        return id

    def _case(self, scene: Scene, question: str, asked: int) -> Case:
        image = ImageRef("scene", image=render(scene))
        sample = Sample("scene", (Turn("user", question, 1),), (image,))
        return Case(
            scene, question, asked, encode(self.loaded, [sample], 256, with_answer=False).inputs
        )

    def cases(self) -> Iterator[Case]:
        """Scenes of two objects or more whose question is answered rightly."""
        for i in range(len(self.rows)):
            scene, question = self.rows.scene(i), self.rows.question(i)
            if len(scene.objects) < 2:
                continue
            self.seen["asked"] += 1
            case = self._case(scene, question.text, question.asked[0])
            if self._says(self._logits(case.inputs)) == case.colour:
                self.seen["right"] += 1
                yield case

    def recoloured(self, case: Case) -> Case | None:
        """The scene with the asked object in a colour that is not there; None where the model does
        not see it so."""
        there = {o.colour for o in case.scene.objects}
        colour = self.random.choice([c for c in COLOURS if c not in there])
        objects = list(case.scene.objects)
        objects[case.asked] = replace(objects[case.asked], colour=colour, rgb=self.rgb[colour])
        other = self._case(replace(case.scene, objects=tuple(objects)), case.question, case.asked)
        return other if self._says(self._logits(other.inputs)) == colour else None

    # ---- the plain model

    @torch.no_grad()
    def _logits(self, inputs: dict[str, Tensor]) -> Tensor:
        logits: Tensor = self.loaded.forward(inputs).logits[0, -1]
        return logits

    def _says(self, logits: Tensor) -> str:
        return str(self.loaded.tokenizer.decode([int(logits.argmax())])).strip()

    @torch.no_grad()
    def _embedded(self, inputs: dict[str, Tensor]) -> Tensor:
        """What the first layer reads [S, d]."""
        out = self.loaded.model(**inputs, use_cache=False, output_hidden_states=True)
        states: Tensor = out.hidden_states[0][0]
        return states

    def _means(self) -> Tensor:
        """Mean image token [36, d] by place."""
        total = 0
        for i in range(MEANS):
            case = self._case(self.rows.scene(i), "what colour is the circle?", 0)
            total = total + self._embedded(case.inputs)[self._image(case)]
        return total / MEANS  # type: ignore[operator]

    def _image(self, case: Case) -> Tensor:
        return (case.inputs["input_ids"][0] == self.loaded.config.image_token_id).nonzero()[:, 0]

    def _after(self, case: Case, embeddings: Tensor) -> Tensor:
        """The answer's logits over the mean [n], for embeddings [n, S, d]."""
        logits = self.loaded.model(inputs_embeds=embeddings, use_cache=False).logits[:, -1]
        return logits[:, self.tokens[case.colour]] - logits.mean(-1)

    def _gradient(self, case: Case) -> Tensor:
        embeddings = self._embedded(case.inputs)[None].requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(self._after(case, embeddings).sum(), embeddings)
        return (gradient * embeddings)[0].sum(-1).detach()

    def _pixel_gradient(self, case: Case) -> Tensor:
        pixels = case.inputs["pixel_values"].clone().requires_grad_()
        with torch.enable_grad():
            logits = self.loaded.model(**case.inputs | {"pixel_values": pixels}).logits[0, -1]
            wanted = logits[self.tokens[case.colour]] - logits.mean()
            (gradient,) = torch.autograd.grad(wanted, pixels)
        grid = pixel_grid(self.loaded.stack.layout, case.inputs)
        return self._at_tokens(case, grid.sums((gradient * pixels).detach())[0])

    def _at_tokens(self, case: Case, patches: Tensor) -> Tensor:
        """Values [S] of the patches' own tokens: in this model each patch is one."""
        values = torch.zeros(case.inputs["input_ids"].shape[1])
        values[self._image(case)] = patches
        return values

    @torch.no_grad()
    def _ablation(self, case: Case) -> tuple[list[float], bool]:
        """What the answer loses [9] without each cell; whether it changes without the asked one."""
        plain, image = self._embedded(case.inputs), self._image(case)
        changed = plain.repeat(GRID * GRID, 1, 1)
        cells = cell_of_patch().flatten()
        for cell in range(GRID * GRID):
            here = cells == cell
            changed[cell, image[here]] = self.means[here]
        lost = self._after(case, plain[None]) - self._after(case, changed)
        out = self.loaded.model(inputs_embeds=changed[case.cell][None], use_cache=False)
        return lost.tolist(), self._says(out.logits[0, -1]) != case.colour

    # ---- where

    def where(self, case: Case) -> dict[str, Any]:
        """By method: values of the nine cells; and the asked one."""
        wanted = [self.tokens[case.colour]]
        local = LocalModel(self.model, case.inputs)
        graph = attribute(self.model, local, targets=wanted, max_feature_nodes=self.nodes)
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

    # ---- swaps

    def swaps(self, case: Case) -> dict[str, Any] | None:
        """What the model says, and how the difference of the two colours' logits moves, by which
        features took on the other scene's values."""
        other = self.recoloured(case)
        if other is None:
            return None
        difference = Difference(self.tokens[other.colour], self.tokens[case.colour])
        here, there = (
            attribute(self.model, inputs, targets=[difference], max_feature_nodes=self.nodes)
            for inputs in (case.inputs, other.inputs)
        )
        before, after = _activations(here), _activations(there)
        of_here = _predicted(here, before, after, 1.0)
        of_there = _predicted(there, after, before, -1.0)
        arms = {f"own-{SWAPPED[0]}": _largest(of_here, SWAPPED[0])}
        arms[f"own-random-{SWAPPED[0]}"] = self.random.sample(sorted(before), SWAPPED[0])
        for n in SWAPPED:
            top = list(dict.fromkeys(_largest(of_here, n) + _largest(of_there, n)))
            arms[f"each-{n}"] = top
            some = self.random.sample(sorted(before), n) + self.random.sample(sorted(after), n)
            arms[f"each-random-{n}"] = list(dict.fromkeys(some))
            near = {f[:2] for f in top}
            beside = [f for f in sorted(before | after) if f[:2] in near and f not in top]
            if len(beside) >= len(top):
                arms[f"each-beside-{n}"] = self.random.sample(beside, len(top))
        local = LocalModel(self.model, case.inputs)
        plain = self.model.intervene(local, [], "free").logits[-1]
        predicted = of_there | of_here
        made: dict[str, Any] = {"from": case.colour, "to": other.colour}
        for name, features in arms.items():
            changes = [Intervention(*f, after.get(f, 0.0)) for f in features]
            logits = self.model.intervene(local, changes, "free").logits[-1]
            moved = logits - plain
            made[name] = {
                "says": self._says(logits),
                "moved": float(moved[difference.plus] - moved[difference.minus]),
                "predicted": sum(predicted.get(f, 0.0) for f in features),
            }
        return made


Active = dict[tuple[int, int, int], float]
"""Activations by layer, position and index."""


def _activations(graph: AttributionGraph) -> Active:
    """All active features."""
    rows = graph.active_features.tolist()
    return dict(zip(map(tuple, rows), graph.activation_values.tolist(), strict=True))


def _largest(predicted: Active, n: int) -> list[tuple[int, int, int]]:
    """The n features for which most is predicted."""
    return sorted(predicted, key=lambda f: -predicted[f])[:n]


def _predicted(graph: AttributionGraph, own: Active, other: Active, sign: float) -> Active:
    """By feature node: its total effect on the target, times the share by which it changes on the
    way from `own` to `other` (with `sign` -1: from `other` to `own`)."""
    effects = total_effects(graph)[0, : graph.n_features].tolist()
    features = [tuple(f) for f in graph.features.tolist()]
    pairs = zip(features, effects, strict=True)
    return {f: sign * e * (other.get(f, 0.0) / own[f] - 1) for f, e in pairs}


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


# ---- tables


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95 % interval of a share."""
    z = 1.959964
    share, unit = hits / n, z * z / n
    middle = (share + unit / 2) / (1 + unit)
    half = z * math.sqrt(share * (1 - share) / n + unit / (4 * n)) / (1 + unit)
    return max(0.0, middle - half), min(1.0, middle + half)


def _share(hits: list[bool]) -> str:
    low, high = wilson(sum(hits), len(hits))
    return (
        f"{100 * sum(hits) / len(hits):.1f} % | {100 * low:.1f} to {100 * high:.1f} % | {len(hits)}"
    )


def _tables(found: list[dict[str, Any]], study: Study) -> str:
    def best(one: dict[str, Any], name: str) -> int:
        values = one["values"][name]
        return values.index(max(values))

    lines = [
        f"{study.seen['right']} of {study.seen['asked']} questions answered rightly; of these "
        f"{len(found)} traced.",
        "",
        "| largest on the asked object's cell | share | 95 % | scenes |",
        "|---|---|---|---|",
    ]
    for name, label in WHERE.items():
        lines.append(f"| {label} | {_share([best(one, name) == one['cell'] for one in found])} |")
    lines.append("| chance, any cell | 11.1 % | | |")
    chance = sum(1 / one["n_objects"] for one in found) / len(found)
    lines.append(f"| chance, a cell with an object | {100 * chance:.1f} % | | |")
    hits = [one["best_patch_in_cell"] for one in found]
    lines.append(f"| the one patch of the largest total effect is in the cell | {_share(hits)} |")
    hits = [one["ablation_flips"] for one in found]
    lines.append(f"| ablating the asked cell changes the answer | {_share(hits)} |")
    swaps = [one["swaps"] for one in found if one.get("swaps")]
    return "\n".join(lines + (_swap_lines(swaps) if swaps else []))


def _swap_lines(swaps: list[dict[str, Any]]) -> list[str]:
    lines = [
        "",
        "| features that take on the recoloured scene's values | it says that colour | 95 % | "
        "scenes | difference of logits moves by | predicted |",
        "|---|---|---|---|---|---|",
    ]
    names = [name for one in swaps for name in one if name not in ("from", "to")]
    for name in dict.fromkeys(names):
        kind, _, n = name.rpartition("-")
        rows = [(one["to"], one[name]) for one in swaps if name in one]
        turned = [row["says"] == to for to, row in rows]
        moved, predicted = (
            sum(row[key] for _, row in rows) / len(rows) for key in ("moved", "predicted")
        )
        label = ARMS[kind].format(n=n)
        lines.append(f"| {label} | {_share(turned)} | {moved:+.2f} | {predicted:+.2f} |")
    return lines


if __name__ == "__main__":
    main()
