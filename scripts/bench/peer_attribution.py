"""One process of `bench_attribution.py`: circuit-tracer's `attribute` on a written case.

    VENV/bin/python peer_attribution.py FOLDER OUTPUT OPTIONS    # as own_attribution.py

Runs in an environment with circuit-tracer and without this project. The Hugging Face model becomes
one of TransformerLens as in `from_pretrained_and_transcoders`, but with its sizes from its own
config: that function knows published models only.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from circuit_tracer import attribute
from circuit_tracer.replacement_model.replacement_model_transformerlens import (
    TransformerLensReplacementModel,
)
from circuit_tracer.transcoder.cross_layer_transcoder import load_clt
from safetensors.torch import save_file
from timed_calls import timed
from transformer_lens import HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_llama_weights
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


def main(folder: Path, output: str, options: dict) -> None:
    """`options`: `threads`, `arguments` of `attribute`."""
    torch.set_num_threads(options["threads"])
    model = _model(folder)
    ids = torch.tensor(json.loads((folder / "ids.json").read_text()))
    graph, figures = timed(lambda: attribute(ids, model, **options["arguments"]))
    figures |= {
        "active": len(graph.active_features),
        "nodes": len(graph.adjacency_matrix),
        "edges": int((graph.adjacency_matrix != 0).sum()),
        "features": len(graph.selected_features),
        "versions": {
            name: version(name)
            for name in ("circuit-tracer", "transformer-lens", "transformers", "torch")
        },
    }
    found = {
        "active_features": graph.active_features,
        "activation_values": graph.activation_values,
        "selected_features": graph.selected_features,
        "logit_token_ids": graph.logit_token_ids,
        "adjacency": graph.adjacency_matrix,
    }
    save_file({k: v.detach().contiguous() for k, v in found.items()}, output + ".safetensors")
    Path(output + ".json").write_text(json.dumps(figures))


def _model(folder: Path) -> TransformerLensReplacementModel:
    llama = LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    own = llama.config
    config = HookedTransformerConfig(
        n_layers=own.num_hidden_layers,
        d_model=own.hidden_size,
        n_ctx=own.max_position_embeddings,
        d_head=own.head_dim,
        n_heads=own.num_attention_heads,
        n_key_value_heads=own.num_key_value_heads,
        d_mlp=own.intermediate_size,
        d_vocab=own.vocab_size,
        act_fn=own.hidden_act,
        eps=own.rms_norm_eps,
        normalization_type="RMS",
        final_rms=True,
        gated_mlp=True,
        positional_embedding_type="rotary",
        rotary_dim=own.head_dim,
        rotary_base=own.rope_theta,
        rotary_adjacent_pairs=False,
        original_architecture="LlamaForCausalLM",
        model_name="llama-benchmark",
        init_weights=False,
        device="cpu",
        dtype=torch.float32,
    )
    model = TransformerLensReplacementModel(config)
    model.tokenizer = PreTrainedTokenizerFast(  # given above, it would be read anew by its name
        tokenizer_file=str(folder / "model" / "tokenizer.json"),
        pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
    )  # fmt: skip
    model.load_and_process_state_dict(
        convert_llama_weights(llama, config),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    coder = load_clt(str(folder / "clt"), device=torch.device("cpu"), dtype=torch.float32)
    model._configure_replacement_model(coder)
    return model


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
