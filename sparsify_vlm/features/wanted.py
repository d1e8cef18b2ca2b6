"""Which features are looked at: given ones, those of a graph's page, all."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify_vlm.errors import UserError

if TYPE_CHECKING:
    from sparsify_vlm.features.config import ExamplesConfig
    from sparsify_vlm.replacement import VLMReplacementModel

Feature = tuple[int, int]
"""Layer of the decoder, and index."""


def wanted_features(cfg: ExamplesConfig, model: VLMReplacementModel) -> list[Feature]:
    """The features of `--features` and `--graph`, by layer and index.

    Raises `UserError` for what is no feature of the coder, and for a folder that holds no graph.
    """
    layers = [model.layers[s] for s in model.clt.cfg.source_layers()]
    if cfg.features == ["all"]:
        return [(layer, index) for layer in layers for index in range(model.clt.cfg.num_latents)]
    found = {_named(text) for text in cfg.features}
    if cfg.graph is not None:
        found |= graph_features(Path(cfg.graph))
    for layer, index in sorted(found):
        if layer not in layers or not 0 <= index < model.clt.cfg.num_latents:
            raise UserError(
                f"feature {layer}_{index} is none of the coder's: layers {layers[0]} to "
                f"{layers[-1]}, {model.clt.cfg.num_latents} latents each"
            )
    return sorted(found)


def _named(text: str) -> Feature:
    if not (match := re.fullmatch(r"(\d+)[_/](\d+)", text)):
        raise UserError(f"--features {text}: name them by layer and index, as in 3_117, or all")
    return int(match[1]), int(match[2])


def graph_features(folder: Path) -> set[Feature]:
    """The features in the JSON of a folder's graphs. Raises `UserError` where there are none."""
    listed = _json(folder / "graph-metadata.json")
    try:
        slugs = [str(one["slug"]) for one in listed["graphs"]]
        nodes = [node for slug in slugs for node in _json(folder / f"{slug}.json")["nodes"]]
        found = {
            tuple(map(int, node["node_id"].split("_")[:2]))
            for node in nodes
            if node["feature_type"] == "cross layer transcoder"
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"--graph {folder}: its graphs are damaged") from error
    if not found:
        raise UserError(f"--graph {folder}: its graphs have no features")
    return found  # type: ignore[return-value]  # of pairs


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"--graph {path.parent}: {path.name} cannot be read; is it a folder that `trace` wrote?"
        ) from error
    except ValueError as error:
        raise UserError(f"--graph: {path} is damaged: not readable as JSON") from error
