"""What would make a training run fit into a device's memory: only options that exist.

Each search yields the one change of its kind that is just enough, or the largest there is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsify_vlm.training.estimate import EstimateConfig, Sizes

Figures = dict[str, Any]
Changes = Iterator[tuple[str, "EstimateConfig"]]
WORTH_NAMING = 0.98
"""An option that leaves more than this share of the peak is not named."""


def ways_to_fit(cfg: EstimateConfig, sizes: Sizes, memory: int) -> list[Figures]:
    """Single options as flags, peak in bytes and whether it fits; if none does, a combination.

    Options that hardly help are left out. The combination keeps as much of the coder as it can.
    """
    searches = (
        *(_optimizer, _moments, _store, _dtype, _micro, _streaming),
        *(_batch, _tied, _targets, _latents, _stride),
    )
    found = [change for search in searches for change in search(cfg, sizes, memory)]
    enough = WORTH_NAMING * sizes.peak(cfg)
    ways = [_way(name, changed, sizes, memory) for name, changed in found]
    ways = [way for way in ways if way["peak"] < enough]
    if any(way["fits"] for way in ways):
        return ways
    return [*ways, *_together(cfg, sizes, memory)]


def _together(cfg: EstimateConfig, sizes: Sizes, memory: int) -> list[Figures]:
    names: list[str] = []
    order = (_optimizer, _moments, _store, _micro, _streaming, _batch, _latents, _targets, _stride)
    for search in order:
        before = sizes.peak(cfg)
        if before <= memory:
            break
        for name, changed in search(cfg, sizes, memory):
            if sizes.peak(changed) < WORTH_NAMING * before:
                names, cfg = [*names, name], changed
                break
    return [_way(" ".join(names), cfg, sizes, memory)] if len(names) > 1 else []


def _way(name: str, cfg: EstimateConfig, sizes: Sizes, memory: int) -> Figures:
    peak = sizes.peak(cfg)
    return {"flags": name, "peak": peak, "fits": peak <= memory}


def _with(config: Any, **changes: Any) -> Any:
    return replace(config, **changes)


def _first_fitting(
    cfg: EstimateConfig,
    sizes: Sizes,
    memory: int,
    values: list[int],
    change: Callable[[int], EstimateConfig],
) -> tuple[int, EstimateConfig] | None:
    """The first of `values` that fits, else the last; None if there are none."""
    for value in values:
        changed = change(value)
        if sizes.peak(changed) <= memory or value == values[-1]:
            return value, changed
    return None


def _halvings(value: int, least: int = 1) -> list[int]:
    values = []
    while value // 2 >= least:
        value //= 2
        values.append(value)
    return values


def _optimizer(cfg: EstimateConfig, sizes: Sizes, memory: int) -> Changes:
    other = _with(cfg, optimizer="signum" if cfg.optimizer == "adam" else "muon")
    if cfg.optimizer != "muon" and sizes.peak(other) < sizes.peak(cfg):
        yield f"--optimizer {other.optimizer}", other


def _moments(cfg: EstimateConfig, sizes: Sizes, memory: int) -> Changes:
    if cfg.optimizer != "signum" and not cfg.bf16_moments:
        yield "--bf16_moments", _with(cfg, bf16_moments=True)


def _store(cfg: EstimateConfig, sizes: Sizes, memory: int) -> Changes:
    if cfg.activations is None:
        yield "--activations DIR", _with(cfg, activations="DIR", stream_activations=False)


def _dtype(cfg: EstimateConfig, sizes: Sizes, memory: int) -> Changes:
    if cfg.activations is not None or cfg.load_in_8bit:
        return
    if sizes.job(cfg).number_bytes > 2:
        yield "--dtype bfloat16", _with(cfg, dtype="bfloat16")
    if sizes.device.type == "cuda":
        yield "--load_in_8bit", _with(cfg, load_in_8bit=True)


def _micro(cfg: EstimateConfig, sizes: Sizes, memory: int) -> Changes:
    if cfg.stream_activations:
        return
    values = [cfg.micro_acc_steps * 2**i for i in range(1, 8)]
    found = _first_fitting(cfg, sizes, memory, values, lambda n: _with(cfg, micro_acc_steps=n))
    if found:
        yield f"--micro_acc_steps {found[0]}", found[1]


def _streaming(cfg: EstimateConfig, sizes: Sizes, memory: int) -> Changes:
    """The model on parts of a batch, which must be equal ones."""
    if cfg.activations is not None or cfg.stream_activations:
        return
    size = cfg.batch_size
    values = [n for n in range(max(cfg.micro_acc_steps, 2), size + 1) if size % n == 0]
    found = _first_fitting(
        cfg,
        sizes,
        memory,
        values,
        lambda n: _with(cfg, micro_acc_steps=n, stream_activations=True),
    )
    if found:
        yield f"--micro_acc_steps {found[0]} --stream_activations", found[1]


def _streams_unevenly(cfg: EstimateConfig, batch_size: int) -> bool:
    return cfg.stream_activations and batch_size % cfg.micro_acc_steps > 0


def _tied(cfg: EstimateConfig, sizes: Sizes, memory: int) -> Changes:
    shared = cfg.sae.per_source_tied or cfg.sae.coalesce_topk != "none"
    if cfg.sae.n_targets > 1 and not shared:
        yield "--per_source_tied", _with(cfg, sae=_with(cfg.sae, per_source_tied=True))


def _batch(cfg: EstimateConfig, sizes: Sizes, memory: int) -> Changes:
    name = "batch_size" if cfg.activations is None else "batch_tokens"
    found = _first_fitting(
        cfg,
        sizes,
        memory,
        [n for n in _halvings(getattr(cfg, name)) if not _streams_unevenly(cfg, n)],
        lambda n: _with(cfg, **{name: n}),
    )
    if found:
        yield f"--{name} {found[0]}", found[1]


def _targets(cfg: EstimateConfig, sizes: Sizes, memory: int) -> Changes:
    most = min(cfg.sae.cross_layer, sizes.job(cfg).clt.n_targets)
    found = _first_fitting(
        cfg,
        sizes,
        memory,
        list(range(most - 1, 0, -1)),
        lambda n: _with(cfg, sae=_with(cfg.sae, cross_layer=n)),
    )
    if found:
        yield f"--cross_layer {found[0]}", found[1]


def _latents(cfg: EstimateConfig, sizes: Sizes, memory: int) -> Changes:
    name = "num_latents" if cfg.sae.num_latents else "expansion_factor"
    width = 1 if cfg.sae.num_latents else sizes.skeleton.d_model
    values = [n for n in _halvings(getattr(cfg.sae, name)) if n * width >= cfg.sae.k]
    found = _first_fitting(
        cfg, sizes, memory, values, lambda n: _with(cfg, sae=_with(cfg.sae, **{name: n}))
    )
    if found:
        yield f"--{name} {found[0]}", found[1]


def _stride(cfg: EstimateConfig, sizes: Sizes, memory: int) -> Changes:
    if cfg.layers:
        return
    values = [s for s in (2, 4, 8) if s < sizes.skeleton.n_layers]
    found = _first_fitting(cfg, sizes, memory, values, lambda n: _with(cfg, layer_stride=n))
    if found:
        yield f"--layer_stride {found[0]}", found[1]
