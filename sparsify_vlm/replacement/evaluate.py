"""`evaluate`: how well a coder reconstructs, and what the model does with its MLPs replaced.

1. Every batch runs through the model as it is: FVU, L0 and dead latents on clean inputs, the
   model's own predictions, the mean of every y.
2. The same batch runs with all MLPs replaced at once: by the coder, by the coder without its cross
   writes, and by zeros.
3. All batches run once more with each MLP replaced by the mean of its y over these tokens.
4. Samples with a reference answer are answered greedily by the model and by the replaced ones.

Sums are kept, never activations. docs/evaluate.md defines every figure.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsify_vlm.coders import load_clt
from sparsify_vlm.data import DataConfig, EncodedBatch, batches, open_samples, prefetched
from sparsify_vlm.errors import UserError
from sparsify_vlm.files import check_output, has_format, write_json, write_text
from sparsify_vlm.models import ROLE_NAMES, Role, TokenTable, record_tokens
from sparsify_vlm.progress import Progress
from sparsify_vlm.replacement.ablation import Ablation
from sparsify_vlm.replacement.answers import answer_samples, reference_answers
from sparsify_vlm.replacement.config import EvaluateConfig
from sparsify_vlm.replacement.loading import load_replacement
from sparsify_vlm.replacement.measures import (
    ARMS,
    AnswerCounts,
    LayerSums,
    Predictions,
    distinct_arms,
    mean_over_layers,
    recovered,
)
from sparsify_vlm.replacement.model import VLMReplacementModel
from sparsify_vlm.replacement.tables import print_evaluation

if TYPE_CHECKING:
    from sparsify_vlm.data import SampleSource

FORMAT, VERSION = "sparsify-vlm evaluation", 1
ABLATIONS: dict[str, Ablation | None] = {"full": None, "same_layer_only": Ablation(cross=True)}
Figures = dict[str, Any]


def evaluate(cfg: EvaluateConfig) -> Figures:
    """Load coder and model, measure, print the tables and write `cfg.output`.

    Returns what was written. Raises `UserError` for a coder, model or dataset that cannot be used.
    """
    _check_outputs(cfg)
    clt = load_clt(cfg.clt)
    if cfg.filter_bos is not None:
        clt.cfg.training["filter_bos"] = cfg.filter_bos
    clt.cfg.input_site = cfg.input_site or clt.cfg.input_site
    model = load_replacement(cfg, clt, cfg.clt)
    figures = measure(model, cfg)
    write_json(Path(cfg.output), figures)
    print_evaluation(figures)
    print(f"Written to {cfg.output}.")
    return figures


def _check_outputs(cfg: EvaluateConfig) -> None:
    """Refuse, before any work, files that cannot be written or hold something else."""
    check_output("--output", cfg.output, lambda text: has_format(text, FORMAT))
    if cfg.answers is not None:
        check_output("--answers", cfg.answers, _are_answers)
        if Path(cfg.output).resolve() == Path(cfg.answers).resolve():
            raise UserError(f"--output and --answers are both {cfg.output}: give two files")


def _are_answers(text: str) -> bool:
    """Whether `text` is what `--answers` writes."""
    try:
        line = json.loads(text.partition("\n")[0])
    except ValueError:
        return False
    return isinstance(line, dict) and {"truth", "answers", "right"} <= line.keys()


def measure(model: VLMReplacementModel, cfg: EvaluateConfig, *, quiet: bool = False) -> Figures:
    """The figures of docs/evaluate.md for `model` on the dataset of `cfg`, as plain data.

    Raises `UserError` when there is no token to measure on or an activation is not finite.
    """
    source = _open(cfg, model)
    sums = _Sums(model, cfg)
    with _progress("Evaluating", source, quiet) as progress:
        for batch in _batches(source, model, cfg):
            sums.add(batch)
            progress.update(len(batch))
    if float(sums.layers.tokens[0]) == 0:
        raise UserError(f"{source.name} ({source.cfg.split}) has no token to measure on")
    if sums.predictions["model"].tokens:
        means = sums.layers.mean_y()
        with _progress("Mean ablation", source, quiet) as progress:
            for batch in _batches(source, model, cfg):
                sums.add_mean_ablated(batch, means)
                progress.update(len(batch))
    answers = AnswerCounts()
    lines: list[dict[str, Any]] = []
    if sums.references:
        arms = {arm: ABLATIONS[arm] for arm in distinct_arms(model.clt.cfg)}
        with _progress("Answering", source, quiet) as progress:
            for batch in _batches(source, model, cfg, with_answer=False):
                lines += answer_samples(model, batch, sums.references, arms, answers)
                progress.update(len(batch))
    if cfg.answers is not None:
        write_text(Path(cfg.answers), "".join(json.dumps(line) + "\n" for line in lines))
    return _figures(model, cfg, source, sums, answers)


def _open(cfg: EvaluateConfig, model: VLMReplacementModel) -> SampleSource:
    data = DataConfig(**{f.name: getattr(cfg, f.name) for f in fields(DataConfig)})
    return open_samples(held_out(data, model.loaded.name), model.loaded)


def held_out(data: DataConfig, model_name: str) -> DataConfig:
    """`data` with a split where it names none: `heldout` of shapes, `validation` of others."""
    if data.split:
        return data
    own = data.dataset is None and data.dataset_mix is None
    shapes = data.dataset == "shapes" or (own and model_name.startswith("tiny-"))
    return replace(data, split="heldout" if shapes else "validation")


def _batches(
    source: SampleSource, model: VLMReplacementModel, cfg: EvaluateConfig, with_answer: bool = True
) -> Iterator[EncodedBatch]:
    made = batches(source, model.loaded, cfg.batch_size, cfg.ctx_len, with_answer=with_answer)
    return prefetched(with_masks(made))


def with_masks(made: Iterator[EncodedBatch]) -> Iterator[EncodedBatch]:
    """The batches that have samples, their answers found in the thread that makes the batches.

    A tokenizer keeps its padding as a state: two threads that use it at once spoil each other's.
    """
    for batch in made:
        if len(batch):
            _ = batch.answer_mask
            yield batch


def _progress(label: str, source: SampleSource, quiet: bool) -> Progress:
    return Progress(label, source.size, unit="samples", quiet=quiet)


class _Sums:
    """Everything that is summed over batches."""

    def __init__(self, model: VLMReplacementModel, cfg: EvaluateConfig) -> None:
        self.model, self.cfg = model, cfg
        self.layers = LayerSums(model.clt)
        arms = ("model", *distinct_arms(model.clt.cfg), "zero", "mean")
        self.predictions = {arm: Predictions() for arm in arms}
        self.samples = 0
        self.roles = torch.zeros(len(Role), dtype=torch.int64)
        self.excluded = 0
        self.references: dict[str, tuple[int, ...]] = {}

    def add(self, batch: EncodedBatch) -> None:
        """Steps 1 and 2 for one batch."""
        model = self.model
        table = record_tokens(
            model.loaded, batch.inputs, model.input_site, model.layers, logits=True
        )
        self._add_layers(table)
        self.samples += len(batch)
        self.references |= reference_answers(model.loaded, batch, self.cfg.max_new_tokens)
        assert table.logits is not None
        asked = self._asked(batch)
        if asked is None:
            return
        own = table.logits[:, :-1][asked.scored].float().log_softmax(-1)
        self.predictions["model"].add(own, asked.labels, own)
        for arm in distinct_arms(model.clt.cfg):
            self._add_spliced(arm, asked, batch, model.replaced(ABLATIONS[arm]), own)
        zeros = torch.zeros(len(model.layers), model.clt.cfg.d_model)
        self._add_spliced("zero", asked, batch, self._constant(zeros))

    def add_mean_ablated(self, batch: EncodedBatch, means: Tensor) -> None:
        """Step 3 for one batch."""
        asked = self._asked(batch)
        if asked is not None:
            self._add_spliced("mean", asked, batch, self._constant(means))

    def _add_layers(self, table: TokenTable) -> None:
        check_finite(table.x, table.y, self.model.clt.cfg.hookpoints)
        counted = ~self.model.excluded.of(table.input_ids, table.position)
        self.excluded += int((~counted).sum())
        self.roles += torch.bincount(table.role[counted].cpu(), minlength=len(Role))
        self.layers.add(table.x[:, counted], table.y[:, counted], table.role[counted])

    def _asked(self, batch: EncodedBatch) -> _Asked | None:
        """The predictions that are scored; None if the batch has none."""
        roles = self.model.loaded.stack.roles(batch.inputs)
        scored = scored_tokens(batch, roles)[:, 1:]
        if not bool(scored.any()):
            return None
        labels = batch.inputs["input_ids"][:, 1:][scored]
        device = self.model.loaded.device
        return _Asked(scored.to(device), labels.to(device))

    def _add_spliced(
        self,
        arm: str,
        asked: _Asked,
        batch: EncodedBatch,
        splice: AbstractContextManager[None],
        own: Tensor | None = None,
    ) -> None:
        with splice:
            logits = self.model.loaded.forward(batch.inputs, logits=True).logits
        self.predictions[arm].add(logits[:, :-1][asked.scored], asked.labels, own)

    def _constant(self, values: Tensor) -> AbstractContextManager[None]:
        """Every MLP a coder writes to writes its row of `values` [L, d] instead."""
        targets = self.model.clt.cfg.target_layers()
        return self.model.writing(
            lambda layer, x: values[layer].to(x).expand_as(x) if layer in targets else None
        )


@dataclass
class _Asked:
    """The predictions of one batch that are scored, N in number."""

    scored: Tensor
    """bool [B, S − 1]: whether the next token is scored."""
    labels: Tensor
    """The next tokens, [N]."""


def scored_tokens(batch: EncodedBatch, roles: Tensor) -> Tensor:
    """The tokens whose prediction is scored, bool [B, S]; roles [B, S].

    Of a chat sample those of its last answer with the end-of-turn token (none without an answer),
    of plain text all but the first.
    """
    present = roles != Role.PAD
    scored = present & (present.cumsum(1) > 1)
    chat = torch.tensor([sample.kind != "text" for sample in batch.samples])
    if bool(chat.any()):
        mask = batch.answer_mask
        assert mask is not None  # batches are encoded with answers here
        scored[chat] = mask[chat]
    return scored


def check_finite(x: Tensor, y: Tensor, hookpoints: Sequence[str]) -> None:
    """Raise `UserError` naming the layer whose x or y, both [L, T, d], is not finite."""
    fine = [values.isfinite().flatten(1).all(1).tolist() for values in (x, y)]
    for name, *layer in zip(hookpoints, *fine, strict=True):
        for what, good in zip(("input", "output"), layer, strict=True):
            if not good:
                raise UserError(
                    f"the {what} of {name} has NaN or infinite values: the model overflows in its "
                    "dtype (try --dtype float32) or its weights are broken"
                )


def _figures(
    model: VLMReplacementModel,
    cfg: EvaluateConfig,
    source: SampleSource,
    sums: _Sums,
    answers: AnswerCounts,
) -> Figures:
    predictions, clt = sums.predictions, model.clt.cfg
    layers = sums.layers
    by_arm = {arm: layers.by_group(layers.fvu(arm)) for arm in ARMS}
    rows = zip(
        clt.hookpoints,
        by_arm[ARMS[0]],
        by_arm[ARMS[1]],
        layers.by_group(layers.l0()),
        layers.by_group(layers.dead()),
        layers.sigma().tolist(),
        strict=True,
    )
    own = predictions["model"].cross_entropy
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": model.loaded.name,
        "clt": cfg.clt,
        "dataset": source.name,
        "split": source.cfg.split,
        "n_samples": sums.samples,
        "skipped": source.bad,
        "tokens": {n: int(sums.roles[r]) for n, r in ROLE_NAMES.items() if r != Role.PAD},
        "excluded_tokens": sums.excluded,
        "scored_tokens": predictions["model"].tokens,
        "layers": [
            {
                "hookpoint": name,
                "fvu": full,
                "fvu_same_layer_only": same,
                "l0": l0,
                "dead": dead,
                "sigma": sigma,
            }
            for name, full, same, l0, dead, sigma in rows
        ],
        "mean_fvu": mean_over_layers(by_arm["full"]),
        "mean_fvu_same_layer_only": mean_over_layers(by_arm["same_layer_only"]),
        "baseline": {
            "cross_entropy": own,
            "zero_ablated_cross_entropy": predictions["zero"].cross_entropy,
            "mean_ablated_cross_entropy": predictions["mean"].cross_entropy,
            "exact_match": answers.exact_match("model"),
        },
        "replacement": {arm: _arm_figures(arm, predictions, answers) for arm in ARMS},
    }


def _arm_figures(arm: str, predictions: dict[str, Predictions], answers: AnswerCounts) -> Figures:
    arm = arm if arm in predictions else "full"
    found, own = predictions[arm], predictions["model"].cross_entropy
    ce = found.cross_entropy
    return {
        "cross_entropy": ce,
        "kl": found.kl,
        "top1_match": found.top1_match,
        "ce_recovered_zero": recovered(ce, predictions["zero"].cross_entropy, own),
        "ce_recovered_mean": recovered(ce, predictions["mean"].cross_entropy, own),
        "exact_match": answers.exact_match(arm),
        "changed_of_correct": answers.changed_of_correct(arm),
        "n_correct": answers.n_correct(),
    }
