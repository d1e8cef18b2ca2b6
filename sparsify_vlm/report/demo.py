"""The demo's report, from the files that the demo's stages left in one folder.

demo.json                       settings, stages with their seconds, versions
{clt,plt}/metrics.jsonl         training
{clt,plt}.eval.json             evaluations
{clt,plt}.answers.jsonl         generated answers, one line per held-out question
decoders.json                   mean decoder norms by σ of the target
concepts.json, examples.json    latents of colours and shapes, scenes to show
pictures/                       their pictures
graph/, graph.html              the traced answer and its page
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sparsify_vlm.errors import UserError
from sparsify_vlm.report import figures
from sparsify_vlm.report.html import number, percent, png_uri, svg, write_page
from sparsify_vlm.report.pictures import patch_overlay, png
from sparsify_vlm.report.viewer.folder import read_folder

CODERS = {
    "clt": "cross-layer",
    "same": "same-layer only",
    "plt": "per-layer",
}
TYPES = ("colour", "shape", "count", "existence")


def write_report(folder: Path) -> Path:
    """Write `report.html` into `folder` and return its path.

    Raises `UserError` when a file of a stage is missing.
    """
    demo = _read(folder / "demo.json")
    evaluations = {name: _read(folder / f"{name}.eval.json") for name in ("clt", "plt")}
    metrics = {name: _lines(folder / name / "metrics.jsonl") for name in ("clt", "plt")}
    settings = demo["settings"]
    path = folder / "report.html"
    write_page(
        path,
        "demo.html.j2",
        title="A cross-layer transcoder of tiny-llava",
        subtitle=_subtitle(settings, evaluations["clt"]),
        k=settings["k"],
        cards=_cards(evaluations["clt"], metrics["clt"], demo["stages"]),
        examples=_examples(folder, "first"),
        differing=_examples(folder, "differing"),
        n_heldout=evaluations["clt"]["n_samples"],
        table=_table(evaluations),
        figures={
            "fvu_by_layer": svg(figures.fvu_by_layer(_fvu_by_layer(evaluations))),
            "training": svg(
                figures.training_curves({CODERS[name]: lines for name, lines in metrics.items()})
            ),
            "heatmap": svg(
                figures.decoder_heatmap(_read(folder / "decoders.json")["mean_norm_by_sigma"])
            ),
        },
        trace=_trace(folder),
        concepts=_concepts(folder),
        stages=demo["stages"],
        commands=_commands(settings),
        versions=", ".join(f"{name} {number}" for name, number in demo["versions"].items()),
    )
    return path


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: not there; run the demo to its end first") from error


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError as error:
        raise UserError(f"{path}: not there; run the demo to its end first") from error
    return [json.loads(line) for line in text.splitlines()]


def _subtitle(settings: dict[str, Any], evaluation: dict[str, Any]) -> str:
    return (
        f"tiny-llava is a small vision-language model that answers questions about pictures of "
        f"coloured shapes. A transcoder with {settings['num_latents']} latents in each of "
        f"{len(evaluation['layers'])} layers, at most {settings['k']} of them active on a token, "
        f"was trained for {settings['steps']} steps to write what the model's MLPs write, each "
        "latent to its own and to all later layers."
    )


def _cards(
    evaluation: dict[str, Any], metrics: list[dict[str, Any]], stages: list[dict[str, Any]]
) -> list[dict[str, str]]:
    fvu, full = evaluation["mean_fvu"], evaluation["replacement"]["full"]
    dead = [d for layer in evaluation["layers"] if (d := layer["dead"]["all"]) is not None]
    kept = 1 - full["changed_of_correct"]["all"]
    seconds = sum(stage["seconds"] for stage in stages)
    return [
        {"value": percent(kept), "label": "of the model's right answers survive the replacement"},
        {"value": number(fvu["image"]), "label": "FVU on image tokens, mean over layers"},
        {"value": number(fvu["text"]), "label": "FVU on text tokens, mean over layers"},
        {"value": percent(1 - sum(dead) / len(dead), 0), "label": "of the latents are alive"},
        {"value": f"{metrics[-1]['tokens'] / 1e6:.1f} M", "label": "tokens trained on"},
        {"value": f"{seconds / 60:.1f} min", "label": "for everything on this page"},
    ]


def _examples(folder: Path, group: str) -> list[dict[str, Any]]:
    """What is shown of each scene of a group of examples.json."""
    clt, plt = (_lines(folder / f"{name}.answers.jsonl") for name in ("clt", "plt"))
    shown = []
    for index in _read(folder / "examples.json")[group]:
        picture, a, b = folder / "pictures" / f"scene-{index}.png", clt[index], plt[index]
        answers = [
            _answer("the model", a, "model"),
            _answer(CODERS["clt"], a, "full"),
            _answer(CODERS["same"], a, "same_layer_only"),
            _answer(CODERS["plt"], b, "full"),
        ]
        about = {"id": a["id"], "question": a["question"], "truth": a["truth"]}
        shown.append(about | {"image": png_uri(picture.read_bytes()), "answers": answers})
    return shown


def _answer(name: str, line: dict[str, Any], arm: str) -> dict[str, Any]:
    text = line["answers"][arm]
    shown = "(goes on)" if text is None else text or "(nothing)"
    return {"name": name, "text": shown, "right": line["right"][arm]}


def _arms(evaluations: dict[str, Any]) -> list[tuple[str, str, dict[str, Any], str]]:
    """(heading, evaluation's fvu key, evaluation, replacement arm) of each compared system."""
    return [
        ("cross-layer (CLT)", "mean_fvu", evaluations["clt"], "full"),
        ("CLT, same-layer only", "mean_fvu_same_layer_only", evaluations["clt"], "same_layer_only"),
        ("per-layer (PLT)", "mean_fvu", evaluations["plt"], "full"),
    ]


def _table(evaluations: dict[str, Any]) -> dict[str, Any]:
    """The systems side by side: the model itself, and the three replacements."""
    arms = _arms(evaluations)
    own = evaluations["clt"]["baseline"]
    replacements = [e["replacement"][arm] for _, _, e, arm in arms]

    def row(label: str, model: str, cells: list[str]) -> dict[str, Any]:
        return {"label": label, "cells": [model, *cells]}

    rows = [
        row(f"FVU, {role} tokens", "0", [number(e[key][role]) for _, key, e, _ in arms])
        for role in ("image", "text")
    ]
    for label, key, model in (
        ("cross-entropy of the answer (nats)", "cross_entropy", number(own["cross_entropy"])),
        ("cross-entropy recovered", "ce_recovered_mean", "1"),
        ("KL from the model (nats)", "kl", "0"),
    ):
        rows.append(row(label, model, [number(r[key]) for r in replacements]))
    rows.append(
        row("same top token", percent(1.0), [percent(r["top1_match"]) for r in replacements])
    )
    rows.append(
        row(
            "exact answers",
            percent(own["exact_match"]["all"]),
            [percent(r["exact_match"]["all"]) for r in replacements],
        )
    )
    for kind in TYPES:
        lost = [percent(r["changed_of_correct"].get(kind)) for r in replacements]
        rows.append(row(f"answers lost, {kind}", percent(0.0), lost))
    return {"columns": ["the model", *(heading for heading, *_ in arms)], "rows": rows}


def _fvu_by_layer(evaluations: dict[str, Any]) -> dict[str, dict[str, list[float | None]]]:
    keys = (("clt", "fvu"), ("clt", "fvu_same_layer_only"), ("plt", "fvu"))
    return {
        heading: {
            role: [layer[key][role] for layer in evaluations[coder]["layers"]]
            for role in ("image", "text")
        }
        for (coder, key), (heading, *_) in zip(keys, _arms(evaluations), strict=True)
    }


def _trace(folder: Path) -> dict[str, Any]:
    """The traced answer: its picture by what each patch does to it, and where to look further."""
    page = read_folder(folder / "graph").page
    vlm = _read(folder / "graph" / f"{page['slug']}.json")["metadata"]["vlm"]
    picture, grid = vlm["images"][0], vlm["patch_effects"][0]
    effects = np.asarray(grid["values"], np.float32)
    with Image.open(folder / "graph" / picture["file"]) as image:
        plain, overlay = png(image), patch_overlay(image, effects, float(effects.max()), scale=4)
    push = effects.clip(min=0)
    order = np.argsort(-push, axis=None)
    enough = int(np.searchsorted(push.flat[order].cumsum(), push.sum() / 2)) + 1
    scores = vlm["scores"]
    return {
        "question": vlm["question"],
        "answer": vlm["answer"].strip(),
        "picture": png_uri(plain),
        "overlay": png_uri(overlay),
        "patches": [
            {"row": i // effects.shape[1] + 1, "column": i % effects.shape[1] + 1, "effect": value}
            for i, value in zip(order.tolist(), push.flat[order].tolist(), strict=True)
        ][:enough],
        "all_patches": effects.size,
        "from_images": percent(scores["from_images"], 0),
        "from_words": percent(scores["from_words"], 0),
        "from_errors": percent(scores["from_errors"], 0),
        "replacement": percent(scores["replacement"], 0),
        "page": "graph.html",
    }


def _concepts(folder: Path) -> list[dict[str, Any]]:
    rows = _read(folder / "concepts.json")
    for row in rows:
        row["images"] = [
            png_uri((folder / "pictures" / name).read_bytes()) for name in row["images"]
        ]
    return sorted(rows, key=lambda row: -row["f1"])


def _commands(settings: dict[str, Any]) -> list[str]:
    s = settings
    return [
        "python scripts/capture_activations.py --model tiny-llava --dataset shapes "
        f"--data_args size={s['train_scenes']} --n_targets 8 --output_dir activations",
        "python -m sparsify tiny-llava --transcode --cross_layer 8 --activations activations "
        f"--num_latents {s['num_latents']} --k {s['k']} --optimizer adam --lr {s['lr']:g} "
        "--lr_warmup_steps 20 --dead_feature_threshold 100000 "
        f"--batch_tokens {s['batch_tokens']} --max_steps {s['steps']} "
        "--epochs 1000 --run_name clt",
        "sparsify-vlm evaluate checkpoints/clt shapes --split heldout",
        "sparsify-vlm trace checkpoints/clt --scene 0 --output_dir graph",
        "sparsify-vlm view graph",
    ]
