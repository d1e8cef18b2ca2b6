"""Train coders on tiny-llava that differ in one thing and compare them on held-out scenes.

    python scripts/compare_coders.py --output_dir runs/compare            # all of it, 3 seeds
    python scripts/compare_coders.py --only paths --seeds 0 --steps 60

`paths`: the same cross-layer transcoder through the reference kernels and through the default ones.
`coders`: a cross-layer transcoder (CLT) against per-layer ones (PLT) of equal latents, of equal
parameters, and of equal active latents per target; and a CLT warm-started from the PLT. Every run
sees the same tokens. Finished runs are kept: given again, the command goes on. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsify_vlm.data.capture import CaptureConfig, capture
from sparsify_vlm.replacement.config import EvaluateConfig
from sparsify_vlm.replacement.evaluate import evaluate
from sparsify_vlm.training import CoderConfig, TrainConfig, train

LATENTS, K, LAYERS = 768, 16, 8
PAIRS = LAYERS * (LAYERS + 1) // 2
SAME_SIZE = LATENTS * (LAYERS + PAIRS) // (2 * LAYERS)
"""Latents of per-layer coders with as many weights: S + P tables of F rows against 2 S."""
SAME_ACTIVE = K * PAIRS // LAYERS
"""k of per-layer coders where a target is written to by as many active latents on average."""


@dataclass
class Arm:
    """One kind of coder."""

    name: str
    coder: dict[str, Any]
    kernels: str | None = None
    after: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)


CLT = {"cross_layer": LAYERS, "num_latents": LATENTS, "k": K}
PLT = CLT | {"cross_layer": 1}
ARMS = {
    "paths": [
        Arm("reference kernels", CLT, "eager"),
        Arm("default kernels", CLT),
        Arm("default kernels, bf16 selection", CLT, settings={"bf16_selection": True}),
    ],
    "coders": [
        Arm("CLT", CLT),
        Arm("PLT, equal latents and L0", PLT),
        Arm("PLT, equal parameters", PLT | {"num_latents": SAME_SIZE}),
        Arm("PLT, equal active latents per target", PLT | {"k": SAME_ACTIVE}),
        Arm("CLT started from the PLT", CLT, after="PLT, equal latents and L0"),
    ],
}


def main() -> None:
    """Train and evaluate what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/compare"))
    parser.add_argument("--only", choices=ARMS, nargs="*", default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--heldout", type=int, default=300)
    args = parser.parse_args()
    store = args.output_dir / "store"
    if not (store / "manifest.json").exists():
        sheet = {"dataset": "shapes", "max_examples": args.samples, "model": "tiny-llava"}
        capture(CaptureConfig(**sheet, device="cpu", output_dir=str(store)))
    for which in args.only:
        found = {
            arm.name: [_figures(arm, seed, args, store) for seed in args.seeds]
            for arm in ARMS[which]
        }
        _print(which, found, args)


def _figures(arm: Arm, seed: int, args: argparse.Namespace, store: Path) -> dict[str, float]:
    """FVU and lost answers of one run, trained and evaluated unless that was done before."""
    name = _run_name(arm.name, seed)
    result = args.output_dir / f"{name}.json"
    if result.exists():
        return json.loads(result.read_text())
    start = None if arm.after is None else str(args.output_dir / _run_name(arm.after, seed))
    training = TrainConfig(
        CoderConfig(transcode=True, **arm.coder),
        activations=str(store),
        batch_tokens=3072,
        max_steps=args.steps,
        optimizer="adam",
        lr=2e-3,
        lr_warmup_steps=20,
        log_every=10,
        save_every=args.steps,
        epochs=1000,
        init_seeds=[seed],
        save_dir=str(args.output_dir),
        run_name=name,
        overwrite=(args.output_dir / name).exists(),
        finetune=start,
        **arm.settings,
    )
    if arm.kernels is not None:
        os.environ["SPARSIFY_VLM_KERNELS"] = arm.kernels
    try:
        folder = train(training)
    finally:
        os.environ.pop("SPARSIFY_VLM_KERNELS", None)
    output = args.output_dir / f"{name}.evaluation.json"
    cfg = EvaluateConfig(
        clt=str(folder),
        dataset="shapes",
        data_args=f"size={args.heldout}",
        device="cpu",
        output=str(output),
    )
    figures = evaluate(cfg)
    row = _row(figures)
    result.write_text(json.dumps(row))
    return row


def _run_name(name: str, seed: int) -> str:
    return name.replace(" ", "-").replace(",", "") + f"-{seed}"


def _row(figures: dict[str, Any]) -> dict[str, float]:
    fvu, spliced = figures["mean_fvu"], figures["replacement"]["full"]
    return {
        "FVU, image tokens": fvu["image"],
        "FVU, text tokens": fvu["text"],
        "KL, nats": spliced["kl"],
        "right answers lost": spliced["changed_of_correct"]["all"],
    }


def _print(which: str, found: dict[str, list[dict[str, float]]], args: argparse.Namespace) -> None:
    columns = list(next(iter(found.values()))[0])
    print(f"\n{which}: {args.steps} steps, seeds {args.seeds}, mean ± standard deviation\n")
    print("| | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name, rows in found.items():
        print(f"| {name} | " + " | ".join(_spread([r[c] for r in rows]) for c in columns) + " |")


def _spread(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f} ± {spread:.4f}"


if __name__ == "__main__":
    main()
