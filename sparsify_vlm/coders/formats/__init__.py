"""Checkpoint formats. Only modules of this folder spell a tensor's key."""

from __future__ import annotations

from pathlib import Path

import torch

from sparsify_vlm.coders.clt import Clt
from sparsify_vlm.coders.formats import circuit_tracer, eleuther, eleuther_stored
from sparsify_vlm.coders.formats.stored import InMemory, StoredClt
from sparsify_vlm.errors import UserError
from sparsify_vlm.hub import offline_if_unreachable

__all__ = ["InMemory", "StoredClt", "load_clt", "open_clt", "save_clt"]

READERS = (eleuther, circuit_tracer)
STORED = {eleuther: eleuther_stored.Stored, circuit_tracer: circuit_tracer.Stored}
WANTED_FILES = ["*.json", "*.safetensors", "*.yaml"]


def load_clt(
    path_or_hub_id: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Clt:
    """Load a coder of any readable format, recognised by its files.

    Reads this project's and EleutherAI's layout (also single coders of sparsify) and
    circuit-tracer's cross-layer transcoders, from a folder or from the Hugging Face Hub
    (`owner/name` or `owner/name/sub/folder`). `dtype` None keeps the checkpoint's.

    Raises `UserError` naming the file and the key if something is missing, has the wrong shape,
    is not finite, or is of a variant or version that is not supported.
    """
    return open_clt(path_or_hub_id).load(device, dtype)


def open_clt(path_or_hub_id: str | Path) -> StoredClt:
    """Open a coder of any readable format to read it layer by layer; as `load_clt` otherwise."""
    folder = _local_folder(path_or_hub_id)
    for reader in READERS:
        if reader.recognises(folder):
            return STORED[reader](folder)
    known = "; ".join(reader.DESCRIPTION for reader in READERS)
    raise UserError(f"{path_or_hub_id}: no coder checkpoint in a known format here ({known})")


def save_clt(clt: Clt, path: str | Path) -> Path:
    """Write `clt` as a checkpoint folder (docs/formats.md); returns the folder.

    Each file is replaced atomically. Raises `UserError` for coders the layout cannot express.
    """
    return eleuther.save(clt, Path(path))


def _local_folder(path_or_hub_id: str | Path) -> Path:
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return path
    parts = str(path_or_hub_id).split("/")
    local = path.exists() or path.parent.is_dir() or parts[0] in (".", "..")
    if local or len(parts) < 2 or not all(parts):
        raise UserError(f"{path_or_hub_id}: no such checkpoint folder")
    return _downloaded("/".join(parts[:2]), "/".join(parts[2:]))


def _downloaded(repository: str, subfolder: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    offline_if_unreachable()
    prefix = f"{subfolder}/" if subfolder else ""
    patterns = [prefix + pattern for pattern in WANTED_FILES]
    try:
        snapshot = Path(snapshot_download(repository, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{repository}: no such local folder, and it cannot be had from the Hub ({reason})"
        ) from error
    if not (snapshot / subfolder).is_dir():
        raise UserError(f"{repository}: no folder '{subfolder}' in this repository")
    return snapshot / subfolder
