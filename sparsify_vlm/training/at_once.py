"""Gradients that are spent as soon as they are known, table by table.

Between a table's gradient and its update lies nothing but the sum over the processes, so only one
table's gradient is held at a time. Everything that is no table keeps its gradient until the step's
end.
"""

from __future__ import annotations

from torch import Tensor, nn

from sparsify_vlm.coders import Clt
from sparsify_vlm.coders.gradients import Accumulated
from sparsify_vlm.coders.kernels import AdamState
from sparsify_vlm.training.distributed import World
from sparsify_vlm.training.optimizers import Optimizers


def tables_of(clt: Clt) -> set[nn.Parameter]:
    """The encoders and decoders: nearly all of a coder's numbers."""
    tables: set[nn.Parameter] = set(clt.W_enc)
    for s in clt.cfg.source_layers():
        for k in range(len(clt.cfg.targets(s))):
            tables.update(clt.tables(s, k))
    return tables


class UpdatedAtOnce(Accumulated):
    """For steps of a single pass; `optimizers.begin` must have been called."""

    def __init__(self, clt: Clt, optimizers: Optimizers, world: World) -> None:
        self.tables = tables_of(clt)
        self._optimizers, self._world = optimizers, world

    def adam_state(self, table: nn.Parameter) -> AdamState | None:
        """What Adam needs to update `table` in the pass that makes its gradient."""
        return self._optimizers.adam_state(table) if self._world.size == 1 else None

    def add(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Update a table with its gradient, summed over the processes; keep any other gradient."""
        super().add(parameter, gradient)
        if parameter in self.tables and parameter.requires_grad:
            self._world.sum_([gradient])
            self._optimizers.update(parameter)
