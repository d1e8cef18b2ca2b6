"""Looking numbers up in results by the names that experiments give them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from sparsify_vlm.analysis.contrasts import minus
from sparsify_vlm.analysis.results import Results
from sparsify_vlm.analysis.tables import Estimate

ROLES = ("image", "text", "text_only")


class Facts:
    """The numbers of one analysis, by what they are."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self.coder: dict[str, Any] = dict(results.provenance.get("coder", {}))
        self.targets: Sequence[int] = self.coder.get("targets", [])
        """How many layers each source layer writes to."""

    @property
    def crosses(self) -> bool:
        """Whether any coder writes to more than one layer; true where that is not known."""
        return not self.targets or max(self.targets) > 1

    @property
    def has_own(self) -> bool:
        """Whether coders write to their own layer."""
        return self.coder.get("target_offset", 0) == 0

    def get(self, name: str, variant: str = "plain") -> Estimate | None:
        """An estimate in a variant; the plain one may go without a suffix."""
        found = self.results.estimate(f"{name}.{variant}")
        if found is None and variant == "plain":
            found = self.results.estimate(name)
        return found

    def role(self, name: str, role: str) -> Estimate | None:
        """An estimate for the tokens of a role; "all" goes without a suffix."""
        return self.results.estimate(name if role == "all" else f"{name}.{role}")

    def arm(self, what: str, arm: str, role: str = "all") -> Estimate | None:
        """A figure of the ablation: `fvu`, `ce`, `kl` … under an arm."""
        return self.role(f"{what}.{arm}", role)

    def roles(self, name: str) -> list[str]:
        """Roles that an estimate is there for and defined, "all" aside."""
        found = [(role, self.role(name, role)) for role in ROLES]
        return [role for role, e in found if e is not None and e.value is not None]

    @property
    def pooled_null(self) -> float | None:
        """Share of the pairs of layers that are own ones: 2 / (L + 1) where all layers write to
        all later ones."""
        return self._value("uniform_null")

    @property
    def latent_null(self) -> float | None:
        """Mean over live latents of the own layer's share, if all wrote alike to their targets."""
        return self._value("uniform_null.per_latent")

    def _value(self, name: str) -> float | None:
        found = self.results.estimate(name)
        return found.value if found is not None else None

    def difference(self, what: str, arm: str, other: str = "full", role: str = "all") -> Estimate:
        """`what` (fvu, delta_ce) under an arm less that under another; paired where that is known.

        Otherwise the two are treated as independent.
        """
        end = "" if role == "all" else f".{role}"
        if other == "full":
            paired = self.results.estimate(f"{what}_difference.{arm}{end}")
        else:
            paired = self.results.estimate(f"{what}_contrast.{arm}-{other}{end}")
            if paired is None:
                first, second = (self.difference(what, one, role=role) for one in (arm, other))
                return minus(first, second)
        if paired is not None:
            return paired
        return minus(
            self.results.estimate(f"{what}.{arm}{end}"), self.results.estimate(f"{what}.full{end}")
        )

    def role_difference(self, name: str, one: str, other: str) -> Estimate:
        """An estimate for one role less that for another; paired where that is known."""
        paired = self.results.estimate(f"{name}.{one}-{other}")
        return paired or minus(self.role(name, one), self.role(name, other))

    def numbered(self, prefix: str) -> dict[int, Estimate]:
        """Estimates named `prefix` + a number, by the number: reach_2, decay_factor_0_5."""
        found = {}
        for name, value in self.results.estimates().items():
            if match := re.fullmatch(re.escape(prefix) + r"(\d+)(?:\.plain)?", name):
                found[int(match[1])] = value
        return dict(sorted(found.items()))
