"""Make the embedded pair, tiny-llama and tiny-llava, from a seed.

    python scripts/train_tiny_llava.py --output runs/pair

1. The vision tower learns to name the colour and shape in each patch.
2. tiny-llama learns word lists, then questions about scenes told in words.
3. tiny-llava, from both, learns questions about scenes seen.
4. Both are written as Hugging Face folders, in bfloat16, and measured on held-out scenes.

Stages 1 to 3 each leave a file in OUTPUT/stages: the same command continues after the last one.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tiny_llava.architecture import (
    D_MODEL,
    build_processor,
    build_tokenizer,
    llava_config,
    text_config,
    vision_config,
)
from tiny_llava.batches import Batch, lists_batch, questions_batch
from tiny_llava.evaluate import accuracy, locality, question_prior
from tiny_llava.model import loss, noisy_writes
from tiny_llava.stages import Schedule, StageFile, fingerprint, optimize, seeded
from tiny_llava.vision import PatchHeads, patches_batch
from torch import Tensor, nn
from transformers import CLIPVisionModel, LlamaForCausalLM, LlavaForConditionalGeneration

from sparsify_vlm.data.shapes import QUESTION_TYPES
from sparsify_vlm.errors import UserError
from sparsify_vlm.files import write_json

LOOKUP = ("colour", "shape")
# Page faults dominate a training step in a virtual machine: keep freed memory in the process.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    "MALLOC_TOP_PAD_": str(1 << 28),
}


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights besides the seed and the device."""

    vision: Schedule = field(default_factory=lambda: Schedule(lr=2e-3, weight_decay=0.05))
    vision_steps: int = 700
    vision_rows: int = 64
    base: Schedule = field(default_factory=lambda: Schedule(lr=3e-3))
    list_steps: int = 300
    lookup_steps: int = 80
    told_steps: int = 400
    vlm: Schedule = field(default_factory=lambda: Schedule(lr=2e-3, tower_lr_factor=0.1))
    seen_lookup_steps: int = 60
    seen_steps: int = 500
    rows: int = 48
    questions: int = 8
    lookups: int = 6
    told_text_weight: float = 0.05
    seen_text_weight: float = 0.02
    noise: float = 0.2
    noise_rise: int = 100
    """Steps over which the noise on the MLPs' writes grows to `noise`."""
    initializer_range: float = 0.06


@dataclass(frozen=True)
class Run:
    """One run of the script: where it writes, from which seed, on what."""

    output: Path
    seed: int
    device: torch.device
    recipe: Recipe

    def stage(self, name: str, train: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The weights of stage `name`: those on disk if it is done, else trained and saved."""
        mark = fingerprint(self.recipe, self.seed, self.device.type)
        file = StageFile(self.output / "stages" / f"{name}.safetensors", mark)
        weights = file.load()
        if weights is None:
            weights = train()
            file.save(weights)
        else:
            print(f"{name}: done before, read from {file.path}", flush=True)
        return weights


def train_vision(run: Run) -> dict[str, Tensor]:
    """Stage 1: the vision tower's weights."""
    recipe = run.recipe
    rng = seeded(run.seed, "vision")
    tower = CLIPVisionModel(vision_config()).to(run.device)
    heads = PatchHeads(D_MODEL).to(run.device)

    def loss_at(_step: int) -> Tensor:
        pixels, labels = patches_batch(rng, recipe.vision_rows, "train")
        states = tower(pixels.to(run.device)).last_hidden_state[:, 1:]
        return heads.loss(states, labels.to(run.device))

    optimize("vision tower", [tower, heads], recipe.vision, recipe.vision_steps, loss_at)
    return tower.state_dict()


def train_base(run: Run) -> dict[str, Tensor]:
    """Stage 2: tiny-llama's weights."""
    recipe = run.recipe
    rng = seeded(run.seed, "base")
    model = new_base(recipe).to(run.device)
    lookups_from = recipe.list_steps
    all_from = lookups_from + recipe.lookup_steps

    def batch_at(step: int) -> Batch:
        if step < lookups_from:
            return lists_batch(rng, recipe.rows)
        types, count = (
            (LOOKUP, recipe.lookups) if step < all_from else (QUESTION_TYPES, recipe.questions)
        )
        return questions_batch(rng, recipe.rows, "train", types, count, seen=False)

    def loss_at(step: int) -> Tensor:
        with noisy_writes(model, noise_at(recipe, step - all_from)):
            return loss(model, batch_at(step).to(run.device), recipe.told_text_weight)

    optimize("tiny-llama", [model], recipe.base, all_from + recipe.told_steps, loss_at)
    return model.state_dict()


def train_vlm(run: Run, vision: dict[str, Tensor], base: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stage 3: tiny-llava's weights, from the vision tower's and tiny-llama's."""
    recipe = run.recipe
    rng = seeded(run.seed, "vlm")
    model = new_vlm(vision, base).to(run.device)
    all_from = recipe.seen_lookup_steps

    def loss_at(step: int) -> Tensor:
        types = LOOKUP if step < all_from else QUESTION_TYPES
        batch = questions_batch(rng, recipe.rows, "train", types, recipe.questions, seen=True)
        with noisy_writes(model, noise_at(recipe, step - all_from)):
            return loss(model, batch.to(run.device), recipe.seen_text_weight)

    optimize("tiny-llava", [model], recipe.vlm, all_from + recipe.seen_steps, loss_at)
    return model.state_dict()


def noise_at(recipe: Recipe, step: int) -> float:
    """The noise on the MLPs' writes at `step` of the questions of all types."""
    return recipe.noise * min(1.0, max(0.0, step / recipe.noise_rise))


def new_base(recipe: Recipe) -> LlamaForCausalLM:
    """An untrained tiny-llama. Its initial weights are larger than the default 0.02, which leaves
    attention flat for hundreds of steps at this width."""
    config = text_config()
    config.initializer_range = recipe.initializer_range
    return LlamaForCausalLM(config)


def new_vlm(vision: dict[str, Tensor], base: dict[str, Tensor]) -> LlavaForConditionalGeneration:
    """tiny-llava before its tuning: a trained tower and decoder, a random projector between."""
    model = LlavaForConditionalGeneration(llava_config())
    for parameter in model.model.multi_modal_projector.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=D_MODEL**-0.5)
    model.model.vision_tower.load_state_dict(vision)
    decoder = {k.removeprefix("model."): v for k, v in base.items() if k.startswith("model.")}
    model.get_decoder().load_state_dict(decoder)
    model.lm_head.load_state_dict({"weight": base["lm_head.weight"]})
    return model


def save_folder(model: nn.Module, processor: object, folder: Path) -> None:
    """Write a Hugging Face folder in bfloat16, readable by everyone; it appears whole or not."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(temporary)
    processor.save_pretrained(temporary)
    for path in temporary.iterdir():
        path.chmod(0o644)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def measure(
    output: Path, seed: int, device: torch.device, scenes: int = 1000
) -> dict[str, dict[str, float]]:
    """Held-out accuracy by question type of the two folders, with controls, and locality."""
    llama = LlamaForCausalLM.from_pretrained(output / "tiny-llama", dtype=torch.float32).to(device)
    llava = LlavaForConditionalGeneration.from_pretrained(
        output / "tiny-llava", dtype=torch.float32
    ).to(device)
    return {
        "tiny-llama, scene told": accuracy(llama, seed, scenes, seen=False),
        "tiny-llava, scene seen": accuracy(llava, seed, scenes, seen=True),
        "tiny-llava, other image": accuracy(llava, seed, scenes, seen=True, wrong_image=True),
        "question alone": question_prior(seed, 20 * scenes),
        "hurt most at asked cell": locality(llava, seed, scenes),
    }


def print_table(table: dict[str, dict[str, float]]) -> None:
    """One line per measurement, one column per question type."""
    print(f"{'held-out exact match':26s}" + "".join(f"{kind:>11s}" for kind in QUESTION_TYPES))
    for name, row in table.items():
        cells = (f"{row[kind]:11.3f}" if kind in row else " " * 11 for kind in QUESTION_TYPES)
        print(f"{name:26s}" + "".join(cells))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        self.exit(2, f"train_tiny_llava.py: {message}; see --help\n")


def parse(arguments: list[str]) -> Run:
    """The command line as a `Run`. Raises `UserError` for what cannot be."""
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for stages and pair")
    parser.add_argument("--seed", type=int, default=0, help="decides weights, scenes and noise")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="more gain little at this size")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device here; use --device cpu")
    if given.seed < 0 or given.threads < 1:
        raise UserError("--seed must be 0 or more and --threads 1 or more")
    if given.output.exists() and not given.output.is_dir():
        raise UserError(f"--output {given.output} is a file; name a folder")
    torch.set_num_threads(given.threads)
    return Run(given.output, given.seed, torch.device(given.device), Recipe())


def restart_with_allocator() -> None:
    """Start this process anew with `ALLOCATOR` set: glibc reads it only when a process starts."""
    if sys.platform == "linux" and not ALLOCATOR.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR})


def make_pair(run: Run) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of tiny-llama and tiny-llava; stages that are done are read, not repeated."""
    vision = run.stage("vision", lambda: train_vision(run))
    base = run.stage("base", lambda: train_base(run))
    vlm = run.stage("vlm", lambda: train_vlm(run, vision, base))
    return base, vlm


def write_folders(run: Run, base: dict[str, Tensor], vlm: dict[str, Tensor]) -> None:
    """Write OUTPUT/tiny-llama and OUTPUT/tiny-llava."""
    llama, llava = LlamaForCausalLM(text_config()), LlavaForConditionalGeneration(llava_config())
    llama.load_state_dict(base)
    llava.load_state_dict(vlm)
    save_folder(llama, build_tokenizer(), run.output / "tiny-llama")
    save_folder(llava, build_processor(), run.output / "tiny-llava")


def main() -> None:
    """Train what is not trained yet, write both folders, measure them."""
    run = parse(sys.argv[1:])
    restart_with_allocator()
    write_folders(run, *make_pair(run))
    table = measure(run.output, run.seed, run.device)
    write_json(run.output / "accuracy.json", table)
    print_table(table)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"train_tiny_llava.py: {error}")
