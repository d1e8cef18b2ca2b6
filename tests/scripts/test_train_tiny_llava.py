"""The embedded pair's training script: packing, resuming, and what it says to bad arguments."""

from __future__ import annotations

import importlib
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from sparsify_vlm.data.shapes import QUESTION_TYPES, render
from sparsify_vlm.errors import UserError
from sparsify_vlm.models.load import CHECKPOINTS

_SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def script() -> Any:
    sys.path.insert(0, str(_SCRIPTS))
    try:
        yield importlib.import_module("train_tiny_llava")
    finally:
        sys.path.remove(str(_SCRIPTS))


def test_a_packed_question_is_answered_as_it_would_be_alone(script):
    """Through the processor, one question at a time, unpacked and without our mask."""
    folder = CHECKPOINTS / "tiny-llava"
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    from tiny_llava.model import final_hidden

    rng = np.random.default_rng(0)
    batch = script.questions_batch(rng, 3, "train", QUESTION_TYPES, 5, seen=True)
    with torch.no_grad():
        packed = model.lm_head(final_hidden(model, batch)[batch.is_answer])[::2]
        rows = batch.is_answer.nonzero()[::2, 0].tolist()
        for logits, row, question in zip(packed, rows, batch.asked, strict=True):
            inputs = processor(
                text=f"USER: <image>\n{question.text} ASSISTANT:",
                images=render(batch.scenes[row]),
                return_tensors="pt",
            )
            torch.testing.assert_close(logits, model(**inputs).logits[0, -1], rtol=1e-4, atol=1e-3)


def _short_run(script, output: Path, seed: int = 0):
    recipe = script.Recipe(
        vision_steps=2,
        vision_rows=2,
        list_steps=2,
        lookup_steps=1,
        told_steps=2,
        seen_lookup_steps=1,
        seen_steps=2,
        rows=2,
        noise_rise=1,
    )
    return script.Run(output, seed, torch.device("cpu"), recipe)


def test_finished_stages_are_read_and_the_rest_comes_out_the_same(script, tmp_path, monkeypatch):
    whole = script.make_pair(_short_run(script, tmp_path / "whole"))
    broken = _short_run(script, tmp_path / "broken")
    with monkeypatch.context() as patch:
        patch.setattr(script, "train_vlm", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            script.make_pair(broken)
    with monkeypatch.context() as patch:
        patch.setattr(script, "train_vision", None)  # calling it again would fail
        patch.setattr(script, "train_base", None)
        resumed = script.make_pair(broken)
    for one, other in zip(whole, resumed, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_stages_of_another_seed_are_refused(script, tmp_path):
    script.make_pair(_short_run(script, tmp_path))
    with pytest.raises(UserError, match="another recipe, seed or device"):
        script.make_pair(_short_run(script, tmp_path, seed=1))


def test_the_folders_load_and_are_readable_by_all(script, tmp_path):
    run = _short_run(script, tmp_path)
    script.write_folders(run, *script.make_pair(run))
    for name in ("tiny-llama", "tiny-llava"):
        for path in (tmp_path / name).iterdir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o644
    table = script.measure(tmp_path, 0, torch.device("cpu"), scenes=100)
    assert max(table["tiny-llava, scene seen"].values()) < 0.9  # hardly trained


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--output"),
        (["--output", "x", "--device", "tpu"], "--device"),
        (["--output", "x", "--seed", "one"], "--seed"),
    ],
)
def test_arguments_that_cannot_be_parsed_are_one_line(script, capsys, arguments, said):
    with pytest.raises(SystemExit) as stopped:
        script.parse(arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--output", "x", "--seed", "-1"], "--seed must be 0 or more"),
        (["--output", "x", "--threads", "0"], "--threads 1 or more"),
        (["--output", __file__], "is a file; name a folder"),
    ],
)
def test_arguments_that_cannot_be_used_say_why(script, arguments, said):
    with pytest.raises(UserError, match=said):
        script.parse(arguments)


@pytest.mark.slow
def test_a_user_error_reaches_the_terminal_without_a_traceback():
    done = subprocess.run(
        [sys.executable, str(_SCRIPTS / "train_tiny_llava.py"), "--output", __file__],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr == f"train_tiny_llava.py: --output {__file__} is a file; name a folder\n"
