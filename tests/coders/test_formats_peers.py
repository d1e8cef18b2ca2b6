"""Coders in other programs' layouts against what those programs compute with them.

The results were stored by `scripts/check_peer_readers.py` (tests/data/peers/README.md).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from foreign import (
    F,
    L,
    compute_circuit_tracer,
    inputs,
    write_circuit_tracer,
    write_gemma_scope,
)
from safetensors.torch import load_file
from torch import Tensor

from sparsify_vlm.coders import load_clt
from sparsify_vlm.coders.formats import open_clt

PEERS = Path(__file__).parent.parent / "data" / "peers"
WRITERS = {
    "circuit-tracer jumprelu": lambda folder: write_circuit_tracer(folder, thresholds=True),
    "circuit-tracer relu": lambda folder: write_circuit_tracer(folder, thresholds=False),
    "gemma affine": lambda folder: write_gemma_scope(folder, affine=True),
    "gemma": lambda folder: write_gemma_scope(folder, affine=False),
}
CASES = [("circuit-tracer", name) for name in WRITERS]
CASES += [("sae-lens", name) for name in WRITERS if name != "circuit-tracer jumprelu"]


def stored(program: str, name: str) -> dict[str, Tensor]:
    results = load_file(PEERS / f"{program}.safetensors")
    assert torch.equal(results["x"], inputs()), "this torch draws other random numbers"
    found = {key.split("/")[1]: tensor for key, tensor in results.items() if f"{name}/" in key}
    assert found
    return found


@pytest.mark.parametrize(("program", "name"), CASES)
def test_we_compute_what_the_program_computes(tmp_path: Path, program: str, name: str) -> None:
    WRITERS[name](tmp_path)
    clt, expected = load_clt(tmp_path), stored(program, name)
    latents = clt.encode(inputs())
    acts = torch.stack([a.dense(F) for a in latents if a is not None])
    assert len(acts) == L
    assert torch.equal(acts > 0, expected["activations"] > 0)
    assert torch.allclose(acts, expected["activations"], atol=1e-5)
    if "reconstruction" in expected:
        y = torch.stack([y for y in clt.decode(latents, inputs()) if y is not None])
        assert torch.allclose(y, expected["reconstruction"], atol=1e-4, rtol=1e-5)
    if "skip" in expected:
        view = open_clt(tmp_path)
        assert all(torch.equal(view.skip(s, 0), expected["skip"][s]) for s in range(L))


def test_the_definition_used_in_tests_of_exports_is_the_program_s(tmp_path: Path) -> None:
    WRITERS["circuit-tracer jumprelu"](tmp_path)
    acts, y = compute_circuit_tracer(tmp_path, inputs())
    expected = stored("circuit-tracer", "circuit-tracer jumprelu")
    assert torch.allclose(acts.float(), expected["activations"], atol=1e-5)
    assert torch.allclose(y.float(), expected["reconstruction"], atol=1e-4)
