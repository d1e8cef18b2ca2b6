"""What `examples` can be told. Read without importing torch, so that its help is quick."""

from __future__ import annotations

from dataclasses import dataclass, field

from sparsify_vlm.data.config import DataConfig
from sparsify_vlm.errors import UserError
from sparsify_vlm.replacement.config import ReplacedConfig


@dataclass(kw_only=True)
class ExamplesConfig(ReplacedConfig, DataConfig):
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

    max_examples: int | None = 2000
    """Read at most this many samples."""

    batch_size: int = 16
    """Samples run through the model together."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("top", "context", "picture_size", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, not {getattr(self, name)}")
        if not self.graph and not self.features:
            raise UserError("whose examples? give --graph with a traced graph, or --features")
        if not self.graph and not self.output_dir:
            raise UserError("--output_dir is missing: where do the examples go?")
