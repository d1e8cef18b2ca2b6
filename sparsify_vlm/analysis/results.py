"""What `analyze` found, in memory and on disk.

OUT/results.json           estimates, notes, and where the numbers come from
OUT/data/TABLE.parquet     every table, for programs
OUT/data/TABLE.csv         the same for spreadsheets
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsify_vlm.analysis.tables import Estimate, Experiment, Table
from sparsify_vlm.errors import UserError
from sparsify_vlm.files import check_writable, write_atomically, write_json, write_text

FORMAT, VERSION = "sparsify-vlm analysis", 1
RESULTS, DATA = "results.json", "data"
OWN_FILES = {RESULTS, DATA, "figures", "report.html", "report.md"}
"""All that `analyze` and `compare` leave in their folder."""


@dataclass(frozen=True)
class Results:
    """Experiments on one coder, with where their numbers come from."""

    experiments: Mapping[str, Experiment]
    """By name, in the order of the report."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Plain data: `coder`, `data` (None: without), `settings`, `versions`, `warnings`."""

    def estimate(self, name: str) -> Estimate | None:
        """The estimate of this name, in whichever experiment it is; None if there is none."""
        found = (e.estimates[name] for e in self.experiments.values() if name in e.estimates)
        return next(found, None)

    def table(self, name: str) -> Table | None:
        """The table of this name if it is there and has rows."""
        found = (e.tables[name] for e in self.experiments.values() if name in e.tables)
        table = next(found, None)
        return table if table is not None and len(table) else None

    def estimates(self) -> dict[str, Estimate]:
        """All estimates by name."""
        return {n: v for e in self.experiments.values() for n, v in e.estimates.items()}

    def save(self, folder: Path) -> None:
        """Write the folder's data and results.json; tables of an earlier run are removed."""
        tables = {n: t for e in self.experiments.values() for n, t in e.tables.items()}
        save_tables(tables, folder / DATA)
        write_json(folder / RESULTS, self.as_json())

    def as_json(self) -> dict[str, Any]:
        """The content of results.json."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "provenance": dict(self.provenance),
            "experiments": {
                name: experiment.figures() | {"tables": sorted(experiment.tables)}
                for name, experiment in self.experiments.items()
            },
        }

    @classmethod
    def load(cls, folder: str | Path) -> Results:
        """Read what `save` wrote. Raises `UserError` for anything else."""
        folder = Path(folder)
        content = read_results(folder)
        try:
            experiments = {
                name: Experiment(
                    name,
                    {key: Estimate(**value) for key, value in found["estimates"].items()},
                    {table: load_table(folder / DATA, table) for table in found["tables"]},
                    found["notes"],
                )
                for name, found in content["experiments"].items()
            }
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{folder / RESULTS} is damaged: {error!r}; run analyze again"
            ) from error
        return cls(experiments, content.get("provenance", {}))


def is_results(folder: str | Path) -> bool:
    """Whether this is a folder written by `analyze`."""
    try:
        content = json.loads((Path(folder) / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT


def read_results(folder: Path) -> dict[str, Any]:
    """The content of results.json. Raises `UserError` if it cannot be used."""
    path = folder / RESULTS
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: not written by analyze")
    if content.get("version") != VERSION:
        raise UserError(f"{path}: version {content.get('version')}, this program reads {VERSION}")
    return content


def check_folder(flag: str, name: str, kind: str) -> Path:
    """The folder for results, refused before any work if it holds something else.

    `kind` is the `format` that a results.json there must have.
    """
    folder = Path(name)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{flag} {name} is a file: give a folder")
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if strange := sorted(there - OWN_FILES):
        raise UserError(f"{flag} {name} holds something else ({strange[0]}): give another folder")
    if RESULTS in there:
        try:
            found = json.loads((folder / RESULTS).read_text(encoding="utf-8")).get("format")
        except (OSError, ValueError, AttributeError):
            found = None
        if found != kind:
            raise UserError(f"{flag} {name} holds something else ({RESULTS}): give another folder")
    check_writable(flag, name, folder)
    return folder


def save_tables(tables: Mapping[str, Table], folder: Path) -> None:
    """Each table as Parquet and CSV; files of tables that are no longer there are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        _write_parquet(folder / f"{name}.parquet", table)
        write_text(folder / f"{name}.csv", _as_csv(table))
    remove_others(folder, {f"{name}.{kind}" for name in tables for kind in ("parquet", "csv")})


def remove_others(folder: Path, kept: Iterable[str]) -> None:
    """Remove the files of an earlier run from one of our own folders."""
    kept = set(kept)
    for path in folder.iterdir():
        if path.name not in kept and path.suffix in (".parquet", ".csv", ".png"):
            path.unlink()


def load_table(folder: Path, name: str) -> Table:
    """Read `NAME.parquet`. Raises `UserError` if it cannot be read."""
    import pyarrow
    from pyarrow import parquet

    path = folder / f"{name}.parquet"
    try:
        return Table(parquet.read_table(path).to_pydict())
    except (OSError, pyarrow.ArrowException) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else "not readable"
        raise UserError(f"{path}: {reason}; run analyze again") from error


def _write_parquet(path: Path, table: Table) -> None:
    import pyarrow
    from pyarrow import parquet

    content = pyarrow.table({name: _plain(table[name]) for name in table.columns})
    write_atomically(path, lambda temporary: parquet.write_table(content, temporary))


def _as_csv(table: Table) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.columns)
    columns = [_plain(table[name]) for name in table.columns]
    writer.writerows(zip(*columns, strict=True))
    return text.getvalue()


def _plain(column: Sequence[Any]) -> list[Any]:
    """The column as Python's own values; what is not a number is None."""
    values = (value.item() if hasattr(value, "item") else value for value in column)
    return [None if isinstance(v, float) and not math.isfinite(v) else v for v in values]
