"""What `bench_attribution.py` traces: a random Llama and a random coder, written as folders.

FOLDER/model    Hugging Face
FOLDER/clt      circuit-tracer's layout (ReLU), or ours (top-k, which circuit-tracer lacks)
FOLDER/ids.json the prompt's token ids; the first is <bos>
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from sparsify_vlm.coders import Clt, CltConfig, save_clt
from sparsify_vlm.models import LoadedModel, load_model

BOS, VOCABULARY, HEADS = 1, 500, 8


@dataclass(frozen=True)
class Case:
    """Sizes of a model, its coder and a prompt."""

    layers: int
    d_model: int
    positions: int
    num_latents: int
    active: int = 0
    """Active features of the whole prompt by the bias of a ReLU coder; 0: top-k."""
    k: int = 0
    max_feature_nodes: int | None = None

    def __str__(self) -> str:
        coder = f"top-k, k = {self.k}" if self.k else "ReLU"
        return (
            f"L={self.layers}, d={self.d_model}, {self.positions} tokens, "
            f"F={self.num_latents} ({coder})"
        )


CASES = {
    "text": Case(layers=8, d_model=256, positions=64, num_latents=2048, active=3000),
    "llava": Case(
        layers=32, d_model=128, positions=600, num_latents=512, k=32, max_feature_nodes=300
    ),
}


def write(case: Case, folder: Path, seed: int) -> None:
    """Write the case into `folder`."""
    random = torch.Generator().manual_seed(seed)
    _write_model(case, folder / "model", random)
    loaded = load_model(str(folder / "model"))
    ids = torch.randint(5, VOCABULARY, (case.positions,), generator=random)
    ids[0] = BOS
    (folder / "ids.json").write_text(json.dumps(ids.tolist()))
    clt = _coder(case, loaded, random)
    if case.k:
        save_clt(clt, folder / "clt")
        return
    _bias(clt, _inputs(loaded, ids), case.active)
    _write_for_circuit_tracer(clt, folder / "clt")


def _fill(weight: Tensor, random: torch.Generator) -> None:
    weight.copy_(torch.randn(weight.shape, generator=random) * weight.shape[-1] ** -0.5)


def _write_model(case: Case, folder: Path, random: torch.Generator) -> None:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=case.d_model,
        intermediate_size=4 * case.d_model,
        num_hidden_layers=case.layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=case.d_model // HEADS,
        rms_norm_eps=1e-6,
        bos_token_id=BOS,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                _fill(weight, random)
    model.save_pretrained(folder)
    words = ["<pad>", "<bos>", "<eos>", "<unk>"]
    words += [f"w{i}" for i in range(len(words), VOCABULARY)]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
    ).save_pretrained(folder)


def _coder(case: Case, loaded: LoadedModel, random: torch.Generator) -> Clt:
    config = CltConfig(
        case.d_model,
        loaded.stack.hookpoints,
        num_latents=case.num_latents,
        n_targets=case.layers,
        activation="topk" if case.k else "relu",
        k=case.k or case.num_latents,
        input_site="resid_mid",
    )
    clt = Clt(config).requires_grad_(False)
    for weight in [*clt.W_enc, *(table for tables in clt.W_dec for table in tables)]:
        _fill(weight, random)
    for bias in clt.b_dec:
        bias.copy_(0.1 * torch.randn(bias.shape, generator=random))
    return clt


def _inputs(loaded: LoadedModel, ids: Tensor) -> list[Tensor]:
    """What the coder of each layer reads [S, d]."""
    read: list[Tensor] = []
    with loaded.stack.reading(lambda _, x, y: read.append(x[0].clone()), "resid_mid"):
        loaded.forward({"input_ids": ids[None]})
    return read


def _bias(clt: Clt, inputs: list[Tensor], active: int) -> None:
    """Let `active` features in all be active after the first position, as many in each layer.

    The threshold lies midway between two pre-activations, so that rounding cannot move it across.
    """
    each = active // len(inputs)
    for s, x in enumerate(inputs):
        highest = (x[1:] @ clt.W_enc[s].T).flatten().topk(each + 1).values
        clt.b_enc[s].fill_(-float(highest[-2:].mean()))


def _write_for_circuit_tracer(clt: Clt, folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        "model_name: benchmark\nmodel_kind: cross_layer_transcoder\nscan: benchmark\n"
        "feature_input_hook: hook_resid_mid\nfeature_output_hook: hook_mlp_out\n"
    )
    for i, (encoder, decoders) in enumerate(zip(clt.W_enc, clt.W_dec, strict=True)):
        biases = {f"b_enc_{i}": clt.b_enc[i], f"b_dec_{i}": clt.b_dec[i]}
        parts = {f"W_enc_{i}": encoder, **biases}
        save_file(
            {name: part.detach().contiguous() for name, part in parts.items()},
            folder / f"W_enc_{i}.safetensors",
        )
        slots = torch.stack([table.detach() for table in decoders], dim=1)
        save_file({f"W_dec_{i}": slots.contiguous()}, folder / f"W_dec_{i}.safetensors")
