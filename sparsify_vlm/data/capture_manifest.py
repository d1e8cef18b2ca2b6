"""What a capture says of itself: its manifest, the same whenever it is continued, and a summary."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch

from sparsify_vlm.data.store_format import canonical_model
from sparsify_vlm.errors import UserError

if TYPE_CHECKING:
    from sparsify_vlm.data.capture import CaptureConfig
    from sparsify_vlm.data.sources import SampleSource
    from sparsify_vlm.data.store_writer import StoreWriter
    from sparsify_vlm.models import LoadedModel


def capture_manifest(
    cfg: CaptureConfig,
    loaded: LoadedModel,
    layers: list[int],
    source: SampleSource,
    batch_size: int,
    shard_tokens: int,
) -> dict[str, Any]:
    """Everything that decides what is stored; a continued capture must have the same."""
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
        "batch_size": batch_size,
        "shard_tokens": shard_tokens,
    }


def _n_targets(cfg: CaptureConfig, n_layers: int) -> int:
    """As asked for, at most as many as there are."""
    most = n_layers - cfg.target_offset
    if most < 1:
        raise UserError("--target_offset 1 needs at least two layers: one has no next one")
    if cfg.n_targets is not None and cfg.n_targets > most:
        print(f"--n_targets {cfg.n_targets} is more than {most}, the most there are: taking {most}")
    return min(cfg.n_targets or most, most)


def weights_fingerprint(model: Any) -> str:
    """Of every parameter's name, shape and first values, so that retrained weights are told apart.

    Parameters that are offloaded to the disk count by name and shape only.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        if parameter.device.type != "meta":
            first = parameter.detach().reshape(-1)[:16].to("cpu", torch.float32)
            digest.update(first.numpy().tobytes())
    return digest.hexdigest()[:16]


def summary(writer: StoreWriter) -> str:
    """What a finished store holds, in a line."""
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
