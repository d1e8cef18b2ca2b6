"""Image-text and text datasets, the embedded shapes, capture and the activation store."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsify_vlm._lazy import lazily

if TYPE_CHECKING:
    from sparsify_vlm.data.batching import batches, prefetched
    from sparsify_vlm.data.capture import CaptureConfig
    from sparsify_vlm.data.config import DataConfig
    from sparsify_vlm.data.encoding import EncodedBatch, encode
    from sparsify_vlm.data.images import BadSample, ImageRef
    from sparsify_vlm.data.legacy import ImportActivationsConfig, import_activations
    from sparsify_vlm.data.rows import Sample, Turn
    from sparsify_vlm.data.shapes import ShapesDataset
    from sparsify_vlm.data.sources import SampleSource, open_samples
    from sparsify_vlm.data.store import ActivationStore

# Imported when first used: reading the configuration must not import torch.
_HOMES = {
    "ActivationStore": "store",
    "BadSample": "images",
    "CaptureConfig": "capture",
    "DataConfig": "config",
    "EncodedBatch": "encoding",
    "ImageRef": "images",
    "ImportActivationsConfig": "legacy",
    "Sample": "rows",
    "SampleSource": "sources",
    "ShapesDataset": "shapes",
    "Turn": "rows",
    "batches": "batching",
    "encode": "encoding",
    "import_activations": "legacy",
    "open_samples": "sources",
    "prefetched": "batching",
}

__all__ = [
    "ActivationStore",
    "BadSample",
    "CaptureConfig",
    "DataConfig",
    "EncodedBatch",
    "ImageRef",
    "ImportActivationsConfig",
    "Sample",
    "SampleSource",
    "ShapesDataset",
    "Turn",
    "batches",
    "encode",
    "import_activations",
    "open_samples",
    "prefetched",
]

__getattr__, __dir__ = lazily(__name__, _HOMES)
