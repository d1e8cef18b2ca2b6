"""Reading a graph folder: what the page may rely on is checked here, once.

The page gets nodes by number and links as three lists, so that tens of thousands of them stay
small, and nothing of the folder's files that it does not show.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from sparsify_vlm.errors import UserError
from sparsify_vlm.report.viewer.marks import check_marks, no_marks

KINDS = {
    "embedding": "token",
    "logit": "logit",
    "mlp reconstruction error": "error",
}
"""Kinds of nodes by their `feature_type`; every other one is a feature."""

MOST_PATCHES = 1024
"""Along one side of a picture."""

PICTURES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}


@dataclass(frozen=True)
class GraphFolder:
    """One graph of a folder."""

    path: Path
    slug: str
    page: dict[str, Any]
    """What the page shows: title, tokens, nodes, links, pictures by file name, examples."""
    pictures: dict[str, Path]
    """Picture files by name, all of them inside the folder."""

    def marks(self) -> dict[str, Any]:
        """Pins, groups and labels; empty ones when none were saved. Raises `UserError`."""
        path = self.path / "marks.json"
        if not path.exists():
            return no_marks()
        value = _json(self.path, "marks.json")
        try:
            check_marks(value)
        except ValueError as error:
            _damaged(path, f"{error}; mend it or delete it")
        return value


def read_folder(path: Path, slug: str = "") -> GraphFolder:
    """Read the graph `slug` (default: the only one) of the folder at `path`.

    Raises `UserError`, naming the file and what is wrong with it.
    """
    if not path.is_dir():
        raise UserError(f"{path}: not a folder; give one that `sparsify-vlm trace` wrote")
    slug = _choose(path, slug)
    file = path / f"{slug}.json"
    graph = _json(path, file.name)
    try:
        page, names = _page(graph)
        page["slug"] = slug
        page["examples"], more = _examples(path)
    except _Bad as error:
        _damaged(error.file or file, str(error))
    pictures = {name: _picture(path, name) for name in dict.fromkeys([*names, *more])}
    folder = GraphFolder(path, slug, page, pictures)
    folder.marks()
    return folder


class _Bad(Exception):
    """What is wrong with a file; `file` where it is not the graph's own."""

    def __init__(self, what: str, file: Path | None = None) -> None:
        super().__init__(what)
        self.file = file


def _damaged(file: Path, what: str) -> NoReturn:
    raise UserError(f"{file}: {what}")


def _need(condition: bool, what: str) -> None:
    if not condition:
        raise _Bad(what)


def _inside(folder: Path, name: str) -> Path:
    """The file `name` of `folder`. Raises `UserError` if it is missing or a link leads outside."""
    path = folder / name
    if not path.is_file():
        _damaged(path, "not there; is the folder one that `sparsify-vlm trace` wrote?")
    if path.resolve().parent != folder.resolve():
        _damaged(path, "a link that leads out of the folder; put the file itself there")
    return path


def _json(folder: Path, name: str) -> Any:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no JSON number")

    path = _inside(folder, name)
    try:
        return json.loads(path.read_text("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        _damaged(path, f"damaged, not JSON ({error})")


def _choose(path: Path, slug: str) -> str:
    listed = _json(path, "graph-metadata.json")
    try:
        slugs = [entry["slug"] for entry in listed["graphs"]]
    except (TypeError, KeyError):
        slugs = []
    if not slugs or not all(_is_name(s) for s in slugs):
        _damaged(path / "graph-metadata.json", "damaged, it lists no graphs by their slug")
    if slug and slug not in slugs:
        raise UserError(f"--slug {slug}: not in {path}, which holds {', '.join(slugs)}")
    if not slug and len(slugs) > 1:
        raise UserError(f"{path} holds several graphs: choose with --slug, of {', '.join(slugs)}")
    return slug or slugs[0]


def _is_name(value: object) -> bool:
    """Whether `value` can name a file of the folder, and none elsewhere."""
    return isinstance(value, str) and Path(value).name == value and "\\" not in value


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e300  # no NaN, no infinity, no integer too long for a float


def _picture(folder: Path, name: str) -> Path:
    from PIL import Image

    path = _inside(folder, name)
    try:
        with Image.open(path) as image:
            image.verify()
    except (OSError, SyntaxError) as error:  # what Pillow raises for damaged files
        _damaged(path, f"damaged, not a picture ({error})")
    return path


def _page(graph: Any) -> tuple[dict[str, Any], list[str]]:
    _need(isinstance(graph, dict), "damaged, not an object")
    for key, kind in (("metadata", dict), ("nodes", list), ("links", list)):
        _need(isinstance(graph.get(key), kind), f"damaged, it has no {key}")
    metadata = graph["metadata"]
    vlm = metadata.get("vlm", {})
    _need(isinstance(vlm, dict), "metadata.vlm is damaged")
    if vlm:
        known = (vlm.get("format"), vlm.get("version")) == ("sparsify-vlm graph", 1)
        _need(known, f"metadata.vlm is {vlm.get('format')!r} version {vlm.get('version')!r}, "
                     "which this version does not read")  # fmt: skip
        for key, kind in (("images", list), ("tokens", list), ("scores", dict)):
            _need(isinstance(vlm.get(key, kind()), kind), f"metadata.vlm.{key} is damaged")
    images = _images(vlm)
    tokens = _tokens(metadata, vlm, len(images))
    nodes, numbers, repeated = _nodes(graph["nodes"], tokens)
    links = _links(graph["links"], nodes, numbers)
    page = {
        "question": str(vlm.get("question") or ""),
        "answer": str(vlm.get("answer") or ""),
        "prompt": str(metadata.get("prompt") or ""),
        "model": _short(str(vlm.get("model") or metadata.get("scan") or "")),
        "coder": _short(str(vlm.get("clt") or "")),
        "scores": {k: v for k, v in vlm.get("scores", {}).items() if _is_number(v)},
        "images": images,
        "tokens": tokens,
        "nodes": nodes,
        "links": links,
        "repeated_ids": repeated,
        "patch_effects": list(_tables("patch_effects", vlm, numbers, len(images))),
        "pixel_effects": list(_tables("pixel_effects", vlm, numbers, len(images))),
        "patch_gradient": str(vlm.get("patch_gradient") or ""),
    }
    return page, [image["file"] for image in images if image["file"]]


def _short(name: str) -> str:
    """A Hub id as it is, of a folder only its own name: pages are given to others."""
    return Path(name).name if Path(name).is_absolute() else name


def _images(vlm: dict[str, Any]) -> list[dict[str, Any]]:
    images = vlm.get("images", [])
    for i, image in enumerate(images):
        _need(isinstance(image, dict), f"images[{i}] is damaged")
        name = image.get("file")
        good = name is None or (_is_name(name) and Path(name).suffix.lower() in PICTURES)
        _need(good, f"images[{i}].file {name!r} is not the name of a picture in the folder")
        for side in ("rows", "columns"):
            size = image.get(side)
            good = isinstance(size, int) and 0 <= size <= MOST_PATCHES
            _need(good, f"images[{i}].{side} {size!r} is not a number of patches")
    return [{key: image[key] for key in ("file", "rows", "columns")} for image in images]


def _tokens(metadata: dict[str, Any], vlm: dict[str, Any], n_images: int) -> list[dict[str, Any]]:
    tokens = vlm.get("tokens")
    if tokens is None:
        texts = metadata.get("prompt_tokens")
        if not isinstance(texts, list):
            raise _Bad("metadata has no prompt_tokens")
        tokens = [{"text": t, "role": "text", "image": -1, "patch": None} for t in texts]
    for i, token in enumerate(tokens):
        good = isinstance(token, dict) and isinstance(token.get("text"), str)
        _need(good, f"tokens[{i}] is damaged")
        image, patch = token.get("image", -1), token.get("patch")
        good = isinstance(image, int) and -1 <= image < n_images
        _need(good, f"tokens[{i}].image {image!r} is not one of the {n_images} images")
        if patch is not None:
            good = image >= 0 and isinstance(patch, list) and len(patch) == 2
            good = good and all(isinstance(x, int) for x in patch)
            size = vlm["images"][image] if good else {"rows": 0, "columns": 0}
            good = good and 0 <= patch[0] < size["rows"] and 0 <= patch[1] < size["columns"]
            _need(good, f"tokens[{i}].patch {patch!r} is outside its image's patches")
    keys = ("text", "role", "image", "patch")
    defaults = {"role": "text", "image": -1, "patch": None}
    return [{key: token.get(key, defaults.get(key)) for key in keys} for token in tokens]


def _nodes(
    raw: list[Any], tokens: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], dict[str, int], int]:
    """Nodes for the page, their numbers by id, and how many ids stood for a second node."""
    nodes: list[dict[str, Any]] = []
    numbers: dict[str, int] = {}
    for i, node in enumerate(raw):
        good = isinstance(node, dict) and isinstance(node.get("node_id"), str)
        _need(good, f"nodes[{i}] has no node_id")
        if node["node_id"] in numbers:
            continue
        numbers[node["node_id"]] = len(nodes)
        nodes.append(_node(node, len(tokens)))
    _need(bool(nodes), "it has no nodes")
    return nodes, numbers, len(raw) - len(nodes)


def _node(node: dict[str, Any], n_tokens: int) -> dict[str, Any]:
    name = node["node_id"]
    kind = KINDS.get(str(node.get("feature_type")), "feature")
    position, layer = node.get("ctx_idx"), str(node.get("layer"))
    good = isinstance(position, int) and 0 <= position < n_tokens
    _need(good, f"node {name!r}: ctx_idx {position!r} is not one of the {n_tokens} tokens")
    good = layer.isdecimal() or (kind == "token" and layer == "E") or kind == "logit"
    _need(good, f"node {name!r}: layer {layer!r} is not a number")
    for key in ("influence", "activation", "token_prob"):
        good = node.get(key) is None or _is_number(node[key])
        _need(good, f"node {name!r}: {key} {node.get(key)!r} is not a number")
    return {
        "id": name,
        "kind": kind,
        "layer": int(layer) if layer.isdecimal() else -1,
        "position": position,
        "feature": _feature(node) if kind == "feature" else None,
        "text": str(node.get("clerp") or ""),
        "influence": node.get("influence"),
        "activation": node.get("activation"),
        "probability": node.get("token_prob") or 0.0,
        "target": bool(node.get("is_target_logit")),
    }


def _feature(node: dict[str, Any]) -> int:
    """Index of the feature in its layer.

    Raises `_Bad` if the node does not tell. `feature` is layer and index as one number (Cantor's
    pairing, (l + i)(l + i + 1)/2 + i), so it is told apart by the layer.
    """
    number, layer = node.get("feature"), int(node["layer"])
    good = isinstance(number, int) and number >= 0
    _need(good, f"node {node['node_id']!r}: feature {number!r} is not a feature's number")
    assert isinstance(number, int)
    diagonal = (math.isqrt(8 * number + 1) - 1) // 2
    index = number - diagonal * (diagonal + 1) // 2
    return index if diagonal - index == layer else number


def _links(raw: list[Any], nodes: list[dict[str, Any]], numbers: dict[str, int]) -> dict[str, Any]:
    source, target, weight = [], [], []
    for i, link in enumerate(raw):
        good = isinstance(link, dict) and _is_number(link.get("weight"))
        _need(good, f"links[{i}] has no weight")
        ends = [numbers.get(str(link.get(end))) for end in ("source", "target")]
        _need(None not in ends, f"links[{i}] leads from or to a node that is not there")
        below, above = (_rank(nodes[end]) for end in ends if end is not None)
        _need(below < above, f"links[{i}] does not lead from a layer to a higher one")
        source.append(ends[0])
        target.append(ends[1])
        weight.append(link["weight"])
    return {"source": source, "target": target, "weight": weight}


def _rank(node: dict[str, Any]) -> float:
    return {"token": -1.0, "logit": math.inf}.get(node["kind"], float(node["layer"]))


def _tables(
    key: str, vlm: dict[str, Any], numbers: dict[str, int], n_images: int
) -> Iterator[dict[str, Any]]:
    """Tables of patches by target and image. Those of image tokens have their image's grid, those
    of pixels the vision tower's, which may be finer."""
    given = vlm.get(key, [])
    _need(isinstance(given, list), f"metadata.vlm.{key} is damaged")
    for i, effect in enumerate(given):
        if not isinstance(effect, dict) or str(effect.get("target")) not in numbers:
            raise _Bad(f"{key}[{i}].target is not a node")
        image: Any = effect.get("image")
        values: Any = effect.get("values")
        good = isinstance(image, int) and 0 <= image < n_images
        _need(good, f"{key}[{i}].image is not one of the {n_images} images")
        good = isinstance(values, list) and all(isinstance(row, list) for row in values)
        good = good and all(_is_number(value) for row in values for value in row)
        if key == "patch_effects":
            size = (vlm["images"][image]["rows"], vlm["images"][image]["columns"])
        else:
            size = (len(values), len(values[0]) if values else 0) if good else (0, 0)
            good = good and max(size) <= MOST_PATCHES
        good = good and len(values) == size[0] and all(len(row) == size[1] for row in values)
        _need(good, f"{key}[{i}].values is not a table of {size[0]} × {size[1]} numbers")
        yield {"target": numbers[effect["target"]], "image": image, "values": values}


def _examples(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Examples by "layer_index", and the pictures they name."""
    file = folder / "examples.json"
    if not file.exists():
        return {}, []
    value = _json(folder, file.name)
    good = isinstance(value, dict) and isinstance(value.get("features"), dict)
    good = good and (value.get("format"), value.get("version")) == ("sparsify-vlm examples", 1)
    if not good:
        raise _Bad("damaged, or not examples of version 1", file)
    names: list[str] = []
    for name, examples in value["features"].items():
        if not isinstance(examples, list) or not all(_is_example(one) for one in examples):
            raise _Bad(f"the examples of feature {name!r} are damaged", file)
        names += [one["image"] for one in examples if one.get("image")]
    return value["features"], names


def _is_example(example: Any) -> bool:
    if not isinstance(example, dict):
        return False
    texts, values = example.get("tokens") or [], example.get("values") or []
    good = isinstance(texts, list) and all(isinstance(text, str) for text in texts)
    good = good and isinstance(values, list) and all(_is_number(value) for value in values)
    good = good and len(texts) == len(values) and _is_number(example.get("activation"))
    name, patches = example.get("image"), example.get("patches") or []
    if name is not None:
        good = good and _is_name(name) and Path(name).suffix.lower() in PICTURES
    rows = isinstance(patches, list) and all(isinstance(row, list) for row in patches)
    return good and rows and all(_is_number(value) for row in patches for value in row)
