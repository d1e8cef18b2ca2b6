"""What training minimises beside Σ_t FVU_t: sparsity penalties and the revival of dead latents.

Penalty, for activations a and decoder norms n of the latents i of all sources s:

    coefficient · mean over tokens of  Σ_s Σ_i f(n_{s,i} a_{s,i})
    l1: f(z) = z        tanh: f(z) = tanh(c z)        l0: f = [a > 0] (jumprelu; to thresholds only)
    norm concat: n = sqrt(Σ_k ‖W_dec[s][k]_i‖²)       sum: n = Σ_k ‖W_dec[s][k]_i‖

Its gradient reaches the activations and the decoders. `tanh` with norm `concat` is that of
Ameisen et al. (2025), "Circuit Tracing".

AuxK (Gao et al. 2024): for each source s and its first target t, with e = y_t − ŷ_t held constant,

    α · min(D / (d/2), 1) · ‖e − W_dec[s][0]ᵀ a_dead‖² / V_t

where a_dead are the min(d/2, D) largest activations among the source's D dead latents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify_vlm.coders.clt import Clt
from sparsify_vlm.coders.sharing import ALONE, Sharing
from sparsify_vlm.errors import UserError

PENALTIES = ("none", "l1", "tanh", "l0")
PENALTY_NORMS = ("concat", "sum")


@dataclass(frozen=True)
class Objective:
    """Raises `UserError` for values that contradict each other."""

    penalty: str = "none"
    """One of `PENALTIES`."""

    coefficient: float = 0.0
    """Of the penalty."""

    tanh_scale: float = 4.0
    """c of the tanh penalty."""

    penalty_norm: str = "concat"
    """One of `PENALTY_NORMS`."""

    auxk_alpha: float = 0.0
    """Weight α of AuxK; 0: none."""

    def __post_init__(self) -> None:
        if self.penalty not in PENALTIES:
            raise UserError(f"--penalty {self.penalty}: choose one of {', '.join(PENALTIES)}")
        if self.penalty_norm not in PENALTY_NORMS:
            raise UserError(f"--penalty_norm {self.penalty_norm}: choose concat or sum")

    @property
    def penalises(self) -> bool:
        """Whether there is a penalty."""
        return self.penalty != "none" and self.coefficient != 0

    def curve(self, z: Tensor) -> Tensor:
        """f of l1 and tanh."""
        return z if self.penalty == "l1" else torch.tanh(self.tanh_scale * z)

    def slope(self, z: Tensor) -> Tensor:
        """f' of l1 and tanh."""
        if self.penalty == "l1":
            return torch.ones_like(z)
        return self.tanh_scale * (1 - torch.tanh(self.tanh_scale * z).square())


def table_norms(clt: Clt, s: int, sharing: Sharing = ALONE) -> list[Tensor]:
    """Per target of layer `s`: [F], norms of the decoder rows of the latents here. Differentiable
    if `sharing` is alone. Not for `secondary_target_tied`, where two tables are added up."""
    found = []
    for k in range(len(clt.cfg.targets(s))):
        (table,) = clt.tables(s, k)
        norms = table.norm(dim=1)
        found.append(norms if sharing.alone else sharing.sum_columns(norms.square()).sqrt())
    return found


def decoder_norms(clt: Clt, s: int, kind: str, sharing: Sharing = ALONE) -> Tensor:
    """[F]: norms of the latents of layer `s` over all their targets; `kind` of `PENALTY_NORMS`.
    Differentiable where no norm is 0."""
    norms = torch.stack(table_norms(clt, s, sharing))
    return norms.sum(0) if kind == "sum" else norms.norm(dim=0)


def norm_slopes(
    clt: Clt, s: int, kind: str, norms: Tensor, sharing: Sharing = ALONE
) -> list[Tensor]:
    """Per target: [F], the factor q with d norm / d W_row = q · W_row; 0 where the norm is 0."""
    if kind == "concat":
        return [_inverse(norms)] * len(clt.cfg.targets(s))
    return [_inverse(n) for n in table_norms(clt, s, sharing)]


def _inverse(norms: Tensor) -> Tensor:
    return torch.where(norms > 0, 1 / norms, torch.zeros_like(norms))


def auxk_size(clt: Clt, dead: Tensor, sharing: Sharing = ALONE) -> tuple[int, float]:
    """Number of dead latents that AuxK takes per token, and the factor for having few of them."""
    n_dead, most = sharing.total(int(dead.sum())), max(clt.cfg.d_model // 2, 1)
    return min(most, n_dead), min(n_dead / most, 1.0)
