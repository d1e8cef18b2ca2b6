"""How one coder is divided over a group of processes: `--tp n`.

The N processes are a mesh of N/n rows by n columns. The n processes of a row see the same tokens
and hold one coder together; the processes of a column hold the same part and see different tokens.
With T tokens a row, S sources and L targets, a step sends in each row:

by feature (small d)    Each process has F/n latents: their rows of every encoder and decoder.
                        Per source   its own k candidates, [T, k] pre-activations, to all
                        Per target   Σ over the row of what was decoded, [T, d]
                        The gradients of own rows need nothing from others.

by column (large d)     F/n rows of every encoder, d/n columns of every decoder.
                        Per source   candidates with their latents' numbers, to all: then every
                                     process has all the active latents
                        Per source   Σ over the row of the gradient of the activations, [T, k],
                                     itself already the sum over the source's targets
                        Targets need nothing: each process decodes its own columns and has its own
                        columns of the error.

A checkpoint holds whole tensors whatever the layout, so that any other can take them up.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from sparsify_vlm.coders.sharing import Sharing
from sparsify_vlm.errors import UserError
from sparsify_vlm.training.distributed import World

Kind = Literal["feature", "column"]

ROWS, COLUMNS = 0, -1
_SPLIT: dict[Kind, dict[str, int]] = {
    "feature": {
        **dict.fromkeys(("W_enc", "b_enc", "W_dec", "post_enc", "post_scale", "threshold"), ROWS),
        "since_fired": COLUMNS,
    },
    "column": {
        **dict.fromkeys(("W_enc", "b_enc", "threshold", "W_skip"), ROWS),
        **dict.fromkeys(("W_dec", "b_dec"), COLUMNS),
    },
}
"""The axis along which each of a `Clt`'s parameters, and the trainer's count [S, F] of tokens since
a latent fired, is divided; the others are whole everywhere."""


# Newer versions of torch have it under this name and warn of the older one.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Layout(Sharing):
    """This process's part of a coder, and what its row of the mesh does together."""

    kind: Kind = "feature"
    place: int = 0
    """Place in the row, which is also the number of the part."""
    parts: int = 1
    group: Any = None
    """The row's process group; None: a single process."""
    world: World | None = None
    """For what breaks while the row talks."""

    @property
    def alone(self) -> bool:
        """Whether this process holds the whole coder."""
        return self.parts == 1

    @property
    def decodes_partly(self) -> bool:
        """Whether `sum_outputs` has something to add up."""
        return self.parts > 1 and self.kind == "feature"

    @property
    def counts_once(self) -> bool:
        """Whether this process is the one that adds to a value's gradient what all know alike."""
        return self.kind == "feature" or self.place == 0

    # ---- who has what

    def axis(self, name: str) -> int | None:
        """The axis along which the parameter `name` of a `Clt` is divided; None: it is whole."""
        return _SPLIT[self.kind].get(name.partition(".")[0]) if self.parts > 1 else None

    def own(self, name: str, whole: Tensor) -> Tensor:
        """This process's part of a whole parameter, or of a tensor of its shape: a view."""
        axis = self.axis(name)
        if axis is None or whole.shape[axis] == 1:  # batch top-k's one threshold
            return whole
        return whole.chunk(self.parts, axis)[self.place]

    def own_columns(self, y: Tensor) -> Tensor:
        """[T, columns] of y [T, d]: what is reconstructed here."""
        return y.chunk(self.parts, 1)[self.place] if self.kind == "column" else y

    def latents_here(self, num_latents: int) -> int:
        """Number of latents that the entries here may have, of `num_latents` in all."""
        return num_latents // self.parts if self.kind == "feature" else num_latents

    def own_latents(self, values: Tensor) -> Tensor:
        """Of values per latent here, those of the encoders' rows."""
        return values if self.kind == "feature" else values.chunk(self.parts)[self.place]

    def all_latents(self, values: Tensor) -> Tensor:
        """Values per latent here, from those of the encoders' rows."""
        return values if self.kind == "feature" else self._gathered(values).flatten()

    def gather(self, name: str, part: Tensor, whole_size: int) -> Tensor:
        """The whole of a parameter, or of a tensor of its shape, from all parts; everywhere.

        `whole_size` is its size along the axis that is divided.
        """
        axis = self.axis(name)
        if axis is None or part.shape[axis] == whole_size:
            return part
        return torch.cat(list(self._gathered(part.contiguous())), axis)

    def first_latent(self, num_latents: int) -> int:
        """Number of the first latent whose encoder is here, of `num_latents` in all."""
        return self.place * (num_latents // self.parts)

    # ---- from pre-activations to active latents

    def global_top(
        self, pre: Tensor, latent: Tensor, k: int, num_latents: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The k largest of all processes' candidates, per token.

        pre, latent [T, m], m ≥ min(k, number of latents here): pre-activations and numbers of the
        candidates of this process, counted from its own first latent. Returns crow [T + 1], latent
        [E] and pre [E] of the chosen: by feature those that are here, in own numbers; by column
        all, in global numbers, k per token and in the same order everywhere.
        """
        if self.parts == 1:
            return super().global_top(pre, latent, k, num_latents)
        tokens, most = pre.shape
        every = self._gathered(pre).transpose(0, 1).reshape(tokens, -1)
        top = every.topk(min(k, every.shape[1]), dim=1)
        if self.kind == "feature":
            kept = torch.zeros_like(every, dtype=torch.bool).scatter_(1, top.indices, True)
            kept = kept.view(tokens, self.parts, most)[:, self.place]
            return _crow(kept.sum(1)), latent[kept], pre[kept]
        numbers = self._gathered((latent + self.first_latent(num_latents)).int())
        numbers = numbers.transpose(0, 1).reshape(tokens, -1).gather(1, top.indices)
        count = torch.full((tokens,), top.values.shape[1], device=pre.device)
        return _crow(count), numbers.flatten().long(), top.values.flatten()

    def all_entries(
        self, crow: Tensor, latent: Tensor, pre: Tensor, num_latents: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """For activations with any number of active latents: by feature those that are here, as
        given; by column all processes' together, in global numbers."""
        if self.kind == "feature" or self.parts == 1:
            return crow, latent, pre
        counts = self._gathered(crow.diff())
        sizes = counts.sum(1).tolist()
        room = max(sizes)
        padding = (0, room - len(latent))
        numbers = self._gathered(pad(latent + self.first_latent(num_latents), padding).int())
        values = self._gathered(pad(pre, padding))
        whole = _crow(counts.sum(0))
        before = whole[:-1] + counts.cumsum(0) - counts  # [n, T]: where each one's entries begin
        all_latents, all_values = latent.new_empty(int(whole[-1])), pre.new_empty(int(whole[-1]))
        for part, size in enumerate(sizes):
            shift = before[part] - (counts[part].cumsum(0) - counts[part])
            place = torch.arange(size, device=pre.device) + shift.repeat_interleave(counts[part])
            all_latents[place] = numbers[part, :size].long()
            all_values[place] = values[part, :size]
        return whole, all_latents, all_values

    def own_entries(self, latent: Tensor, num_latents: int) -> tuple[Tensor, Tensor]:
        """Which entries [E] belong to encoder rows that are here, and their own numbers."""
        if self.kind == "feature" or self.parts == 1:
            return torch.ones_like(latent, dtype=torch.bool), latent
        own = latent - self.first_latent(num_latents)
        here = (own >= 0) & (own < num_latents // self.parts)
        return here, own[here]

    def largest(self, values: Tensor, count: int) -> Tensor:
        """Which of `values` [E] are among the `count` largest of all processes' entries, in order;
        all processes together have at least `count`."""
        if self.kind == "column" or self.parts == 1:
            return super().largest(values, count)
        own = values.topk(min(len(values), count), sorted=False)
        room = int(self._gathered(torch.tensor([len(own.values)], device=values.device)).max())
        every = self._gathered(pad(own.values, (0, room - len(own.values)), value=-torch.inf))
        chosen = every.flatten().topk(count, sorted=False).indices - self.place * room
        here = chosen[(chosen >= 0) & (chosen < room)]
        return own.indices[here].sort().values

    def lowest(self, values: Tensor) -> Tensor | None:
        """The smallest value of all processes' entries; None if there are none."""
        own = super().lowest(values)
        if self.kind == "column" or self.parts == 1:
            return own
        least = self._gathered((values.new_tensor(torch.inf) if own is None else own)[None]).min()
        return least if bool(least.isfinite()) else None

    def survivors(self, written: Sequence[Tensor], k: int, positive: bool) -> list[Tensor]:
        """As `activations.survivors`, over all processes' entries; unused places are -inf."""
        if self.kind == "column" or self.parts == 1:
            return super().survivors(written, k, positive)
        values = torch.cat(list(written), 1)
        top = values.topk(min(k, values.shape[1]), dim=1)
        room = (0, k - top.values.shape[1])
        candidates = pad(top.values, room, value=-torch.inf), pad(top.indices, room)
        crow, place, chosen = self.global_top(*candidates, k, values.shape[1])
        row = torch.arange(len(values), device=values.device).repeat_interleave(crow.diff())
        used = chosen > (0 if positive else -torch.inf)
        kept = torch.zeros_like(values, dtype=torch.bool)
        kept[row[used], place[used]] = True
        return list(kept.split([u.shape[1] for u in written], dim=1))

    # ---- sums over the row

    def total(self, number: int) -> int:
        """Of a number of latents or entries here: that of all processes'."""
        if self.kind == "column" or self.parts == 1:
            return number
        device = None if self.world is None else self.world.device
        return int(self._summed(torch.tensor(number, device=device)))

    def sum_outputs(self, y_hat: Tensor) -> Tensor:
        """ŷ_t [T, d] from what each process decoded, without what all have (b_dec, W_skip)."""
        return self._summed(y_hat) if self.kind == "feature" else y_hat

    def sum_value_gradients(self, grad: Tensor) -> Tensor:
        """[E]: of the loss by a source's activations, all its targets added up already."""
        return self._summed(grad) if self.kind == "column" else grad

    def sum_columns(self, partial: Tensor) -> Tensor:
        """Sums over d of which each process has its columns' part: ‖e‖² [L, T], Σ‖W‖², and the
        gradients of vectors over latents that are whole (post_enc, post_scale)."""
        return self._summed(partial) if self.kind == "column" else partial

    def sum_features(self, partial: Tensor) -> Tensor:
        """Sums over latents of which each process has its own's part: the penalty, L0 and counts
        (by feature only), the gradient of an autoencoder's b_dec by its encoder."""
        return self._summed(partial) if self.kind == "feature" else partial

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Add each tensor up over the row, in place, whatever the layout."""
        for tensor in tensors:
            self._summed(tensor)

    def _summed(self, tensor: Tensor) -> Tensor:
        if self.world is not None and self.parts > 1 and tensor.numel():
            with self.world.losing_others():
                dist.all_reduce(tensor, group=self.group)
        return tensor

    def _gathered(self, part: Tensor) -> Tensor:
        """[n, ...] of the same shape from each process."""
        if self.world is None or self.parts == 1:
            return part[None]
        if part.numel() == 0:
            return part.expand(self.parts, *part.shape)
        whole = part.new_empty(self.parts * part.shape[0], *part.shape[1:])
        with self.world.losing_others():
            _all_gather(whole, part.contiguous(), group=self.group)
        return whole.view(self.parts, *part.shape)


def _crow(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def best_kind(d_model: int, k: int, parts: int) -> Kind:
    """Which layout sends less, as long as a part has enough columns to be worth a kernel's while.

    Per token, by feature 8 d (n − 1)/n bytes a target, by column 8 k (n − 1) + 8 k (n − 1)/n a
    source.
    """
    return "column" if d_model // parts >= 128 and d_model > (parts + 1) * k else "feature"


def mesh(world: World, tp: int, kind: Kind = "feature") -> tuple[World, Layout]:
    """The world of those that share out the tokens, and the layout of those that share a coder.

    Every process must call it. Raises `UserError` where `tp` does not divide the processes.
    """
    if tp < 1 or world.size % tp:
        raise UserError(
            f"--tp {tp} does not divide the {world.size} processes of this run: give --tp a "
            "divisor of their number, or start a multiple of it"
        )
    if tp == 1:
        return world, Layout()
    place, row = world.rank % tp, world.rank // tp
    rows = [list(range(first, first + tp)) for first in range(0, world.size, tp)]
    columns = [list(range(first, world.size, tp)) for first in range(tp)]
    of_rows, of_columns = [dist.new_group(r) for r in rows], [dist.new_group(c) for c in columns]
    data = world.sharing_tokens(row, len(rows), of_columns[place])
    return data, Layout(kind, place, tp, of_rows[row], world)


def check_divisible(kind: Kind, tp: int, num_latents: int, d_model: int) -> None:
    """Raise `UserError` where a coder cannot be divided evenly into `tp` parts."""
    if num_latents % tp:
        raise UserError(f"--tp {tp} does not divide {num_latents} latents: choose a divisor")
    if kind == "column" and d_model % tp:
        raise UserError(f"--tp {tp} does not divide {d_model} columns: choose a divisor")
