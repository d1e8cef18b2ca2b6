"""Other programs' layouts: what is read computes what the layout's definition says."""

from __future__ import annotations

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

from sparsify_vlm.coders import Clt, Latents, load_clt, save_clt
from sparsify_vlm.coders.formats import InMemory, StoredClt, open_clt

CASES = {
    "gemma affine": ("gemma-scope-2", write_gemma_scope, {}),
    "gemma": ("gemma-scope-2", write_gemma_scope, {"affine": False}),
    "circuit-tracer jumprelu": ("circuit-tracer", write_circuit_tracer, {}),
    "circuit-tracer relu": ("circuit-tracer", write_circuit_tracer, {"thresholds": False}),
    "clt-forge": ("clt-forge", write_clt_forge, {}),
    "clt-forge unscaled": ("clt-forge", write_clt_forge, {"scaled": False}),
    "clt-forge in parts": ("clt-forge", write_clt_forge, {"parts": 4}),
    "clt-forge in many parts": ("clt-forge", write_clt_forge, {"parts": F}),
    "clt-forge own layer": ("clt-forge", write_clt_forge, {"crossing": False, "parts": 2}),
    "curt-tigges": ("curt-tigges", write_curt_tigges, {}),
    "curt-tigges raw": ("curt-tigges", write_curt_tigges, {"normalised": False}),
    "curt-tigges skip": ("curt-tigges", write_curt_tigges, {"skip": True}),
    "curt-tigges source": ("curt-tigges", write_curt_tigges, {"tying": "per_source"}),
    "curt-tigges source raw": (
        "curt-tigges",
        write_curt_tigges,
        {"tying": "per_source", "normalised": False},
    ),
    "curt-tigges target": ("curt-tigges", write_curt_tigges, {"tying": "per_target"}),
    "curt-tigges target raw": (
        "curt-tigges",
        write_curt_tigges,
        {"tying": "per_target", "normalised": False},
    ),
}
IGNORED = "ignore:.*(ln2.hook_normalized|not known)"


def reconstruct(clt: Clt, x: Tensor) -> tuple[Tensor, Tensor]:
    """Dense activations [L, T, F] and ŷ [L, T, d]."""
    latents = clt.encode(x)
    acts = torch.stack([a.dense(F) for a in latents if a is not None])
    return acts.detach(), torch.stack([y for y in clt.decode(latents, x) if y is not None]).detach()


def close(found: Tensor, expected: Tensor) -> bool:
    scale = expected.abs().max()
    return bool((found.double() - expected).abs().max() < 2e-6 * scale)


@pytest.mark.filterwarnings(IGNORED)
@pytest.mark.parametrize("case", CASES)
def test_a_read_coder_computes_what_the_layout_defines(tmp_path: Path, case: str) -> None:
    name, write, options = CASES[case]
    compute = write(tmp_path / "coder", **options)
    clt = load_clt(tmp_path / "coder")
    acts, y = reconstruct(clt, inputs())
    expected_acts, expected_y = compute(inputs())
    assert bool((acts > 0).any(dim=(1, 2)).all())
    assert torch.equal(acts > 0, expected_acts > 0)
    assert close(acts, expected_acts)
    assert close(y, expected_y)
    assert open_clt(tmp_path / "coder").format == name


@pytest.mark.filterwarnings(IGNORED)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("max_bytes", [1, 5000, 1 << 20])
def test_read_layer_by_layer_it_gives_the_same(tmp_path: Path, case: str, max_bytes: int) -> None:
    """y from encoder, bias, threshold and decoder rows as given, biases from y at no activation."""
    _, write, options = CASES[case]
    compute = write(tmp_path / "coder", **options)
    stored = open_clt(tmp_path / "coder")
    acts, y = compute(inputs())
    written = torch.zeros_like(y)
    for s in range(L):
        W = decoder(stored, s, max_bytes).double()
        pre = inputs()[s] @ stored.encoder(s).T + stored.encoder_bias(s)
        threshold = stored.threshold(s)
        active = pre > (0 if threshold is None else threshold)
        assert torch.equal(active, acts[s] > 0)
        written[list(stored.cfg.targets(s))] += torch.einsum("tf,fkd->ktd", acts[s], W)
    clt = load_clt(tmp_path / "coder")
    silent = [torch.zeros(1, dtype=torch.long).expand(7, 1)] * L
    rest = clt.decode([Latents(torch.zeros(7, 1), i) for i in silent], inputs())
    assert close(written + torch.stack([r for r in rest if r is not None]).detach(), y)


def decoder(stored: StoredClt, s: int, max_bytes: int) -> Tensor:
    """[F, n_targets, d] from the blocks, whose places must follow each other."""
    parts = []
    for first, rows in stored.decoder_blocks(s, max_bytes):
        assert first == sum(len(part) for part in parts)
        assert len(rows) == 1 or rows.numel() * rows.itemsize <= max_bytes
        parts.append(rows.clone())
    return torch.cat(parts)


def test_non_zero_acausal_slots_are_dropped_and_named_by_layer(tmp_path: Path) -> None:
    compute = write_gemma_scope(tmp_path, acausal=(3, L - 1))
    lines = [f"layer {s}: non-zero writes to earlier layers dropped" for s in (3, L - 1)]
    with pytest.warns(UserWarning, match="earlier layers") as caught:
        clt = load_clt(tmp_path)
    assert [str(w.message).rpartition(f"{tmp_path}: ")[2] for w in caught] == lines
    assert close(reconstruct(clt, inputs())[1], compute(inputs())[1])
    stored = open_clt(tmp_path)
    assert stored.warnings == []
    for s in range(L):
        for _ in stored.decoder_blocks(s, max_bytes=100):
            pass
    assert stored.warnings == lines


def test_one_non_zero_acausal_number_is_noticed_unless_only_samples_are_looked_at(
    tmp_path: Path,
) -> None:
    """Rows long enough that their earlier slots are passed over; the number is in no sample."""
    layers, d, latents, s = 3, 9000, 64, 2
    for i in range(layers):
        w_dec = torch.randn(latents, layers, d)
        w_dec[:, :i] = 0
        if i == s:
            w_dec[-1, 1, -1] = 1
        tensors = {"w_enc": torch.randn(d, latents), "w_dec": w_dec, "b_dec": torch.zeros(d)}
        tensors |= {"b_enc": torch.zeros(latents), "threshold": torch.ones(latents)}
        save_file(tensors, tmp_path / f"params_layer_{i}.safetensors")
    quick, thorough = open_clt(tmp_path), open_clt(tmp_path)
    for view, check in ((quick, False), (thorough, True)):
        found = torch.cat([rows.clone() for _, rows in view.decoder_blocks(s, check=check)])
        assert torch.equal(found, w_dec[:, s:])
    assert quick.warnings == []
    assert thorough.warnings == ["layer 2: non-zero writes to earlier layers dropped"]


def test_the_affine_skip_survives_saving_in_our_layout(tmp_path: Path) -> None:
    compute = write_gemma_scope(tmp_path / "gemma")
    save_clt(load_clt(tmp_path / "gemma"), tmp_path / "ours")
    acts, y = reconstruct(load_clt(tmp_path / "ours"), inputs())
    assert close(acts, compute(inputs())[0])
    assert close(y, compute(inputs())[1])


def test_where_x_is_read(tmp_path: Path) -> None:
    write_gemma_scope(tmp_path / "gemma")
    assert load_clt(tmp_path / "gemma").cfg.input_site == "mlp_in"
    write_curt_tigges(tmp_path / "curt", mlp_input_template="transformer.h.{}.ln_2.input")
    assert load_clt(tmp_path / "curt").cfg.input_site == "resid_mid"
    write_clt_forge(tmp_path / "forge")
    with pytest.warns(UserWarning, match=r"ln2\.hook_normalized"):
        assert load_clt(tmp_path / "forge").cfg.input_site == "mlp_in"


def test_a_latent_of_curt_tigges_is_active_at_its_threshold(tmp_path: Path) -> None:
    write_curt_tigges(tmp_path / "curt", normalised=False)
    clt, stored = load_clt(tmp_path / "curt"), open_clt(tmp_path / "curt")
    file = load_file(tmp_path / "curt" / "clt_checkpoint_97689.safetensors")
    theta = file["theta_manager.log_threshold"][2].exp()
    below = torch.nextafter(theta, torch.zeros(()))
    found = clt.activate(2, torch.stack([theta, below])).dense(F)
    assert torch.equal(found, torch.stack([theta, torch.zeros(F)]))
    assert bool((theta > stored.threshold(2)).all())


def test_in_memory_is_the_same_view_of_a_coder(tmp_path: Path) -> None:
    write_clt_forge(tmp_path)
    with pytest.warns(UserWarning, match="hook_normalized"):
        view, stored = InMemory(load_clt(tmp_path)), open_clt(tmp_path)
    for s in (0, L - 1):
        assert torch.allclose(view.encoder(s), stored.encoder(s))
        assert torch.equal(view.encoder_bias(s), stored.encoder_bias(s))
        assert torch.equal(view.threshold(s), stored.threshold(s))
        found = torch.cat([rows for _, rows in view.decoder_blocks(s, 2000)])
        expected = decoder(stored, s, 3000)
        assert found.shape == (F, L - s, D)
        assert torch.allclose(found, expected)
