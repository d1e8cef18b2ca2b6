"""What `export` writes computes, by each layout's own definition, what the coder computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from foreign import (
    compute_circuit_tracer,
    compute_clt_forge,
    compute_gemma_scope,
    write_circuit_tracer,
    write_clt_forge,
    write_curt_tigges,
    write_gemma_scope,
)
from safetensors.torch import load_file
from torch import Tensor

from sparsify_vlm.cli import main
from sparsify_vlm.coders import Clt, CltConfig, export_clt, load_clt, open_clt, save_clt
from sparsify_vlm.errors import UserError

LAYERS, D, F, T = 11, 6, 20, 9
COMPUTE = {
    "circuit-tracer": compute_circuit_tracer,
    "gemma-scope-2": compute_gemma_scope,
    "clt-forge": compute_clt_forge,
}


def coder(**options) -> Clt:
    """A coder with random numbers wherever it has numbers."""
    values = {"d_model": D, "num_latents": F, "k": 4, "n_targets": LAYERS, "model": "owner/model"}
    clt = Clt(CltConfig(hookpoints=[f"h.{i}.mlp" for i in range(LAYERS)], **values | options))
    with torch.no_grad():
        for parameter in clt.parameters():
            parameter += torch.randn(parameter.shape)
        for tensor in (*clt.threshold, clt.in_norm, clt.out_norm):
            if tensor is not None:
                tensor.uniform_(0.1, 2)
    return clt


def outputs(clt: Clt, x: Tensor) -> tuple[Tensor, Tensor]:
    latents = clt.encode(x)
    acts = torch.stack([a.dense(F) for a in latents if a is not None])
    return acts.detach(), torch.stack([y for y in clt.decode(latents, x) if y is not None]).detach()


def same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    return all(
        bool((a.double() - b.double()).abs().max() < 3e-6 * a.abs().max())
        for a, b in zip(found, expected, strict=True)
    )


VARIANTS = {
    "relu": {"activation": "relu"},
    "jumprelu": {"activation": "jumprelu"},
    "batchtopk": {"activation": "batchtopk"},
    "short reach": {"activation": "relu", "n_targets": 3},
    "own layer": {"activation": "jumprelu", "n_targets": 1},
    "normalised": {"activation": "jumprelu", "normalize_io": True},
    "divided": {"activation": "relu", "divide_cross_layer": True},
    "tied to sources": {"activation": "relu", "per_source_tied": True},
    "tied to targets": {"activation": "relu", "coalesce_topk": "concat"},
    "with the targets": {"activation": "relu", "coalesce_topk": "per-layer"},
    "scaled": {"activation": "relu", "post_encoder_scale": True},
    "two decoders": {"activation": "relu", "secondary_target_tied": True},
}


@pytest.mark.filterwarnings("ignore:.*hook_normalized")
@pytest.mark.parametrize("format", COMPUTE)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_files_compute_what_the_coder_does(tmp_path: Path, format, variant: str) -> None:
    clt, x = coder(**VARIANTS[variant]), torch.randn(LAYERS, T, D)
    save_clt(clt, tmp_path / "ours")
    for place, source in {"file": open_clt(tmp_path / "ours"), "memory": clt}.items():
        folder = export_clt(source, format, tmp_path / place)
        assert same(COMPUTE[format](folder, x), outputs(clt, x))
        back = load_clt(folder)
        assert same(outputs(back, x), outputs(clt, x))
        assert back.cfg.input_site == "mlp_in"
        assert back.cfg.model == "owner/model"


@pytest.mark.filterwarnings("ignore:.*hook_normalized")
@pytest.mark.parametrize("format", COMPUTE)
def test_thresholds_below_0(tmp_path: Path, format) -> None:
    """They let no negative latent through, whatever the layout's own program would do."""
    clt, x = coder(activation="jumprelu"), torch.randn(LAYERS, T, D)
    for threshold in clt.threshold:
        threshold.data.uniform_(-1, 1)
    export_clt(clt, format, tmp_path / "out")
    assert same(COMPUTE[format](tmp_path / "out", x), outputs(clt, x))
    assert same(outputs(load_clt(tmp_path / "out"), x), outputs(clt, x))


@pytest.mark.parametrize("own_only", [False, True])
def test_gemma_scope_has_own_skip_connections_only(tmp_path: Path, own_only: bool) -> None:
    clt = coder(activation="relu", skip_connection=True, n_targets=3)
    x = torch.randn(LAYERS, T, D)
    if own_only:
        with torch.no_grad():
            for tables in clt.W_skip:
                for W in list(tables)[1:]:
                    W.zero_()
        folder = export_clt(clt, "gemma-scope-2", tmp_path / "out")
        assert same(compute_gemma_scope(folder, x), outputs(clt, x))
        assert "affine_skip_connection" in load_file(folder / "params_layer_10.safetensors")
        return
    with pytest.raises(UserError, match="skip connections to the own layer only, and layer 0"):
        export_clt(clt, "gemma-scope-2", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:.*hook_normalized")
@pytest.mark.parametrize("write", [write_circuit_tracer, write_clt_forge, write_curt_tigges])
@pytest.mark.parametrize("format", COMPUTE)
def test_from_one_program_to_another(tmp_path: Path, write, format) -> None:
    hooks = {"feature_input_hook": "mlp.hook_in"} if write is write_circuit_tracer else {}
    compute, x = write(tmp_path / "in", **hooks), torch.randn(LAYERS, T, D)
    folder = export_clt(load_clt(tmp_path / "in"), format, tmp_path / "out")
    assert same(COMPUTE[format](folder, x), compute(x))


def test_circuit_tracer_s_names(tmp_path: Path) -> None:
    """The files its loader asks for, in float32, and where it hooks the coder in."""
    clt = coder(activation="jumprelu", input_site="resid_mid")
    folder = export_clt(clt, "circuit-tracer", tmp_path)
    names = {f"W_{kind}_{i}.safetensors" for kind in ("enc", "dec") for i in range(LAYERS)}
    assert {path.name for path in folder.iterdir()} == names | {"config.yaml"}
    first = load_file(folder / "W_enc_10.safetensors")
    assert set(first) == {"W_enc_10", "b_enc_10", "b_dec_10", "threshold_10"}
    assert {tensor.dtype for tensor in first.values()} == {torch.float32}
    config = (folder / "config.yaml").read_text()
    assert "feature_input_hook: hook_resid_mid" in config
    assert "feature_output_hook: hook_mlp_out" in config
    assert "model_kind: cross_layer_transcoder" in config
    assert "model_name: owner/model" in config
    assert load_clt(folder).cfg.input_site == "resid_mid"


REFUSED = {
    "topk": ("circuit-tracer", {}, "knows ReLU and JumpReLU only, not topk"),
    "groupmax": ("gemma-scope-2", {"activation": "groupmax"}, "not groupmax"),
    "skip": ("circuit-tracer", {"activation": "relu", "skip_connection": True}, "no skip"),
    "offset": ("clt-forge", {"activation": "relu", "target_offset": 1}, "--target_offset 1"),
    "site": ("gemma-scope-2", {"activation": "relu", "input_site": "resid_mid"}, "mlp_in"),
    "bias": (
        "circuit-tracer",
        {"activation": "relu", "train_post_encoder": True},
        "--train_post_encoder",
    ),
    "selection": (
        "gemma-scope-2",
        {"activation": "batchtopk", "coalesce_topk": "concat", "topk_coalesced": True},
        "--topk_coalesced",
    ),
    "autoencoder": (
        "circuit-tracer",
        {"activation": "relu", "transcode": False, "n_targets": 1, "input_site": "mlp_out"},
        "transcoders only",
    ),
    "crossing": ("sparsify", {}, "one target per coder"),
    "jumprelu": ("sparsify", {"activation": "jumprelu", "n_targets": 1}, "topk, groupmax or ReLU"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_layout_cannot_express_is_refused(tmp_path: Path, case: str) -> None:
    format, options, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        export_clt(coder(**options), format, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_batchtopk_without_a_learned_threshold_is_refused(tmp_path: Path) -> None:
    clt = coder(activation="batchtopk")
    with torch.no_grad():
        clt.threshold[3].zero_()
    with pytest.raises(UserError, match="not batchtopk without a learned threshold"):
        export_clt(clt, "circuit-tracer", tmp_path / "out")


def test_sparsify_s_layout_is_read_by_sparsify(tmp_path: Path) -> None:
    sparsify = pytest.importorskip("sparsify")
    clt, x = coder(n_targets=1), torch.randn(LAYERS, T, D)
    folder = export_clt(clt, "sparsify", tmp_path / "out")
    expected = outputs(clt, x)[1]
    for i in range(LAYERS):
        single = sparsify.SparseCoder.load_from_disk(folder / f"h.{i}.mlp")
        y = single(x[i], y=x[i]).sae_out
        assert torch.allclose(y, expected[i], atol=1e-5)


def test_the_command_and_its_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_gemma_scope(tmp_path / "gemma", affine=False, acausal=(2,))
    arguments = ["export", str(tmp_path / "gemma"), "circuit-tracer", str(tmp_path / "out")]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "note: layer 2: non-zero writes to earlier layers dropped" in printed
    assert "11 layers, 20 latents each" in printed
    x = torch.randn(LAYERS, T, D)
    found, expected = (
        compute_circuit_tracer(tmp_path / "out", x),
        outputs(load_clt(tmp_path / "out"), x),
    )
    assert same(found, expected)

    before = (tmp_path / "out" / "config.yaml").read_bytes()
    assert main(arguments) == 1
    assert "is there and not empty" in capsys.readouterr().err
    assert (tmp_path / "out" / "config.yaml").read_bytes() == before
    assert main([*arguments[:2], "neuronpedia", str(tmp_path / "new")]) == 2
    assert "neuronpedia" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "nothing"), "eleuther", str(tmp_path / "new")]) == 1
    assert "nothing" in capsys.readouterr().err


def test_eleuther_s_layout_keeps_everything(tmp_path: Path) -> None:
    clt, x = coder(skip_connection=True, train_post_encoder=True), torch.randn(LAYERS, T, D)
    folder = export_clt(clt, "eleuther", tmp_path / "out")
    assert same(outputs(load_clt(folder), x), outputs(clt, x))
    assert json.loads((folder / "clt.json").read_text())["model"] == "owner/model"
