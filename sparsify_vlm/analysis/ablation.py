"""What the cross-layer writes are worth: reconstruction and predictions without them, and controls.

1. Activity of the coder on the tokens: energies for the random deletion, means (`activity.py`).
2. Decoders refitted with frozen encoders, and fitted to random ones (`refit.py`).
3. Every arm's error on clean inputs (`arms.py`, `reconstruction.py`).
4. Every arm spliced into the model (`spliced.py`).

Each step passes over the data once more; sums are kept per sample, never activations. Intervals are
of the samples, and differences between arms are of the same samples. docs/analysis_ablation.md
defines every figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sparsify_vlm.analysis.ablation_tables import (
    fvu_contrasts,
    fvu_intervals,
    fvu_table,
    loss_intervals,
    loss_table,
    refit_recovers,
)
from sparsify_vlm.analysis.activity import Activity, activity
from sparsify_vlm.analysis.arms import (
    Arm,
    constant_arm,
    kept_arm,
    masked_arm,
    random_coder,
    reaches,
    refitted_arm,
)
from sparsify_vlm.analysis.bootstrap import Intervals
from sparsify_vlm.analysis.deletion import Deletion, random_deletion, write_energies
from sparsify_vlm.analysis.reconstruction import ReconstructionSums, reconstruction
from sparsify_vlm.analysis.refit import refit, refit_bytes
from sparsify_vlm.analysis.spliced import SplicedSums, spliced
from sparsify_vlm.analysis.tables import Experiment
from sparsify_vlm.analysis.tokens import ModelTokens, Tokens, Watched, token_batches
from sparsify_vlm.coders import Clt, load_clt
from sparsify_vlm.data import ActivationStore, DataConfig
from sparsify_vlm.errors import UserError
from sparsify_vlm.replacement import ExcludedTokens, VLMReplacementModel

ONE_LAYER_ARMS = (
    *("full", "same_only", "cross_mean", "refit", "random_deletion", "plt", "mean", "zero"),
)
"""Arms that are also spliced one layer at a time."""
RIDGE = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
GIB = 2.0**30


@dataclass(frozen=True)
class Ablated(Experiment):
    """The experiment "ablation", with what `compare` needs of it.

    `intervals` has, by the names of `estimates`, each with its samples' interval: two coders are
    compared by `bootstrap.unpaired_difference` of theirs. The sums per sample are behind them.
    """

    intervals: Mapping[str, Intervals] = field(default_factory=dict)
    reconstruction: ReconstructionSums | None = None
    spliced: SplicedSums | None = None
    """None without a model."""


def ablation(
    coder: VLMReplacementModel | Clt,
    data: Tokens | DataConfig | ActivationStore | str | Path,
    *,
    plt: Clt | str | Path | None = None,
    fit_data: Tokens | DataConfig | ActivationStore | str | Path | None = None,
    measured: Activity | None = None,
    draws: int = 5,
    ridge: Sequence[float] = RIDGE,
    reach: Sequence[int] | None = None,
    refitting: bool | None = None,
    refit_gib: float = 4.0,
    batch_size: int = 32,
    max_samples: int | None = None,
    spliced_samples: int | None = None,
    one_layer_samples: int = 64,
    seed: int = 0,
    quiet: bool = False,
) -> Ablated:
    """The ablation experiment for a coder, with its model or (reconstruction only) without.

    Args:
        data: a dataset for the model, an activation store, or the `Tokens` of either.
        plt: a per-layer coder trained alike, for comparison.
        fit_data: other data to fit decoders on, such as the coder's training data; with a few
            measured samples alone, the refit is worse than it could be.
        measured: the coder's activity on the same tokens, if it is known already.
        draws: random deletions.
        ridge: strengths of the refit's penalty to choose from, see `refit.py`.
        reach: distances D of the arms reach_D. Default: 1, 2, 4, 8 … below the longest.
        refitting: False leaves out `refit` and `random_init`, None does if a layer's sums take
            more than `refit_gib`, and says so in the notes.
        spliced_samples: samples that predictions are measured on; default all.
        one_layer_samples: of these, for splices of one layer at a time; 0 for none.

    Raises `UserError` for data, a model or a `plt` that does not fit the coder.
    """
    model = coder if isinstance(coder, VLMReplacementModel) else None
    clt = coder.clt if isinstance(coder, VLMReplacementModel) else coder
    tokens = _tokens(data, coder, batch_size, max_samples)
    fitted_on = None if fit_data is None else _tokens(fit_data, coder, batch_size, None)
    per_layer = None if plt is None else fitting_plt(plt, coder)
    measured = measured or activity(clt, Watched(tokens, "Activity", quiet))
    notes = _notes(clt, tokens, measured)
    deletions = _deletions(clt, measured, draws, seed)
    arms = _own_arms(clt, measured, deletions, reaches(clt.cfg) if reach is None else reach)
    if per_layer is not None:
        arms.append(kept_arm("plt", per_layer, lambda distance: True))
    if fitted_on is None and measured.samples < 2 and not refitting:
        notes.append("The refit was left out: with a single sample there is none to fit on.")
    elif _whether_to_refit(clt, refitting, refit_gib * GIB):
        seen = Watched(fitted_on or tokens, "Refitting", quiet)
        halved = fitted_on is None
        arms += _refitted_arms(clt, seen, halved, measured, ridge, refit_gib * GIB, seed, notes)
    else:
        notes.append(_no_refit_note(clt))
    mean_y = measured.mean_y["all"].to(clt.device, clt.dtype)
    arms += [constant_arm("mean", mean_y), constant_arm("zero", torch.zeros_like(mean_y))]
    seen = Watched(tokens, "Reconstructing", quiet)
    found = reconstruction(clt.cfg, arms, seen, measured.mean_y, measured.sigma_by_role)
    losses = None
    if model is not None and isinstance(tokens, ModelTokens):
        one = _firsts([arm for arm in arms if arm.name in ONE_LAYER_ARMS and one_layer_samples])
        some = tokens if spliced_samples is None else tokens.with_logits(spliced_samples)
        losses = spliced(model, arms, one, some, one_layer_samples, quiet)
    notes += [*_deletion_notes(deletions, found), *_splice_notes(losses)]
    return _outcome(found, losses, notes, seed)


def _outcome(
    found: ReconstructionSums, losses: SplicedSums | None, notes: Sequence[str], seed: int
) -> Ablated:
    intervals = fvu_intervals(found, seed) | fvu_contrasts(found, seed)
    intervals |= refit_recovers(found, seed)
    tables = {"fvu_comparison": fvu_table(found, seed)}
    if losses is not None:
        intervals |= loss_intervals(losses, seed)
        tables["delta_loss"] = loss_table(losses, seed)
    return Ablated(
        "ablation",
        {name: interval.estimate() for name, interval in intervals.items()},
        tables,
        notes,
        intervals,
        found,
        losses,
    )


def _tokens(
    data: Tokens | DataConfig | ActivationStore | str | Path,
    coder: VLMReplacementModel | Clt,
    batch_size: int,
    max_samples: int | None,
) -> Tokens:
    if isinstance(data, Tokens):
        return data
    return token_batches(data, coder, batch_size=batch_size, max_samples=max_samples)


# ---- arms


def _own_arms(
    clt: Clt, measured: Activity, deletions: Sequence[Deletion], reach: Sequence[int]
) -> list[Arm]:
    """The arms that need nothing but the coder and its activity."""
    nearest = clt.cfg.target_offset
    arms = [
        kept_arm("full", clt, lambda distance: True),
        kept_arm("same_only", clt, lambda distance: distance == nearest),
        kept_arm(
            "cross_mean",
            clt,
            lambda distance: distance == nearest,
            shift=_mean_cross(clt, measured),
        ),
        kept_arm("cross_only", clt, lambda distance: distance > nearest),
    ]
    arms += [kept_arm(f"reach_{D}", clt, lambda distance, D=D: distance <= D) for D in reach]  # type: ignore[misc]
    arms += [masked_arm("random_deletion", clt, deletion) for deletion in deletions]
    if clt.W_skip is not None:
        arms.append(kept_arm("no_skip", clt, lambda distance: True, skip=False))
    return arms


@torch.no_grad()
def _mean_cross(clt: Clt, measured: Activity) -> torch.Tensor:
    """[L, d]: the mean of everything that `same_only` leaves out. Skip connections are linear:
    their mean write is that of the mean of x."""
    mean = measured.mean_cross.to(clt.device, clt.dtype)
    for t in clt.cfg.target_layers():
        for s, place in clt.cfg.sources(t):
            if place > 0 and clt.skip(s, place) is not None:
                x = measured.mean_x[s][None].to(clt.device, clt.dtype)
                mean[t] += clt.skip_write(s, place, x)[0]
    return mean


def _deletions(clt: Clt, measured: Activity, draws: int, seed: int) -> list[Deletion]:
    energies = write_energies(clt, measured.energy["all"], measured.sigma)
    return [random_deletion(clt, energies, seed + draw) for draw in range(draws)]


def _refitted_arms(
    clt: Clt,
    tokens: Tokens,
    halved: bool,
    measured: Activity,
    ridge: Sequence[float],
    limit: float,
    seed: int,
    notes: list[str],
) -> list[Arm]:
    k = max(1, round(measured.mean_l0()))
    random = random_coder(clt, measured.mean_x, min(k, clt.cfg.num_latents), seed)
    own, drawn = refit(
        [clt, random],
        tokens,
        measured.mean_y["all"],
        ridge,
        limit,
        halved=halved,
    )
    where = (
        f"one half of the samples and measured on the other, both ways ({own[0].tokens} and "
        f"{own[1].tokens} tokens"
        if halved
        else f"{tokens.name} ({own[0].tokens} tokens"
    )
    notes.append(
        f"refit and random_init are fitted on {where}, ridge {min(own[0].ridge):g} to "
        f"{max(own[0].ridge):g} by layer); random_init has random encoders with {random.cfg.k} "
        "active latents per token."
    )
    return [refitted_arm("refit", clt, own), refitted_arm("random_init", random, drawn)]


def _whether_to_refit(clt: Clt, wanted: bool | None, limit: float) -> bool:
    fits = refit_bytes(clt.cfg) <= limit
    if wanted and not fits:
        raise UserError(_no_refit_note(clt))
    return fits if wanted is None else wanted


def fitting_plt(
    given: Clt | str | Path, coder: VLMReplacementModel | Clt, name: str | None = None
) -> Clt:
    """The per-layer coder, called `name` in errors. Raises `UserError` unless it stands where
    `coder` does."""
    clt = coder.clt if isinstance(coder, VLMReplacementModel) else coder
    plt = given if isinstance(given, Clt) else load_clt(given)
    name = name or ("the PLT" if isinstance(given, Clt) else f"--plt {given}")
    if plt.cfg.n_targets > 1:
        raise UserError(f"{name} writes to {plt.cfg.n_targets} layers: give a per-layer coder")
    for what in ("d_model", "hookpoints", "input_site", "target_offset"):
        mine, its = getattr(clt.cfg, what), getattr(plt.cfg, what)
        if mine != its:
            raise UserError(
                f"{name} is not for the same MLPs: its {what} is {_short(its)}, not {_short(mine)}"
            )
    if isinstance(coder, VLMReplacementModel):
        tokenizer = coder.loaded.tokenizer
        if ExcludedTokens.as_trained(plt.cfg.training, tokenizer) != coder.excluded:
            raise UserError(f"{name} was trained on other tokens: see filter_bos in its clt.json")
    return plt.to(clt.device).requires_grad_(False)


def _short(value: object) -> str:
    """A list by its ends."""
    if isinstance(value, (list, tuple)) and len(value) > 2:
        return f"{value[0]} … {value[-1]} ({len(value)})"
    return str(value)


def _firsts(arms: Sequence[Arm]) -> list[Arm]:
    """One draw of each."""
    return list({arm.name: arm for arm in reversed(arms)}.values())[::-1]


# ---- notes


def _notes(clt: Clt, tokens: Tokens, measured: Activity) -> list[str]:
    roles = ", ".join(f"{n} {role}" for role, n in measured.tokens.items() if role != "all")
    found = [
        f"Measured on {measured.samples} samples of {tokens.name}: {measured.tokens['all']} tokens "
        f"({roles}). FVU is the mean over layers of error/variance about the role's own mean; "
        "intervals are of samples."
    ]
    if clt.cfg.n_targets == 1:
        found.append(
            "The coder has no cross writes: the arms that take them away are the full one."
        )
    if measured.samples < 2:
        found.append("With a single sample there are no intervals.")
    return found


def _no_refit_note(clt: Clt) -> str:
    return (
        f"The refit was left out: {clt.cfg.num_latents} latents take "
        f"{refit_bytes(clt.cfg) / GIB:.1f} GiB for the sums of a layer; allow more with --refit_gib"
    )


def _deletion_notes(deletions: Sequence[Deletion], found: ReconstructionSums) -> list[str]:
    if not deletions:
        return []
    wanted = float(deletions[0].wanted.sum())
    gone = ", ".join(f"{float(d.deleted.sum()) / wanted:.3f}" for d in deletions) if wanted else "0"
    notes = [
        f"{len(deletions)} random deletions took away {gone} of the cross writes' energy, each "
        "target's for itself."
    ]
    if (errors := found.draws.get("random_deletion")) is not None:
        fvu = torch.from_numpy(errors[:, 0] / found.total[:, 0].sum(0)).nanmean(1)
        each = ", ".join(f"{value:.4f}" for value in fvu.tolist())
        notes.append(
            f"FVU of the random deletions, one by one: {each}; their interval is of samples and of "
            "the mean over deletions."
        )
    else:
        notes.append("With one random deletion its interval is of samples only.")
    return notes


def _splice_notes(losses: SplicedSums | None) -> list[str]:
    if losses is None:
        return ["There is no model: predictions with spliced MLPs were not measured."]

    def scored(sums: Any) -> int:
        return int(sums[..., 0].sum())

    notes = [
        f"Predictions were scored at {scored(losses.model)} tokens of {len(losses.model)} samples"
        + (
            f", with one layer spliced at {scored(losses.one_layer[:, 0, 0])} of "
            f"{len(losses.one_layer)}."
            if losses.one_layer.size
            else "."
        )
    ]
    if losses.one_layer.size:
        notes.append(
            "One-layer splices take the first random deletion; their interval is of samples only."
        )
    return notes
