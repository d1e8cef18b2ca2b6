"""Every bad input as a user would type it: one clear line, non-zero, nothing written over."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from families import FAMILIES, build, picture, tokenizer
from safetensors.torch import load_file, save_file

from sparsify_vlm.cli import main

Check = Callable[..., str]
CODER = ["--transcode", "--cross_layer", "2", "--num_latents", "16", "--k", "2"]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny random models, and a dataset of four pictures with questions."""
    folder = tmp_path_factory.mktemp("shelf")
    for name in ("llava", "llama", "gpt2"):
        build(name, folder)
    rows = []
    for i in range(4):
        picture(40, 32, seed=i).save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "question": "what colour ?", "answer": "red"})
    write_rows(folder / "good.jsonl", rows)
    write_rows(folder / "text.jsonl", [{"text": "it is red and green . " * 4}] * 4)
    return folder


def write_rows(file: Path, rows: list[dict[str, str]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file below `folder`, by its path."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An output directory that holds something of the user's."""
    folder = tmp_path / "out"
    (folder / "mine").mkdir(parents=True)
    (folder / "mine" / "notes.txt").write_text("keep this")
    return folder


@pytest.fixture
def refused(out: Path, capfd: pytest.CaptureFixture[str]) -> Check:
    """Run a command that must be refused; returns its one line. `kept` must stay as it is."""

    def run(argv: list[object], *words: str, status: int = 1, kept: Path = out) -> str:
        before = contents(kept)
        capfd.readouterr()
        assert main([str(token) for token in argv]) == status
        err = capfd.readouterr().err
        lines = [line for line in err.splitlines() if not line.startswith(("Training", "Captur"))]
        assert len(lines) == 1, err
        assert lines[0].startswith("error: ")
        for word in words:
            assert word in lines[0], lines[0]
        assert contents(kept) == before
        return lines[0]

    return run


def train(model: object, data: object, out: Path, *more: object) -> list[object]:
    steps = ["--batch_size", "2", "--max_steps", "2", "--save_dir", out, "--run_name", "r"]
    return ["train", model, data, *CODER, "--optimizer", "adam", *steps, *more]


# ---- the command line


def test_hookpoints_swallow_the_positionals(refused: Check, out: Path) -> None:
    line = ["train", "--save_dir", out, *CODER, "--hookpoints", "layers.0.mlp", "llava", "my/data"]
    refused(line, "--hookpoints took", "llava", "MODEL", status=2)


def test_unknown_flag(refused: Check, shelf: Path, out: Path) -> None:
    line = train(shelf / "llava", shelf / "good.jsonl", out, "--cross_leyer", "2")
    refused(line, "--cross_leyer", "--cross_layer", status=2)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--cross_layer", "-2"], ["--cross_layer -2", "negative"]),
        (["--transcode", "False"], ["--cross_layer", "--transcode"]),
        (["--k", "17"], ["--k 17", "--num_latents 16"]),
        (["--k", "0"], ["--k 0"]),
        (["--lr", "inf"], ["--lr inf", "finite"]),
        (["--device", "toaster"], ["toaster", "cpu"]),
        (["--device", "meta"], ["meta", "cpu"]),
        (["--num_latents", str(10**12)], ["out of memory", "estimate"]),
        (["--num_latents", str(10**13)], ["--num_latents 10000000000000", "is the most"]),
        (["--layers", "0", "--hookpoints", "a"], ["--layers", "--hookpoints"]),
        (["--layers", "0", "--layer_stride", "2"], ["--layers", "--layer_stride"]),
        (["--dataset_mix", "mix.yaml"], ["--dataset", "--dataset_mix"]),
        (["--resume", "--overwrite"], ["--resume", "--overwrite"]),
        (["--run_name", "../mine"], ["--run_name ../mine", "--save_dir"]),
        (["--run_name", "mine/too"], ["--run_name mine/too", "one folder"]),
        (["--run_name", ""], ["--run_name is empty", "one folder"]),
        (["--max_examples", str(10**30)], ["--max_examples", "choose a number"]),
    ],
)
def test_settings_that_do_not_go_together(
    more: list[str], words: list[str], refused: Check, shelf: Path, out: Path
) -> None:
    refused(train(shelf / "llava", shelf / "good.jsonl", out, *more), *words)


@pytest.mark.parametrize("given", ["size=1.5", f"size={2**70}", "seed=-1", "seed=x", "colour=1"])
def test_scenes_there_cannot_be(given: str, refused: Check, shelf: Path, out: Path) -> None:
    refused(train(shelf / "llava", "shapes", out, "--data_args", given), "size and seed", given)


def test_more_active_latents_than_there_are(refused: Check, shelf: Path, out: Path) -> None:
    """Known only once the model's width is: 32 · 1 latents."""
    line = train(shelf / "llava", shelf / "good.jsonl", out, "--k", "64", "--num_latents", "0")
    refused([*line, "--expansion_factor", "1"], "--k 64", "32")


# ---- the model


def test_no_such_model(refused: Check, shelf: Path, out: Path) -> None:
    refused(train("nobody/nothing", shelf / "good.jsonl", out), "nobody/nothing", "tiny-llava")
    refused(train("./not/here/at/all", shelf / "good.jsonl", out), "./not/here", "tiny-llava")


def test_offline(
    refused: Check, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(train("llava", "shapes", out), "llava", "tiny-llava")


def test_model_without_mlps(refused: Check, shelf: Path, out: Path, tmp_path: Path) -> None:
    tok = tokenizer()
    config = tf.OPTConfig(
        vocab_size=len(tok), hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4
    )
    tf.OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    tok.save_pretrained(tmp_path / "opt")
    refused(train(tmp_path / "opt", shelf / "text.jsonl", out), "OPT", "MLP")


def test_unknown_hookpoint(refused: Check, shelf: Path, out: Path) -> None:
    line = train(shelf / "llava", shelf / "good.jsonl", out, "--hookpoints", "layers.7.mlp")
    refused(line, "layers.7.mlp", "language_model.model.layers.0.mlp")
    line = train(shelf / "llava", shelf / "good.jsonl", out, "--layers", "7")
    refused(line, "--layers 7", "3 layers")


def test_deeper_than_the_model_is_clamped_and_said(
    shelf: Path, out: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = train(shelf / "llava", shelf / "good.jsonl", out, "--cross_layer", "16")
    assert main([str(token) for token in line]) == 0
    said = capfd.readouterr()
    assert "--cross_layer 16" in said.out + said.err
    assert "3" in next(s for s in (said.out + said.err).splitlines() if "--cross_layer 16" in s)
    cfg = json.loads((out / "r" / "clt.json").read_text())
    assert cfg["n_targets"] == 3
    assert (out / "mine" / "notes.txt").read_text() == "keep this"


def test_estimate_of_no_model(refused: Check, tmp_path: Path) -> None:
    line = ["estimate", "nobody/nothing", "--cross_layer", "2"]
    refused(line, "nobody/nothing", "tiny-llava", kept=tmp_path)


def test_estimate_does_not_replace_other_files(refused: Check, shelf: Path, out: Path) -> None:
    line = ["estimate", shelf / "llama", "--cross_layer", "2", "--output"]
    refused([*line, out / "mine" / "notes.txt"], "notes.txt")
    refused([*line, out], "folder")
    for _ in range(2):  # its own it may
        assert main([str(token) for token in [*line, out / "estimate.json"]]) == 0


# ---- images


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.png", None, ["missing.png"]),
        ("half.png", lambda whole: whole[: len(whole) // 2], ["half.png"]),
        ("text.png", lambda whole: b"this is not an image", ["text.png"]),
        ("empty.png", lambda whole: b"", ["empty.png"]),
    ],
)
def test_bad_image(
    name: str, content: Any, words: list[str], refused: Check, shelf: Path, out: Path
) -> None:
    if content is not None:
        (shelf / name).write_bytes(content((shelf / "0.png").read_bytes()))
    rows = [{"image": image, "question": "what ?", "answer": "red"} for image in ("0.png", name)]
    data = write_rows(shelf / f"with_{name}.jsonl", rows)
    refused(train(shelf / "llava", data, out), *words, kept=out / "mine")
    # Nothing was trained, so the mended command needs no --overwrite.
    assert main([str(token) for token in train(shelf / "llava", shelf / "good.jsonl", out)]) == 0


def test_truncation_that_cuts_image_tokens(refused: Check, shelf: Path, out: Path) -> None:
    line = train(shelf / "llava", shelf / "good.jsonl", out, "--ctx_len", "8")
    refused(line, "--ctx_len", "image", kept=out / "mine")


def test_nothing_to_train_on(refused: Check, shelf: Path, out: Path) -> None:
    """Coders that have seen no token are not published as if they were trained."""
    line = train(shelf / "llava", shelf / "good.jsonl", out)
    refused([*line, "--max_image_pixels", "9", "--skip_bad"], "no token", "9", kept=out / "mine")
    refused([*line, "--exclude_tokens", *range(99)], "--exclude_tokens", kept=out / "mine")
    assert not (out / "r" / "clt.json").exists()
    assert main([str(token) for token in line]) == 0


def test_no_such_dataset(refused: Check, shelf: Path, out: Path) -> None:
    refused(train(shelf / "llava", shelf / "absent.jsonl", out), "absent.jsonl")
    refused(train(shelf / "llava", "nobody/nothing", out), "nobody/nothing")


# ---- activations


def test_nan_names_layer_and_batch(refused: Check, shelf: Path, out: Path, tmp_path: Path) -> None:
    """The MLP of layer 1 returns NaN for one word, which the second batch holds."""
    torch.manual_seed(0)
    model, tok = FAMILIES["llama"].build()
    with torch.no_grad():
        model.model.embed_tokens.weight[tok.convert_tokens_to_ids("green")] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    tok.save_pretrained(tmp_path / "nan")
    rows = [{"text": "it is red ."}] * 2 + [{"text": "it is green ."}] * 2
    data = write_rows(tmp_path / "nan.jsonl", rows)
    line = train(tmp_path / "nan", data, out, "--shuffle_seed", "-1", "--ctx_len", "6")
    refused(line, "layers.0.mlp", "NaN", "batch 1", kept=out / "mine")


@pytest.fixture
def store(shelf: Path, tmp_path: Path) -> Path:
    """A store of the activations of the tiny LLaVA."""
    folder = tmp_path / "store"
    line = ["capture", shelf / "llava", shelf / "good.jsonl", "--output_dir", folder]
    assert main([str(token) for token in [*line, "--batch_size", "2"]]) == 0
    return folder


def from_store(model: object, store: Path, out: Path) -> list[object]:
    line = ["train", model, *CODER, "--save_dir", out, "--run_name", "r", "--activations", store]
    return [*line, "--batch_tokens", "16"]


def test_store_of_another_model(refused: Check, shelf: Path, store: Path, out: Path) -> None:
    refused(from_store(shelf / "gpt2", store, out), "llava", "gpt2")


def test_store_with_a_damaged_shard(refused: Check, shelf: Path, store: Path, out: Path) -> None:
    shard = sorted(store.glob("batch_*_y.safetensors"))[0]
    damaged = bytearray(shard.read_bytes())
    damaged[-5] ^= 1
    shard.write_bytes(bytes(damaged))
    refused(from_store(shelf / "llava", store, out), shard.name, kept=out / "mine")
    shard.unlink()
    refused(from_store(shelf / "llava", store, out), shard.name, kept=out / "mine")


def test_no_store(refused: Check, shelf: Path, out: Path, tmp_path: Path) -> None:
    refused(from_store(shelf / "llava", tmp_path / "absent", out), "absent")


def test_capture_into_another_capture(refused: Check, shelf: Path, store: Path) -> None:
    line = ["capture", shelf / "llava", shelf / "good.jsonl", "--output_dir", store]
    refused([*line, "--batch_size", "2", "--ctx_len", "64"], str(store), kept=store)


def test_import_of_nothing(refused: Check, out: Path, tmp_path: Path) -> None:
    refused(["import-activations", tmp_path / "absent", out / "acts"], "absent")
    (tmp_path / "empty").mkdir()
    refused(["import-activations", tmp_path / "empty", out / "acts"], "empty")


def test_import_into_what_is_there(refused: Check, out: Path, tmp_path: Path) -> None:
    layer = tmp_path / "old" / "L0"
    layer.mkdir(parents=True)
    torch.save(torch.randn(4, 8), layer / "batch_0_x.pt")
    torch.save(torch.randn(1, 4, 8), layer / "batch_0_y.pt")
    refused(["import-activations", tmp_path / "old", out / "mine"], str(out / "mine"))


# ---- checkpoints


@pytest.fixture
def checkpoint(shelf: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    line = train(shelf / "llava", shelf / "good.jsonl", folder)
    assert main([str(token) for token in line]) == 0
    return folder / "r"


def damage(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    file = checkpoint / "language_model.model.layers.1.mlp" / "sae.safetensors"
    tensors = load_file(str(file))
    change(tensors)
    save_file(tensors, str(file))
    return file


def evaluate(checkpoint: Path, shelf: Path) -> list[object]:
    output = checkpoint.parent / "eval.json"
    line = ["evaluate", checkpoint, shelf / "good.jsonl", "--model", shelf / "llava"]
    return [*line, "--output", output]


def test_checkpoint_with_a_missing_tensor(refused: Check, shelf: Path, checkpoint: Path) -> None:
    damage(checkpoint, lambda tensors: tensors.pop("encoder.weight"))
    refused(evaluate(checkpoint, shelf), "layers.1.mlp", "encoder.weight", kept=checkpoint.parent)


def test_checkpoint_with_a_wrong_shape(refused: Check, shelf: Path, checkpoint: Path) -> None:
    def cut(tensors: dict[str, torch.Tensor]) -> None:
        tensors["encoder.weight"] = tensors["encoder.weight"][:, :-1].contiguous()

    damage(checkpoint, cut)
    refused(evaluate(checkpoint, shelf), "layers.1.mlp", "encoder.weight", kept=checkpoint.parent)


def test_evaluation_does_not_replace_other_files(
    refused: Check, shelf: Path, checkpoint: Path
) -> None:
    line = evaluate(checkpoint, shelf)[:-1]
    for other in (checkpoint / "clt.json", checkpoint / "metrics.jsonl", checkpoint):
        refused([*line, other], "--output", other.name, kept=checkpoint.parent)
        refused([*line, "e.json", "--answers", other], "--answers", kept=checkpoint.parent)
    both = checkpoint.parent / "both.json"
    refused([*line, both, "--answers", both], "both.json", kept=checkpoint.parent)
    mine = [*line, both, "--answers", checkpoint.parent / "answers.jsonl", "--split", "train"]
    for _ in range(2):  # its own it may
        assert main([str(token) for token in mine]) == 0


def test_no_checkpoint(refused: Check, shelf: Path, tmp_path: Path) -> None:
    refused(evaluate(tmp_path / "absent", shelf), "absent", kept=tmp_path)
    (tmp_path / "empty").mkdir()
    refused(evaluate(tmp_path / "empty", shelf), "empty", kept=tmp_path)


def test_checkpoint_of_another_model(refused: Check, shelf: Path, checkpoint: Path) -> None:
    line = ["evaluate", checkpoint, shelf / "text.jsonl", "--model", shelf / "gpt2"]
    refused(line, kept=checkpoint.parent)


def test_run_that_is_there_is_not_written_over(
    refused: Check, shelf: Path, checkpoint: Path
) -> None:
    line = train(shelf / "llava", shelf / "good.jsonl", checkpoint.parent)
    refused(line, str(checkpoint), "--resume", "--overwrite", kept=checkpoint)
    changed = [*line, "--lr", "0.5", "--resume"]
    refused(changed, "lr", "--resume", kept=checkpoint)
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()
    (checkpoint / "thesis.tex").write_text("years of work")
    refused([*line, "--overwrite"], str(checkpoint), kept=checkpoint)


# ---- the disk


@pytest.mark.parametrize("command", ["train", "capture"])
def test_disk_full(
    command: str, refused: Check, shelf: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first flush to the disk fails as it does when no block is left."""

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    line: list[object] = train(shelf / "llava", shelf / "good.jsonl", out)
    if command == "capture":
        line = ["capture", shelf / "llava", shelf / "good.jsonl", "--output_dir", out / "acts"]
    monkeypatch.setattr(os, "fsync", full)
    refused(line, "no space left", kept=out / "mine")


def test_output_is_a_file(refused: Check, shelf: Path, out: Path) -> None:
    line = train(shelf / "llava", shelf / "good.jsonl", out / "mine", "--run_name", "notes.txt")
    refused(line, "notes.txt")
