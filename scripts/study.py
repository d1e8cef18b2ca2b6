"""What cross-layer writes do in a text model and in a vision-language model: the whole study.

    python scripts/study.py --output_dir runs/study          # what `make study` runs
    python scripts/study.py --seeds 0 1 --steps 60 --heldout_samples 60    # a quick look

For tiny-llama (scenes told in words) and tiny-llava (scenes seen and told) and each seed: per-layer
transcoders (PLT), a cross-layer transcoder (CLT), a CLT that starts from the PLT, and one trained
from zero for as many steps as those two together, all from configs/study_llm.yaml and
configs/study_vlm.yaml. Each CLT is analysed on held-out scenes with the
PLT as a control, the seeds are compared, and a page is written from the results. Every step is a
`sparsify-vlm` command, the first line of its log in the folder, and is skipped when its result is
there: given again, the study goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from study_page import write_page

ROOT = Path(__file__).resolve().parents[1]
MODELS = {"llm": "tiny-llama", "vlm": "tiny-llava"}
ARMS = ("plt", "clt", "warm", "long")
"""Kinds of coders, in the order of training: `warm` is a CLT that starts from `plt`, `long` a CLT
that takes as many steps as both."""
ANALYSED = ("clt", "warm", "long")


@dataclass(frozen=True)
class Study:
    """Where the study is kept, and how large it is."""

    folder: Path
    seeds: Sequence[int]
    steps: int
    train_samples: int
    heldout_samples: int
    jobs: int

    def store(self, model: str) -> Path:
        """The activations that all coders of a model are trained on."""
        return self.folder / f"{model}-activations"

    def coder(self, model: str, arm: str, seed: int) -> Path:
        """A trained coder."""
        return self.folder / f"{model}-{arm}-{seed}"

    def analysis(self, model: str, arm: str, seed: int) -> Path:
        """What `analyze` wrote about a coder."""
        return self.folder / f"{model}-{arm}-{seed}.analysis"

    def comparison(self, arm: str) -> Path:
        """What `compare` wrote about the two models' coders of one kind."""
        return self.folder / f"{arm}.comparison"


class StepFailed(Exception):
    """A step of the study did not end well."""


def main() -> int:
    """Run what is missing; the exit status."""
    study, page = _arguments()
    study.folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    try:
        with ThreadPoolExecutor(study.jobs) as pool:
            list(pool.map(lambda model: capture(study, model), MODELS))
            chains = [(model, seed) for seed in study.seeds for model in MODELS]
            list(pool.map(lambda chain: train_and_analyze(study, *chain), chains))
            list(pool.map(lambda arm: compare(study, arm), ANALYSED))
    except StepFailed as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    write_page(
        page,
        comparisons={arm: study.comparison(arm) for arm in ANALYSED},
        analyses={
            (model, arm): [study.analysis(model, arm, seed) for seed in study.seeds]
            for model in MODELS
            for arm in ANALYSED
        },
    )
    print(f"The study took {(time.monotonic() - start) / 60:.1f} minutes. The page: {page}")
    return 0


def train_and_analyze(study: Study, model: str, seed: int) -> None:
    """All coders of one model and seed."""
    for arm in ARMS:
        train(study, model, arm, seed)
    for arm in ANALYSED:
        analyze(study, model, arm, seed)


def capture(study: Study, model: str) -> None:
    """Store the activations on training scenes, for all coders of `model`."""
    store = study.store(model)
    words = ["capture", MODELS[model], *_data(model, "train")]
    words += ["--max_examples", study.train_samples, "--output_dir", store]
    run(study, store, None, words)  # ends at once where the store is complete


def train(study: Study, model: str, arm: str, seed: int) -> None:
    """Train one coder from its YAML file."""
    coder = study.coder(model, arm, seed)
    words = ["train", "--config", f"configs/study_{model}.yaml"]
    words += ["--activations", study.store(model), "--init_seeds", seed]
    steps = 2 * study.steps if arm == "long" else study.steps
    words += ["--max_steps", steps, "--save_every", steps]
    words += ["--save_dir", study.folder, "--run_name", coder.name]
    if arm == "plt":
        words += ["--cross_layer", 0]
    if arm == "warm":
        words += ["--finetune", study.coder(model, "plt", seed)]
    run(study, coder, "clt.json", words)


def analyze(study: Study, model: str, arm: str, seed: int) -> None:
    """The four experiments on one CLT, with the PLT of the same seed as a control."""
    folder = study.analysis(model, arm, seed)
    words = ["analyze", study.coder(model, arm, seed), *_data(model, "heldout")]
    words += ["--max_examples", study.heldout_samples, "--plt", study.coder(model, "plt", seed)]
    words += ["--fit_activations", study.store(model), "--seed", seed, "--output_dir", folder]
    run(study, folder, "report.md", words)


def compare(study: Study, arm: str) -> None:
    """The two models over all seeds."""
    folders = {
        model: [study.analysis(model, arm, seed) for seed in study.seeds] for model in MODELS
    }
    folder = study.comparison(arm)
    words = ["compare", "--text", *folders["llm"], "--vlm", *folders["vlm"]]
    run(study, folder, "report.md", [*words, "--output_dir", folder])


def run(study: Study, folder: Path, result: str | None, words: Sequence[object]) -> None:
    """Run `sparsify-vlm WORDS`, which makes `folder`, unless its file `result` is there.

    What it prints goes to a log beside the folder. Raises `StepFailed` with its last line.
    """
    log = folder.with_name(folder.name + ".log")
    if result is not None and (folder / result).exists():
        return
    texts = [str(word) for word in words]
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as out:
        print(f"$ sparsify-vlm {shlex.join(texts)}", file=out, flush=True)
        command = [sys.executable, "-m", "sparsify_vlm", *texts]
        status = subprocess.run(
            command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env=_environment(study)
        ).returncode
    if status:
        last = log.read_text(encoding="utf-8").strip().splitlines()[-1]
        raise StepFailed(f"{folder.name}: {last} (all of it in {log})")
    print(f"{texts[0]:>8} {folder.name}: {time.monotonic() - start:.0f} s", flush=True)


def _environment(study: Study) -> dict[str, str]:
    threads = str(max(1, (os.cpu_count() or 1) // study.jobs))
    return {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": threads} | os.environ


def _data(model: str, split: str) -> list[str]:
    if model == "llm":
        return ["--dataset", "shapes", "--split", split]
    name = "study_mix" if split == "train" else "study_heldout"
    return ["--dataset_mix", f"configs/{name}.yaml"]


def _arguments() -> tuple[Study, Path]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/study"))
    parser.add_argument("--page", type=Path, help="default: study.md in the output folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of each coder")
    parser.add_argument("--train_samples", type=int, default=5000)
    parser.add_argument("--heldout_samples", type=int, default=400)
    parser.add_argument("--jobs", type=int, default=2, help="steps that run side by side")
    args = parser.parse_args()
    folder = args.output_dir.resolve()
    study = Study(
        folder, args.seeds, args.steps, args.train_samples, args.heldout_samples, args.jobs
    )
    return study, (args.page or folder / "study.md").resolve()


if __name__ == "__main__":
    sys.exit(main())
