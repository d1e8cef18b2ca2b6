"""What `export` can be told, and the command itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Format = Literal["eleuther", "sparsify", "circuit-tracer", "gemma-scope-2", "clt-forge"]


@dataclass(kw_only=True)
class ExportConfig:
    """What is written, and where."""

    clt: str
    """Coder: a folder or a Hub id, in any readable format."""

    format: Format
    """`eleuther`: this project's layout, that of EleutherAI's clt-training. `sparsify`: the same
    with one target per coder, as PyPI's sparsify reads it. `circuit-tracer`, `gemma-scope-2`,
    `clt-forge`: those programs' cross-layer transcoders."""

    output_dir: str
    """Folder for the files; must be new or empty."""


def export(cfg: ExportConfig) -> None:
    """`sparsify-vlm export`: write `cfg.clt` in another layout and say what was not used."""
    from sparsify_vlm.coders.formats import export_clt, open_clt

    stored = open_clt(cfg.clt)
    folder = export_clt(stored, cfg.format, cfg.output_dir)
    for line in stored.warnings:
        print(f"note: {line}")
    print(f"{folder}: {stored.cfg.n_layers} layers, {stored.cfg.num_latents} latents each")
