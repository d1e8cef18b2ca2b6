"""A graph folder of a made-up vision-language model, by the contract of docs/viewer.md, by hand."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

ROWS = COLUMNS = 8
LAYERS = 4
BEFORE = ["<bos>", "USER", ":"]
AFTER = [" What", " color", " is", " the", " circle", "?", " ASSISTANT", ":"]
CIRCLE = [(2, 5), (2, 6), (3, 5), (3, 6)]
FIRST_IMAGE = len(BEFORE)
LAST = FIRST_IMAGE + ROWS * COLUMNS + len(AFTER) - 1
WORD = {text.strip(): FIRST_IMAGE + ROWS * COLUMNS + i for i, text in enumerate(AFTER)}


def position(row: int, column: int) -> int:
    return FIRST_IMAGE + row * COLUMNS + column


def cantor(layer: int, index: int) -> int:
    return (layer + index) * (layer + index + 1) // 2 + index


def picture(path: Path, size: int = 128) -> None:
    image = Image.new("RGB", (size, size), (226, 226, 218))
    draw = ImageDraw.Draw(image)
    draw.ellipse((5 * 16 + 2, 2 * 16 + 2, 7 * 16 - 2, 4 * 16 - 2), fill=(205, 40, 40))
    draw.rectangle((16 + 4, 5 * 16, 3 * 16, 7 * 16 - 3), fill=(45, 80, 200))
    image.save(path)


class Graph:
    """Nodes and links as they are added."""

    def __init__(self) -> None:
        self.nodes: list[dict[str, Any]] = []
        self.links: list[dict[str, Any]] = []

    def add(self, node_id: str, kind: str, layer: int | str, at: int, **more: Any) -> str:
        node = {"node_id": node_id, "feature": -1, "layer": str(layer), "ctx_idx": at}
        node |= {"feature_type": kind, "jsNodeId": node_id, "clerp": "", "influence": 0.5}
        node |= {"activation": None, "token_prob": 0.0, "is_target_logit": False}
        self.nodes.append(node | more)
        return node_id

    def feature(self, layer: int, index: int, at: int, **more: Any) -> str:
        given = {"feature": cantor(layer, index), "activation": 2.0} | more
        return self.add(f"{layer}_{index}_{at}", "cross layer transcoder", layer, at, **given)

    def token(self, at: int, influence: float = 0.3) -> str:
        return self.add(f"E_{at}_{at}", "embedding", "E", at, influence=influence, feature=at)

    def link(self, source: str, target: str, weight: float) -> None:
        self.links.append({"source": source, "target": target, "weight": weight})


def tokens() -> list[dict[str, Any]]:
    def word(text: str) -> dict[str, Any]:
        role = "special" if text == "<bos>" else "text"
        return {"text": text, "role": role, "image": -1, "patch": None}

    patches = [
        {"text": "<image>", "role": "image", "image": 0, "patch": [row, column]}
        for row in range(ROWS)
        for column in range(COLUMNS)
    ]
    return [*map(word, BEFORE), *patches, *map(word, AFTER)]


def build(seed: int = 0) -> dict[str, Any]:
    """The circle's patches fire a red and a round feature each; they meet the word "circle", and
    "red" is said. Around them noise, errors, and patches of the blue square that speak against."""
    rng = random.Random(seed)
    g = Graph()
    red = g.add("4_7_74", "logit", LAYERS, LAST, clerp='Output "red" (p=0.910)',
                token_prob=0.91, is_target_logit=True, influence=None, feature=7)  # fmt: skip
    blue = g.add("4_9_74", "logit", LAYERS, LAST, clerp='Output "blue" (p=0.060)',
                 token_prob=0.06, influence=None, feature=9)  # fmt: skip
    circle = g.token(WORD["circle"], 0.2)
    for name in ("What", "color", "?"):
        g.token(WORD[name], 0.6)
    asks = g.feature(2, 30, WORD["circle"], clerp="the asked shape", influence=0.35)
    g.link(circle, asks, 1.5)
    says = g.feature(3, 12, LAST, clerp="say red", influence=0.1, activation=4.0)
    g.link(says, red, 3.0)
    g.link(says, blue, -1.0)
    g.link(asks, says, 0.8)
    for n, (row, column) in enumerate(CIRCLE):
        at = position(row, column)
        patch = g.token(at, 0.15 + 0.01 * n)
        seen = g.feature(0, 40, at, clerp="red patch", influence=0.2 + 0.01 * n)
        shape = g.feature(1, 41, at, influence=0.3 + 0.01 * n)
        g.link(patch, seen, 2.0)
        g.link(patch, shape, 1.0 + 0.1 * n)
        g.link(seen, says, 0.7 + 0.1 * n)
        g.link(shape, asks, 0.3)
        g.link(seen, red, 0.25)
    for row, column in ((5, 1), (5, 2), (6, 1), (6, 2)):
        at = position(row, column)
        patch = g.token(at, 0.55)
        square = g.feature(0, 50, at, influence=0.6)
        g.link(patch, square, 1.8)
        g.link(square, says, -0.2)
        g.link(square, blue, 0.4)
    ids = [node["node_id"] for node in g.nodes]
    for i in range(30):
        layer, at = (
            rng.randrange(LAYERS),
            rng.choice([LAST, LAST - 1, WORD["circle"], position(4, i % 8)]),
        )
        node = g.feature(layer, 100 + i, at, influence=0.6 + i / 160, activation=1.0 + i / 10)
        for below in rng.sample([n for n in g.nodes if n["node_id"] in ids], 6):
            rank = -1 if below["layer"] == "E" else int(below["layer"])
            if rank < layer:
                g.link(below["node_id"], node, rng.uniform(-0.3, 0.3))
        g.link(node, red, rng.uniform(-0.2, 0.2))
    for layer in range(LAYERS):
        error = g.add(f"e_{layer}_{LAST}", "mlp reconstruction error", layer, LAST, influence=0.7)
        g.link(error, red, 0.1)
    effects = [[rng.uniform(-0.05, 0.05) for _ in range(COLUMNS)] for _ in range(ROWS)]
    for n, (row, column) in enumerate(CIRCLE):
        effects[row][column] = 1.0 + 0.2 * n
    effects[5][1] = -0.6
    vlm = {
        **{"format": "sparsify-vlm graph", "version": 1, "n_layers": LAYERS, "tokens": tokens()},
        **{"question": "What color is the circle?", "answer": "red"},
        **{"model": "made-up", "clt": "by hand"},
        "images": [{"file": "image-0.png", "rows": ROWS, "columns": COLUMNS}],
        "scores": {"replacement": 0.81, "completeness": 0.93, "mean_path_length": 2.6,
                   "path_lengths": [0, 0.1, 0.5, 0.4], "from_images": 0.62, "from_words": 0.3,
                   "from_errors": 0.08},
        "patch_effects": [{"target": red, "image": 0, "values": effects}],
    }  # fmt: skip
    metadata = {"slug": "made-up", "scan": "made-up", "prompt": "…", "schema_version": 1,
                "prompt_tokens": [t["text"] for t in tokens()], "vlm": vlm}  # fmt: skip
    return {"metadata": metadata, "qParams": {}, "nodes": g.nodes, "links": g.links}


def examples() -> dict[str, Any]:
    patches = [[1.5 if (row, column) in CIRCLE else 0.0 for column in range(8)] for row in range(8)]
    seen = {"activation": 1.5, "image": "image-0.png", "patches": patches}
    said = {"activation": 4.0, "tokens": ["it", " is", " red"], "values": [0.0, 1.0, 4.0]}
    features = {"0_40": [seen], "3_12": [said]}
    return {"format": "sparsify-vlm examples", "version": 1, "features": features}


def write(folder: Path, graph: dict[str, Any] | None = None) -> Path:
    """Write `graph` (default: `build()`) and all that belongs to it into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    graph = build() if graph is None else graph
    (folder / "made-up.json").write_text(json.dumps(graph))
    listed = {"graphs": [{"slug": "made-up", "scan": "made-up"}]}
    (folder / "graph-metadata.json").write_text(json.dumps(listed))
    (folder / "examples.json").write_text(json.dumps(examples()))
    picture(folder / "image-0.png")
    return folder


if __name__ == "__main__":
    import sys

    print(write(Path(sys.argv[1])))
