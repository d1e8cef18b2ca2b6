"""Which models are accepted, and with what words the others are refused."""

from __future__ import annotations

from copy import deepcopy
from types import MethodType
from typing import Any

import pytest
import torch
import transformers as tf
from families import D_MODEL, shared, text, tokenizer, vision
from torch import Tensor, nn

from sparsify_vlm.errors import UserError
from sparsify_vlm.models import resolve_stack

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def _blip2() -> Any:
    config = tf.Blip2Config(
        vision_config={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
        | {"num_attention_heads": 4, "image_size": 32, "patch_size": 8},
        qformer_config={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
        | {"num_attention_heads": 4, "encoder_hidden_size": 32, "vocab_size": 64},
        text_config={"model_type": "opt", "hidden_size": 32, "ffn_dim": 48, "vocab_size": 64}
        | {"num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32},
        num_query_tokens=4,
    )
    return tf.Blip2ForConditionalGeneration(config)


def _mllama() -> Any:
    tok = tokenizer("<|image|>")
    config = tf.MllamaConfig(
        vision_config={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
        | {"num_global_layers": 1, "attention_heads": 4, "image_size": 32, "patch_size": 8}
        | {"vision_output_dim": 64, "intermediate_layers_indices": [0]},
        text_config=text(tf.MllamaTextConfig, tok, cross_attention_layers=[1]).to_dict(),
        image_token_index=tok.convert_tokens_to_ids("<|image|>"),
    )
    return tf.MllamaForConditionalGeneration(config)


def _aya() -> Any:
    tok = tokenizer("<image>")
    config = tf.AyaVisionConfig(
        vision_config=vision(tf.SiglipVisionConfig, vision_use_head=False).to_dict(),
        text_config=text(tf.Cohere2Config, tok).to_dict(),
        image_token_index=tok.convert_tokens_to_ids("<image>"),
    )
    return tf.AyaVisionForConditionalGeneration(config)


def _gptj() -> Any:
    return tf.GPTJForCausalLM(
        tf.GPTJConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_inner=48)
    )


def _phi() -> Any:
    return tf.PhiForCausalLM(tf.PhiConfig(**SMALL, **HEADS, pad_token_id=0, bos_token_id=1))


def _falcon() -> Any:
    config = tf.FalconConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        parallel_attn=True,
    )
    return tf.FalconForCausalLM(config)


def _neox() -> Any:
    config = tf.GPTNeoXConfig(**SMALL, num_attention_heads=4, use_parallel_residual=True)
    return tf.GPTNeoXForCausalLM(config)


def _opt() -> Any:
    config = tf.OPTConfig(
        hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
        word_embed_proj_dim=32,
    )  # fmt: skip
    return tf.OPTForCausalLM(config)


def _mamba() -> Any:
    return tf.MambaForCausalLM(
        tf.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64, state_size=4)
    )


def _t5gemma() -> Any:
    half = {**SMALL, **HEADS, "head_dim": 8}
    return tf.T5GemmaForConditionalGeneration(
        tf.T5GemmaConfig(encoder=half, decoder=half, vocab_size=64)
    )


REFUSED = {
    "Blip2ForConditionalGeneration": (_blip2, "no MLP module.*OPTDecoderLayer has"),
    "MllamaForConditionalGeneration": (_mllama, r"layer 1 .*cross-attention"),
    "AyaVisionForConditionalGeneration": (_aya, "layer 0 .*not the residual stream plus"),
    "GPTJForCausalLM": (_gptj, "layer 0 .*not the residual stream plus"),
    "PhiForCausalLM": (_phi, "layer 0 .*not the residual stream plus"),
    "FalconForCausalLM": (_falcon, "layer 0 .*not the residual stream plus"),
    "GPTNeoXForCausalLM": (_neox, "layer 0 .*not the residual stream plus"),
    "T5GemmaForConditionalGeneration": (_t5gemma, "encoder-decoder"),
    "OPTForCausalLM": (_opt, "no MLP module.*self_attn"),
    "MambaForCausalLM": (_mamba, "no MLP module"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    build, reason = REFUSED[name]
    model = build()
    with pytest.raises(UserError, match=f"{name}.*{reason}") as caught:
        resolve_stack(model)
    assert "\n" not in str(caught.value)


def test_sequential_gpt_neox_is_accepted() -> None:
    config = tf.GPTNeoXConfig(**SMALL, num_attention_heads=4, use_parallel_residual=False)
    stack = resolve_stack(tf.GPTNeoXForCausalLM(config))
    assert stack.hookpoints == ["layers.0.mlp", "layers.1.mlp"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [0.5, 1.02, -1.0])
def test_wrong_write_is_caught(dtype: torch.dtype, factor: float) -> None:
    """One layer of a doctored model adds a multiple of what its MLP returns."""
    model = deepcopy(shared("llama").model).to(dtype)
    resolve_stack(model)
    layer = model.model.layers[2]

    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        middle = hidden_states + attended
        return middle + factor * self.mlp(self.post_attention_layernorm(middle))

    layer.forward = MethodType(forward, layer)
    with pytest.raises(UserError, match=r"LlamaForCausalLM's layer 2 \(LlamaDecoderLayer\)"):
        resolve_stack(model)


def test_a_hook_that_changes_the_output_is_caught() -> None:
    model = deepcopy(shared("gpt2").model)
    model.transformer.h[1].register_forward_hook(lambda module, args, out: out + 1e-3)
    with pytest.raises(UserError, match="layer 1 "):
        resolve_stack(model)


def test_decoder_that_takes_no_tokens_is_refused() -> None:
    model = deepcopy(shared("llama").model)

    def forward(self: Any, frames: Tensor) -> Tensor:
        return frames

    model.model.forward = MethodType(forward, model.model)
    with pytest.raises(UserError, match="LlamaForCausalLM's decoder does not run on text tokens"):
        resolve_stack(model.train())
    assert model.training


def test_mlp_that_returns_a_tuple_is_refused() -> None:
    model = deepcopy(shared("llama").model)

    class Both(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            return x, None

    layer = model.model.layers[0]
    layer.mlp = Both()

    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return hidden_states + self.mlp(hidden_states)[0]

    layer.forward = MethodType(forward, layer)
    with pytest.raises(UserError, match="does not map one tensor to one tensor"):
        resolve_stack(model)


def test_stack_knows_its_width_and_depth() -> None:
    stack = shared("qwen2_5_vl").stack
    assert (stack.n_layers, stack.d_model) == (3, D_MODEL)
    assert "_blocks" not in repr(stack)
