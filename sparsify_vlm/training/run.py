"""`train`: one call from settings to a folder of trained coders."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparsify_vlm.coders import Clt, CltConfig, load_clt
from sparsify_vlm.data import ActivationStore, DataConfig
from sparsify_vlm.errors import UserError
from sparsify_vlm.models import LoadedModel, load_model
from sparsify_vlm.models.load import usable_device
from sparsify_vlm.training.checkpoint import RunFolder
from sparsify_vlm.training.config import RunConfig, TrainConfig
from sparsify_vlm.training.distributed import World, joined_world
from sparsify_vlm.training.divided import divided, settled, whole_shapes
from sparsify_vlm.training.optimizers import warmup_steps
from sparsify_vlm.training.parallel import Layout, mesh
from sparsify_vlm.training.sources import LiveSource, StoreSource, TokenSource
from sparsify_vlm.training.spliced import SplicedLoss
from sparsify_vlm.training.trainer import Callback, Trainer

if TYPE_CHECKING:
    from sparsify_vlm.training.estimate import EstimateConfig

# Settings that do not decide which weights come out; all others must be the same in a resumed run.
_FREE = frozenset(
    {
        *("sae", "hookpoints", "layers", "layer_stride"),  # the coder's own settings say it
        *("activations", "batch_size", "batch_tokens"),  # the source's identity says it
        *("max_steps", "epochs"),  # the number of steps says it, where the learning rate decays
        *("micro_acc_steps", "stream_activations", "dead_feature_threshold"),
        *("run_name", "save_dir", "save_every", "resume", "overwrite"),
        *("log_every", "log_to_wandb", "log_to_tensorboard", "log_to_trackio"),
        *("wandb_log_frequency", "tp", "tp_layout"),
    }
)


def train(
    cfg: TrainConfig,
    data: DataConfig | None = None,
    run: RunConfig | None = None,
    *,
    loaded: LoadedModel | None = None,
    quiet: bool = False,
    on_step: Callback | None = None,
) -> Path:
    """Train coders as `cfg` says and return the run's folder, `{save_dir}/{run_name}`.

    The tokens are those of the model `run.model` (or `loaded`, which is then used as it is) on the
    dataset `data`, or of the activation store `cfg.activations`. Under torchrun all processes call
    this together. `on_step` gets each line of metrics.jsonl, in the first process.

    Raises `UserError` for everything a user can mend; nothing of another run is written over.
    """
    data, run = data or DataConfig(), run or RunConfig()
    with joined_world() as processes:
        world, row = mesh(processes, cfg.tp)
        source, model = world.first_then_others(lambda: _source(cfg, data, run, loaded, world))
        clt, layout = _coders(cfg, source, model, row)
        folder = RunFolder(Path(cfg.save_dir) / (cfg.run_name or "unnamed"))
        world.resumes_from(folder.last_step)
        spliced = _spliced(cfg, source, clt, world)
        trainer = Trainer(
            cfg,
            clt,
            source,
            folder,
            world,
            quiet=quiet,
            on_step=on_step,
            spliced=spliced,
            layout=layout,
        )
        trainer.settings = _settings(cfg, clt, source, trainer.total)
        world.first_then_others(lambda: _prepare(cfg, folder, trainer, world))
        done = cfg.resume and trainer.load()
        if world.is_first and not quiet:
            _announce(trainer, done)
        if done:
            return folder.path
        trainer.fit()
        _list_skipped(source, world)
    return folder.path


def _source(
    cfg: TrainConfig,
    data: DataConfig,
    run: RunConfig,
    loaded: LoadedModel | None,
    world: World,
) -> tuple[TokenSource, dict[str, Any]]:
    """The source, and the model's name and revision for the checkpoint."""
    device = run.device or world.device
    if cfg.activations is not None:
        store = _open_store(cfg.activations, data, run)
        where = torch.device(usable_device(device))
        source = StoreSource(cfg, store, data.shuffle_seed, world, where)
        return source, {"model": store.model, "revision": store.revision}
    if loaded is None:
        if run.model is None:
            raise UserError("give a model to train on, for example tiny-llava or llava")
        loaded = load_model(
            run.model,
            device,
            run.dtype,
            revision=run.revision,
            trust_remote_code=run.trust_remote_code,
            token=run.hf_token,
            load_in_8bit=run.load_in_8bit,
            load_in_4bit=run.load_in_4bit,
        )
    live = LiveSource(cfg, data, loaded, world)
    return live, {"model": loaded.name, "revision": loaded.revision}


def _open_store(path: str, data: DataConfig, run: RunConfig) -> ActivationStore:
    if data.dataset is not None or data.dataset_mix is not None:
        raise UserError("--activations is a dataset already captured: leave the dataset out")
    store = ActivationStore(path)
    if run.model is not None:
        store.check_model(run.model, store.d_model, store.hookpoints)
    return store


def coder_config(
    cfg: TrainConfig | EstimateConfig, d_model: int, hookpoints: list[str], **model: Any
) -> CltConfig:
    """The coders that `cfg` asks for; `model` and `revision` are kept with them."""
    same = (
        *("num_latents", "k", "target_offset", "activation", "transcode", "skip_connection"),
        *("train_post_encoder", "post_encoder_scale", "normalize_decoder", "expansion_factor"),
        *("jumprelu_bandwidth", "jumprelu_init_threshold", "coalesce_topk", "topk_coalesced"),
        *("per_source_tied", "secondary_target_tied", "normalize_io", "divide_cross_layer"),
    )
    return CltConfig(
        d_model=d_model,
        hookpoints=hookpoints,
        n_targets=min(cfg.sae.n_targets, _most_targets(cfg, len(hookpoints))),
        input_site=cfg.sae.input_site if cfg.sae.transcode else "mlp_out",
        **{name: getattr(cfg.sae, name) for name in same},
        **model,
    )


def _coders(
    cfg: TrainConfig, source: TokenSource, model: dict[str, Any], row: Layout
) -> tuple[Clt, Layout]:
    """The coders to train, with zero weights or those of `--finetune`, and how they are divided."""
    config = coder_config(cfg, source.d_model, source.hookpoints, **model)
    layout = settled(row, cfg, config)
    clt = divided(config, layout, source.device)
    if cfg.finetune is not None:
        _copy_weights(clt, cfg.finetune, layout)
    return clt, layout


def _spliced(cfg: TrainConfig, source: TokenSource, clt: Clt, world: World) -> SplicedLoss | None:
    """The loss on predictions that `--loss_fn` asks for."""
    if cfg.loss_fn == "fvu":
        return None
    if not isinstance(source, LiveSource):
        raise UserError(f"--loss_fn {cfg.loss_fn} needs the running model, not a store")
    return SplicedLoss(source.loaded, clt, cfg, world)


def _most_targets(cfg: TrainConfig | EstimateConfig, n_layers: int) -> int:
    """Layers that the first coder can write to."""
    return max(n_layers - cfg.sae.target_offset, 1)


def _copy_weights(clt: Clt, path: str, layout: Layout) -> None:
    """Start from the coders of `path`: the same ones, or per-layer ones of the same width, whose
    own-layer decoders are the first targets'; all other decoders then start at 0."""
    start = load_clt(path, clt.device if layout.alone else "cpu", clt.dtype)
    for name in ("input_site", "transcode", "normalize_io", "divide_cross_layer"):
        theirs, ours = getattr(start.cfg, name), getattr(clt.cfg, name)
        if theirs != ours:
            raise UserError(
                f"--finetune {path}: its coders have {name} {theirs}, asked for is {ours}"
            )
    _check_same_layers(start.cfg, clt.cfg, path)
    found, wanted, shapes = start.state_dict(), clt.state_dict(), whole_shapes(clt.cfg)
    per_layer = start.cfg.n_targets == 1 < clt.cfg.n_targets and clt.cfg.target_offset == 0
    for name, value in wanted.items():
        if name in found and found[name].shape == shapes[name]:
            value.copy_(layout.own(name, found[name]))
        elif not (per_layer and _of_later_target(name)):
            raise UserError(
                f"--finetune {path}: its coders have another shape than asked for ('{name}'); give "
                "the same hookpoints and latents, and the same targets or per-layer transcoders"
            )


def _check_same_layers(theirs: CltConfig, ours: CltConfig, path: str) -> None:
    """Refuse coders of other layers or with other targets, which the tensors' shapes do not tell.

    Per-layer ones may become any; otherwise decoders are shared and added up in the same way, since
    a tensor of the same name would mean something else.
    """
    layers = [[_layer_number(name) for name in cfg.hookpoints] for cfg in (theirs, ours)]
    if layers[0] != layers[1]:
        raise UserError(
            f"--finetune {path}: its coders are of layers {_few(layers[0])}, asked for are "
            f"{_few(layers[1])}; give the same --layers or --hookpoints"
        )
    if theirs.n_targets == 1:
        return
    for name in ("n_targets", "target_offset", "coalesce_topk", *_TIES):
        there, here = getattr(theirs, name), getattr(ours, name)
        if there != here:
            raise UserError(
                f"--finetune {path}: its coders have {name} {there}, asked for is {here}; give "
                "the same, or per-layer transcoders to start from"
            )


_TIES = ("per_source_tied", "secondary_target_tied")


def _layer_number(hookpoint: str) -> str:
    """The layer's number in a hookpoint's name, whatever the prefix; the name if there is none."""
    numbers = [part for part in hookpoint.split(".") if part.isdecimal()]
    return numbers[0] if len(numbers) == 1 else hookpoint


def _few(names: list[str]) -> str:
    return ", ".join(names if len(names) < 7 else [*names[:3], "…", names[-1]])


def _of_later_target(name: str) -> bool:
    """Whether a parameter belongs to a target beyond a source's first."""
    parts = name.split(".")
    return len(parts) == 3 and int(parts[2]) > 0


def _settings(cfg: TrainConfig, clt: Clt, source: TokenSource, total: int | None) -> dict[str, Any]:
    """What must be the same in a resumed run, by the names users know."""
    coder = asdict(clt.cfg)
    del coder["training"]
    own = {name: value for name, value in asdict(cfg).items() if name not in _FREE}
    if cfg.auxk_alpha:  # otherwise it is but a figure
        own["dead_feature_threshold"] = cfg.dead_feature_threshold
    decays = cfg.optimizer != "signum"
    return {**own, "steps": total if decays else None, **coder, **source.identity}


def _prepare(cfg: TrainConfig, folder: RunFolder, trainer: Trainer, world: World) -> None:
    if world.is_first:
        folder.prepare(trainer.settings, resume=cfg.resume, overwrite=cfg.overwrite)


def _announce(trainer: Trainer, done: bool) -> None:
    """Say what is going to happen, and what was asked for but is done otherwise."""
    cfg, clt, total = trainer.cfg, trainer.clt.cfg, trainer.total
    if done:
        return print(f"{trainer.run.path} is finished: {trainer.step} steps. Nothing to do.")
    most = _most_targets(cfg, clt.n_layers)
    if cfg.sae.n_targets > most:
        print(
            f"--cross_layer {cfg.sae.cross_layer} is more than the {most} layers the first coder "
            f"can write to: taking {most}."
        )
    warmup = warmup_steps(cfg, total)
    if cfg.optimizer != "signum" and warmup < cfg.lr_warmup_steps:
        print(f"--lr_warmup_steps {cfg.lr_warmup_steps} is the whole run: taking {warmup}.")
    verb = f"Resuming at step {trainer.step} of" if trainer.step else "Training for"
    steps = "as many steps as the data gives" if total is None else f"{total} steps"
    layout, shapes = trainer.layout, trainer.shapes
    parameters = sum(shapes[name].numel() for name, _ in trainer.clt.named_parameters())
    shared = "" if layout.alone else f", divided by {layout.kind} over {layout.parts} processes"
    print(
        f"{verb} {steps}: {len(clt.source_layers())} coders of {clt.num_latents} latents (k = "
        f"{clt.k}), each writing to up to {clt.n_targets} layers, {parameters:,} parameters"
        f"{shared}; {cfg.optimizer} at {trainer.optimizers.lr:.2e}. Checkpoints in "
        f"{trainer.run.path}",
        flush=True,
    )


def _list_skipped(source: TokenSource, world: World) -> None:
    """Tell which samples were left out, once all processes have reported theirs."""
    skipped = sorted({line for lines in world.gather(source.skipped) for line in lines})
    if skipped and world.is_first:
        print(f"{len(skipped)} samples were skipped:", file=sys.stderr)
        for line in skipped:
            print(f"  {line}", file=sys.stderr)
