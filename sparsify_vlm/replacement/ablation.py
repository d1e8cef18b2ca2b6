"""Which parts of ŷ_t = b_t + Σ_s a_s W_{s→t} are left out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sparsify_vlm.coders import CltConfig
from sparsify_vlm.errors import UserError


@dataclass(frozen=True)
class Ablation:
    """Writes to leave out of a replacement model. Layers are positions in the coder's hookpoints.

    A write that is left out takes its skip connection with it; the biases b_t always stay.
    """

    sources: Iterable[int] = ()
    """Coders none of whose writes count."""

    layers: Iterable[int] = ()
    """Layers that keep their own MLP. Their coders still write to later layers."""

    cross: bool = False
    """Leave out every write but a coder's first: that to its own layer (with target_offset 1, to
    the next)."""

    same: bool = False
    """Leave out the writes of coders to their own layer."""

    reach: int | None = None
    """Keep only writes to layers at most this far above the coder."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", frozenset(self.sources))
        object.__setattr__(self, "layers", frozenset(self.layers))

    def check(self, cfg: CltConfig) -> None:
        """Raise `UserError` if a layer is named that the coder does not have."""
        for name, chosen in (("sources", self.sources), ("layers", self.layers)):
            for layer in chosen:
                if not 0 <= layer < cfg.n_layers:
                    raise UserError(
                        f"ablate: {name} has layer {layer}, but the coder has the layers 0 to "
                        f"{cfg.n_layers - 1}"
                    )

    def keeps(self, source: int, target: int, offset: int) -> bool:
        """Whether what coder `source` writes to layer `target` stays; `offset` is the coder's."""
        distance = target - source
        return not (
            source in self.sources
            or (self.cross and distance > offset)
            or (self.same and distance == 0)
            or (self.reach is not None and distance > self.reach)
        )
