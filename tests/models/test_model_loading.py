"""Loading: aliases, devices and dtypes, and one clear line for whatever goes wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import transformers as tf
from families import FAMILIES, VLMS, build, example, load, shared
from huggingface_hub import errors
from safetensors.torch import load_file, save_file

from sparsify_vlm.errors import UserError
from sparsify_vlm.models import ALIASES, load_model
from sparsify_vlm.models.hub_errors import explained


def refusal(*args: Any, **kwargs: Any) -> str:
    """The one line with which loading is refused."""
    with pytest.raises(UserError) as caught:
        load_model(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved Llama."""
    return build("llama", tmp_path_factory.mktemp("saved"))


@pytest.mark.parametrize("name", VLMS)
def test_parts_of_a_vlm(name: str) -> None:
    loaded = shared(name)
    assert loaded.is_vlm
    assert loaded.image_processor is not None
    assert loaded.tokenizer is loaded.processor.tokenizer
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())


def test_parts_of_a_text_model() -> None:
    loaded = shared("llama")
    assert not loaded.is_vlm
    assert loaded.image_processor is None
    assert loaded.tokenizer is loaded.processor
    assert loaded.device == torch.device("cpu")
    assert loaded.dtype == torch.float32


def test_saved_weights_are_the_loaded_ones(llama: Path) -> None:
    loaded = load_model(str(llama))
    stored = load_file(llama / "model.safetensors")
    for name, tensor in loaded.model.state_dict().items():
        torch.testing.assert_close(tensor, stored[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("bf16", torch.bfloat16),
        ("float16", torch.float16),
        (torch.bfloat16, torch.bfloat16),
        ("auto", torch.float32),
        (None, torch.float32),
    ],
)
def test_dtypes(llama: Path, dtype: Any, expected: torch.dtype) -> None:
    loaded = load_model(str(llama), "cpu", dtype)
    assert loaded.dtype == expected
    assert loaded.forward(example_of(loaded)).logits.dtype == expected


def example_of(loaded: Any) -> dict[str, Any]:
    """One short text."""
    return dict(loaded.tokenizer(["what is red ?"], return_tensors="pt"))


def test_pixels_take_the_models_dtype(tmp_path: Path) -> None:
    loaded = load("qwen2_5_vl", tmp_path, dtype="bf16")
    inputs = example(loaded)
    assert inputs["pixel_values"].dtype == torch.float32
    assert loaded.to_device(inputs)["pixel_values"].dtype == torch.bfloat16
    assert loaded.to_device(inputs)["input_ids"].dtype == torch.int64
    assert loaded.forward(inputs).logits.isfinite().all()


def test_last_logits_equal_the_whole() -> None:
    loaded = shared("llava")
    inputs = example(loaded)
    last, whole = loaded.forward(inputs).logits, loaded.forward(inputs, logits=True).logits
    assert last.shape[1] == 1
    torch.testing.assert_close(last[:, 0], whole[:, -1])


def test_whole_batch_reaches_the_model() -> None:
    """Gemma 3's logits depend on token_type_ids, Qwen's on mm_token_type_ids: both are passed."""
    for name, key in (("gemma3", "token_type_ids"), ("qwen2_5_vl", "mm_token_type_ids")):
        loaded = shared(name)
        inputs = example(loaded)
        with torch.no_grad():
            expected = loaded.model(**inputs).logits
        given = loaded.forward(inputs, logits=True).logits
        torch.testing.assert_close(given, expected, rtol=0, atol=0)
        without = loaded.forward({k: v for k, v in inputs.items() if k != key}, logits=True).logits
        assert (without - expected).abs().max() > 1e-3


def test_aliases() -> None:
    assert ALIASES["llava"] == "llava-hf/llava-1.5-7b-hf"
    assert {Path(ALIASES[name]).name for name in ("tiny-llava", "tiny-llama")} == {
        "tiny-llava",
        "tiny-llama",
    }


def test_no_such_model_offline() -> None:
    message = refusal("nobody-here/no-such-model")
    assert "'nobody-here/no-such-model' is not in the local cache" in message
    assert "tiny-llava" in message


def test_no_such_folder(tmp_path: Path) -> None:
    assert "neither a folder here nor a possible Hub id" in refusal(str(tmp_path / "a" / "b"))


def test_folder_without_a_model(tmp_path: Path) -> None:
    message = refusal(str(tmp_path))
    assert "holds no model: it has no config.json" in message
    assert "tiny-llava" in message


def _hub(kind: type[errors.HfHubHTTPError], text: str) -> OSError:
    """What transformers raises when the Hub answers with `kind`."""
    error = OSError("You are trying to access something.\nMore lines.")
    error.__cause__ = kind(text, response=Mock(headers={}))
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (_hub(errors.GatedRepoError, "403"), "is gated: accept its terms"),
        (_hub(errors.RepositoryNotFoundError, "404"), "neither a folder here nor a model on the"),
        (_hub(errors.RevisionNotFoundError, "404"), "has no such revision: check --revision"),
        (OSError("You are trying to access a gated repo.\nMake sure"), "is gated"),
        (ValueError("x requires you to execute, set `trust_remote_code=True`"), "brings its own"),
        (ImportError("Foo requires the bar library. Long help"), "not installed: Foo requires"),
        (ValueError("The checkpoint … does not recognize this architecture"), "no config.json of"),
        (OSError("no space.\nleft"), "cannot be loaded: no space"),
        (RuntimeError("You set `ignore_mismatched_sizes` to `False`"), "weights of other shapes"),
        (json.JSONDecodeError("Expecting value", "{", 1), "a configuration, tokenizer or"),
        (Exception("data did not match any variant"), "no tokenizer that can be read: data did"),
    ],
)
def test_hub_errors_in_one_line(error: Exception, expected: str) -> None:
    with pytest.raises(UserError) as caught, explained("some/model"):
        raise error
    message = str(caught.value)
    assert message.startswith("model 'some/model' ")
    assert expected in message
    assert "tiny-llava" in message
    assert "\n" not in message
    assert caught.value.__cause__ is error


def test_errors_of_the_program_are_not_hidden() -> None:
    with pytest.raises(ValueError, match="bug"), explained("some/model"):
        raise ValueError("a bug")


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("tokenizer.json", "{", "is not JSON"),
        ("tokenizer.json", '{"added_tokens": []}', "no tokenizer that can be read"),
        ("tokenizer.json", None, "no tokenizer that can be read"),
        ("processor_config.json", "{", "is not JSON"),
        ("config.json", {"text_config": 5}, "config.json that is not understood"),
        ("config.json", {"text_config": {"intermediate_size": 50}}, "other shapes"),
    ],
)
def test_damaged_files_of_a_model_end_in_one_line(
    file: str, content: Any, expected: str, tmp_path: Path
) -> None:
    path = build("llava", tmp_path) / file
    if isinstance(content, dict):
        whole = json.loads(path.read_text())
        for name, value in content.items():
            whole[name] = whole[name] | value if isinstance(value, dict) else value
        content = json.dumps(whole)
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(UserError, match=expected) as caught:
        load_model(str(path.parent))
    assert "\n" not in str(caught.value)


def test_nan_in_the_weights_is_named(tmp_path: Path) -> None:
    model, tok = FAMILIES["llama"].build()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0] = float("nan")
    model.save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"layer 1 .* NaN or infinity"):
        load_model(str(tmp_path))


def test_remote_code_is_off_unless_asked(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}})
    )
    (folder / "code.py").write_text(
        f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
        "from transformers import PreTrainedConfig\nclass Config(PreTrainedConfig): pass\n"
    )
    assert "pass --trust_remote_code True" in refusal(str(folder))
    assert not marker.exists()


def test_model_without_mlps(tmp_path: Path) -> None:
    config = tf.OPTConfig(
        hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=len(shared("llama").tokenizer), word_embed_proj_dim=32,
    )  # fmt: skip
    tf.OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    shared("llama").tokenizer.save_pretrained(tmp_path / "opt")
    message = refusal(str(tmp_path / "opt"))
    assert "OPTForCausalLM cannot be used: its decoder has no MLP module" in message
    assert "tiny-llava" in message


def test_model_without_a_decoder(tmp_path: Path) -> None:
    config = tf.ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    config.save_pretrained(tmp_path)
    assert "a vit model generates no text" in refusal(str(tmp_path))


def test_unknown_model_type(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "not-invented"}))
    assert "model type that this version of transformers knows" in refusal(str(tmp_path))


def test_incomplete_checkpoint(llama: Path, tmp_path: Path) -> None:
    """transformers would fill the missing layer with random weights."""
    folder = shutil.copytree(llama, tmp_path / "cut")
    tensors = load_file(folder / "model.safetensors")
    lacking = "model.layers.1.mlp.up_proj.weight"
    del tensors[lacking]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert f"lacks 1 weights of its decoder, {lacking} first" in refusal(str(folder))


def test_damaged_weights(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "damaged")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    assert "damaged weight file" in refusal(str(folder))


def test_missing_weights(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "empty")
    (folder / "model.safetensors").unlink()
    assert "cannot be loaded: Error no file named" in refusal(str(folder))


def test_unknown_dtype(llama: Path) -> None:
    assert "dtype 'int8' is none of float32" in refusal(str(llama), "cpu", "int8")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(llama: Path) -> None:
    assert "torch sees no CUDA device" in refusal(str(llama), "cuda")


def test_processors_take_no_videos() -> None:
    for name in ("qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl", "smolvlm"):
        assert not hasattr(shared(name).processor, "video_processor")
        assert type(shared(name).processor).__name__ in dir(tf)


def test_smolvlm_without_num2words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build("smolvlm", tmp_path)
    monkeypatch.setattr("transformers.utils.is_num2words_available", lambda: False)
    assert "pip install num2words" in refusal(str(folder))


def test_processor_without_chat_template_or_with_one(tmp_path: Path) -> None:
    """A chat template saved beside the processor comes back with it."""
    folder = build("llava", tmp_path)
    processor = load_model(str(folder)).processor
    assert processor.chat_template is None
    processor.chat_template = "{{ messages[0]['content'] }}"
    processor.save_pretrained(folder)
    assert load_model(str(folder)).processor.chat_template == processor.chat_template
