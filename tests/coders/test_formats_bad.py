"""Damaged, incomplete and unknown coders of other programs: one line that says what and where."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from foreign import (
    D,
    F,
    L,
    inputs,
    write_circuit_tracer,
    write_clt_forge,
    write_curt_tigges,
    write_gemma_scope,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsify_vlm.coders import load_clt
from sparsify_vlm.coders.formats import open_clt
from sparsify_vlm.errors import UserError

Tensors = dict[str, Tensor]


def change(path: Path, edit: Callable[[Tensors], object]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def set_fields(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields), encoding="utf-8")


def poison(key: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors[key].view(-1)[-1:].fill_(float("nan"))


def narrow(key: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({key: tensors[key][..., :-1].clone()})


GEMMA, FORGE, CURT = "params_layer_3.safetensors", "clt_weights.safetensors", "clt_cfg.json"
STATE = "clt_checkpoint_97689.safetensors"
THETA = "theta_manager.log_threshold"
FIRST = "decoder_module.decoders.3->5"

BROKEN: dict[str, tuple[Callable, Callable[[Path], object], str]] = {
    # missing layers and files
    "gemma layer": (
        write_gemma_scope,
        lambda p: (p / GEMMA).unlink(),
        "params_layer_3.safetensors: the file is missing; 11 layers are expected",
    ),
    "gemma last layer": (
        write_gemma_scope,
        lambda p: (p / "params_layer_10.safetensors").unlink(),
        "params_layer_10.safetensors: the file is missing; 11 layers are expected",
    ),
    "circuit-tracer layer": (
        write_circuit_tracer,
        lambda p: (p / "W_enc_4.safetensors").unlink(),
        "W_enc_4.safetensors: the file is missing",
    ),
    "circuit-tracer last layer": (
        write_circuit_tracer,
        lambda p: (p / "W_enc_10.safetensors").unlink(),
        "W_dec_0.safetensors: tensor 'W_dec_0' has shape [20, 11, 6], expected [20, 10, 6]",
    ),
    "circuit-tracer decoder": (
        write_circuit_tracer,
        lambda p: (p / "W_dec_4.safetensors").unlink(),
        "W_dec_4.safetensors: the file is missing",
    ),
    "forge weights": (
        write_clt_forge,
        lambda p: (p / FORGE).unlink(),
        "clt_weights.safetensors: the file is missing",
    ),
    "curt weights": (
        write_curt_tigges,
        lambda p: (p / STATE).unlink(),
        "no safetensors file beside cfg.json",
    ),
    "curt decoder": (
        write_curt_tigges,
        lambda p: change(p / STATE, lambda t: t.pop(f"{FIRST}.weight")),
        f"tensor '{FIRST}.weight' is missing",
    ),
    "curt norms": (
        write_curt_tigges,
        lambda p: (p.parent / "norm_stats.json").unlink(),
        "norm_stats.json: the coder works on normalised x and y",
    ),
    # layers that do not belong together
    "gemma mixed widths": (
        write_gemma_scope,
        lambda p: change(p / GEMMA, narrow("w_enc")),
        "params_layer_3.safetensors: tensor 'w_enc' has shape [6, 19], expected [6, 20]",
    ),
    "gemma mixed affine": (
        lambda p: write_gemma_scope(p, affine=False),
        lambda p: change(p / GEMMA, lambda t: t.update(affine_skip_connection=torch.ones(D, D))),
        "params_layer_3.safetensors: tensor 'affine_skip_connection' is in this layer, but not",
    ),
    "gemma of another depth": (
        write_gemma_scope,
        lambda p: (p / GEMMA).rename(p / "params_layer_11.safetensors") and write_one(p),
        "params_layer_11.safetensors: the other files are of a coder of 11 layers",
    ),
    "circuit-tracer mixed widths": (
        write_circuit_tracer,
        lambda p: change(p / "W_enc_4.safetensors", narrow("b_enc_4")),
        "W_enc_4.safetensors: tensor 'b_enc_4' has shape [19], expected [20]",
    ),
    "forge widths": (
        write_clt_forge,
        lambda p: set_fields(p / CURT, d_latent=F + 4),
        "the files hold 20 latents, but clt_cfg.json says d_latent 24",
    ),
    "forge part": (
        lambda p: write_clt_forge(p, parts=4),
        lambda p: (p / "rank3_clt_weights.safetensors").unlink(),
        "the files hold 15 latents, but clt_cfg.json says d_latent 20",
    ),
    "forge part within": (
        lambda p: write_clt_forge(p, parts=4),
        lambda p: (p / "rank1_clt_weights.safetensors").unlink(),
        "rank1_clt_weights.safetensors: the file is missing; 4 parts are expected",
    ),
    "two formats": (
        write_gemma_scope,
        write_clt_forge,
        "holds files of more than one format: Gemma Scope 2's params_layer_0.safetensors and CLT-F",
    ),
    # values that are not numbers
    "gemma NaN": (
        write_gemma_scope,
        lambda p: change(p / GEMMA, poison("w_dec")),
        "params_layer_3.safetensors: tensor 'w_dec' holds NaN",
    ),
    "gemma encoder NaN": (
        write_gemma_scope,
        lambda p: change(p / GEMMA, poison("w_enc")),
        "params_layer_3.safetensors: tensor 'w_enc' holds NaN",
    ),
    "circuit-tracer NaN": (
        write_circuit_tracer,
        lambda p: change(p / "W_dec_10.safetensors", poison("W_dec_10")),
        "W_dec_10.safetensors: tensor 'W_dec_10' holds NaN",
    ),
    "forge NaN": (
        write_clt_forge,
        lambda p: change(p / FORGE, poison("W_dec")),
        "clt_weights.safetensors: tensor 'W_dec' holds NaN",
    ),
    "curt NaN": (
        write_curt_tigges,
        lambda p: change(p / STATE, poison(f"{FIRST}.weight")),
        f"tensor '{FIRST}.weight' holds NaN",
    ),
    "forge factor": (
        write_clt_forge,
        lambda p: change(p / FORGE, lambda t: t["estimated_norm_scaling_factor_in"].zero_()),
        "must be positive",
    ),
    # what changes the meaning
    "gemma architecture": (
        write_gemma_scope,
        lambda p: (p / "config.json").write_text('{"architecture": "topk"}'),
        "config.json: coders with architecture 'topk' cannot be read here",
    ),
    "circuit-tracer negative": (
        write_circuit_tracer,
        lambda p: change(p / "W_enc_4.safetensors", lambda t: t["threshold_4"].neg_()),
        "'threshold_4' is negative somewhere",
    ),
    "forge activation": (
        write_clt_forge,
        lambda p: set_fields(p / CURT, activation_fn="topk"),
        "clt_cfg.json: coders with activation_fn 'topk' cannot be read here",
    ),
    "curt activation": (
        write_curt_tigges,
        lambda p: set_fields(p / "cfg.json", activation_fn="batchtopk"),
        "cfg.json: coders with activation_fn 'batchtopk' (scripts/convert_batchtopk_to_jumprelu.py",
    ),
    "curt normalisation": (
        write_curt_tigges,
        lambda p: set_fields(p / "cfg.json", normalization_method="sqrt_d_model"),
        "cfg.json: coders with normalization_method 'sqrt_d_model' cannot be read here",
    ),
    "curt offset": (
        write_curt_tigges,
        lambda p: set_fields(p / "cfg.json", enable_feature_offset=True),
        "cfg.json: coders with enable_feature_offset cannot be read here",
    ),
    "curt input": (
        write_curt_tigges,
        lambda p: set_fields(p / "cfg.json", mlp_input_template="transformer.h.{}.attn.input"),
        "cfg.json: coders with mlp_input_template 'transformer.h.{}.attn.input' cannot be read",
    ),
    # files that are no such files
    "gemma cut off": (
        write_gemma_scope,
        lambda p: (p / GEMMA).write_bytes((p / GEMMA).read_bytes()[:900]),
        "params_layer_3.safetensors: not a readable safetensors file",
    ),
    "forge json": (
        write_clt_forge,
        lambda p: (p / CURT).write_text("{"),
        "clt_cfg.json: not readable as JSON",
    ),
    "forge depth": (
        write_clt_forge,
        lambda p: set_fields(p / CURT, n_layers="eleven"),
        "clt_cfg.json: field 'n_layers' is 'eleven', not a positive whole number",
    ),
}


def write_one(folder: Path) -> None:
    change(folder / "params_layer_4.safetensors", lambda t: save_file(t, folder / GEMMA))


def read(path: Path, layerwise: bool) -> None:
    if not layerwise:
        load_clt(path)
        return
    stored = open_clt(path)
    for s in range(L):
        stored.encoder(s), stored.encoder_bias(s), stored.threshold(s)
        for _ in stored.decoder_blocks(s):
            pass


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("case", BROKEN)
def test_one_line_says_what_is_wrong_and_where(tmp_path: Path, case: str, layerwise: bool) -> None:
    write, break_it, message = BROKEN[case]
    write(tmp_path / "coder")
    read(tmp_path / "coder", layerwise)
    break_it(tmp_path / "coder")
    with pytest.raises(UserError) as caught:
        read(tmp_path / "coder", layerwise)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["w_dec", "W_dec_3"])
def test_an_unchecked_block_s_fault_is_found_by_name(tmp_path: Path, key: str) -> None:
    gemma = key == "w_dec"
    (write_gemma_scope if gemma else write_circuit_tracer)(tmp_path)
    file = tmp_path / (GEMMA if gemma else "W_dec_3.safetensors")
    change(file, poison(key))
    stored = open_clt(tmp_path)
    rows = torch.cat([W.clone() for _, W in stored.decoder_blocks(3, check=False)])
    assert gemma or not bool(rows.isfinite().all())
    assert str(stored.not_finite(3)) == f"{file}: tensor '{key}' holds NaN or infinite values"


def test_what_is_not_known_is_named_and_not_used(tmp_path: Path) -> None:
    compute = write_gemma_scope(tmp_path / "gemma")
    change(tmp_path / "gemma" / GEMMA, lambda t: t.update(gate=torch.ones(2)))
    with pytest.warns(UserWarning, match="params_layer_3.*tensor 'gate' is not known and not used"):
        clt = load_clt(tmp_path / "gemma")
    y = torch.stack([y for y in clt.reconstruct(inputs()) if y is not None])
    assert torch.allclose(y.double(), compute(inputs())[1], atol=1e-4)

    write_clt_forge(tmp_path / "forge", temperature=2)
    assert any("field 'temperature'" in line for line in open_clt(tmp_path / "forge").warnings)
    write_curt_tigges(tmp_path / "curt", temperature=2)
    assert any("field 'temperature'" in line for line in open_clt(tmp_path / "curt").warnings)
    write_circuit_tracer(tmp_path / "tracer")
    change(tmp_path / "tracer/W_enc_2.safetensors", lambda t: t.update(W_skip_2=torch.ones(2)))
    assert any("tensor 'W_skip_2'" in line for line in open_clt(tmp_path / "tracer").warnings)


def test_a_folder_in_no_known_format_is_told_the_formats(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="no coder checkpoint in a known format") as caught:
        open_clt(tmp_path)
    for name in ("sae.safetensors", "circuit-tracer", "Gemma Scope 2", "CLT-Forge", "curt-tigges"):
        assert name in str(caught.value)
