"""Coders on the Hub, a folder playing the repository: what is asked for, and what is read."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from foreign import inputs, write_curt_tigges, write_gemma_scope
from huggingface_hub.utils import filter_repo_objects
from torch import Tensor

from sparsify_vlm.coders import Clt, load_clt
from sparsify_vlm.coders.formats import open_clt
from sparsify_vlm.errors import UserError


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """tmp_path/hub/OWNER/NAME are repositories; what is downloaded is copied to tmp_path/cache."""

    def download(repository: str, allow_patterns: list[str], ignore_patterns: str) -> str:
        source, target = tmp_path / "hub" / repository, tmp_path / "cache" / repository
        names = [str(p.relative_to(source)) for p in source.rglob("*") if p.is_file()]
        chosen = filter_repo_objects(
            names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        for name in chosen:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, target / name)
        return str(target)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr("sparsify_vlm.coders.formats.offline_if_unreachable", lambda: None)
    return tmp_path / "hub"


def downloaded(hub: Path) -> set[str]:
    cache = hub.parent / "cache" / "owner" / "name"
    return {str(p.relative_to(cache)) for p in cache.rglob("*") if p.is_file()}


def outputs(clt: Clt) -> Tensor:
    return torch.stack([y for y in clt.reconstruct(inputs()) if y is not None]).double()


def test_a_subfolder_deep_in_a_repository(hub: Path) -> None:
    compute = write_gemma_scope(hub / "owner/name/clt/width_16k_affine", affine=True)
    write_gemma_scope(hub / "owner/name/clt/width_16k", affine=False)
    clt = load_clt("owner/name/clt/width_16k_affine")
    assert torch.allclose(outputs(clt), compute(inputs())[1], atol=1e-4)
    assert {name.rpartition("/")[0] for name in downloaded(hub)} == {"clt/width_16k_affine"}


def test_norms_one_folder_up_come_along(hub: Path) -> None:
    compute = write_curt_tigges(hub / "owner/name/untied")
    shutil.copytree(hub / "owner/name/untied", hub / "owner/name/tied")
    assert torch.allclose(outputs(load_clt("owner/name/untied")), compute(inputs())[1], atol=1e-3)
    assert downloaded(hub) == {
        "norm_stats.json",
        "untied/cfg.json",
        "untied/clt_checkpoint_97689.safetensors",
    }


def test_a_repository_of_many_coders_is_not_downloaded_whole(hub: Path) -> None:
    write_gemma_scope(hub / "owner/name/clt/width_16k")
    write_gemma_scope(hub / "owner/name/clt/width_262k")
    with pytest.raises(UserError, match=r"owner/name.*name its folder"):
        open_clt("owner/name")
    assert downloaded(hub) == set()
