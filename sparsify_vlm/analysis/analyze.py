"""`analyze`: the experiments on one coder, in this order.

1. With tokens: everything they need is opened, so that what does not fit is refused at once.
2. The decoders are read once, layer by layer: norms and products.
3. With tokens: what latents and layers do on them, by role (`activity`).
4. Weights, features and distance, from 2 and 3.
5. With tokens: the ablation, and what single latents' cross-layer writes do to the model.

Only numbers: `sparsify_vlm.studies` writes the report.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib.metadata import version
from typing import Any

from sparsify_vlm.analysis.ablation import ablation, fitting_plt
from sparsify_vlm.analysis.activity import Activity, activity
from sparsify_vlm.analysis.causal_join import with_causal
from sparsify_vlm.analysis.config import AnalyzeConfig, read_labels
from sparsify_vlm.analysis.decoders import Decoders, read_decoders
from sparsify_vlm.analysis.distance import distance
from sparsify_vlm.analysis.features import features
from sparsify_vlm.analysis.results import Results
from sparsify_vlm.analysis.role_contrasts import ablation_with_roles, with_roles
from sparsify_vlm.analysis.tables import Experiment
from sparsify_vlm.analysis.tokens import ModelTokens, Tokens, Watched, token_batches
from sparsify_vlm.analysis.weights import weights
from sparsify_vlm.coders import Clt, load_clt
from sparsify_vlm.coders.formats import InMemory, StoredClt, open_clt
from sparsify_vlm.coders.formats.gemma_scope import SAMPLED, Stored
from sparsify_vlm.data import ActivationStore, DataConfig
from sparsify_vlm.progress import Progress
from sparsify_vlm.replacement import VLMReplacementModel
from sparsify_vlm.replacement.loading import load_replacement

PACKAGES = ("sparsify-vlm", "torch", "transformers")


@dataclass
class _Opened:
    """What measuring on tokens needs."""

    clt: Clt
    model: VLMReplacementModel | None
    """None for tokens of a store."""
    tokens: Tokens
    plt: Clt | None
    """Per-layer transcoders trained alike."""
    fitted_on: Tokens | None


@dataclass
class _Measured:
    """What the experiments are made from."""

    stored: StoredClt
    opened: _Opened | None
    decoders: Decoders
    activity: Activity | None


def run_experiments(
    cfg: AnalyzeConfig, coder: Clt | StoredClt | None = None, quiet: bool = False
) -> Results:
    """The experiments that `cfg` asks for.

    Args:
        coder: instead of the one that `cfg.clt` names.
        quiet: without progress.

    Raises `UserError` for a coder, model or dataset that cannot be used, or not together.
    """
    stored = InMemory(coder) if isinstance(coder, Clt) else coder or open_clt(cfg.clt)
    opened = _open(stored, cfg) if cfg.has_data else None
    decoders = _decoders(stored, quiet)
    measured = _Measured(stored, opened, decoders, _activity(opened, quiet) if opened else None)
    made = {name: EXPERIMENTS[name](measured, cfg, quiet) for name in cfg.experiments()}
    return Results(made, _provenance(measured, cfg))


def _decoders(stored: StoredClt, quiet: bool) -> Decoders:
    layers = len(stored.cfg.source_layers())
    with Progress("Reading decoders", layers, unit="layers", quiet=quiet) as progress:
        return read_decoders(stored, lambda s: progress.update(1))


def _open(stored: StoredClt, cfg: AnalyzeConfig) -> _Opened:
    """Load what measuring on tokens needs. Raises `UserError` for what does not fit together."""
    store = ActivationStore(cfg.activations) if cfg.activations else None
    fit_store = ActivationStore(cfg.fit_activations) if cfg.fit_activations else None
    plt = load_clt(cfg.plt) if cfg.plt else None
    clt, model = stored.load(), None
    if store is not None:
        tokens = token_batches(store, clt, max_samples=cfg.max_examples)
    else:
        model = load_replacement(cfg, clt, cfg.clt)
        data = DataConfig(**{f.name: getattr(cfg, f.name) for f in fields(DataConfig)})
        tokens = token_batches(data, model, batch_size=cfg.batch_size)
    coder = model or clt
    return _Opened(
        clt=coder.clt if isinstance(coder, VLMReplacementModel) else coder,
        model=model,
        tokens=tokens,
        plt=None if plt is None else fitting_plt(plt, coder, f"--plt {cfg.plt}"),
        fitted_on=None if fit_store is None else token_batches(fit_store, coder),
    )


def _activity(opened: _Opened, quiet: bool) -> Activity:
    return activity(opened.clt, Watched(opened.tokens, "Activity", quiet))


def _weights(measured: _Measured, cfg: AnalyzeConfig, quiet: bool) -> Experiment:
    found = weights(
        measured.decoders, activity=measured.activity, seed=cfg.seed, resamples=cfg.bootstrap
    )
    return _by_role(found, measured, cfg)


def _by_role(found: Experiment, measured: _Measured, cfg: AnalyzeConfig) -> Experiment:
    if measured.activity is None:
        return found
    return with_roles(found, measured.decoders, measured.activity, cfg.seed, cfg.bootstrap)


def _distance(measured: _Measured, cfg: AnalyzeConfig, quiet: bool) -> Experiment:
    return distance(
        measured.decoders, activity=measured.activity, seed=cfg.seed, resamples=cfg.bootstrap
    )


def _features(measured: _Measured, cfg: AnalyzeConfig, quiet: bool) -> Experiment:
    found = features(
        measured.decoders,
        activity=measured.activity,
        labels=read_labels(cfg.labels),
        top=cfg.top,
        seed=cfg.seed,
        resamples=cfg.bootstrap,
    )
    found = _by_role(found, measured, cfg)
    opened, active = measured.opened, measured.activity
    if not cfg.causal or opened is None or opened.model is None or active is None:
        return found
    assert isinstance(opened.tokens, ModelTokens)
    where = opened.model, opened.tokens, measured.decoders, active
    return with_causal(found, *where, cfg.causal, cfg.seed, quiet)


def _ablation(measured: _Measured, cfg: AnalyzeConfig, quiet: bool) -> Experiment:
    opened = measured.opened
    assert opened is not None
    assert measured.activity is not None
    found = ablation(
        opened.model or opened.clt,
        opened.tokens,
        plt=opened.plt,
        fit_data=opened.fitted_on,
        refit_gib=cfg.refit_gib,
        measured=measured.activity,
        seed=cfg.seed,
        quiet=quiet,
    )
    return ablation_with_roles(found, measured.activity, cfg.seed)


EXPERIMENTS: dict[str, Callable[[_Measured, AnalyzeConfig, bool], Experiment]] = {
    "weights": _weights,
    "ablation": _ablation,
    "features": _features,
    "distance": _distance,
}


def _provenance(measured: _Measured, cfg: AnalyzeConfig) -> dict[str, Any]:
    """Where the numbers come from, as plain data."""
    coder = measured.stored.cfg
    return {
        "coder": {
            "path": cfg.clt,
            "format": measured.stored.format,
            "model": coder.model,
            "revision": coder.revision,
            "n_layers": coder.n_layers,
            "num_latents": coder.num_latents,
            "d_model": coder.d_model,
            "n_targets": coder.n_targets,
            "target_offset": coder.target_offset,
            "targets": [len(coder.targets(s)) for s in range(coder.n_layers)],
            "activation": coder.activation,
            "k": coder.k,
            "input_site": coder.input_site,
            "training": coder.training,
        },
        "data": _data(measured, cfg),
        "plt": cfg.plt,
        "fit_activations": cfg.fit_activations,
        "settings": {"seed": cfg.seed, "bootstrap": cfg.bootstrap, "labels": cfg.labels},
        "versions": {name: version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        "warnings": [*measured.stored.warnings, *_warnings(measured)],
    }


def _warnings(measured: _Measured) -> list[str]:
    """What a reader must know of how coder, model and reading fit."""
    found, opened, stored = [], measured.opened, measured.stored
    if stored.format == Stored.format and opened is None:
        found.append(
            f"Writes to earlier layers were looked for in {SAMPLED} latents of each layer only; "
            "with tokens, and by export, all are looked at."
        )
    model = opened.model.loaded.name if opened and opened.model else None
    if model and stored.cfg.model and model != stored.cfg.model:
        found.append(f"The coder is of {stored.cfg.model}; it was measured in {model}.")
    return found


def _data(measured: _Measured, cfg: AnalyzeConfig) -> dict[str, Any] | None:
    if measured.opened is None or measured.activity is None:
        return None
    counts = dict(measured.activity.tokens)
    return {
        "source": measured.opened.tokens.name,
        "samples": measured.activity.samples,
        "all_tokens": counts.pop("all"),
        "tokens": counts,
        "model": measured.opened.model.loaded.name if measured.opened.model else None,
    }
