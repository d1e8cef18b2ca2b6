"""Data sets in temporary folders, and the embedded pair to read them with."""

from __future__ import annotations

from pathlib import Path

import families
import pytest

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


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with p0.png to p9.png."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(10):
        families.picture(48, 48, i).save(folder / f"p{i}.png")
    return folder
