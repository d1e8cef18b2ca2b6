"""What an experiment gives: numbers with intervals, and tables, as plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

Column = Sequence[Any]
"""Values of one column; None where a number is undefined."""


@dataclass(frozen=True)
class Estimate:
    """A number, and the interval it is known to lie in with 95 % confidence where there is one."""

    value: float | None
    """None where it is undefined (no tokens, no variance)."""
    low: float | None = None
    high: float | None = None
    n: int | None = None
    """What the interval is over: how many samples, source layers or latents."""
    over: str = ""
    """Of what `n` counts: "samples", "source layers", "latents", "seeds"."""

    @classmethod
    def of(
        cls, value: float, low: float = math.nan, high: float = math.nan, **more: Any
    ) -> Estimate:
        """An estimate of which what is not finite is None."""
        known = [v if math.isfinite(v) else None for v in (value, low, high)]
        return cls(known[0], known[1], known[2], **more)


@dataclass(frozen=True)
class Table:
    """Columns of equal length. Raises `ValueError` if their lengths differ."""

    columns: Mapping[str, Column]

    def __post_init__(self) -> None:
        lengths = {name: len(column) for name, column in self.columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"columns of different length: {lengths}")

    @classmethod
    def from_rows(cls, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Table:
        """A table of `rows`, each with every one of `names`."""
        return cls({name: [row[name] for row in rows] for name in names})

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def __getitem__(self, name: str) -> Column:
        return self.columns[name]

    def rows(self) -> list[dict[str, Any]]:
        """One mapping per row."""
        names = list(self.columns)
        return [
            dict(zip(names, row, strict=True)) for row in zip(*self.columns.values(), strict=True)
        ]

    def where(self, **equal: Any) -> Table:
        """The rows in which every named column has the given value."""
        kept = [row for row in self.rows() if all(row[k] == v for k, v in equal.items())]
        return Table.from_rows(kept, list(self.columns))


@dataclass(frozen=True)
class Experiment:
    """The outcome of one experiment."""

    name: str
    """`weights`, `ablation`, `features` or `distance`."""
    estimates: Mapping[str, Estimate] = field(default_factory=dict)
    tables: Mapping[str, Table] = field(default_factory=dict)
    notes: Sequence[str] = ()
    """What a reader must know to read the numbers; one sentence each."""

    def figures(self) -> dict[str, Any]:
        """Estimates and notes as plain data."""
        return {
            "estimates": {name: asdict(value) for name, value in self.estimates.items()},
            "notes": list(self.notes),
        }
