"""Frozen models in 8 and 4 bits, through bitsandbytes on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparsify_vlm.data import DataConfig, batches, open_samples
from sparsify_vlm.errors import UserError
from sparsify_vlm.models import load as loading
from sparsify_vlm.models import load_model, record_tokens


def recorded(**options: bool) -> tuple[torch.Tensor, int]:
    """What the MLPs of tiny-llava write on a few scenes, and the bytes of the decoder's weights."""
    loaded = load_model("tiny-llava", "cpu", **options)
    samples = open_samples(DataConfig(dataset="shapes", max_examples=4), loaded)
    inputs = next(iter(batches(samples, loaded, 4, 2048))).inputs
    weights = loaded.model.get_decoder().parameters()
    return record_tokens(loaded, inputs).y.float(), sum(p.nbytes for p in weights)


def test_eight_bits_write_nearly_the_same_with_less_memory() -> None:
    exact, full = recorded()
    rough, less = recorded(load_in_8bit=True)
    assert less < 0.5 * full
    for layer in range(len(exact)):
        error = (rough[layer] - exact[layer]).norm() / exact[layer].norm()
        assert 0 < error < 0.1


def test_four_bits(tmp_path: Path) -> None:
    """A text model 64 wide; tiny-llava's 96 cannot be divided into blocks."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = LlamaConfig(
        **sizes, vocab_size=64, num_attention_heads=4, bos_token_id=1, eos_token_id=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    source = Path(loading.ALIASES["tiny-llama"])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    exact, rough = (
        load_model(str(tmp_path), "cpu", load_in_4bit=four).forward(
            {"input_ids": torch.arange(3, 20)[None]}, logits=True
        )
        for four in (False, True)
    )
    error = (rough.logits - exact.logits).norm() / exact.logits.norm()
    assert 0 < error < 0.3


def test_what_cannot_be_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="multiple of 64, take --load_in_8bit"):
        load_model("tiny-llava", "cpu", load_in_4bit=True)
    with pytest.raises(UserError, match="exclude each other"):
        load_model("tiny-llava", "cpu", load_in_4bit=True, load_in_8bit=True)
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package bitsandbytes"):
        load_model("tiny-llava", "cpu", load_in_8bit=True)
