"""Capture with the embedded models: what is stored, interruption, bad samples, the command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from stores import contents
from torch import Tensor

from sparsify_vlm import models
from sparsify_vlm.cli import main
from sparsify_vlm.data import ActivationStore, encode, open_samples
from sparsify_vlm.data.capture import CaptureConfig, capture
from sparsify_vlm.data.capture_manifest import weights_fingerprint
from sparsify_vlm.errors import UserError
from sparsify_vlm.models import LoadedModel


def config(folder: Path, **changes: Any) -> CaptureConfig:
    values = {
        "model": "tiny-llava",
        "output_dir": str(folder),
        "dataset": "shapes",
        "max_examples": 22,
        "batch_size": 4,
        "shard_tokens": 400,
        "quiet": True,
    }
    return CaptureConfig(**values | changes)


@contextmanager
def seen_by_hooks(mlps: list[Any]) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """What plain PyTorch hooks on the MLP modules see."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    handles = [
        mlp.register_forward_hook(lambda _, x, y, i=i: seen.__setitem__(i, (x[0][0], y[0])))
        for i, mlp in enumerate(mlps)
    ]
    yield seen
    for handle in handles:
        handle.remove()


def test_store_holds_what_the_mlps_read_and_write(vlm: LoadedModel, tmp_path: Path) -> None:
    """Against one forward per sample, without padding, read with plain hooks."""
    cfg = config(tmp_path / "s", dtype="float32")
    store = ActivationStore(capture(cfg, vlm))
    assert store.n_samples == 22
    assert len(store.shards) > 1
    rows = store.rows(range(len(store)))
    mlps = [layer.mlp for layer in vlm.model.model.language_model.layers]
    for number, sample in enumerate(open_samples(cfg, vlm)):
        inputs = encode(vlm, [sample], cfg.ctx_len).inputs
        with seen_by_hooks(mlps) as seen, torch.no_grad():
            vlm.model(**inputs)
        mine = rows.sample == number
        assert torch.equal(rows.input_ids[mine].long(), inputs["input_ids"][0])
        assert rows.position[mine].tolist() == list(range(int(mine.sum())))
        for layer, (x, y) in seen.items():
            torch.testing.assert_close(rows.x[layer, mine], x, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(rows.y[layer, mine], y, rtol=1e-4, atol=1e-4)


def test_token_table(vlm: LoadedModel, tmp_path: Path) -> None:
    store = ActivationStore(capture(config(tmp_path / "s"), vlm))
    rows = store.rows(range(len(store)))
    image_id = vlm.config.image_token_id
    assert torch.equal(rows.role == models.Role.IMAGE, rows.input_ids == image_id)
    grid = [[row, column] for row in range(6) for column in range(6)]
    for number in range(store.n_samples):
        assert rows.patch[(rows.sample == number) & (rows.role == 1)].tolist() == grid
    assert store.roles["image"] == 36 * 22
    assert (rows.input_ids[rows.position == 0] == store.bos_token_id).all()
    assert store.hookpoints == [f"language_model.model.layers.{i}.mlp" for i in range(8)]
    assert store.n_targets == 8


def test_bfloat16_is_the_rounded_float32(vlm: LoadedModel, tmp_path: Path) -> None:
    exact = ActivationStore(capture(config(tmp_path / "a", dtype="fp32"), vlm))
    short = ActivationStore(capture(config(tmp_path / "b"), vlm))
    a, b = (store.rows(range(0, len(store), 7)) for store in (exact, short))
    assert b.x.dtype == torch.bfloat16
    assert torch.equal(a.x.bfloat16(), b.x)
    assert torch.equal(a.y.bfloat16(), b.y)


def test_some_layers_before_the_norm_of_a_text_model(llm: LoadedModel, tmp_path: Path) -> None:
    cfg = config(
        tmp_path / "s", model="tiny-llama", dtype="fp32", layers=[5, 2], input_site="resid_mid"
    )
    store = ActivationStore(capture(cfg, llm))
    assert store.hookpoints == ["layers.2.mlp", "layers.5.mlp"]
    assert store.n_targets == 2
    rows = store.rows(range(200))
    layer = llm.model.model.layers[5]
    with torch.no_grad():
        y = layer.mlp(layer.post_attention_layernorm(rows.x[1]))
    torch.testing.assert_close(rows.y[1], y, rtol=1e-4, atol=1e-4)


@pytest.fixture
def undisturbed(vlm: LoadedModel, tmp_path: Path) -> dict:
    return contents(capture(config(tmp_path / "undisturbed"), vlm))


@pytest.mark.parametrize("batches", [0, 1, 3, 4])
def test_interrupted_and_continued_equals_undisturbed(
    vlm: LoadedModel,
    tmp_path: Path,
    undisturbed: dict,
    monkeypatch: pytest.MonkeyPatch,
    batches: int,
) -> None:
    record, left = models.record_tokens, batches

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        return record(*args, **kwargs)

    cfg = config(tmp_path / "s")
    with monkeypatch.context() as patch:
        patch.setattr(models, "record_tokens", interrupted)
        with pytest.raises(KeyboardInterrupt):
            capture(cfg, vlm)
    with pytest.raises(UserError, match="has not ended"):
        ActivationStore(cfg.output_dir)
    assert contents(capture(cfg, vlm)) == undisturbed


@pytest.mark.slow
def test_killed_command_continues(vlm: LoadedModel, tmp_path: Path) -> None:
    """SIGKILL while the command writes its third shard or later, then the command again."""
    cfg = config(tmp_path / "stretch", max_examples=400, shard_tokens=1000)
    stretch = contents(capture(cfg, vlm))
    parts = tmp_path / "parts"
    command = [sys.executable, "-m", "sparsify_vlm", "capture", "tiny-llava", "shapes"]
    command += ["--max_examples", "400", "--batch_size", "4", "--shard_tokens", "1000"]
    command += ["--output_dir", str(parts)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while _lines(parts) < 2 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 2 <= _lines(parts) < _lines(tmp_path / "stretch")
    subprocess.run(command, check=True, capture_output=True)
    assert contents(parts) == stretch


def _lines(folder: Path) -> int:
    path = folder / "shards.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def _rows_with_bad_images(folder: Path) -> Path:
    rows = []
    for i in range(12):
        Image.new("RGB", (48, 48), (20 * i, 0, 0)).save(folder / f"{i}.png")
        rows.append(
            {"image": f"{i}.png", "question": "what colour is the shape ?", "answer": "red"}
        )
    (folder / "3.png").unlink()
    (folder / "8.png").write_bytes(b"no image")
    (folder / "9.png").unlink()
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_bad_samples_are_skipped_and_listed(vlm: LoadedModel, tmp_path: Path) -> None:
    data = str(_rows_with_bad_images(tmp_path))
    changes = {"dataset": data, "max_examples": None, "batch_size": 2, "shard_tokens": 60}
    with pytest.raises(UserError, match=r"\d\.png"):
        capture(config(tmp_path / "s", **changes), vlm)
    cfg = config(tmp_path / "s", skip_bad=True, **changes)
    store = ActivationStore(capture(cfg, vlm))  # goes on where the first one stopped
    assert store.n_samples == 9
    assert len(store.manifest["skipped"]) == 3
    for name in ("3.png", "8.png", "9.png"):
        assert sum(name in reason for reason in store.manifest["skipped"]) == 1
    assert contents(capture(config(tmp_path / "t", skip_bad=True, **changes), vlm)) == contents(
        store.path
    )


def test_retrained_model_is_another_model(vlm: LoadedModel, tmp_path: Path) -> None:
    capture(config(tmp_path / "s"), vlm)
    weight = vlm.model.model.language_model.layers[4].mlp.up_proj.weight
    before = weights_fingerprint(vlm.model)
    weight[0, 0] += 1e-3
    try:
        assert weights_fingerprint(vlm.model) != before
        with pytest.raises(UserError, match="already holds another capture: weights"):
            capture(config(tmp_path / "s"), vlm)
    finally:
        weight[0, 0] -= 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_examples": 23}, "dataset fingerprint"),
        ({"batch_size": 5}, "batch_size 4 there, 5 asked for"),
        ({"dtype": "fp32"}, "dtype bfloat16 there, float32"),
        ({"layers": [0]}, "hookpoints"),
    ],
)
def test_other_settings_are_another_capture(
    vlm: LoadedModel, tmp_path: Path, changes: dict, message: str
) -> None:
    folder = capture(config(tmp_path / "s"), vlm)
    before = contents(folder)
    with pytest.raises(UserError, match=message):
        capture(config(folder, **changes), vlm)
    assert contents(folder) == before


def test_not_a_number_names_layer_and_batch(vlm: LoadedModel, tmp_path: Path) -> None:
    broken, calls = vlm.model.model.language_model.layers[6].mlp, 0

    def poison(_: Any, args: Any, output: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return output * torch.nan if calls == 3 else output

    handle = broken.register_forward_hook(poison)
    try:
        with pytest.raises(UserError, match=r"y of \S+layers.6.mlp in batch 2 .* holds NaN"):
            capture(config(tmp_path / "s"), vlm)
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "int8"}, "--dtype int8 is none of"),
        ({"input_site": "mlp_out"}, "--input_site mlp_out is none of"),
        ({"n_targets": 0}, "--n_targets must be at least 1"),
        ({"batch_size": 0}, "--batch_size must be at least 1"),
        ({"target_offset": 2}, "--target_offset must be 0 or 1"),
        ({"layers": [1], "hookpoints": ["x"]}, "exclude each other"),
    ],
)
def test_bad_settings(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(tmp_path, **changes)


def test_unknown_layers_and_hookpoints(vlm: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--layers 8: tiny-llava has layers 0 to 7"):
        capture(config(tmp_path / "s", layers=[8]), vlm)
    with pytest.raises(UserError, match="hookpoint 'nowhere' matches no MLP"):
        capture(config(tmp_path / "s", hookpoints=["nowhere"]), vlm)
    assert not (tmp_path / "s").exists()


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    line = ["capture", "--model", "tiny-llava", "--dataset", "shapes", "--n_targets", "16"]
    line += ["--output_dir", str(tmp_path / "s"), "--max_examples", "9"]
    assert main(line) == 0
    said = capsys.readouterr().out
    assert "--n_targets 16 is more than 8, the most there are: taking 8" in said
    assert "9 samples" in said
    assert main(line) == 0
    assert "is complete" in capsys.readouterr().out
    assert main([*line, "--dtype", "float16"]) == 1
    assert "already holds another capture" in capsys.readouterr().err


def test_script_is_the_command() -> None:
    script = Path(__file__).parents[2] / "scripts" / "capture_activations.py"
    environment = os.environ | {"COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, script, "--help"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0
    assert "--output_dir" in done.stdout
