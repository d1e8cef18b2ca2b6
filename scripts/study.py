"""What cross-layer writes do in a text model and in a vision-language model: the whole study.

    python scripts/study.py --output_dir runs/study          # what `make study` runs
    python scripts/study.py --seeds 0 --steps 60             # a quick look

For tiny-llama (scenes told in words) and tiny-llava (scenes seen and told) and each seed: a
cross-layer transcoder (CLT), per-layer transcoders (PLT), and a CLT that starts from the PLT, all
from configs/study_llm.yaml and configs/study_vlm.yaml. Each CLT is analysed on held-out scenes with
the PLT as a control, the three seeds are compared, and docs/study.md is written from the results.
Every step is a command of its own and is skipped when its result is there: given again, the study
goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODELS = {"llm": "tiny-llama", "vlm": "tiny-llava"}
ARMS = ("plt", "clt", "warm")
"""Kinds of coders, in the order of training: `warm` is a CLT that starts from `plt`."""


@dataclass(frozen=True)
class Study:
    """Where the study is kept, and how large it is."""

    folder: Path
    seeds: Sequence[int]
    steps: int
    train_samples: int
    heldout_samples: int

    def store(self, model: str) -> Path:
        """The activations that all coders of a model are trained on."""
        return self.folder / f"{model}-activations"

    def coder(self, model: str, arm: str, seed: int) -> Path:
        """A trained coder."""
        return self.folder / f"{model}-{arm}-{seed}"

    def analysis(self, model: str, arm: str, seed: int) -> Path:
        """What `analyze` wrote about a coder."""
        return self.folder / f"{model}-{arm}-{seed}.analysis"


def main() -> None:
    """Run what is missing."""
    study = _arguments()
    start = time.monotonic()
    for model in MODELS:
        capture(study, model)
        for seed in study.seeds:
            for arm in ARMS:
                train(study, model, arm, seed)
            for arm in ("clt", "warm"):
                analyze(study, model, arm, seed)
    compare(study)
    print(f"\nThe study took {(time.monotonic() - start) / 60:.1f} minutes.")


def capture(study: Study, model: str) -> None:
    """Store the activations on training scenes, for all coders of `model`."""
    run(
        study.store(model) / "manifest.json",
        ["capture", MODELS[model], *_data(model, "train")],
        ["--max_examples", study.train_samples, "--output_dir", study.store(model)],
    )


def train(study: Study, model: str, arm: str, seed: int) -> None:
    """Train one coder from its YAML file."""
    folder = study.coder(model, arm, seed)
    more = {
        "plt": ["--cross_layer", 0],
        "clt": [],
        "warm": ["--finetune", study.coder(model, "plt", seed)],
    }
    run(
        folder / "clt.json",
        ["train", "--config", ROOT / "configs" / f"study_{model}.yaml"],
        ["--activations", study.store(model), "--init_seeds", seed, "--max_steps", study.steps],
        ["--save_every", study.steps, "--save_dir", study.folder, "--run_name", folder.name],
        more[arm],
    )


def analyze(study: Study, model: str, arm: str, seed: int) -> None:
    """The four experiments on one CLT, with the PLT of the same seed as a control."""
    folder = study.analysis(model, arm, seed)
    run(
        folder / "report.md",
        ["analyze", study.coder(model, arm, seed), *_data(model, "heldout")],
        ["--max_examples", study.heldout_samples, "--plt", study.coder(model, "plt", seed)],
        ["--output_dir", folder],
    )


def compare(study: Study) -> None:
    """The two models over all seeds."""
    for arm in ("clt", "warm"):
        folders = {
            model: [study.analysis(model, arm, seed) for seed in study.seeds] for model in MODELS
        }
        output = study.folder / f"{arm}.comparison"
        run(
            output / "report.md",
            ["compare", "--text", *folders["llm"], "--vlm", *folders["vlm"]],
            ["--output_dir", output],
        )


def run(result: Path, *parts: Sequence[object]) -> None:
    """Run `sparsify-vlm` with the words of `parts`, unless `result` is there; stop if it fails."""
    if result.exists():
        return
    words = [str(word) for part in parts for word in part]
    print(f"\n$ sparsify-vlm {' '.join(words)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "sparsify_vlm", *words], cwd=ROOT)
    if done.returncode:
        sys.exit(done.returncode)


def _data(model: str, split: str) -> list[str]:
    if model == "llm":
        return ["--dataset", "shapes", "--split", split]
    name = "study_mix" if split == "train" else "study_heldout"
    return ["--dataset_mix", f"configs/{name}.yaml"]


def _arguments() -> Study:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/study"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of each coder")
    parser.add_argument("--train_samples", type=int, default=5000)
    parser.add_argument("--heldout_samples", type=int, default=600)
    args = parser.parse_args()
    return Study(
        args.output_dir.resolve(), args.seeds, args.steps, args.train_samples, args.heldout_samples
    )


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()
