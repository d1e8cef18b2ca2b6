"""Data sets in temporary folders, and the embedded pair to read them with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparsify_vlm.models import LoadedModel, load_model


@pytest.fixture(scope="session")
def vlm() -> LoadedModel:
    return load_model("tiny-llava", "cpu")


@pytest.fixture(scope="session")
def llm() -> LoadedModel:
    return load_model("tiny-llama", "cpu")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written into the user's cache of datasets."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    # After each stream, `datasets` sleeps for seconds, because of a bug in Arrow's downloads.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    datasets.disable_progress_bars()


def picture(seed: int, size: int = 48) -> Image.Image:
    """A picture of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with p0.png to p9.png."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(10):
        picture(i).save(folder / f"p{i}.png")
    return folder
