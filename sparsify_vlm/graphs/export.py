"""A graph as the JSON that circuit-tracer's frontend and Neuronpedia read, pruned.

    GRAPH_DIR/<slug>.json           metadata, qParams, nodes, links
    GRAPH_DIR/graph-metadata.json   the metadata of all graphs in the folder
    GRAPH_DIR/image-0.png …         the pictures, as the patch grid lies on them
    GRAPH_DIR/examples.json         examples of features, where given

Nodes have circuit-tracer's ids, `{layer}_{index}_{position}` for features, but for errors,
`e_{layer}_{position}`: there `{layer}_{position}_{position}` is also the id of a feature. What
other readers do not know (the patch grid, roles, total effects of patches) stands in `metadata.vlm`
and in fields of the nodes that they pass over. docs/tracing.md has the table.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsify_vlm import __version__
from sparsify_vlm.errors import UserError
from sparsify_vlm.files import write_atomically, write_json
from sparsify_vlm.graphs.effects import patch_grid, total_effects
from sparsify_vlm.graphs.graph import AttributionGraph, PixelEffects
from sparsify_vlm.models import Role

if TYPE_CHECKING:
    from PIL.Image import Image

FORMAT, VERSION = "sparsify-vlm graph", 1
EXAMPLES_FORMAT = "sparsify-vlm examples"
METADATA, EXAMPLES = "graph-metadata.json", "examples.json"
RESERVED = ("graph", "graph-metadata", "examples", "marks", "verify", "inputs")
"""Files of a graph folder that no slug may overwrite."""

LISTED = (
    "slug",
    "scan",
    "transcoder_list",
    "prompt_tokens",
    "prompt",
    "node_threshold",
    "schema_version",
)
"""Fields of a graph's metadata that `graph-metadata.json` repeats."""

_SLUG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SLUG_LENGTH = 60


@dataclass
class Story:
    """What a graph's tensors do not say.

    Attributes:
        question, answer: as asked, and the model's likeliest token.
        clt: name or folder of the coder.
        pictures: one per image of the prompt, RGB, covered by its patch grid.
        labels: text by feature id (`{layer}_{index}`).
        examples: JSON-able examples by feature id.
    """

    question: str = ""
    answer: str = ""
    clt: str = ""
    pictures: Sequence[Image] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    examples: Mapping[str, Any] = field(default_factory=dict)


def export_graph(
    graph: AttributionGraph,
    folder: str | Path,
    slug: str,
    story: Story | None = None,
    *,
    scan: str | None = None,
    node_threshold: float = 0.8,
    edge_threshold: float = 0.98,
) -> Path:
    """Write the graph, pruned, into `folder`; returns the path of `<slug>.json`.

    `scan` is the model's name at Neuronpedia (default: the last part of the model's own). Pictures
    of a model whose image tokens have no known places get grids without rows. Raises `UserError`
    for a slug that cannot be a file's name, and where pictures and images differ in number.
    """
    folder, story = Path(folder), story or Story()
    check_slug(slug)
    n_images = int(graph.images.max()) + 1
    if story.pictures and n_images and len(story.pictures) != n_images:
        raise UserError(f"{len(story.pictures)} pictures for a prompt with {n_images} images")
    kept = graph.prune(node_threshold, edge_threshold)
    ids = node_ids(graph)
    metadata = _metadata(graph, slug, scan or _scan(graph), node_threshold, edge_threshold)
    metadata["vlm"] = _vlm(graph, story, ids)
    made = {
        "metadata": metadata,
        "qParams": {
            "pinnedIds": [],
            "supernodes": [],
            "linkType": "both",
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": _nodes(graph, ids, kept.node_mask, kept.edges, kept.cumulative, story.labels),
        "links": _links(graph, ids, kept.edges),
    }
    for i, picture in enumerate(story.pictures):
        write_atomically(folder / _picture(i), lambda path, p=picture: p.save(path, "PNG"))  # type: ignore[misc]
    if story.examples:
        here = examples_of(graph, story.examples)
        write_json(folder / EXAMPLES, {"format": EXAMPLES_FORMAT, "version": 1, "features": here})
    path = folder / f"{slug}.json"
    write_json(path, made)
    _list(folder / METADATA, {name: metadata[name] for name in LISTED})
    return path


def examples_of(graph: AttributionGraph, examples: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `examples` by feature id that are of feature nodes."""
    features = {f"{layer}_{index}" for layer, _, index in graph.features.tolist()}
    return {k: v for k, v in examples.items() if k in features}


# ---- names


def slug_of(*texts: str) -> str:
    """A slug of words: letters and digits of `texts`, lower case, with dashes between."""
    words = re.findall(r"[a-z0-9]+", " ".join(texts).lower())
    made = ""
    for word in words:
        if len(made) + len(word) >= _SLUG_LENGTH:
            break
        made += f"-{word}" if made else word
    made = made or "trace"
    return f"{made}-trace" if made in RESERVED else made


def check_slug(slug: str) -> None:
    """Raise `UserError` unless `<slug>.json` is a file of its own in any folder."""
    if not _SLUG.fullmatch(slug):
        raise UserError(
            f"--slug '{slug}': up to 100 letters, digits, '-', '_' and '.', the first a letter or "
            "digit"
        )
    if slug.lower() in RESERVED:
        raise UserError(f"--slug '{slug}' is the name of another file of a graph folder")


def node_ids(graph: AttributionGraph) -> list[str]:
    """The id of every node [N]."""
    S, vocabulary = graph.n_positions, len(graph.logits)
    ids = [f"{layer}_{index}_{position}" for layer, position, index in graph.features.tolist()]
    ids += [f"e_{layer}_{position}" for layer in range(graph.n_layers) for position in range(S)]
    ids += [f"E_{token}_{position}" for position, token in enumerate(graph.input_ids.tolist())]
    seen: set[int] = set()
    for i, token in enumerate(graph.logit_token_ids.tolist()):
        # circuit-tracer numbers targets that are no token from the end of the vocabulary on
        number = vocabulary + i if token < 0 or token in seen else token
        seen.add(number)
        ids.append(f"{graph.n_layers + 1}_{number}_{S - 1}")
    return ids


def feature_number(layer: int, index: int) -> int:
    """Cantor's number of the pair, by which frontends ask for a feature's page."""
    return (layer + index) * (layer + index + 1) // 2 + index


def _picture(i: int) -> str:
    return f"image-{i}.png"


def _scan(graph: AttributionGraph) -> str:
    return str(graph.info.get("model", "")).rstrip("/").rsplit("/", 1)[-1]


# ---- metadata


def _metadata(
    graph: AttributionGraph, slug: str, scan: str, node_threshold: float, edge_threshold: float
) -> dict[str, Any]:
    return {
        "slug": slug,
        "scan": scan,
        "transcoder_list": [],
        "prompt_tokens": graph.tokens,
        "prompt": str(graph.info.get("prompt", "".join(graph.tokens))),
        "node_threshold": node_threshold,
        "schema_version": 1,
        "info": {"generator": {"name": "sparsify-vlm", "version": __version__}},
        "pruning_settings": {"node_threshold": node_threshold, "edge_threshold": edge_threshold},
    }


def _vlm(graph: AttributionGraph, story: Story, ids: list[str]) -> dict[str, Any]:
    scores = graph.scores()
    effects = total_effects(graph)[:, graph.token_nodes]
    n_images = max(int(graph.images.max()) + 1, len(story.pictures))
    grids = [patch_grid(graph, i) for i in range(n_images)]
    pixels = {} if graph.pixels is None else _pixels(graph.pixels, ids[graph.target_nodes])
    return pixels | {
        "format": FORMAT,
        "version": VERSION,
        "question": story.question,
        "answer": story.answer,
        "model": graph.info.get("model", ""),
        "clt": story.clt,
        "images": [
            {
                "file": _picture(i) if story.pictures else None,
                "rows": grid.rows,
                "columns": grid.columns,
            }
            for i, grid in enumerate(grids)
        ],
        "n_layers": graph.n_layers,
        "tokens": [
            {
                "text": text,
                "role": _role(graph, position),
                "image": int(graph.images[position]),
                "patch": _patch(graph, position),
            }
            for position, text in enumerate(graph.tokens)
        ],
        "scores": {
            "replacement": scores.replacement,
            "completeness": scores.completeness,
            "mean_path_length": scores.mean_path_length,
            "path_lengths": scores.path_lengths,
            "from_images": scores.image,
            "from_words": scores.words,
            "from_errors": scores.errors,
        },
        "patch_effects": [
            {"target": target, "image": i, "values": grid.of(effects[row]).tolist()}
            for row, target in enumerate(ids[graph.target_nodes])
            for i, grid in enumerate(grids)
        ],
    }


def _pixels(pixels: PixelEffects, targets: list[str]) -> dict[str, Any]:
    """What patches of pixels add; their grids are other than those of the image tokens."""
    tables = [pixels.table(i) for i in range(len(pixels.grids))]
    return {
        "patch_gradient": pixels.gradient,
        "pixel_effects": [
            {"target": target, "image": i, "values": table[row].tolist()}
            for row, target in enumerate(targets)
            for i, table in enumerate(tables)
        ],
    }


def _role(graph: AttributionGraph, position: int) -> str:
    return Role(int(graph.roles[position])).name.lower()


def _patch(graph: AttributionGraph, position: int) -> list[int] | None:
    row, column = graph.patches[position].tolist()
    return [row, column] if row >= 0 else None


def _list(path: Path, metadata: dict[str, Any]) -> None:
    """Put a graph among those of its folder, in the place of one with the same slug."""
    listed: list[Any] = []
    if path.is_file():
        try:
            listed = json.loads(path.read_text(encoding="utf-8"))["graphs"]
            listed = [one for one in listed if one["slug"] != metadata["slug"]]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged: remove it, or write to another folder") from error
    write_json(path, {"graphs": [*listed, metadata]})


# ---- nodes and links


def _nodes(
    graph: AttributionGraph,
    ids: list[str],
    mask: Tensor,
    edges: Tensor,
    cumulative: Tensor,
    labels: Mapping[str, str],
) -> list[dict[str, Any]]:
    """The nodes that were kept; of features and errors, those with an edge."""
    used = torch.zeros_like(mask)
    used[edges.flatten()] = True
    used[graph.token_nodes.start :] = True
    made = []
    for node in (mask & used).nonzero()[:, 0].tolist():
        one = _node(graph, ids[node], node, labels)
        share = float(cumulative[node])
        is_target = node >= graph.target_nodes.start
        one["influence"] = None if is_target or not math.isfinite(share) else share
        made.append(one)
    return made


def _node(graph: AttributionGraph, id: str, node: int, labels: Mapping[str, str]) -> dict[str, Any]:
    S = graph.n_positions
    own: dict[str, Any]
    if node < graph.n_features:
        layer, position, index = graph.features[node].tolist()
        own = {
            "feature": feature_number(layer, index),
            "layer": str(layer),
            "feature_type": "cross layer transcoder",
            "jsNodeId": f"{layer}_{index}-0",
            "clerp": labels.get(f"{layer}_{index}", ""),
            "activation": float(graph.activation_values[graph.selected_features[node]]),
        }
    elif node < graph.errors.stop:
        layer, position = divmod(node - graph.errors.start, S)
        own = {
            "feature": -1,
            "layer": str(layer),
            "feature_type": "mlp reconstruction error",
            "jsNodeId": f"e_{layer}-{position}",
        }
    elif node < graph.token_nodes.stop:
        position = node - graph.token_nodes.start
        own = {
            "feature": position,
            "layer": "E",
            "feature_type": "embedding",
            "jsNodeId": f"E_{int(graph.input_ids[position])}-{position}",
        }
    else:
        position, own = S - 1, _target(graph, id, node - graph.target_nodes.start)
    plain = {
        "node_id": id,
        "ctx_idx": position,
        "token_prob": 0.0,
        "is_target_logit": False,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "clerp": "",
        "activation": None,
        "role": _role(graph, position),
    }
    if graph.images[position] >= 0:
        plain |= {"image": int(graph.images[position]), "patch": _patch(graph, position)}
    return plain | own


def _target(graph: AttributionGraph, id: str, place: int) -> dict[str, Any]:
    number, label = int(id.split("_")[1]), graph.target_labels[place]
    is_token = int(graph.logit_token_ids[place]) >= 0
    probability = float(graph.logit_probabilities[place]) if is_token else 0.0
    return {
        "feature": number,
        "layer": str(graph.n_layers + 1),
        "feature_type": "logit",
        "jsNodeId": f"L_{number}-{graph.n_positions - 1}",
        "clerp": f'Output "{label}" (p={probability:.3f})' if is_token else f'Target "{label}"',
        "token_prob": probability,
        "is_target_logit": place == 0,
    }


def _links(graph: AttributionGraph, ids: list[str], kept: Tensor) -> list[dict[str, Any]]:
    """The edges that were kept, by target, then source."""
    n = graph.n_nodes
    keys = graph.edges.target * n + graph.edges.source
    places = torch.searchsorted(keys, kept[:, 0] * n + kept[:, 1])
    weights = graph.edges.weight[places].tolist()
    return [
        {"source": ids[source], "target": ids[target], "weight": weight}
        for (target, source), weight in zip(kept.tolist(), weights, strict=True)
    ]
