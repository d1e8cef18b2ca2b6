"""Storing what a model's MLPs read and write on a dataset: `capture`.

    encoding thread        samples → the processor's batches
    lanes (this thread)    batch → forward, with x and y of every layer copied out as they appear
    writing thread         rows → shards on disk (`store_writer.py`)

Under torchrun every process captures its share of the batches (`store_shares.py`).

The model is run once; every activation is stored once. A capture that was cut off is continued by
the same command, at the batch after the last finished shard, with the batches formed as before.
"""

from __future__ import annotations

import os
import sys
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
    from sparsify_vlm.data.store_shares import Share
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
    from sparsify_vlm.data.capture_manifest import capture_manifest, summary
    from sparsify_vlm.data.sources import open_samples
    from sparsify_vlm.data.store_shares import Share, has_parts
    from sparsify_vlm.data.store_writer import StoreWriter, disk_errors_told

    loaded = loaded or _load(cfg)
    layers = _chosen_layers(cfg, loaded)
    source = open_samples(_data_config(cfg), loaded)
    size = batch_size(cfg, loaded, layers)
    shard_tokens = cfg.shard_tokens or _default_shard_tokens(cfg, loaded, layers)
    manifest = capture_manifest(cfg, loaded, layers, source, size, shard_tokens)
    store = StoreWriter(cfg.output_dir, manifest, shard_tokens)
    rank, world = _place()
    shared = world > 1 or has_parts(store.path)
    writer = Share(store, rank, world) if shared else store
    with disk_errors_told(writer), writer:
        if store.complete:
            print(f"{cfg.output_dir} is complete: {summary(store)}")
            return store.path
        _run(cfg, loaded, layers, source, writer, world)
    _tell(store, world, told=not isinstance(writer, Share) or writer.joined)
    return store.path


def _place() -> tuple[int, int]:
    """Which process this is, of how many, by torchrun's variables."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def _tell(store: StoreWriter, world: int, told: bool) -> None:
    """Say what is stored: of several processes the one that joined it does, whichever it is."""
    from sparsify_vlm.data.capture_manifest import summary

    if not told:
        print(f"{store.path}: this process is done; the last one joins what all have captured")
        return
    out = sys.__stdout__ if world > 1 else sys.stdout
    print(f"{store.path}: {summary(store)}", file=out)
    for reason in store.skipped:
        print(f"  skipped {reason}", file=out)


def _run(
    cfg: CaptureConfig,
    loaded: LoadedModel,
    layers: list[int],
    source: SampleSource,
    writer: StoreWriter | Share,
    world: int,
) -> None:
    from sparsify_vlm.data.batching import prefetched
    from sparsify_vlm.data.lanes import in_order, lanes, threads_divided
    from sparsify_vlm.progress import Progress

    size = batch_size(cfg, loaded, layers)
    models = lanes(loaded, BATCH_BYTES // (size * _sample_bytes(loaded, layers)))
    workers = [partial(_token_rows, cfg, model, layers) for model in models]
    done = writer.samples + len(writer.skipped)
    total = None if source.size is None else -(-source.size // world)
    bar = Progress("Capturing", total, unit="samples", initial=done, quiet=cfg.quiet)
    encoded = prefetched(_encoded(cfg, size, loaded, source, writer))
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
    cfg: CaptureConfig,
    size: int,
    loaded: LoadedModel,
    source: SampleSource,
    writer: StoreWriter | Share,
) -> Iterator[tuple[EncodedBatch, list[str]]]:
    """The batches that are to be stored, each with the samples that it had to leave out."""
    from sparsify_vlm.data.batching import batches

    known, start = 0, writer.batches
    for batch in batches(source, loaded, size, cfg.ctx_len, start=start, wanted=writer.wants):
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
        return _no_rows(len(layers), loaded.stack.d_model, dtype, skipped, batch.number)
    site = cast("InputSite", cfg.input_site)
    table = record_tokens(loaded, batch.inputs, site, layers, dtype=dtype)
    columns = ("x", "y", "input_ids", "position", "sample", "role", "patch")
    copies = {name: _to_cpu(getattr(table, name)) for name in columns}
    rows = TokenRows(**copies, samples=batch.ids, skipped=skipped, number=batch.number)
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


def _no_rows(n_layers: int, d_model: int, dtype: Any, skipped: list[str], number: int) -> TokenRows:
    import torch

    from sparsify_vlm.data.store_writer import TokenRows

    nothing = torch.empty(0, dtype=torch.int32)
    values = torch.empty(n_layers, 0, d_model, dtype=dtype)
    patch = torch.empty(0, 2, dtype=torch.int16)
    table = (nothing, nothing, nothing, nothing.to(torch.uint8), patch)
    return TokenRows(values, values, *table, [], skipped, number)


def _data_config(cfg: CaptureConfig) -> DataConfig:
    """The dataset's options alone, which its fingerprint is made of."""
    return DataConfig(**{option.name: getattr(cfg, option.name) for option in fields(DataConfig)})


def _load(cfg: CaptureConfig) -> LoadedModel:
    from sparsify_vlm.models import load_model

    return load_model(
        cfg.model,
        _device(cfg),
        cfg.model_dtype,
        revision=cfg.revision,
        trust_remote_code=cfg.trust_remote_code,
        token=cfg.hf_token,
        load_in_8bit=cfg.load_in_8bit,
        load_in_4bit=cfg.load_in_4bit,
    )


def _device(cfg: CaptureConfig) -> str | None:
    """`--device`; of several processes on a machine with several GPUs each takes its own."""
    import torch

    if cfg.device not in (None, "cuda") or not torch.cuda.is_available() or _place()[1] == 1:
        return cfg.device
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"


def _chosen_layers(cfg: CaptureConfig, loaded: LoadedModel) -> list[int]:
    n_layers = loaded.stack.n_layers
    if wrong := [layer for layer in cfg.layers if not 0 <= layer < n_layers]:
        raise UserError(f"--layers {wrong[0]}: {cfg.model} has layers 0 to {n_layers - 1}")
    if cfg.hookpoints:
        return loaded.stack.match(cfg.hookpoints)
    return sorted(set(cfg.layers)) or list(range(n_layers))


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
