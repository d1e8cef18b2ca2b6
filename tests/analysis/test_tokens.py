"""Groups of tokens, counted by hand; the same tokens from the model and from a store of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sparsify_vlm.analysis.tokens import GROUPS, ROLES, token_batches, token_groups
from sparsify_vlm.coders import Clt, CltConfig
from sparsify_vlm.data import ActivationStore, CaptureConfig, DataConfig
from sparsify_vlm.data.capture import capture
from sparsify_vlm.errors import UserError
from sparsify_vlm.models import Role, load_model
from sparsify_vlm.replacement import VLMReplacementModel

N = 20
P, T, S = Role.IMAGE, Role.TEXT, Role.SPECIAL


def test_groups_of_samples_with_an_image_without_and_with_two() -> None:
    samples = {
        3: ([S, T, P, P, T, S, T], "other other image image text other text"),
        4: ([S, T, T], "other text_only text_only"),
        9: ([P, T, P, T], "image text image text"),
        -1: ([T, P], "other image"),  # a store that does not know samples
    }
    for number, (roles, expected) in samples.items():
        role, sample = torch.tensor(roles, dtype=torch.uint8), torch.full((len(roles),), number)
        assert [GROUPS[g] for g in token_groups(role, sample)] == expected.split()
    known = [n for n in samples if n >= 0]
    role = torch.tensor([r for n in known for r in samples[n][0]], dtype=torch.uint8)
    sample = torch.tensor([n for n in known for _ in samples[n][0]])
    together = " ".join(samples[n][1] for n in known)
    assert [GROUPS[g] for g in token_groups(role, sample)] == together.split()


def coder_for(name: str, **changes: object) -> VLMReplacementModel:
    loaded = load_model(name, "cpu")
    names, d = loaded.stack.hookpoints, loaded.stack.d_model
    cfg = CltConfig(d, names, num_latents=8, k=2, n_targets=8, model=name, **changes)  # type: ignore[arg-type]
    return VLMReplacementModel(loaded, Clt(cfg).requires_grad_(False))


@pytest.fixture(scope="module")
def model() -> VLMReplacementModel:
    return coder_for("tiny-llava")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    options = {"dataset": "shapes", "split": "heldout", "max_examples": N, "dtype": "float32"}
    return capture(
        CaptureConfig(model="tiny-llava", output_dir=str(folder), quiet=True, **options)  # type: ignore[arg-type]
    )


DATA = DataConfig(dataset="shapes", split="", max_examples=N)


def test_the_model_and_its_store_give_the_same_tokens(
    model: VLMReplacementModel, stored: Path
) -> None:
    live = token_batches(DATA, model, batch_size=7)
    kept = token_batches(stored, model.clt)
    kept._block = 64  # type: ignore[attr-defined]  # some blocks, each of whole samples
    parts = [list(source) for source in (live, kept)]
    assert [len(b) > 1 for b in parts] == [True, True]
    for name in ("group", "sample", "rows"):
        a, b = (torch.cat([getattr(batch, name) for batch in part]) for part in parts)
        assert torch.equal(a, b), name
    for name in ("x", "y"):
        a, b = (torch.cat([getattr(batch, name) for batch in part], 1) for part in parts)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert live.size == kept.size == N
    assert torch.equal(torch.cat([b.rows for b in parts[0]]), torch.arange(N))


def test_tokens_of_tiny_llava_are_its_image_and_the_question_after_it(
    model: VLMReplacementModel,
) -> None:
    (batch,) = token_batches(DATA, model, batch_size=N)
    tokens = dict(zip(ROLES, batch.members.sum(1).tolist(), strict=True))
    assert tokens["image"] == 36 * N  # 6 × 6 patches
    assert tokens["text_only"] == 0
    # "USER", ":" and the end-of-turn are in no group; BOS does not count at all.
    assert batch.counted is not None
    assert batch.encoded is not None
    assert int(batch.counted.sum()) == len(batch) == tokens["all"]
    bos = model.loaded.tokenizer.bos_token_id
    assert not bool((batch.encoded.inputs["input_ids"][batch.counted] == bos).any())
    assert 0 < tokens["text"] < tokens["all"] - tokens["image"]
    assert batch.local.bincount().tolist() == batch.counted.sum(1).tolist()


def test_bos_counts_where_the_coder_was_trained_on_it(stored: Path) -> None:
    cfg = coder_for("tiny-llava", training={"filter_bos": False}).clt.cfg
    with_bos = sum(len(batch) for batch in token_batches(stored, cfg))
    assert with_bos == len(ActivationStore(stored))
    cfg.training = {}
    assert sum(len(batch) for batch in token_batches(stored, cfg)) == with_bos - N


def test_fewer_samples(model: VLMReplacementModel, stored: Path) -> None:
    for source in (
        token_batches(DATA, model, batch_size=4, max_samples=6),
        token_batches(stored, model.clt, max_samples=6),
    ):
        rows = torch.cat([batch.rows for batch in source])
        assert rows.tolist() == list(range(6))
        assert source.size == 6


def test_a_store_that_does_not_know_its_samples_has_blocks(
    model: VLMReplacementModel, stored: Path
) -> None:
    class Imported(ActivationStore):
        def rows(self, rows: Any) -> Any:
            found = super().rows(rows)
            found.sample[:] = -1
            return found

    known, found = (
        list(token_batches(kind(stored), model.clt)) for kind in (ActivationStore, Imported)
    )
    rows = torch.cat([batch.rows for batch in found])
    assert rows.tolist() == list(range(-(-len(ActivationStore(stored)) // 256)))
    x = [torch.cat([batch.x for batch in part], 1) for part in (known, found)]
    assert torch.equal(*x)
    tokens = sum(batch.members.sum(1) for batch in found)
    assert isinstance(tokens, torch.Tensor)
    assert tokens[ROLES.index("image")] == 36 * N
    assert tokens[ROLES.index("text")] == tokens[ROLES.index("text_only")] == 0


def test_a_store_without_a_layer_that_is_written(model: VLMReplacementModel, stored: Path) -> None:
    store = ActivationStore(stored)
    store.manifest["y_layers"] = list(range(1, 8))
    with pytest.raises(UserError, match=r"does not hold y of .*layers\.0\.mlp"):
        token_batches(store, model.clt)
    token_batches(store, coder_for("tiny-llava", target_offset=1).clt)


def test_text_of_a_text_model_is_text_only() -> None:
    model = coder_for("tiny-llama")
    (batch,) = token_batches(DATA, model, batch_size=N)
    tokens = dict(zip(ROLES, batch.members.sum(1).tolist(), strict=True))
    assert tokens["image"] == tokens["text"] == 0
    assert 0 < tokens["text_only"] < tokens["all"]  # the end-of-turn is in no group


def test_a_mix_is_named_without_a_split(model: VLMReplacementModel, tmp_path: Path) -> None:
    """Its parts have their own."""
    (tmp_path / "mix.yaml").write_text(
        "streams:\n  - {name: seen, dataset: shapes, split: heldout, kind: conversation}\n"
    )
    mix = DataConfig(dataset_mix=str(tmp_path / "mix.yaml"), split="", max_examples=2)
    assert token_batches(mix, model).name.endswith("mix.yaml")
    assert token_batches(DATA, model).name == "shapes (heldout)"


def test_data_that_is_not_for_the_coder(stored: Path, tmp_path: Path) -> None:
    text = coder_for("tiny-llama")
    with pytest.raises(UserError, match="holds activations of tiny-llava, not of tiny-llama"):
        token_batches(stored, text)
    (tmp_path / "rows.jsonl").write_text('{"image": "a.png", "question": "q", "answer": "a"}\n')
    data = DataConfig(dataset=str(tmp_path / "rows.jsonl"))
    with pytest.raises(UserError, match="has images, which tiny-llama does not read"):
        token_batches(data, text)
    cfg = coder_for("tiny-llava").clt.cfg
    with pytest.raises(UserError, match="needs a model"):
        token_batches(DATA, cfg)
    with pytest.raises(UserError, match="holds x at mlp_in; the coder reads resid_mid"):
        token_batches(stored, coder_for("tiny-llava", input_site="resid_mid").clt)
    cfg.hookpoints[3] = "model.layers.30.mlp"
    with pytest.raises(UserError, match=r"does not hold the coder's layer model\.layers\.30\.mlp"):
        token_batches(stored, cfg)
