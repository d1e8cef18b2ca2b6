"""Does a traced answer lead to the object that was asked about? Measured on scenes that are known.

    python scripts/trace_ground_truth.py --output_dir runs/ground-truth          # trains its coder
    python scripts/trace_ground_truth.py --clt checkpoints/t --scenes 200 --swaps 100
    python scripts/trace_ground_truth.py --clt checkpoints/t --scenes 0 --figures docs/images

Held-out scenes with two objects or more, "what colour is the <shape>?" answered rightly by
tiny-llava. Where: the share of scenes in which the asked object's grid cell has the largest sum
over its image tokens, by the graph's signed total effects and influences, by gradient × input, and
by replacing a cell's image tokens by their means over scenes.

Swaps: the asked object is given a colour that is not in the scene. In the unchanged model, which
sees the first picture, features take on the values they have on the second: those for which the
graph of the first scene, of both, or of each predicts the largest change (target: second colour
minus first), or as many random active ones, or random others of the same layers and positions. The
share of scenes in which the answer becomes the second colour. Prints Markdown tables with Wilson's
95 % intervals; `--figures` draws them against the number of features, with three scenes.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from ground_truth.figures import EXAMPLES, draw
from ground_truth.scenes import Scenes
from ground_truth.swaps import swaps
from ground_truth.tables import tables
from ground_truth.where import Where

from sparsify_vlm import VLMReplacementModel
from sparsify_vlm.data.config import DataConfig
from sparsify_vlm.training import CoderConfig, RunConfig, TrainConfig, train

MODEL, LATENTS, K, LAYERS = "tiny-llava", 768, 16, 8


def main() -> None:
    """Train or load the coder, then measure, print and draw."""
    args = _arguments()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    model = VLMReplacementModel.from_pretrained(MODEL, args.clt or _trained(args))
    scenes = Scenes(model, args.seed)
    where = Where(scenes, args.nodes) if args.scenes else None
    found: list[dict[str, Any]] = []
    start = time.monotonic()
    for i, case in enumerate(scenes.cases()):
        one = where.measure(case) if where and i < args.scenes else {}
        if i < args.swaps:
            one["swaps"] = swaps(scenes, case, args.nodes, drawn=i < EXAMPLES)
        found.append(one)
        last = len(found) == max(args.scenes, args.swaps)
        if last or len(found) % 10 == 0:
            print(f"{len(found)} scenes, {time.monotonic() - start:.0f} s", flush=True)
            (args.output_dir / "scenes.json").write_text(json.dumps(found))
        if last:
            break
    print(tables(found, scenes.seen["asked"], scenes.seen["right"]))
    if args.figures:
        draw([one["swaps"] for one in found if one.get("swaps")], args.figures)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clt", default=None, help="a coder of tiny-llava; default: train one")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/ground-truth"))
    parser.add_argument(
        "--scenes", type=int, default=200, help="where do traces lead; 0: not asked"
    )
    parser.add_argument("--swaps", type=int, default=100, help="scenes with swaps")
    parser.add_argument("--figures", type=Path, default=None, help="a folder for figures of swaps")
    parser.add_argument("--steps", type=int, default=300, help="training steps of the coder")
    parser.add_argument("--nodes", type=int, default=1500, help="features that are nodes at most")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if max(args.scenes, args.swaps) < 1 or (args.figures and args.swaps < 1):
        parser.error("nothing to do: give --scenes or --swaps, and --swaps for --figures")
    return args


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


if __name__ == "__main__":
    main()
