"""`analyze`: the experiments on one coder, in this order.

1. The decoders are read once, layer by layer: norms and products.
2. With tokens: what latents and layers do on them, by role (`activity`).
3. Weights, features and distance, from 1 and 2.
4. With tokens: the ablation, and what single latents' cross-layer writes do to the model.

Only numbers: `sparsify_vlm.studies` writes the report.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from sparsify_vlm.analysis.ablation import ablation
from sparsify_vlm.analysis.activity import Activity, activity
from sparsify_vlm.analysis.causal_join import with_causal
from sparsify_vlm.analysis.config import AnalyzeConfig, read_labels
from sparsify_vlm.analysis.decoders import Decoders, read_decoders
from sparsify_vlm.analysis.distance import distance
from sparsify_vlm.analysis.features import features
from sparsify_vlm.analysis.results import Results
from sparsify_vlm.analysis.role_contrasts import ablation_with_roles, with_roles
from sparsify_vlm.analysis.tables import Experiment
from sparsify_vlm.analysis.tokens import ModelTokens, Tokens, token_batches
from sparsify_vlm.analysis.weights import weights
from sparsify_vlm.coders import Clt, load_clt
from sparsify_vlm.coders.formats import InMemory, StoredClt, open_clt
from sparsify_vlm.data import ActivationStore, DataConfig
from sparsify_vlm.progress import Progress
from sparsify_vlm.replacement.loading import load_replacement

if TYPE_CHECKING:
    from sparsify_vlm.replacement import VLMReplacementModel

PACKAGES = ("sparsify-vlm", "torch", "transformers")


@dataclass
class _Measured:
    """What the experiments are made from."""

    stored: StoredClt
    decoders: Decoders
    clt: Clt | None = None
    """Loaded whole, with tokens only."""
    model: VLMReplacementModel | None = None
    tokens: Tokens | None = None
    activity: Activity | None = None
    plt: Clt | None = None
    """Per-layer transcoders trained alike."""


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
    measured = _Measured(stored, _decoders(stored, quiet))
    if cfg.has_data:
        _add_tokens(measured, cfg, quiet)
    made = {name: EXPERIMENTS[name](measured, cfg, quiet) for name in cfg.experiments()}
    return Results(made, _provenance(measured, cfg))


def _decoders(stored: StoredClt, quiet: bool) -> Decoders:
    layers = len(stored.cfg.source_layers())
    with Progress("Reading decoders", layers, unit="layers", quiet=quiet) as progress:
        return read_decoders(stored, lambda s: progress.update(1))


def _add_tokens(measured: _Measured, cfg: AnalyzeConfig, quiet: bool) -> None:
    """Load what the tokens need, and measure the activity on them."""
    if cfg.plt is not None:
        measured.plt = load_clt(cfg.plt)
    clt = measured.stored.load()
    if cfg.activations:
        measured.clt = clt
        data: DataConfig | ActivationStore = ActivationStore(cfg.activations)
        measured.tokens = token_batches(data, clt, max_samples=cfg.max_examples)
    else:
        measured.model = load_replacement(cfg, clt, cfg.clt)
        measured.clt = measured.model.clt
        data = DataConfig(**{f.name: getattr(cfg, f.name) for f in fields(DataConfig)})
        measured.tokens = token_batches(data, measured.model, batch_size=cfg.batch_size)
    with Progress("Activity", measured.tokens.size, unit="samples", quiet=quiet) as progress:
        measured.activity = activity(measured.clt, watched(measured.tokens, progress))


def watched(tokens: Tokens, progress: Progress) -> Any:
    """The batches of `tokens`, counted as they are used."""
    for batch in tokens:
        yield batch
        progress.update(len(batch.rows))


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
    model, tokens, active = measured.model, measured.tokens, measured.activity
    if not cfg.causal or model is None or active is None or not isinstance(tokens, ModelTokens):
        return found
    return with_causal(found, model, tokens, measured.decoders, active, cfg.causal, cfg.seed, quiet)


def _ablation(measured: _Measured, cfg: AnalyzeConfig, quiet: bool) -> Experiment:
    assert measured.clt is not None
    assert measured.tokens is not None
    assert measured.activity is not None
    found = ablation(
        measured.model or measured.clt,
        measured.tokens,
        plt=measured.plt,
        fit_data=cfg.fit_activations,
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
        "warnings": list(measured.stored.warnings),
    }


def _data(measured: _Measured, cfg: AnalyzeConfig) -> dict[str, Any] | None:
    if measured.tokens is None or measured.activity is None:
        return None
    counts = dict(measured.activity.tokens)
    return {
        "source": measured.tokens.name,
        "samples": measured.activity.samples,
        "all_tokens": counts.pop("all"),
        "tokens": counts,
        "model": measured.model.loaded.name if measured.model else None,
    }
