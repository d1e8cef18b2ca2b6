"""Checkpoint formats. Only modules of this folder spell a tensor's key."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from sparsify_vlm.coders.clt import Clt
from sparsify_vlm.coders.formats import (
    circuit_tracer,
    clt_forge,
    curt_tigges,
    eleuther,
    eleuther_stored,
    gemma_scope,
)
from sparsify_vlm.coders.formats.stored import InMemory, StoredClt
from sparsify_vlm.coders.formats.written import export_clt
from sparsify_vlm.errors import UserError
from sparsify_vlm.hub import offline_if_unreachable

__all__ = ["InMemory", "StoredClt", "export_clt", "load_clt", "open_clt", "save_clt"]

READERS = (eleuther_stored, circuit_tracer, gemma_scope, clt_forge, curt_tigges)
WANTED_FILES = ["*.json", "*.safetensors", "*.yaml"]


def load_clt(
    path_or_hub_id: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Clt:
    """Load a coder of any readable format, recognised by its files.

    Reads this project's and EleutherAI's layout (also single coders of sparsify) and the
    cross-layer transcoders of circuit-tracer, Gemma Scope 2, CLT-Forge and curt-tigges
    (docs/formats.md), from a folder or from the Hugging Face Hub (`owner/name` or
    `owner/name/sub/folder`). `dtype` None keeps the checkpoint's. What is found and not used is
    warned of (`UserWarning`).

    Raises `UserError` naming the file and the key if something is missing, has the wrong shape,
    is not finite, or is of a variant or version that is not supported.
    """
    stored = open_clt(path_or_hub_id)
    clt = stored.load(device, dtype)
    for line in stored.warnings:
        warnings.warn(f"{path_or_hub_id}: {line}", stacklevel=2)
    return clt


def open_clt(path_or_hub_id: str | Path) -> StoredClt:
    """Open a coder of any readable format to read it layer by layer; as `load_clt` otherwise."""
    folder = _local_folder(path_or_hub_id)
    found = [reader for reader in READERS if reader.recognises(folder)]
    if len(found) > 1:
        both = " and ".join(reader.DESCRIPTION for reader in found)
        raise UserError(f"{path_or_hub_id}: holds files of more than one format: {both}")
    if found:
        return found[0].Stored(folder)
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
    deeper = f"{prefix}*/*/*"  # hundreds of coders may be in folders of folders
    above = f"{subfolder.rpartition('/')[0]}/".lstrip("/")
    patterns = [prefix + pattern for pattern in WANTED_FILES] + [above + curt_tigges.STATS]
    try:
        snapshot = Path(
            snapshot_download(repository, allow_patterns=patterns, ignore_patterns=deeper)
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{repository}: no such local folder, and it cannot be had from the Hub ({reason})"
        ) from error
    folder = snapshot / subfolder
    if not folder.is_dir() or not any(folder.iterdir()):
        what = f"no folder '{subfolder}' with a coder" if subfolder else "no coder at the top"
        raise UserError(
            f"{repository}: {what} of this repository; if it is deeper, name its folder: "
            f"{repository}/FOLDER"
        )
    return folder
