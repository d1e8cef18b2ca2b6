"""What `evaluate` can be told, and what all tell that put a coder into its model.

Read without importing torch, so that its help is quick.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sparsify_vlm.data.config import DataConfig
from sparsify_vlm.errors import UserError

INPUT_SITES = ("mlp_in", "resid_mid", "mlp_out")


@dataclass(kw_only=True)
class ReplacedConfig:
    """A coder's model, and where it runs; see `load_replacement`."""

    model: str | None = None
    """Model. Default: the one the coder was trained on."""

    device: str | None = None
    """Where the model and the coder run. Default: cuda if there, else cpu."""

    dtype: str | None = None
    """Type of the model's numbers. Default: float32 on a CPU, bfloat16 elsewhere."""

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


@dataclass(kw_only=True)
class EvaluateConfig(ReplacedConfig, DataConfig):
    """What is measured, on which tokens."""

    clt: str
    """Coder: a folder or a Hub id, in any readable format."""

    output: str = "eval.json"
    """File the figures are written to."""

    answers: str | None = None
    """File every generated answer is written to, a JSON line per sample. Default: none."""

    split: str = ""
    """Split to read. Default: heldout for shapes, validation for others."""

    max_examples: int | None = 500
    """Read at most this many samples."""

    batch_size: int = 16
    """Samples run through the model together."""

    max_new_tokens: int = 32
    """Answers longer than this are not asked for; 0 generates none at all."""

    filter_bos: bool | None = None
    """Leave the beginning-of-sequence token out of every figure, and its MLPs as they are.
    Default: as the coder was trained."""

    input_site: str | None = None
    """Where the coder reads: mlp_in (the MLP's input, after its norm), resid_mid (before the norm)
    or mlp_out (the MLP's output). Default: what the checkpoint says; mlp_in for transcoders that do
    not say it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 1:
            raise UserError(f"--batch_size must be at least 1, not {self.batch_size}")
        if self.input_site not in (None, *INPUT_SITES):
            raise UserError(f"--input_site {self.input_site} is none of {', '.join(INPUT_SITES)}")
        if self.max_new_tokens < 0:
            raise UserError(f"--max_new_tokens must not be negative, as {self.max_new_tokens} is")
