"""Foreign checkpoints give the active latents, activations and errors that circuit-tracer got."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

from sparsify_vlm.coders import Clt, load_clt, save_clt

ORACLES = Path(__file__).parents[1] / "oracles" / "attribution"
CASES = [
    ("llama_relu", "clt_eleutherai", "resid_mid"),
    ("llama_relu", "clt_circuit_tracer", "resid_mid"),
    ("llama_topk", "clt_eleutherai", "mlp_in"),
    ("llama_soft_tokens", "clt_eleutherai", "resid_mid"),
]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(ORACLES / "models" / "tiny_llama").eval()


@torch.no_grad()
def record(model: LlamaForCausalLM, embeddings: Tensor, site: str) -> tuple[Tensor, Tensor, Tensor]:
    """x and y [L, T, d] at every MLP, and the logits [T, V], of one plain forward pass."""
    x: list[Tensor] = []
    y: list[Tensor] = []
    handles = []
    for layer in model.model.layers:
        read = layer.mlp if site == "mlp_in" else layer.post_attention_layernorm
        handles.append(read.register_forward_pre_hook(lambda _, args: x.append(args[0][0])))
        handles.append(layer.mlp.register_forward_hook(lambda _, __, out: y.append(out[0])))
    logits = model(inputs_embeds=embeddings[None]).logits[0]
    for handle in handles:
        handle.remove()
    return torch.stack(x), torch.stack(y), logits


def embed(model: LlamaForCausalLM, oracle: dict[str, Tensor]) -> Tensor:
    """The token embeddings [T, d], with image features in the place of some, as in a VLM."""
    embeddings = model.get_input_embeddings()(oracle["input_ids"]).detach().clone()
    if "soft_positions" in oracle:
        embeddings[oracle["soft_positions"]] = oracle["soft_embeds"]
    return embeddings


@pytest.mark.parametrize("again", [False, True], ids=["as_read", "saved_and_read_again"])
@pytest.mark.parametrize(("case", "folder", "site"), CASES)
def test_activations_and_errors(case, folder, site, again, model, tmp_path):
    path = ORACLES / "cases" / case / folder
    oracle = load_file(ORACLES / "cases" / case / "oracle.safetensors")
    clt = load_clt(path)
    if again:
        save_clt(clt, tmp_path)
        clt = load_clt(tmp_path)
    assert clt.cfg.n_layers == 4
    assert clt.cfg.activation == ("topk" if case == "llama_topk" else "relu")
    if folder == "clt_circuit_tracer":
        assert clt.cfg.input_site == site
    x, y, logits = record(model, embed(model, oracle), site)
    torch.testing.assert_close(logits, oracle["hf_logits"], rtol=0, atol=2e-5)
    check(clt, x, y, oracle)


def check(clt: Clt, x: Tensor, y: Tensor, oracle: dict[str, Tensor]) -> None:
    latents = clt.encode(x)
    dense = torch.stack([active.dense(clt.cfg.num_latents) for active in latents]).detach()
    dense[:, 0] = 0  # nothing is active at the first token in the reference run
    active = dense.nonzero()
    assert torch.equal(active, oracle["active_features"])
    values = dense[tuple(active.T)]
    torch.testing.assert_close(values, oracle["activation_values"], rtol=1e-5, atol=1e-5)
    errors = y - torch.stack(clt.reconstruct(x)).detach()
    errors[:, 0] = 0
    torch.testing.assert_close(errors, oracle["error_vectors"], rtol=1e-5, atol=2e-5)
