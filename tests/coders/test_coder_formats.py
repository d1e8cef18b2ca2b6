"""Checkpoints: written and read again, shared with sparsify, foreign layouts, damaged ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsify_vlm.coders import Clt, CltConfig, load_clt, save_clt
from sparsify_vlm.errors import UserError

L, D, F = 12, 6, 24  # more than ten layers: order by number, not by name


def make(layers: int = L, prefix: str = "language_model.model.", **options) -> Clt:
    options = {"d_model": D, "num_latents": F, "k": 3} | options
    cfg = CltConfig(
        hookpoints=[f"{prefix}layers.{i}.mlp" for i in range(layers)],
        model="owner/model",
        training={"tokens": 123},
        **options,
    )
    clt = Clt(cfg)
    with torch.no_grad():
        for parameter in clt.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape)
        for tensor in (*clt.threshold, clt.in_norm, clt.out_norm):
            if tensor is not None:
                tensor.uniform_(0.1, 2)
        if cfg.normalize_io:  # nothing reads or writes there
            clt.in_norm[layers - cfg.target_offset :] = 1
            clt.out_norm[: cfg.target_offset] = 1
    return clt


def same(left: list[Tensor | None], right: list[Tensor | None]) -> bool:
    return all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize(
    "options",
    [
        {"n_targets": 16},
        {"n_targets": 3, "target_offset": 1, "skip_connection": True},
        {"n_targets": 3, "train_post_encoder": True, "post_encoder_scale": True},
        {"n_targets": 1, "target_offset": 1},
        {"n_targets": 1, "train_post_encoder": True},
        {"transcode": False, "input_site": "mlp_out"},
        {"activation": "relu", "n_targets": 2, "input_site": "resid_mid"},
        {"activation": "batchtopk", "n_targets": 2},
        {"activation": "batchtopk", "transcode": False, "input_site": "mlp_out"},
        {"activation": "groupmax", "per_source_tied": True},
        {"activation": "groupmax", "n_targets": 2, "per_source_tied": True, "target_offset": 1},
        {"activation": "jumprelu", "n_targets": 2, "jumprelu_bandwidth": 0.5},
        {"n_targets": 3, "coalesce_topk": "concat", "skip_connection": True},
        {"n_targets": 3, "coalesce_topk": "per-layer", "train_post_encoder": True},
        {"n_targets": 3, "coalesce_topk": "per-layer", "topk_coalesced": True},
        {"n_targets": 3, "secondary_target_tied": True, "skip_connection": True},
        {"n_targets": 1, "secondary_target_tied": True, "per_source_tied": True},
        {"n_targets": 3, "divide_cross_layer": True, "skip_connection": True},
        {"n_targets": 3, "divide_cross_layer": True, "target_offset": 1},
        {"n_targets": 3, "normalize_io": True, "target_offset": 1},
        {"normalize_io": True, "transcode": False, "input_site": "mlp_out"},
        {"n_targets": 1, "coalesce_topk": "concat", "post_encoder_scale": True},
    ],
    ids=str,
)
def test_written_and_read_again_is_the_same(options, tmp_path):
    clt = make(**options)
    assert save_clt(clt, tmp_path / "c") == tmp_path / "c"
    for name in ("load_clt", "from_pretrained"):
        again = (
            load_clt(tmp_path / "c") if name == "load_clt" else Clt.from_pretrained(tmp_path / "c")
        )
        assert again.cfg == clt.cfg
        state = again.state_dict()
        assert state.keys() == clt.state_dict().keys()
        assert all(torch.equal(state[key], value) for key, value in clt.state_dict().items())
    x = torch.randn(L, 5, D)
    assert same(clt.reconstruct(x), again.reconstruct(x))
    assert load_clt(tmp_path / "c", dtype=torch.float64).dtype == torch.float64
    assert not list((tmp_path / "c").rglob("*.tmp"))


@pytest.mark.parametrize(
    "options",
    [{}, {"skip_connection": True}, {"transcode": False, "input_site": "mlp_out"}],
    ids=str,
)
def test_single_target_checkpoints_are_sparsify_s_own(options, tmp_path):
    from sparsify import SparseCoder

    clt = make(layers=3, prefix="", **options)
    save_clt(clt, tmp_path)
    coders = SparseCoder.load_many(str(tmp_path), local=True)
    assert list(coders) == clt.cfg.hookpoints
    x = torch.randn(3, 40, D)
    ours = clt.reconstruct(x)
    for s, coder in enumerate(coders.values()):
        encoded = coder.encode(x[s])
        theirs = coder.decode(encoded.top_acts, encoded.top_indices)
        if coder.W_skip is not None:
            theirs = theirs + x[s] @ coder.W_skip.mT
        torch.testing.assert_close(ours[s], theirs)
        assert coder.cfg.k == 3
        assert coder.cfg.transcode == clt.cfg.transcode


def test_sparsify_s_own_checkpoints_are_read(tmp_path):
    from sparsify import SparseCoder, SparseCoderConfig

    cfg = SparseCoderConfig(num_latents=F, k=3, transcode=True, skip_connection=True)
    coders = [SparseCoder(D, cfg) for _ in range(L)]
    x = torch.randn(L, 20, D)
    for i, coder in enumerate(coders):
        for parameter in coder.parameters():
            parameter.data.normal_()
        coder.save_to_disk(tmp_path / f"h.{i}.mlp")
    clt = load_clt(tmp_path)
    assert clt.cfg.hookpoints == [f"h.{i}.mlp" for i in range(L)]
    assert (clt.cfg.n_targets, clt.cfg.target_offset) == (1, 0)
    for i, (coder, ours) in enumerate(zip(coders, clt.reconstruct(x), strict=True)):
        encoded = coder.encode(x[i])
        theirs = coder.decode(encoded.top_acts, encoded.top_indices) + x[i] @ coder.W_skip.mT
        torch.testing.assert_close(ours, theirs)
    one = load_clt(tmp_path / "h.7.mlp")
    assert one.cfg.hookpoints == ["h.7.mlp"]
    torch.testing.assert_close(one.reconstruct(x[7:8])[0], clt.reconstruct(x)[7])


# ---- circuit-tracer


def test_thresholds_of_circuit_tracer(tmp_path):
    (tmp_path / "config.yaml").write_text(
        "model_kind: cross_layer_transcoder\nfeature_input_hook: hook_resid_mid\n"
        "feature_output_hook: hook_mlp_out\nmodel_name: owner/model\n"
    )
    W_enc, W_dec = torch.randn(11, F, D), [torch.randn(F, 11 - i, D) for i in range(11)]
    threshold = torch.rand(11, F)
    for i in range(11):
        encoder = {
            f"W_enc_{i}": W_enc[i],
            f"b_enc_{i}": torch.zeros(F),
            f"b_dec_{i}": torch.full((D,), float(i)),
            f"threshold_{i}": threshold[i],
        }
        save_file(encoder, tmp_path / f"W_enc_{i}.safetensors")
        save_file({f"W_dec_{i}": W_dec[i]}, tmp_path / f"W_dec_{i}.safetensors")
    clt = load_clt(tmp_path)
    assert clt.cfg.activation == "jumprelu"
    assert clt.cfg.input_site == "resid_mid"
    assert clt.cfg.model == "owner/model"
    x = torch.randn(11, 7, D)
    pre = torch.einsum("ltd,lfd->ltf", x, W_enc)
    acts = pre * (pre > threshold[:, None])
    expected = 10.0 + sum(acts[s] @ W_dec[s][:, 10 - s] for s in range(11))
    torch.testing.assert_close(clt.reconstruct(x)[10], expected, rtol=1e-5, atol=1e-4)
    again = load_clt(save_clt(clt, tmp_path / "out"))
    assert again.cfg == clt.cfg
    assert same(again.reconstruct(x), clt.reconstruct(x))
    (tmp_path / "W_enc_9.safetensors").unlink()
    with pytest.raises(UserError, match=r"W_enc_9\.safetensors: the file is missing"):
        load_clt(tmp_path)
    text = (tmp_path / "config.yaml").read_text().replace("hook_resid_mid", "ln2.hook_normalized")
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"config\.yaml|W_enc_9"):
        load_clt(tmp_path)


# ---- damaged checkpoints


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_clt(make(layers=3, n_targets=2), tmp_path / "coder")


def edit_tensors(folder: Path, change) -> None:
    path = folder / "language_model.model.layers.1.mlp" / "sae.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def edit_json(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def poison(tensors: dict[str, Tensor]) -> None:
    tensors["encoder.weight"][3, 2] = torch.nan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("W_decs.1"),
            r"layers\.1\.mlp/sae\.safetensors: tensor 'W_decs.1' is miss",
        ),
        (
            lambda t: t.update({"encoder.bias": torch.zeros(F + 1)}),
            r"'encoder.bias' has shape \[25\], expected \[24\]",
        ),
        (poison, r"layers\.1\.mlp/sae\.safetensors: tensor 'encoder.weight' holds NaN"),
    ],
)
def test_bad_tensors_are_named(change, message, saved):
    edit_tensors(saved, change)
    with pytest.raises(UserError, match=message):
        load_clt(saved)


def test_bad_files_are_named(saved):
    first = saved / "language_model.model.layers.0.mlp"
    edit_json(saved / "clt.json", version=2)
    with pytest.raises(UserError, match=r"clt\.json: format 'sparsify-vlm clt' version 2"):
        load_clt(saved)
    edit_json(saved / "clt.json", version=1)
    edit_json(first / "cfg.json", k=5)
    with pytest.raises(UserError, match="must agree"):
        load_clt(saved)
    (first / "cfg.json").write_text("{")
    with pytest.raises(UserError, match=r"0\.mlp/cfg\.json: not readable as JSON"):
        load_clt(saved)
    (first / "cfg.json").unlink()
    with pytest.raises(UserError, match=r"0\.mlp/cfg\.json: the file is missing"):
        load_clt(saved)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hookpoints", 5),
        ("hookpoints", ["a", 5]),
        ("hookpoints", []),
        ("target_offset", 2),
        ("n_targets", "x"),
        ("model", 5),
        ("normalisation", "unit"),
        ("training", [1]),
    ],
)
def test_sheet_that_is_not_understood_is_refused(saved, field, value):
    edit_json(saved / "clt.json", **{field: value})
    with pytest.raises(UserError, match=rf"clt\.json: .*{field}"):
        load_clt(saved)


def test_every_layer_is_checked_for_what_cannot_be_read(saved):
    last = sorted(saved.glob("*/cfg.json"))[-1]
    edit_json(last, activation="gelu")
    with pytest.raises(UserError, match=rf"{last.parent.name}/cfg\.json: .*activation.*gelu"):
        load_clt(saved)


def test_truncated_and_missing_tensor_files_are_named(saved):
    path = saved / "language_model.model.layers.2.mlp" / "sae.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"2\.mlp/sae\.safetensors: not a readable safetensors"):
        load_clt(saved)
    path.unlink()
    with pytest.raises(UserError, match=r"2\.mlp/sae\.safetensors: the file is missing"):
        load_clt(saved)


def test_a_missing_layer_folder_is_noticed_without_a_sheet(saved):
    import shutil

    (saved / "clt.json").unlink()
    shutil.rmtree(saved / "language_model.model.layers.2.mlp")
    with pytest.raises(UserError, match="is a layer's folder missing"):
        load_clt(saved)


def test_no_checkpoint_at_all(tmp_path):
    with pytest.raises(UserError, match="no coder checkpoint in a known format"):
        load_clt(tmp_path)
    for path in (tmp_path / "nowhere", "nowhere", "./a/b"):
        with pytest.raises(UserError, match=r"no such (checkpoint|local) folder"):
            load_clt(path)
    with pytest.raises(UserError, match="owner/name: no such local folder, and it cannot be had"):
        load_clt("owner/name")


def test_a_full_disk_leaves_the_old_checkpoint(saved, monkeypatch):
    before = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_clt(make(layers=3, n_targets=2), saved)
    assert before == {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}


def test_a_mistyped_folder_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^runs/demo/cltt: no such checkpoint folder$"):
        load_clt("runs/demo/cltt")
