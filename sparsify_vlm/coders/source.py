"""One layer's coder during a step: its active latents, what they write, and the way back.

Written to target k:   u = (a + post_enc [a>0]) · post_scale · factor · kept
with `factor` for --divide_cross_layer and `kept` where a target takes the top-k of all its sources.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify_vlm.coders.clt import Clt
from sparsify_vlm.coders.gradients import Ledger
from sparsify_vlm.coders.kernels import Entries, Kernels
from sparsify_vlm.coders.selecting import select
from sparsify_vlm.coders.sharing import ALONE, Sharing


class Source:
    """Layer `s` of `clt` at the tokens x_s [T, d]."""

    def __init__(
        self,
        clt: Clt,
        s: int,
        x_s: Tensor,
        k: int,
        kernels: Kernels,
        bf16: bool = False,
        sharing: Sharing = ALONE,
    ) -> None:
        self.clt, self.s, self.kernels, self.sharing = clt, s, kernels, sharing
        self.x = clt.skip_input(s, x_s)
        self.read = clt.encoder_input(s, x_s)
        self.selected = select(clt, s, self.read, k, kernels, bf16, sharing)
        self.selection = self.selected.selection
        self.base = Entries(self.selection, self.selected.values)
        self.active = self.selected.values > 0
        self.grad = torch.zeros_like(self.selected.values)
        """[E]: of the loss by the activations."""
        self.threshold_grad = (
            torch.zeros_like(self.grad) if clt.cfg.activation == "jumprelu" else None
        )
        """[E]: of the loss by [a > 0], for thresholds (`jumprelu`)."""

    @property
    def density(self) -> float:
        """Entries per token."""
        return len(self.selection.col) / max(self.selection.tokens, 1)

    # ---- to the targets

    def written(self, k: int, kept: Tensor | None = None) -> Entries:
        """u for the k-th target. Made anew where it is not the activations: keeping each would
        cost memory. `kept` [E] bool: the entries that this target takes."""
        clt, values = self.clt, self.base.values
        factor = clt.write_factor(self.s, clt.cfg.targets(self.s)[k])
        if clt.post_enc is None and clt.post_scale is None and factor == 1 and kept is None:
            return self.base
        values = self._before_scale(k)
        if clt.post_scale is not None:
            values = values * clt.post_scale[self.s][k][self.selection.col]
        if factor != 1:
            values = values * factor
        return Entries(self.selection, values if kept is None else values * kept)

    def _before_scale(self, k: int) -> Tensor:
        values = self.base.values
        if self.clt.post_enc is None:
            return values
        return values + self.clt.post_enc[self.s][k][self.selection.col] * self.active

    # ---- and back

    def take(self, k: int, grad: Tensor, ledger: Ledger, kept: Tensor | None = None) -> None:
        """Take the gradient of what was written to the k-th target [E]."""
        clt, col = self.clt, self.selection.col
        factor = clt.write_factor(self.s, clt.cfg.targets(self.s)[k])
        if factor != 1:
            grad = grad * factor
        if kept is not None:
            grad = grad * kept
        if clt.post_scale is not None:
            scale = clt.post_scale[self.s][k]
            before = self._before_scale(k) * grad * self.active
            ledger.add(scale, self.sharing.sum_columns(self.selection.totals(before)))
            grad = grad * scale[col]
        if clt.post_enc is not None:
            totals = self.selection.totals(grad * self.active)
            ledger.add(clt.post_enc[self.s][k], self.sharing.sum_columns(totals))
        self.grad += grad

    def finish(self, ledger: Ledger) -> None:
        """Hand over the encoder's gradient."""
        clt, s = self.clt, self.s
        self.grad = self.sharing.sum_value_gradients(self.grad)
        if self.threshold_grad is not None:
            ledger.add(clt.threshold[s], self._thresholds())
        self._encoder(ledger, Entries(self.selection, self.grad * self.active))

    def revive(self, ledger: Ledger, entries: Entries) -> None:
        """Hand over the encoder's part of AuxK's gradient, given that of pre-activations."""
        summed = self.sharing.sum_value_gradients(entries.values)
        self._encoder(ledger, Entries(entries.selection, summed))

    def _encoder(self, ledger: Ledger, entries: Entries) -> None:
        clt, s = self.clt, self.s
        entries = self._of_own_rows(entries)
        bias = entries.selection.totals(entries.values)
        if not clt.cfg.transcode:
            ledger.add(clt.b_dec[s], self.sharing.sum_features(-(bias @ clt.W_enc[s])))
        ledger.table(clt.W_enc[s], self.read, entries, dots=False)
        ledger.add(clt.b_enc[s], bias)

    def _of_own_rows(self, entries: Entries) -> Entries:
        """The entries whose latents' encoders are here, in the numbers of their rows."""
        sel, rows = entries.selection, len(self.clt.b_enc[self.s])
        if sel.num_latents == rows:
            return entries
        here, own = self.sharing.own_entries(sel.col, self.clt.cfg.num_latents)
        counts = torch.bincount(sel.row[here], minlength=sel.tokens)
        crow = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        return Entries(self.kernels.ragged(crow, own, rows), entries.values[here])

    def _thresholds(self) -> Tensor:
        """Straight-through: the rectangular kernel of Rajamanoharan et al. (2024)."""
        assert self.threshold_grad is not None
        assert self.selected.threshold is not None
        width = self.clt.cfg.jumprelu_bandwidth
        threshold = self.selected.threshold[self.selection.col]
        near = (self.selected.pre - threshold).abs() < width / 2
        each = -(threshold * self.grad + self.threshold_grad) / width * near
        return self.sharing.own_latents(self.selection.totals(each))


def kept_of_all(sources: list[Source], written: list[Entries], k: int) -> list[Tensor]:
    """Per source: [E] bool, which entries are among the k largest that a token writes to a target,
    all its sources together."""
    tables = [_padded(entries) for entries in written]
    positive = sources[0].clt.cfg.activation == "batchtopk"
    kept = sources[0].sharing.survivors([table for table, _ in tables], k, positive)
    return [mask[place] for mask, (_, place) in zip(kept, tables, strict=True)]


def _padded(entries: Entries) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The values as a table [T, K], unused places -inf, and where each entry stands in it."""
    selection = entries.selection
    row = selection.row
    place = torch.arange(len(row), device=row.device) - selection.crow[row]
    most = int(selection.crow.diff().max()) if selection.tokens else 0
    table = entries.values.new_full((selection.tokens, max(most, 1)), -torch.inf)
    return table.index_put_((row, place), entries.values), (row, place)
