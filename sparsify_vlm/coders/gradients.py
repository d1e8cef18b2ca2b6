"""Where the gradients of a step go.

A table [F, d] that is used once in a step hands its gradient over as soon as it is known, so that
it can be spent on the spot and its memory used again. Tables that several sources or targets share
are added up first.
"""

from __future__ import annotations

from collections import Counter
from typing import Protocol

from torch import Tensor, nn

from sparsify_vlm.coders.kernels import AdamState, Entries, Kernels


class Gradients(Protocol):
    """Takes the gradients of one step."""

    def adam_state(self, table: nn.Parameter) -> AdamState | None:
        """What Adam needs to update `table` now, in the pass that makes its gradient; None where
        the gradient is needed itself. Once it is given, `add` is not called for the table."""

    def add(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Take the whole gradient of `parameter` in this pass."""


class Accumulated:
    """Adds gradients to the parameters' `.grad`, as autograd does."""

    def adam_state(self, table: nn.Parameter) -> AdamState | None:
        """None: the gradients are kept."""
        return None

    def add(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """`parameter.grad += gradient`."""
        if not parameter.requires_grad:
            return
        if parameter.grad is None:
            parameter.grad = gradient
        else:
            parameter.grad += gradient


class Ledger:
    """The gradients of one pass through a coder, on their way to `into`.

    `uses` counts how often each table's gradient comes up; `decays` [F] are factors q by which a
    table's own rows are part of its gradient (q · W: the pull of a penalty on the norms).
    """

    def __init__(
        self,
        into: Gradients,
        kernels: Kernels,
        uses: Counter[nn.Parameter],
        decays: dict[nn.Parameter, Tensor],
    ) -> None:
        self._into, self._kernels = into, kernels
        self._uses, self._decays = uses, decays
        self._partial: dict[nn.Parameter, Tensor] = {}

    def table(
        self, table: nn.Parameter, G: Tensor, entries: Entries, *, dots: bool = True
    ) -> Tensor:
        """Take the gradient of `table` that entries written with it get from G [T, d]; with `dots`
        the gradient of the entries' values [E]."""
        kernels = self._kernels
        fuses = kernels.fuses_adam if dots else kernels.fuses_adam_without_dots
        if fuses and self._uses[table] == 1 and table not in self._partial:
            state = self._into.adam_state(table) if table.requires_grad else None
            if state is not None:
                decay = self._decays.get(table)
                return self._kernels.backward_adam(G, entries, table, state, decay, dots=dots)
        gradient, products = self._kernels.backward(G, entries, table, dots=dots)
        self._take(table, gradient)
        return products

    def _take(self, table: nn.Parameter, gradient: Tensor) -> None:
        self._uses[table] -= 1
        if table in self._partial:
            gradient = self._partial.pop(table).add_(gradient)
        if self._uses[table] > 0:
            self._partial[table] = gradient
            return
        if table in self._decays:
            gradient.addcmul_(self._decays[table][:, None], table)
        self._into.add(table, gradient)

    def add(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Take the gradient of a vector or of a skip connection."""
        self._into.add(parameter, gradient)
