"""A graph as a folder: `graph.safetensors` and `graph.json`, both with format and version.

Tensors have the names and shapes of `AttributionGraph`'s fields; the edges are three lists (target
and source nodes int32, weight float32), by target, then source. Metadata is JSON: the prompt's
tokens as text, the targets' labels, the scores, names of model and coder. docs/attribution.md has
the table.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify_vlm.errors import UserError
from sparsify_vlm.files import write_json, write_tensors
from sparsify_vlm.graphs.graph import AttributionGraph, PixelEffects
from sparsify_vlm.graphs.influence import Edges

FORMAT, VERSION = "sparsify-vlm graph", 1
TENSORS, METADATA = "graph.safetensors", "graph.json"

_SHAPES: dict[str, tuple[str | int, ...]] = {
    "active_features": ("active", 3),
    "activation_values": ("active",),
    "selected_features": ("selected",),
    "edge_target": ("edges",),
    "edge_source": ("edges",),
    "edge_weight": ("edges",),
    "logit_token_ids": ("targets",),
    "logit_probabilities": ("targets",),
    "error_vectors": ("layers", "positions", "d_model"),
    "logits": ("vocabulary",),
    "input_ids": ("positions",),
    "roles": ("positions",),
    "patches": ("positions", 2),
    "images": ("positions",),
    "zeroed": ("positions",),
}
"""Every tensor with its sizes; a name stands for one number throughout the file."""

_PIXELS: dict[str, tuple[str | int, ...]] = {
    "pixel_effects": ("targets", "pixel_patches"),
    "pixel_direct": ("targets", "pixel_patches"),
    "pixel_outside": ("targets",),
    "pixel_grids": ("pictures", 2),
}
"""The same for tensors that are there together or not at all."""
_FIELD = len("pixel_")

_EDGES = ("edge_target", "edge_source", "edge_weight")


def save(graph: AttributionGraph, folder: Path) -> Path:
    """Write the folder; each file is replaced atomically, the metadata last."""
    edges = graph.edges
    tensors = {k: getattr(graph, k) for k in _SHAPES if k not in _EDGES}
    tensors["edge_target"] = edges.target.to(torch.int32)
    tensors["edge_source"] = edges.source.to(torch.int32)
    tensors["edge_weight"] = edges.weight
    info = dict(graph.info)
    if graph.pixels is not None:
        tensors |= {k: getattr(graph.pixels, k[_FIELD:]) for k in _PIXELS}
        info["patch_gradient"] = graph.pixels.gradient
    write_tensors(folder / TENSORS, tensors, {"format": FORMAT, "version": str(VERSION)})
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "n_nodes": graph.n_nodes,
        "tokens": graph.tokens,
        "targets": graph.target_labels,
        "scores": asdict(graph.scores()),
        **info,
    }
    write_json(folder / METADATA, metadata)
    return folder


def load(folder: Path) -> AttributionGraph:
    """Read the folder. Raises `UserError`, naming the file, if anything in it does not fit."""
    metadata = _metadata(folder / METADATA)
    tensors = _tensors(folder / TENSORS)
    sizes = _sizes(folder / TENSORS, tensors)
    n = sizes["selected"] + sizes["positions"] * (sizes["layers"] + 1) + sizes["targets"]
    _check_contents(folder, tensors, metadata, sizes, n)
    edges = Edges(
        tensors["edge_target"].long(), tensors["edge_source"].long(), tensors["edge_weight"], n
    )
    known = ("format", "version", "n_nodes", "tokens", "targets", "scores", "patch_gradient")
    return AttributionGraph(
        edges=edges,
        tokens=metadata["tokens"],
        target_labels=metadata["targets"],
        info={k: v for k, v in metadata.items() if k not in known},
        pixels=_pixels(tensors, metadata),
        **{k: tensors[k] for k in _SHAPES if k not in _EDGES},
    )


def _pixels(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> PixelEffects | None:
    if "pixel_effects" not in tensors:
        return None
    fields: dict[str, Any] = {k[_FIELD:]: tensors[k] for k in _PIXELS}
    return PixelEffects(**fields, gradient=str(metadata.get("patch_gradient", "")))


def _metadata(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; a graph is a folder with {METADATA} and {TENSORS}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged: not readable as JSON") from error
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise UserError(f"{path} is no attribution graph of this program")
    if value.get("version") != VERSION:
        raise UserError(
            f"{path} has version {value.get('version')}, this program reads {VERSION}: update it"
        )
    for key in ("tokens", "targets"):
        if not isinstance(value.get(key), list) or not all(isinstance(t, str) for t in value[key]):
            raise UserError(f"{path} is damaged: '{key}' is no list of texts")
    return value


def _tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise UserError(f"{path}: no such file, the graph is not complete")
    try:
        tensors = load_file(str(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: not readable as safetensors") from error
    wanted = [*_SHAPES, *(_PIXELS if _PIXELS.keys() & tensors.keys() else ())]
    if missing := [name for name in wanted if name not in tensors]:
        raise UserError(f"{path} is damaged: '{missing[0]}' is missing")
    return tensors


def _sizes(path: Path, tensors: dict[str, Tensor]) -> dict[str, int]:
    """The number behind each name in `_SHAPES` and `_PIXELS`."""
    sizes: dict[str, int] = {}
    for name, shape in (_SHAPES | _PIXELS).items():
        if name not in tensors:
            continue
        found = tuple(tensors[name].shape)
        fits = len(found) == len(shape) and all(
            got == (sizes.setdefault(size, got) if isinstance(size, str) else size)
            for got, size in zip(found, shape, strict=True)
        )
        if not fits:
            raise UserError(f"{path} is damaged: '{name}' has the shape {found}")
    return sizes


def _check_contents(
    folder: Path,
    tensors: dict[str, Tensor],
    metadata: dict[str, Any],
    sizes: dict[str, int],
    n: int,
) -> None:
    path = folder / TENSORS
    for name, limit in (
        ("edge_target", n),
        ("edge_source", n),
        ("selected_features", sizes["active"]),
    ):
        values = tensors[name]
        if bool(((values < 0) | (values >= limit)).any()):
            raise UserError(f"{path} is damaged: '{name}' points outside of the graph")
    for name in ("edge_weight", "activation_values", "logit_probabilities", *_PIXELS):
        if name in tensors and not bool(tensors[name].isfinite().all()):
            raise UserError(f"{path} is damaged: '{name}' is not finite")
    if "pixel_grids" in tensors:
        counts = tensors["pixel_grids"].prod(1)
        if bool((counts < 0).any()) or int(counts.sum()) != sizes["pixel_patches"]:
            raise UserError(f"{path} is damaged: 'pixel_grids' does not fit 'pixel_effects'")
    if (
        len(metadata["tokens"]) != sizes["positions"]
        or len(metadata["targets"]) != sizes["targets"]
    ):
        raise UserError(f"{folder}: {METADATA} and {TENSORS} do not belong together")
