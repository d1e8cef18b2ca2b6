"""The token table of a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import D_MODEL, FAMILIES, N_LAYERS, example, shared
from torch import Tensor

from sparsify_vlm.models import Role, record_tokens


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", FAMILIES)
def test_table_against_the_batch(name: str, side: str) -> None:
    """Row by row: samples in order, pads left out, x and y those of the forward pass."""
    loaded = shared(name)
    inputs = example(loaded, side)
    xs: list[Tensor] = []
    ys: list[Tensor] = []
    with loaded.stack.reading(lambda layer, x, y: (xs.append(x.clone()), ys.append(y.clone()))):
        loaded.forward(inputs)
    table = record_tokens(loaded, inputs)
    roles, patches = loaded.stack.roles(inputs), loaded.stack.patches(inputs)
    t = 0
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        for position, column in enumerate(mask.nonzero()[:, 0].tolist()):
            assert table.input_ids[t] == inputs["input_ids"][row, column]
            assert table.sample[t] == row
            assert table.position[t] == position
            assert table.role[t] == roles[row, column]
            assert table.patch[t].tolist() == patches[row, column].tolist()
            for layer in range(N_LAYERS):
                assert (table.x[layer, t] == xs[layer][row, column]).all()
                assert (table.y[layer, t] == ys[layer][row, column]).all()
            t += 1
    assert len(table) == t
    assert table.logits is None


def test_types_and_shapes() -> None:
    loaded = shared("llava")
    inputs = example(loaded)
    table = record_tokens(loaded, inputs, logits=True)
    n = int(inputs["attention_mask"].sum())
    assert table.x.shape == table.y.shape == (N_LAYERS, n, D_MODEL)
    assert table.input_ids.dtype == table.position.dtype == table.sample.dtype == torch.int32
    assert (table.role.dtype, table.patch.dtype) == (torch.uint8, torch.int16)
    assert table.logits is not None
    torch.testing.assert_close(table.logits, loaded.forward(inputs, logits=True).logits)
    assert not (table.role == Role.PAD).any()


def test_unpadded_batch_and_chosen_layers() -> None:
    loaded = shared("gpt2")
    inputs: dict[str, Any] = dict(loaded.tokenizer(["red green", "blue red"], return_tensors="pt"))
    whole = record_tokens(loaded, inputs)
    part = record_tokens(loaded, inputs, layers=[2, 0])
    torch.testing.assert_close(part.x, whole.x[[0, 2]], rtol=0, atol=0)
    torch.testing.assert_close(part.y, whole.y[[0, 2]], rtol=0, atol=0)
    del inputs["attention_mask"]
    assert len(record_tokens(loaded, inputs)) == len(whole)


@pytest.mark.parametrize("name", ["llama", "gemma3", "olmo2", "granite"])
def test_input_sites(name: str) -> None:
    """The stream before a layer's norm plus its write is what the next layer reads."""
    loaded = shared(name)
    inputs = example(loaded)
    middle = record_tokens(loaded, inputs, "resid_mid")
    with torch.no_grad():
        states = loaded.model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
    kept = inputs["attention_mask"].bool()
    for layer in range(N_LAYERS - 1):  # the last hidden state is after the final norm
        torch.testing.assert_close(middle.x[layer] + middle.y[layer], states[layer + 1][kept])
    autoencoder = record_tokens(loaded, inputs, "mlp_out")
    torch.testing.assert_close(autoencoder.x, middle.y, rtol=0, atol=0)


def test_counted_tokens() -> None:
    loaded = shared("llama")
    bos = loaded.tokenizer.bos_token_id
    inputs = dict(loaded.tokenizer(["<s> red <s>", "blue"], padding=True, return_tensors="pt"))
    table = record_tokens(loaded, inputs)
    assert table.input_ids.tolist().count(bos) == 4
    names = loaded.tokenizer.convert_ids_to_tokens(table.input_ids.tolist())
    assert names == ["<s>", "<s>", "red", "<s>", "<s>", "blue"]
    counts = table.counted(filter_bos=True, remove_first_token=False, bos_token_id=bos)
    assert counts.tolist() == [False, False, True, False, False, True]
    counts = table.counted(filter_bos=False, remove_first_token=True, bos_token_id=bos)
    assert counts.tolist() == [False, True, True, True, False, True]
    assert table.counted(True, False, None).all()
