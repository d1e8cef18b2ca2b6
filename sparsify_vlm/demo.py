"""`demo`: the whole road once, on the embedded model and data, ending in a report.

1. Capture the model's activations on training scenes.
2. Train a cross-layer transcoder (CLT) from the store, and a per-layer transcoder (PLT) alike.
3. Evaluate both on held-out scenes, spliced into the model, with generated answers.
4. Find the latents that stand for colours and shapes.
5. Trace one answer back to the picture, with examples of the features it went through.
6. Write the report from the files that 1 to 5 left in the folder.

Each stage is what the command of its name does, and can be run by hand.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify_vlm.errors import UserError
from sparsify_vlm.files import write_json

if TYPE_CHECKING:
    from sparsify_vlm.training import TrainConfig

MODEL = "tiny-llava"
BATCH = 64
EXAMPLES = 8
"""Held-out scenes shown with their answers: the first ones, two of each question type."""
DIFFERENCES = 4
"""Scenes shown besides: the first ones that one of the replacements answers wrongly."""
LEAST_HELDOUT = 20
"""Held-out scenes until every colour and shape is in an even and in an odd one: latents are chosen
on the ones and scored on the others."""

SEARCHED = 300
"""Held-out scenes that examples of the graph's features are looked for in."""
LEAST_F1 = 0.5
"""From here on a latent is called by the concept it was found for."""
LABELS = "labels.json"
GRAPH_PAGE = "graph.html"
"""The traced answer's page, beside the report."""
MARK = "demo.json"
"""Written first: a folder that holds it is a demo's and may be made anew."""


@dataclass
class DemoConfig:
    """The demo: capture, train, evaluate and report on the embedded model and data."""

    output_dir: str = "runs/demo"
    """Folder for everything the demo writes; one that an earlier demo wrote is made anew."""

    train_scenes: int = 5000
    """Training scenes to capture."""

    heldout_scenes: int = 600
    """Held-out scenes to evaluate on."""

    num_latents: int = 768
    """Latents per layer of both coders."""

    k: int = 16
    """Active latents per token and layer of both coders."""

    steps: int = 300
    """Optimizer steps of each coder."""

    batch_tokens: int = 3072
    """Tokens per step."""

    lr: float = 2e-3
    """Adam's learning rate at its peak."""

    seed: int = 0
    """Seed of the coders' initial weights."""

    keep_activations: bool = False
    """Keep the captured activations (about 3 KB a token) when the demo is done."""

    def __post_init__(self) -> None:
        least = {"train_scenes": 1, "heldout_scenes": LEAST_HELDOUT, "steps": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least {bound}")


@dataclass
class _Stage:
    name: str
    what: str
    seconds: float


class _Stages:
    """Runs stages, announces them and remembers their times."""

    def __init__(self) -> None:
        self.done: list[_Stage] = []

    def __call__(self, name: str, what: str, work: Callable[[], Any]) -> Any:
        print(f"\n[{len(self.done) + 1}] {name}: {what}", flush=True)
        start = time.monotonic()
        result = work()
        self.done.append(_Stage(name, what, time.monotonic() - start))
        return result


def run_demo(cfg: DemoConfig) -> Path:
    """Run every stage and return the path of the report.

    Raises `UserError` when the output folder holds something that no demo wrote.
    """
    # Read once, when torch is first imported: threads that wait without spinning cost a third of
    # the speed on an idle machine, and save the demo from standing still on a busy one.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from sparsify_vlm.data.capture import capture
    from sparsify_vlm.report.demo import write_report
    from sparsify_vlm.training import train

    folder = _fresh_folder(Path(cfg.output_dir))
    stages = _Stages()
    store = folder / "activations"
    what = f"{MODEL}'s MLPs on {cfg.train_scenes} scenes"
    stages("capture", what, partial(capture, _capture_config(cfg, store)))
    for name, cross_layer in (("clt", 8), ("plt", 0)):
        what = f"{cfg.num_latents} latents a layer, k = {cfg.k}, cross_layer = {cross_layer}"
        settings = _train_config(cfg, store, folder, name, cross_layer)
        stages(f"train {name}", what, partial(train, settings))
    for name in ("clt", "plt"):
        what = f"spliced into the model, {cfg.heldout_scenes} held-out scenes"
        stages(f"evaluate {name}", what, partial(_evaluate, cfg, folder, name))
    stages("look inside", "decoders, latents of colours and shapes", partial(_inspect, cfg, folder))
    stages("trace", "one answer, back to the patches it came from", partial(_trace, cfg, folder))
    stages("examples", "where the graph's features are strongest", partial(_examples, cfg, folder))
    if not cfg.keep_activations:
        shutil.rmtree(store)
    _remember(cfg, folder, stages.done)
    report = write_report(folder)
    print(f"\nThe report: {report.resolve()}\nThe traced answer: {folder.resolve() / GRAPH_PAGE}")
    return report


def _fresh_folder(folder: Path) -> Path:
    """An empty folder that is marked as a demo's."""
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARK).is_file():
            raise UserError(
                f"--output_dir {folder}: holds files that no demo wrote; give another folder"
            )
        shutil.rmtree(folder)
    write_json(folder / MARK, {"format": "sparsify-vlm demo", "version": 1})
    return folder


def _capture_config(cfg: DemoConfig, store: Path) -> Any:
    from sparsify_vlm.data.capture import CaptureConfig

    return CaptureConfig(
        model=MODEL,
        dataset="shapes",
        data_args=f"size={cfg.train_scenes}",
        n_targets=8,
        output_dir=str(store),
        batch_size=BATCH,
    )


def _train_config(
    cfg: DemoConfig, store: Path, folder: Path, name: str, cross_layer: int
) -> TrainConfig:
    from sparsify_vlm.training import CoderConfig, TrainConfig

    return TrainConfig(
        sae=CoderConfig(
            transcode=True, cross_layer=cross_layer, num_latents=cfg.num_latents, k=cfg.k
        ),
        activations=str(store),
        batch_tokens=cfg.batch_tokens,
        max_steps=cfg.steps,
        epochs=1000,
        optimizer="adam",
        lr=cfg.lr,
        lr_warmup_steps=20,
        dead_feature_threshold=100_000,
        init_seeds=[cfg.seed],
        log_every=5,
        save_every=cfg.steps,
        save_dir=str(folder),
        run_name=name,
    )


def _heldout(cfg: DemoConfig) -> dict[str, Any]:
    """The held-out scenes in their own order, as options of `DataConfig`."""
    return {
        "dataset": "shapes",
        "split": "heldout",
        "data_args": f"size={cfg.heldout_scenes}",
        "shuffle_seed": -1,
    }


def _evaluate(cfg: DemoConfig, folder: Path, name: str) -> dict[str, Any]:
    from sparsify_vlm.replacement.evaluate import EvaluateConfig, evaluate

    return evaluate(
        EvaluateConfig(
            clt=str(folder / name),
            **_heldout(cfg),
            max_examples=None,
            batch_size=BATCH,
            output=str(folder / f"{name}.eval.json"),
            answers=str(folder / f"{name}.answers.jsonl"),
        )
    )


def _inspect(cfg: DemoConfig, folder: Path) -> None:
    """Write concepts.json, decoders.json and the pictures the report shows."""
    from sparsify_vlm.analysis.decoders import mean_write_norms
    from sparsify_vlm.coders import load_clt
    from sparsify_vlm.data import DataConfig, ShapesDataset, batches, open_samples
    from sparsify_vlm.data.shapes import PATCH_GRID
    from sparsify_vlm.features.firings import image_firings
    from sparsify_vlm.features.shapes import concept_latents
    from sparsify_vlm.models import load_model
    from sparsify_vlm.report.pictures import patch_overlay, png

    loaded, clt = load_model(MODEL), load_clt(folder / "clt")
    layers = json.loads((folder / "clt.eval.json").read_text("utf-8"))["layers"]
    norms = mean_write_norms(clt, [layer["sigma"] for layer in layers])
    write_json(folder / "decoders.json", {"mean_norm_by_sigma": norms})

    rows = ShapesDataset("heldout", cfg.heldout_scenes)
    samples = open_samples(DataConfig(**_heldout(cfg)), loaded)
    encoded = batches(samples, loaded, BATCH, ctx_len=2048)
    firings = image_firings(loaded, clt, encoded, (PATCH_GRID, PATCH_GRID))
    pictures = folder / "pictures"
    pictures.mkdir()
    table = []
    for concept in concept_latents(firings, rows):
        names = []
        for sample, activation in concept.examples:
            names.append(f"{concept.latent.concept}-{sample}.png")
            overlay = patch_overlay(rows[sample]["image"], activation, concept.top)
            (pictures / names[-1]).write_bytes(overlay)
        table.append(asdict(concept.latent) | {"images": names})
    write_json(folder / "concepts.json", table)
    examples = {"first": list(range(EXAMPLES)), "differing": _differing(folder)}
    write_json(folder / "examples.json", examples)
    for index in {index for group in examples.values() for index in group}:
        (pictures / f"scene-{index}.png").write_bytes(png(rows[index]["image"]))


def _trace(cfg: DemoConfig, folder: Path) -> None:
    """Write graph/: the first held-out question about the colour of one of several
    objects that the model answers rightly."""
    from sparsify_vlm.data import ShapesDataset
    from sparsify_vlm.graphs.config import TraceConfig
    from sparsify_vlm.graphs.tracing import trace

    rows = ShapesDataset("heldout", cfg.heldout_scenes)
    lines = (folder / "clt.answers.jsonl").read_text("utf-8").splitlines()
    scene = next(
        index
        for index, line in enumerate(map(json.loads, lines))
        if line["type"] == "colour"
        and line["right"]["model"]
        and len(rows[index]["scene"].objects) > 1
    )
    write_json(folder / LABELS, _labels(folder))
    trace(
        TraceConfig(
            clt=str(folder / "clt"),
            scene=scene,
            output_dir=str(folder / "graph"),
            slug="answer",
            patches=True,
            labels=str(folder / LABELS),
        )
    )


def _examples(cfg: DemoConfig, folder: Path) -> None:
    """Write the examples of the graph's features into its folder, and the graph's page."""
    from sparsify_vlm.features.config import ExamplesConfig
    from sparsify_vlm.features.examples import examples
    from sparsify_vlm.report.graph_page import write_standalone
    from sparsify_vlm.report.viewer.folder import read_folder

    graph, data = folder / "graph", _heldout(cfg)
    examples(
        ExamplesConfig(
            clt=str(folder / "clt"),
            graph=str(graph),
            **data,
            max_examples=SEARCHED,
            top=4,
            batch_size=BATCH,
        )
    )
    write_standalone(read_folder(graph), str(folder / GRAPH_PAGE))


def _labels(folder: Path) -> dict[str, str]:
    """The concepts that latents were found to stand for, by feature."""
    rows = json.loads((folder / "concepts.json").read_text("utf-8"))
    good = [row for row in rows if row["f1"] >= LEAST_F1]
    return {
        f"{row['layer']}_{row['latent']}": f"{row['concept']} (F1 {row['f1']:.2f})" for row in good
    }


def _differing(folder: Path) -> list[int]:
    """The first held-out questions that the model gets right and one of the replacements wrong."""
    files = (folder / f"{name}.answers.jsonl" for name in ("clt", "plt"))
    lines = [map(json.loads, file.read_text("utf-8").splitlines()) for file in files]
    found = [
        index
        for index, both in enumerate(zip(*lines, strict=True))
        if both[0]["right"]["model"] and not all(v for line in both for v in line["right"].values())
    ]
    return found[:DIFFERENCES]


def _remember(cfg: DemoConfig, folder: Path, stages: list[_Stage]) -> None:
    packages = ("sparsify-vlm", "torch", "transformers", "eai-sparsify")
    manifest = json.loads((folder / MARK).read_text("utf-8"))
    write_json(
        folder / MARK,
        manifest
        | {
            "settings": asdict(cfg),
            "stages": [asdict(stage) for stage in stages],
            "versions": {name: version(name) for name in packages}
            | {"python": platform.python_version()},
        },
    )
