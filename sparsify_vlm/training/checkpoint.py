"""A run's folder: what is published, what is kept for resuming, and who may write there.

    {save_dir}/{run_name}/
      run.json                 format, version, the settings that decide the result
      metrics.jsonl            one line per reported step
      resume/step-00001000/    state.json, tensors.safetensors: everything to go on from
      {hookpoint}/, clt.json   the published coders, made from the last resume state

A state is written beside and renamed as a whole; the one before is removed only then. A kill at any
moment leaves a state to go on from, or none if the first had not been written yet.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from sparsify_vlm.errors import UserError
from sparsify_vlm.files import sync, write_json, write_tensors

RUN_FORMAT, STATE_FORMAT, VERSION = "sparsify-vlm run", "sparsify-vlm resume state", 2
_STATE = re.compile(r"step-(\d{8,})")


class RunFolder:
    """The folder of one run. Only the first process may call what writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self._sheet, self._states = path / "run.json", path / "resume"
        self._replaced = path / ".replaced"

    # ---- opening

    def prepare(self, settings: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
        """Make the folder ready: an empty one, or with `resume` one whose run has `settings`.

        Raises `UserError` for a folder that holds anything else, which stays untouched.
        """
        settings = json.loads(json.dumps(settings))
        self.undo_overwrite()  # of a run that was killed before its first state
        if self._is_empty():
            if resume:
                print(f"{self.path} has no run to resume; starting one")
            return self._start(settings)
        if self._failed_at_once() and not resume:
            return self._start(settings)
        if overwrite:
            self._set_aside()
            return self._start(settings)
        if not resume:
            raise UserError(
                f"{self.path} holds a run already: give --resume to continue it, --overwrite to "
                "delete it, or another --run_name"
            )
        _compare(self.path, self._read_sheet()["settings"], settings)
        for rest in [*self._states.glob(".*"), *self._saved()[:-1]]:  # of a kill while saving
            shutil.rmtree(rest)

    def _is_empty(self) -> bool:
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file; give another --run_name or --save_dir")
        # What a kill leaves of a first write starts with a dot.
        return not self.path.exists() or all(p.name.startswith(".") for p in self.path.iterdir())

    def _failed_at_once(self) -> bool:
        """Whether the run here ended before its first step, over a bad input perhaps, so that the
        mended command can simply be given again."""
        names = {p.name for p in self.path.iterdir() if not p.name.startswith(".")}
        nothing_done = not self.metrics.exists() or self.metrics.stat().st_size == 0
        return names <= {self._sheet.name, self.metrics.name} and nothing_done

    def _start(self, settings: Mapping[str, Any]) -> None:
        sheet = {"format": RUN_FORMAT, "version": VERSION, "id": uuid.uuid4().hex}
        with disk_full_explained(self):
            write_json(self._sheet, {**sheet, "settings": settings})

    def _read_sheet(self) -> dict[str, Any]:
        if not self._sheet.is_file():
            raise UserError(
                f"{self.path} is not empty and holds no run of ours (no run.json): give another "
                "--run_name or --save_dir"
            )
        sheet = _read(self._sheet, RUN_FORMAT)
        if not isinstance(sheet.get("settings"), dict):
            raise UserError(f"{self._sheet} does not say the run's settings: it is damaged")
        return sheet

    def _parts(self) -> list[Path]:
        """What a run writes, and nothing else that may lie here."""
        coders = [p for p in self.path.iterdir() if (p / "sae.safetensors").is_file()]
        files = [self.path / name for name in ("metrics.jsonl", "clt.json", "run.json")]
        return [
            part
            for part in (self._states, *coders, *self.path.glob("events.out.tfevents.*"), *files)
            if part.exists()
        ]

    def _set_aside(self) -> None:
        """Move the run that is to be overwritten away, until the new one has a state."""
        self._read_sheet()
        self._replaced.mkdir()
        for part in self._parts():
            os.replace(part, self._replaced / part.name)

    def undo_overwrite(self) -> None:
        """Put back a run that was to be overwritten, if the new one has no state yet."""
        if not self._replaced.is_dir() or self._saved():
            return
        for part in self._parts():
            if (self._replaced / part.name).exists():
                _remove(part)
        for part in list(self._replaced.iterdir()):
            os.replace(part, self.path / part.name)
        self._replaced.rmdir()

    @property
    def id(self) -> str:
        """A name for the run that no other has, the same after a resume."""
        return str(self._read_sheet()["id"])

    # ---- states

    def _saved(self) -> list[Path]:
        found = [p for p in self._states.glob("step-*") if _STATE.fullmatch(p.name)]
        return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))

    def save_state(self, step: int, plain: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
        """Write the state after `step`, then remove older ones."""
        final = self._states / f"step-{step:08d}"
        older = [path for path in self._saved() if path != final]
        if not final.exists():
            _write_state(final, {**plain, "step": step}, tensors)
        for path in older:
            shutil.rmtree(path)
        if self._replaced.exists():
            shutil.rmtree(self._replaced)

    def last_step(self) -> int | None:
        """The step of the last state; None if there is none."""
        saved = self._saved()
        return int(saved[-1].name.removeprefix("step-")) if saved else None

    def load_state(
        self, part: Callable[[str, Tensor], Tensor] = lambda _, whole: whole
    ) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """The last state's plain values and tensors (on the CPU), None if there is none.

        Of each tensor only the `part` taken of it, given its key, is held.

        Raises `UserError` for files that cannot be read or are of an unknown version.
        """
        from safetensors.torch import load_file

        saved = self._saved()
        if not saved:
            return None
        plain = _read(saved[-1] / "state.json", STATE_FORMAT)
        path = saved[-1] / "tensors.safetensors"
        try:
            # Copied: the file is mapped, and it is removed when the next state is written.
            return plain, {key: part(key, t).clone() for key, t in load_file(path).items()}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read ({error}); the run cannot be resumed") from None

    # ---- metrics

    def cut_metrics(self, step: int) -> None:
        """Drop lines of metrics.jsonl that belong to steps after `step`, or are incomplete."""
        if not self.metrics.exists():
            return
        kept = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines(keepends=True):
            if not line.endswith("\n") or json.loads(line)["step"] > step:
                break
            kept.append(line)
        temporary = self.metrics.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, self.metrics)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _write_state(final: Path, plain: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    temporary = final.with_name(f".{final.name}.tmp")
    try:
        write_tensors(
            temporary / "tensors.safetensors",
            tensors,
            {"format": STATE_FORMAT, "version": str(VERSION)},
        )
        write_json(temporary / "state.json", {"format": STATE_FORMAT, "version": VERSION, **plain})
        os.replace(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync(final.parent)


def _read(path: Path, form: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error})") from None
    if not isinstance(value, dict) or value.get("format") != form:
        raise UserError(f"{path} is not a file of the format '{form}'")
    if value.get("version") != VERSION:
        raise UserError(
            f"{path} has version {value.get('version')}, this program knows {VERSION}: update "
            "sparsify-vlm, or start a new run"
        )
    return value


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flat(inner, f"{prefix}.{name}" if prefix else name)
    else:
        yield prefix, value


def _compare(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    old, new = dict(_flat(before)), dict(_flat(now))
    for name in [*old, *(n for n in new if n not in old)]:
        if old.get(name) != new.get(name):
            raise UserError(
                f"--resume: {name} was {_short(old.get(name))} in {path} and is "
                f"{_short(new.get(name))} now; give the run's own settings or another --run_name"
            )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "…"


@contextmanager
def disk_full_explained(run: RunFolder) -> Iterator[None]:
    """Turn "no space left" into one line that says what is still there."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else None
        if number not in (errno.ENOSPC, errno.EDQUOT) and "os error 28" not in str(error):
            raise
        step = run.last_step()
        kept = "nothing was saved before" if step is None else f"step {step} is kept"
        raise UserError(
            f"no space left on the disk of {run.path} while saving; {kept}. Free some space and "
            "continue with --resume"
        ) from error
