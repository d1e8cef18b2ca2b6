"""Storing what a model's MLPs read and write on a dataset: `capture`.

    encoding thread        samples → the processor's batches
    lanes (this thread)    batch → forward, with x and y of every layer copied out as they appear
    writing thread         rows → shards on disk (`store_writer.py`)

The model is run once; every activation is stored once. A capture that was cut off is continued by
the same command, at the batch after the last finished shard, with the batches formed as before.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sparsify_vlm.data.config import DataConfig
from sparsify_vlm.errors import UserError

if TYPE_CHECKING:
    from sparsify_vlm.data.encoding import EncodedBatch
    from sparsify_vlm.data.sources import SampleSource
    from sparsify_vlm.data.store_writer import StoreWriter, TokenRows
    from sparsify_vlm.models import InputSite, LoadedModel

SHARD_BYTES = 64 << 20
"""Size of a shard's two files together, unless --shard_tokens says otherwise."""
BATCH_BYTES, BATCH_MOST, SAMPLE_TOKENS = 4 << 30, 64, 1024
"""What the default of --batch_size is made of."""
SITES = ("mlp_in", "resid_mid")
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(kw_only=True)
class CaptureConfig(DataConfig):
    """Which activations of which model go where."""

    model: str
    """Hub id or folder of a model, or llava, tiny-llava, tiny-llama (the latter two ship with the
    package)."""

    output_dir: str
    """Folder of the activation store. The same command continues a capture that was cut off; a
    folder that holds anything else is left alone."""

    n_targets: int | None = None
    """Layers that a source layer writes to at most (the --cross_layer of a later training).
    Nothing is stored more often for it. Default: all layers that follow."""

    target_offset: int = 0
    """0: a layer's first target is its own MLP's output; 1: the next layer's."""

    input_site: str = "mlp_in"
    """Where x is read: mlp_in (the MLP's input, after its norm) or resid_mid (before the norm)."""

    dtype: str = "bfloat16"
    """Type of the stored numbers: bfloat16, float16 or float32."""

    hookpoints: list[str] = field(default_factory=list)
    """Layers to capture, by name or pattern, as in language_model.model.layers.1?.mlp. Default:
    all."""

    layers: list[int] = field(default_factory=list)
    """Layers to capture, by number, instead of --hookpoints."""

    batch_size: int | None = None
    """Samples that the model sees at a time. Default: as many as keep x and y of 1,024 tokens each
    within 4 GiB, at most 64. On a CPU up to four such batches run side by side where they are small
    enough to keep within 4 GiB together."""

    shard_tokens: int | None = None
    """Tokens per shard; the batch that reaches them is its last. Default: as many as fill 64 MiB.
    Up to three shards are in memory."""

    device: str | None = None
    """Where the model runs: cpu, cuda, cuda:1, or auto to spread it over all. Default: cuda if
    there, else cpu."""

    model_dtype: str | None = None
    """Type of the model's numbers: float32, bfloat16, float16, or auto for the checkpoint's own.
    Default: float32 on a CPU, bfloat16 elsewhere."""

    revision: str | None = None
    """Branch, tag or commit of the model on the Hub."""

    hf_token: str | None = field(default=None, repr=False)
    """Access token for gated or private models."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model."""

    load_in_8bit: bool = False
    """Quantise the model's weights to 8 bits (needs bitsandbytes)."""

    load_in_4bit: bool = False
    """Quantise the model's weights to 4 bits (NF4)."""

    quiet: bool = False
    """Print no progress."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.dtype = DTYPES.get(self.dtype, self.dtype)
        if self.dtype not in DTYPES.values():
            raise UserError(f"--dtype {self.dtype} is none of {', '.join(DTYPES.values())}")
        if self.input_site not in SITES:
            raise UserError(
                f"--input_site {self.input_site} is none of {', '.join(SITES)} (what the MLPs "
                "write is stored in any case: autoencoders train on it)"
            )
        if self.target_offset not in (0, 1):
            raise UserError(f"--target_offset must be 0 or 1, not {self.target_offset}")
        if self.hookpoints and self.layers:
            raise UserError("--hookpoints and --layers exclude each other; give one of them")
        for name in ("batch_size", "n_targets", "shard_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"--{name} must be at least 1, not {value}")


def capture(cfg: CaptureConfig, loaded: LoadedModel | None = None) -> Path:
    """Write an activation store to `cfg.output_dir`, or continue one, and return its folder.

    `loaded` takes the place of loading `cfg.model`.

    Raises:
        UserError: the model or the dataset cannot be had or used; the folder holds something else;
            values are not finite; the disk is full (finished shards are intact).
    """
    from sparsify_vlm.data.sources import open_samples
    from sparsify_vlm.data.store_writer import StoreWriter, disk_errors_told

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("capture runs in one process: start it without torchrun")
    loaded = loaded or _load(cfg)
    layers = _chosen_layers(cfg, loaded)
    source = open_samples(_data_config(cfg), loaded)
    writer = StoreWriter(
        cfg.output_dir,
        _manifest(cfg, loaded, layers, source),
        cfg.shard_tokens or _default_shard_tokens(cfg, loaded, layers),
    )
    with disk_errors_told(writer), writer:
        if writer.complete:
            print(f"{cfg.output_dir} is complete: {_summary(writer)}")
            return writer.path
        _run(cfg, loaded, layers, source, writer)
    print(f"{cfg.output_dir}: {_summary(writer)}")
    for reason in writer.skipped:
        print(f"  skipped {reason}")
    return writer.path


def _run(
    cfg: CaptureConfig,
    loaded: LoadedModel,
    layers: list[int],
    source: SampleSource,
    writer: StoreWriter,
) -> None:
    from sparsify_vlm.data.batching import prefetched
    from sparsify_vlm.data.lanes import in_order, lanes, threads_divided
    from sparsify_vlm.progress import Progress

    size = batch_size(cfg, loaded, layers)
    models = lanes(loaded, BATCH_BYTES // (size * _sample_bytes(loaded, layers)))
    workers = [partial(_token_rows, cfg, model, layers) for model in models]
    done = writer.samples + len(writer.skipped)
    bar = Progress("Capturing", source.size, unit="samples", initial=done, quiet=cfg.quiet)
    encoded = prefetched(_encoded(cfg, size, loaded, source, writer.batches))
    with (
        bar,
        threads_divided(len(models)),
        closing(encoded),
        closing(in_order(encoded, workers)) as made,
    ):
        for rows in made:
            writer.add(rows)
            bar.update(len(rows.samples) + len(rows.skipped))
        writer.finish()


def _encoded(
    cfg: CaptureConfig, size: int, loaded: LoadedModel, source: SampleSource, start: int
) -> Iterator[tuple[EncodedBatch, list[str]]]:
    """The batches from number `start` on, each with the samples that it had to leave out."""
    from sparsify_vlm.data.batching import batches

    known = 0
    for batch in batches(source, loaded, size, cfg.ctx_len, start=start):
        bad = source.bad
        yield batch, bad[known:]
        known = len(bad)


def _token_rows(
    cfg: CaptureConfig,
    loaded: LoadedModel,
    layers: list[int],
    encoded: tuple[EncodedBatch, list[str]],
) -> TokenRows:
    """Run the model on a batch and bring the rows to the CPU, in the stored dtype."""
    import torch

    from sparsify_vlm.data.store_writer import TokenRows
    from sparsify_vlm.models import record_tokens

    batch, skipped = encoded
    dtype = getattr(torch, cfg.dtype)
    if not len(batch):
        return _no_rows(len(layers), loaded.stack.d_model, dtype, skipped)
    site = cast("InputSite", cfg.input_site)
    table = record_tokens(loaded, batch.inputs, site, layers, dtype=dtype)
    columns = ("x", "y", "input_ids", "position", "sample", "role", "patch")
    copies = {name: _to_cpu(getattr(table, name)) for name in columns}
    rows = TokenRows(**copies, samples=batch.ids, skipped=skipped)
    if loaded.device.type == "cuda":
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(loaded.device))
        rows.ready = copied.synchronize
    return rows


def _to_cpu(values: Any) -> Any:
    """A contiguous copy on the CPU, from a GPU without waiting for it."""
    import torch

    if values.device.type != "cuda":
        return values.cpu().contiguous()
    out = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return out.copy_(values, non_blocking=True)


def _no_rows(n_layers: int, d_model: int, dtype: Any, skipped: list[str]) -> TokenRows:
    import torch

    from sparsify_vlm.data.store_writer import TokenRows

    nothing = torch.empty(0, dtype=torch.int32)
    values = torch.empty(n_layers, 0, d_model, dtype=dtype)
    patch = torch.empty(0, 2, dtype=torch.int16)
    return TokenRows(
        values, values, nothing, nothing, nothing, nothing.to(torch.uint8), patch, [], skipped
    )


def _data_config(cfg: CaptureConfig) -> DataConfig:
    """The dataset's options alone, which its fingerprint is made of."""
    return DataConfig(**{option.name: getattr(cfg, option.name) for option in fields(DataConfig)})


def _load(cfg: CaptureConfig) -> LoadedModel:
    from sparsify_vlm.models import load_model

    return load_model(
        cfg.model,
        cfg.device,
        cfg.model_dtype,
        revision=cfg.revision,
        trust_remote_code=cfg.trust_remote_code,
        token=cfg.hf_token,
        load_in_8bit=cfg.load_in_8bit,
        load_in_4bit=cfg.load_in_4bit,
    )


def _chosen_layers(cfg: CaptureConfig, loaded: LoadedModel) -> list[int]:
    n_layers = loaded.stack.n_layers
    if wrong := [layer for layer in cfg.layers if not 0 <= layer < n_layers]:
        raise UserError(f"--layers {wrong[0]}: {cfg.model} has layers 0 to {n_layers - 1}")
    if cfg.hookpoints:
        return loaded.stack.match(cfg.hookpoints)
    return sorted(set(cfg.layers)) or list(range(n_layers))


def _n_targets(cfg: CaptureConfig, n_layers: int) -> int:
    """As asked for, at most as many as there are."""
    most = n_layers - cfg.target_offset
    if most < 1:
        raise UserError("--target_offset 1 needs at least two layers: one has no next one")
    if cfg.n_targets is not None and cfg.n_targets > most:
        print(f"--n_targets {cfg.n_targets} is more than {most}, the most there are: taking {most}")
    return min(cfg.n_targets or most, most)


def batch_size(cfg: CaptureConfig, loaded: LoadedModel, layers: list[int]) -> int:
    """`--batch_size`, or its default for this model and these layers."""
    if cfg.batch_size is not None:
        return cfg.batch_size
    return min(max(1, BATCH_BYTES // _sample_bytes(loaded, layers)), BATCH_MOST)


def _sample_bytes(loaded: LoadedModel, layers: list[int]) -> int:
    """Of x and y of a sample of 1,024 tokens, as the model makes them."""
    return SAMPLE_TOKENS * 2 * len(layers) * loaded.stack.d_model * loaded.dtype.itemsize


def _default_shard_tokens(cfg: CaptureConfig, loaded: LoadedModel, layers: list[int]) -> int:
    import torch

    per_token = 2 * len(layers) * loaded.stack.d_model * getattr(torch, cfg.dtype).itemsize
    return max(1, SHARD_BYTES // per_token)


def _manifest(
    cfg: CaptureConfig, loaded: LoadedModel, layers: list[int], source: SampleSource
) -> dict[str, Any]:
    """Everything that decides what is stored; a continued capture must have the same."""
    from sparsify_vlm.data.store_format import canonical_model

    every = list(range(len(layers)))
    return {
        "model": canonical_model(cfg.model),
        "revision": loaded.revision,
        "weights": weights_fingerprint(loaded.model),
        "model_dtype": str(loaded.dtype).removeprefix("torch."),
        "processor": type(loaded.processor).__name__,
        "dataset": {
            "name": source.name,
            "split": cfg.split,
            "ctx_len": cfg.ctx_len,
            "fingerprint": source.fingerprint,
        },
        "hookpoints": [loaded.stack.hookpoints[layer] for layer in layers],
        "d_model": loaded.stack.d_model,
        "dtype": cfg.dtype,
        "n_targets": _n_targets(cfg, len(layers)),
        "target_offset": cfg.target_offset,
        "sites": {"x": cfg.input_site, "y": "mlp_out"},
        "x_layers": every,
        "y_layers": every,
        "bos_token_id": loaded.tokenizer.bos_token_id,
        "batch_size": batch_size(cfg, loaded, layers),
        "shard_tokens": cfg.shard_tokens or _default_shard_tokens(cfg, loaded, layers),
    }


def weights_fingerprint(model: Any) -> str:
    """Of every parameter's name, shape and first values, so that retrained weights are told apart.

    Parameters that are offloaded to the disk count by name and shape only.
    """
    import torch

    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        if parameter.device.type != "meta":
            first = parameter.detach().reshape(-1)[:16].to("cpu", torch.float32)
            digest.update(first.numpy().tobytes())
    return digest.hexdigest()[:16]


def _summary(writer: StoreWriter) -> str:
    roles: dict[str, int] = {}
    for shard in writer.shards:
        for role, n in shard.roles.items():
            roles[role] = roles.get(role, 0) + n
    split = ", ".join(f"{n:,} {role}" for role, n in roles.items())
    size = sum(file.stat().st_size for file in writer.path.iterdir()) / 1e9
    left_out = f", {len(writer.skipped)} skipped" if writer.skipped else ""
    return (
        f"{writer.samples:,} samples{left_out}, {writer.tokens:,} tokens ({split}), {size:.2f} GB"
    )
