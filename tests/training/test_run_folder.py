"""Who may write into a run's folder, and what is left when writing fails."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from toy_source import toy_config, toy_trainer

from sparsify_vlm.coders import load_clt
from sparsify_vlm.errors import UserError
from sparsify_vlm.training.checkpoint import RunFolder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_run_is_not_written_over(tmp_path: Path) -> None:
    trainer = toy_trainer(toy_config(tmp_path))
    trainer.fit()
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"--resume .* --overwrite .* --run_name"):
        toy_trainer(toy_config(tmp_path))
    assert contents(tmp_path) == before


def test_a_foreign_folder_is_not_written_over_even_when_asked(tmp_path: Path) -> None:
    (tmp_path / "unnamed").mkdir()
    (tmp_path / "unnamed" / "thesis.txt").write_text("all of it")
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(UserError, match="--run_name"):
            toy_trainer(toy_config(tmp_path, **options))
    assert contents(tmp_path) == {"unnamed/thesis.txt": b"all of it"}


def test_overwrite_removes_the_run_and_nothing_else(tmp_path: Path) -> None:
    toy_trainer(toy_config(tmp_path)).fit()
    (tmp_path / "unnamed" / "notes.txt").write_text("mine")
    first = contents(tmp_path)
    toy_trainer(toy_config(tmp_path, overwrite=True, max_steps=7)).fit()
    second = contents(tmp_path)
    assert second.pop("unnamed/notes.txt") == b"mine"
    assert not any(".replaced" in name for name in second)
    assert second["unnamed/metrics.jsonl"] != first["unnamed/metrics.jsonl"]
    assert [name for name in second if "resume/step-" in name and "00000012" in name] == []


@pytest.mark.parametrize("killed", [False, True])
def test_overwriting_ends_before_it_has_saved(tmp_path: Path, killed: bool) -> None:
    toy_trainer(toy_config(tmp_path)).fit()
    before = contents(tmp_path)

    def stop(line: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    trainer = toy_trainer(toy_config(tmp_path, overwrite=True), on_step=stop)
    assert "unnamed/clt.json" not in contents(tmp_path)
    if killed:  # nothing of the process's own cleaning up runs; the next command finds the rest
        trainer.run.undo_overwrite = lambda: None  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    if killed:
        assert contents(tmp_path) != before
        with pytest.raises(UserError, match="holds a run already"):
            toy_trainer(toy_config(tmp_path))
    assert contents(tmp_path) == before


def test_weights_that_are_not_finite_are_not_published(tmp_path: Path) -> None:
    def spoil(line: dict[str, Any]) -> None:
        if line["step"] == 10:
            trainer.clt.b_enc[1].data[3] = torch.inf

    trainer = toy_trainer(toy_config(tmp_path), on_step=spoil)
    with pytest.raises(UserError, match=r"b_enc\.1 .* step 10: .* Step 5 is kept"):
        trainer.fit()
    assert json.loads((tmp_path / "unnamed" / "clt.json").read_text())["training"]["step"] == 5


def test_resume_with_other_settings_names_the_field(tmp_path: Path) -> None:
    toy_trainer(toy_config(tmp_path)).fit()
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"lr was 0\.01 .* is 0\.5 now"):
        toy_trainer(toy_config(tmp_path, lr=0.5, resume=True))
    assert contents(tmp_path) == before


def test_resume_of_nothing_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = toy_trainer(toy_config(tmp_path, resume=True))
    assert trainer.step == 0
    assert "no run to resume" in capsys.readouterr().out


@pytest.mark.parametrize("failing", ["tensors.safetensors", "sae.safetensors"])
def test_full_disk_is_one_line_and_keeps_the_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    real = safetensors.torch.save_file
    failing_from = 10

    def save_file(tensors: dict[str, torch.Tensor], filename: str, metadata: Any = None) -> None:
        if failing in filename and trainer.step >= failing_from:
            Path(filename).write_bytes(b"what fitted")
            raise OSError(errno.ENOSPC, "No space left on device", filename)
        real(tensors, filename, metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", save_file)
    trainer = toy_trainer(toy_config(tmp_path))
    with pytest.raises(UserError, match=r"no space left .* --resume"):
        trainer.fit()
    kept = 5 if failing == "tensors.safetensors" else 10
    assert trainer.run.last_step() == kept
    assert [p.name for p in (tmp_path / "unnamed" / "resume").iterdir()] == [f"step-{kept:08d}"]
    failing_from = 1000
    published = load_clt(tmp_path / "unnamed").state_dict()  # still readable
    assert all(value.isfinite().all() for value in published.values())
    toy_trainer(toy_config(tmp_path, resume=True)).fit()
    undisturbed = toy_trainer(toy_config(tmp_path / "other"))
    undisturbed.fit()
    expected = load_clt(tmp_path / "other" / "unnamed").state_dict()
    for name, value in load_clt(tmp_path / "unnamed").state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_full_disk_from_safetensors_own_error_is_recognised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_file(*_: Any) -> None:
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", save_file)
    with pytest.raises(UserError, match="nothing was saved before"):
        toy_trainer(toy_config(tmp_path)).fit()


def test_leftovers_of_a_killed_save_are_ignored_and_removed(tmp_path: Path) -> None:
    toy_trainer(toy_config(tmp_path)).fit()
    resume = tmp_path / "unnamed" / "resume"
    for name in (".step-00000099.tmp", "step-00000003"):  # half written; half removed
        (resume / name).mkdir()
    trainer = toy_trainer(toy_config(tmp_path, resume=True))
    assert trainer.step == 12
    assert not (resume / ".step-00000099.tmp").exists()


def test_half_a_line_of_metrics_is_dropped(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    lines = [json.dumps({"step": step}) + "\n" for step in range(1, 8)]
    run.metrics.write_text("".join(lines) + '{"step": 5, "lo')
    run.cut_metrics(5)
    assert run.metrics.read_text() == "".join(lines[:5])


def test_unknown_version_and_damaged_state_are_refused(tmp_path: Path) -> None:
    toy_trainer(toy_config(tmp_path)).fit()
    state = tmp_path / "unnamed" / "resume" / "step-00000012"
    sheet = json.loads((state / "state.json").read_text())
    (state / "state.json").write_text(json.dumps({**sheet, "version": 99}))
    with pytest.raises(UserError, match=r"state\.json has version 99"):
        toy_trainer(toy_config(tmp_path, resume=True))
    (state / "state.json").write_text(json.dumps(sheet))
    (state / "tensors.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(UserError, match=r"tensors\.safetensors cannot be read"):
        toy_trainer(toy_config(tmp_path, resume=True))


def test_damaged_sheet_and_incomplete_state_are_refused(tmp_path: Path) -> None:
    toy_trainer(toy_config(tmp_path)).fit()
    state = tmp_path / "unnamed" / "resume" / "step-00000012" / "state.json"
    whole = json.loads(state.read_text())
    for lacking in ("optimizers", "tokens"):
        state.write_text(json.dumps({k: v for k, v in whole.items() if k != lacking}))
        with pytest.raises(UserError, match=rf"resume lacks '{lacking}'"):
            toy_trainer(toy_config(tmp_path, resume=True))
    state.write_text(json.dumps(whole))
    sheet = tmp_path / "unnamed" / "run.json"
    sheet.write_text(json.dumps(json.loads(sheet.read_text()) | {"settings": None}))
    with pytest.raises(UserError, match=r"run\.json does not say the run's settings"):
        toy_trainer(toy_config(tmp_path, resume=True))
