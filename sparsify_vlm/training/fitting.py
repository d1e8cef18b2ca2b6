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
    searches = (_optimizer, _store, _dtype, _micro, _batch, _targets, _latents, _stride)
    found = [change for search in searches for change in search(cfg, sizes, memory)]
    enough = WORTH_NAMING * sizes.peak(cfg)
    ways = [_way(name, changed, sizes, memory) for name, changed in found]
    ways = [way for way in ways if way["peak"] < enough]
    if any(way["fits"] for way in ways):
        return ways
    return [*ways, *_together(cfg, sizes, memory)]


def _together(cfg: EstimateConfig, sizes: Sizes, memory: int) -> list[Figures]:
    names: list[str] = []
    for search in (_optimizer, _store, _micro, _batch, _latents, _targets, _stride):
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


def _store(cfg: EstimateConfig, sizes: Sizes, memory: int) -> Changes:
    if cfg.activations is None:
        yield "--activations DIR", _with(cfg, activations="DIR")


def _dtype(cfg: EstimateConfig, sizes: Sizes, memory: int) -> Changes:
    if cfg.activations is not None or cfg.load_in_8bit:
        return
    if sizes.job(cfg).number_bytes > 2:
        yield "--dtype bfloat16", _with(cfg, dtype="bfloat16")
    if sizes.device.type == "cuda":
        yield "--load_in_8bit", _with(cfg, load_in_8bit=True)


def _micro(cfg: EstimateConfig, sizes: Sizes, memory: int) -> Changes:
    values = [cfg.micro_acc_steps * 2**i for i in range(1, 8)]
    found = _first_fitting(cfg, sizes, memory, values, lambda n: _with(cfg, micro_acc_steps=n))
    if found:
        yield f"--micro_acc_steps {found[0]}", found[1]


def _batch(cfg: EstimateConfig, sizes: Sizes, memory: int) -> Changes:
    name = "batch_size" if cfg.activations is None else "batch_tokens"
    found = _first_fitting(
        cfg,
        sizes,
        memory,
        _halvings(getattr(cfg, name)),
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
