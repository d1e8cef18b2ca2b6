"""What `examples` can be told. Read without importing torch, so that its help is quick."""

from __future__ import annotations

from dataclasses import dataclass, field

from sparsify_vlm.data.config import DataConfig
from sparsify_vlm.errors import UserError


@dataclass(kw_only=True)
class ExamplesConfig(DataConfig):
    """Of which latents the strongest examples are kept, and where they go."""

    clt: str
    """Coder: a folder or a Hub id, in any readable format."""

    output_dir: str | None = None
    """Folder of examples.json and its pictures. Default: that of --graph."""

    graph: str | None = None
    """Folder of a traced graph: its features are looked at, those that its page shows."""

    features: list[str] = field(default_factory=list)
    """Features to look at, as LAYER_INDEX (3_117), layers as the decoder counts them; or all."""

    top: int = 6
    """Examples of each feature: the samples in which it is strongest."""

    context: int = 24
    """Words of text around the strongest one, two thirds of them before it."""

    picture_size: int = 160
    """Pixels of an example's picture along its longer side."""

    model: str | None = None
    """Model. Default: the one the coder was trained on."""

    max_examples: int | None = 2000
    """Read at most this many samples."""

    batch_size: int = 16
    """Samples run through the model together."""

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

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("top", "context", "picture_size", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, not {getattr(self, name)}")
        if not self.graph and not self.features:
            raise UserError("whose examples? give --graph with a traced graph, or --features")
        if not self.graph and not self.output_dir:
            raise UserError("--output_dir is missing: where do the examples go?")
