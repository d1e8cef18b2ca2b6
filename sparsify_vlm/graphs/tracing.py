"""`trace`: one prompt's graph, as a folder that can be looked at, exported and verified.

1. The coder and its model are loaded, the prompt is put into the model's chat template.
2. The answer's next token, or what was asked for, is attributed.
3. The folder is written: the whole graph, the pruned one as JSON, the pictures as the model saw
   them, and the processor's batch, from which `verify` starts.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sparsify_vlm.coders import load_clt
from sparsify_vlm.data.encoding import decode_images, encode_decoded
from sparsify_vlm.data.images import BadSample, ImageRef
from sparsify_vlm.data.pictures import as_seen
from sparsify_vlm.data.prompts import Prompter
from sparsify_vlm.data.rows import IMAGE_MARK, Sample, Turn
from sparsify_vlm.errors import UserError
from sparsify_vlm.files import write_tensors
from sparsify_vlm.graphs.attribution import attribute, check_prompt_fits
from sparsify_vlm.graphs.config import TraceConfig, in_bytes
from sparsify_vlm.graphs.effects import patch_grid, total_effects
from sparsify_vlm.graphs.export import (
    EXAMPLES_FORMAT,
    Story,
    check_slug,
    examples_of,
    export_graph,
    slug_of,
)
from sparsify_vlm.graphs.graph import AttributionGraph
from sparsify_vlm.graphs.pixels import patches_of, pixel_effects
from sparsify_vlm.graphs.stored import METADATA
from sparsify_vlm.graphs.targets import Difference, Target
from sparsify_vlm.models import LoadedModel, Role
from sparsify_vlm.replacement.loading import load_replacement
from sparsify_vlm.replacement.local import LocalModel, freed

if TYPE_CHECKING:
    from PIL.Image import Image

    from sparsify_vlm.replacement import VLMReplacementModel

INPUTS = "inputs.safetensors"
"""The processor's batch."""
INPUTS_FORMAT = {"format": "sparsify-vlm inputs", "version": "1"}
UNLIMITED = 1 << 30
SHOWN = 10
"""Lines of each printed table."""


def trace(cfg: TraceConfig) -> Path:
    """Trace one prompt; returns the graph's folder.

    Raises `UserError` for whatever of `cfg` cannot be used.
    """
    _check_given(cfg)
    model = load_replacement(cfg, load_clt(cfg.clt), cfg.clt)
    asked = ask(cfg, model.loaded)
    graph = _graph(cfg, model, asked)
    answer = model.loaded.tokenizer.decode([int(graph.logits.argmax())])
    slug = cfg.slug or slug_of(asked.question, answer)
    folder = Path(cfg.output_dir or Path("graphs") / slug)
    _check_folder(folder, slug)
    story = Story(asked.question, answer, cfg.clt, asked.pictures, _labels(cfg), _examples(cfg))
    graph.info |= {"clt": cfg.clt, "slug": slug, "dtype": cfg.dtype}
    if cfg.difference:
        graph.info["difference"] = [_id(model.loaded, text) for text in cfg.difference]
    graph.save(folder)
    write_tensors(folder / INPUTS, asked.inputs, INPUTS_FORMAT)
    _carry_pictures(cfg, examples_of(graph, story.examples), folder)
    export_graph(
        graph,
        folder,
        slug,
        story,
        scan=cfg.scan,
        node_threshold=cfg.node_threshold,
        edge_threshold=cfg.edge_threshold,
    )
    print(summary(graph, asked, answer))
    print(f"\nWritten to {folder}. `sparsify-vlm verify {folder}` checks it by intervention.")
    return folder


def _graph(cfg: TraceConfig, model: VLMReplacementModel, asked: Asked) -> AttributionGraph:
    options: dict[str, Any] = {
        "max_n_logits": cfg.max_n_logits,
        "desired_logit_prob": cfg.desired_logit_prob,
        "max_feature_nodes": cfg.max_feature_nodes or None,
        "targets": _targets(cfg),
        "memory": in_bytes("--memory", cfg.memory),
    }
    if not cfg.patches:
        return attribute(model, asked.inputs, **options)
    check_prompt_fits(model, asked.inputs, options["memory"])
    with freed(LocalModel(model, asked.inputs)) as local:
        patches_of(local)  # refuses at once what it cannot place
        graph = attribute(model, local, **options)
        graph.pixels = pixel_effects(local, graph, options["targets"], cfg.patch_gradient)
    return graph


# ---- what is asked


@dataclass
class Asked:
    """A prompt as the model takes it.

    Attributes:
        inputs: the processor's batch of one.
        question: as the user put it.
        pictures: as the patch grid lies on them.
        truth: the right answer, where it is known.
    """

    inputs: dict[str, Tensor]
    question: str
    pictures: Sequence[Image] = ()
    truth: str | None = None


def ask(cfg: TraceConfig, loaded: LoadedModel) -> Asked:
    """The prompt of the flags. Raises `UserError` where model, prompt and pictures do not fit."""
    question, images, truth = cfg.prompt or "", _images(cfg), None
    if cfg.scene is not None:
        from sparsify_vlm.data.shapes import ShapesDataset

        row = ShapesDataset("heldout", cfg.scene + 1, text_only=not loaded.is_vlm)[cfg.scene]
        images = [ImageRef(row["id"], image=row["image"])] if "image" in row else []
        question, truth = (cfg.prompt, None) if cfg.prompt else (row["question"], row["answer"])
    prompter = Prompter.of(loaded)
    sample = _sample(cfg, loaded, prompter, question, tuple(images))
    try:
        shown = decode_images(loaded, sample)
        batch = encode_decoded(
            loaded, [sample], [shown], UNLIMITED, with_answer=False, prompter=prompter
        )
    except BadSample as error:
        reason = error.reason.removesuffix(": raise --ctx_len")
        more = "" if reason == error.reason else ": the model reads no more; shorten the prompt"
        raise UserError(f"the prompt cannot be used: {reason}{more}") from error
    _check_length(loaded, batch.inputs)
    return Asked(batch.inputs, question, as_seen(loaded, batch.inputs, shown), truth)


def _images(cfg: TraceConfig) -> list[ImageRef]:
    for path in cfg.image:
        if "://" not in path and not Path(path).is_file():
            raise UserError(f"--image {path}: no such file")
    return [ImageRef(path, path=path) for path in cfg.image]


def _sample(
    cfg: TraceConfig,
    loaded: LoadedModel,
    prompter: Prompter,
    question: str,
    images: tuple[ImageRef, ...],
) -> Sample:
    marks = {mark for mark in (IMAGE_MARK, prompter.image_token) if mark}
    found = sum(question.count(mark) for mark in marks) if loaded.is_vlm else 0
    if not (cfg.raw or (not loaded.is_vlm and not prompter.has_template)):
        if found:
            raise UserError(
                f"--prompt holds the image token {prompter.image_token}, which the chat template "
                "puts where it belongs: leave it out, or give --raw"
            )
        return Sample("--prompt", (Turn("user", question, len(images)),), images)
    if loaded.is_vlm and found != len(images):
        raise UserError(
            f"--raw prompt with {found} image tokens ({prompter.image_token}) for {len(images)} "
            "pictures: it needs one where each picture stands"
        )
    return Sample("--prompt", images=images, text=question)


def _check_length(loaded: LoadedModel, inputs: Mapping[str, Tensor]) -> None:
    length = inputs["input_ids"].shape[1]
    limit = getattr(loaded.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise UserError(
            f"the prompt cannot be used: it has {length} tokens, {loaded.name} reads {limit} at "
            "most; shorten it or show a smaller picture"
        )


def _targets(cfg: TraceConfig) -> list[Target] | None:
    wanted: list[Target] = list(cfg.target_tokens)
    if cfg.difference:
        wanted.append(Difference(*cfg.difference))
    return wanted or None


def _id(loaded: LoadedModel, text: str) -> int:
    (id,) = loaded.tokenizer.encode(text, add_special_tokens=False)
    return int(id)


# ---- files


def _check_given(cfg: TraceConfig) -> None:
    """What can be refused before anything is loaded."""
    if cfg.slug is not None:
        check_slug(cfg.slug)
    _labels(cfg)
    _examples(cfg)
    if cfg.output_dir is not None and cfg.slug is not None:
        _check_folder(Path(cfg.output_dir), cfg.slug)


def _check_folder(folder: Path, slug: str) -> None:
    """Refuse to write over anything but the same graph."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        there = json.loads((folder / METADATA).read_text(encoding="utf-8")).get("slug")
    except (OSError, ValueError, AttributeError):
        there = None
    if there != slug:
        what = "another graph" if there else "something else"
        raise UserError(f"--output_dir {folder} holds {what}: give another folder")


def _json_file(flag: str, name: str) -> Any:
    try:
        return json.loads(Path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not readable as JSON"
        raise UserError(f"{flag} {name}: {reason}") from error


def _labels(cfg: TraceConfig) -> dict[str, str]:
    value = {} if cfg.labels is None else _json_file("--labels", cfg.labels)
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise UserError(f'--labels {cfg.labels}: must be like {{"3_117": "text"}}')
    return value


def _examples(cfg: TraceConfig) -> dict[str, Any]:
    if cfg.examples is None:
        return {}
    value = _json_file("--examples", cfg.examples)
    if not isinstance(value, dict) or value.get("format") != EXAMPLES_FORMAT:
        raise UserError(f"--examples {cfg.examples}: no examples of features of this program")
    features = value.get("features")
    if not isinstance(features, dict):
        raise UserError(f"--examples {cfg.examples} is damaged: it has no features")
    for name in _pictures(features):
        if Path(name).name != name or not _beside(cfg, name).is_file():
            raise UserError(f"--examples {cfg.examples}: its picture {name} is not beside it")
    return features


def _pictures(examples: Mapping[str, Any]) -> set[str]:
    """Files that examples by feature id name."""
    return {
        one["image"]
        for ones in examples.values()
        for one in (ones if isinstance(ones, list) else [])
        if isinstance(one, dict) and isinstance(one.get("image"), str)
    }


def _beside(cfg: TraceConfig, name: str) -> Path:
    return Path(cfg.examples or "").parent / name


def _carry_pictures(cfg: TraceConfig, examples: Mapping[str, Any], folder: Path) -> None:
    """Copy the pictures that examples name from beside their file."""
    for name in _pictures(examples):
        source = _beside(cfg, name)
        if source.resolve() != (folder / name).resolve():
            shutil.copyfile(source, folder / name)


# ---- what is printed


def summary(graph: AttributionGraph, asked: Asked, answer: str) -> str:
    """The answer, the scores, and what has the largest effects on the first target."""
    scores, top = graph.scores(), float(graph.logits.float().softmax(0).max())
    right = "" if asked.truth is None else f"; right: {asked.truth}"
    effects = total_effects(graph)[0]
    lines = [
        f"{asked.question} → {answer.strip()} (p = {top:.3f}{right})",
        f"replacement {scores.replacement:.3f}, completeness {scores.completeness:.3f}, mean path "
        f"{scores.mean_path_length:.2f} edges; influence from images {scores.image:.0%}, words "
        f"{scores.words:.0%}, errors {scores.errors:.0%}",
        "",
        f"Largest total effects on {graph.target_labels[0]!r}:",
        "",
        "  layer  feature  position  token           role     activation   effect",
        *_feature_lines(graph, effects),
    ]
    heading = "  image  row  column   effect"
    tokens = [patch_grid(graph, i).of(effects[graph.token_nodes]) for i in range(_n_images(graph))]
    if patches := _patch_lines(tokens):
        lines += ["", heading, *patches]
    if graph.pixels is not None:
        pixels = [graph.pixels.table(i)[0] for i in range(len(graph.pixels.grids))]
        title = "Patches of pixels, through the vision tower:"
        lines += ["", title, "", heading, *_patch_lines(pixels)]
    return "\n".join(lines)


def _n_images(graph: AttributionGraph) -> int:
    return int(graph.images.max()) + 1


def _feature_lines(graph: AttributionGraph, effects: Tensor) -> list[str]:
    values = effects[: graph.n_features]
    lines = []
    for node in values.abs().topk(min(SHOWN, len(values))).indices.tolist():
        layer, position, index = graph.features[node].tolist()
        activation = float(graph.activation_values[graph.selected_features[node]])
        role = Role(int(graph.roles[position])).name.lower()
        token = repr(graph.tokens[position])[1:-1][:14]
        lines.append(
            f"  {layer:>5}  {index:>7}  {position:>8}  {token:<14}  {role:<7}  {activation:>10.3f}"
            f"  {float(values[node]):>+7.3f}"
        )
    return lines


def _patch_lines(tables: Sequence[Tensor]) -> list[str]:
    """The largest entries of tables [rows, columns], one for each picture."""
    found = []
    for image, values in enumerate(tables):
        for place in range(values.numel()):
            row, column = divmod(place, values.shape[1])
            found.append((float(values[row, column]), image, row, column))
    found.sort(key=lambda one: -abs(one[0]))
    return [f"  {i:>5}  {r:>3}  {c:>6}  {value:>+7.3f}" for value, i, r, c in found[:SHOWN]]
