"""What a latent's cross-layer writes do to the model's predictions, beside all of its writes.

The model runs as it is, with its own MLPs. Of one latent i of layer s, at every token where it is
active, what the coder says it writes, u W_{s→t}[i], is subtracted from MLP t's write

    without any     for every layer t it writes to
    without cross   for all of those but the first

u being the latent's value on clean inputs in both cases. All else responds: attention, norms, the
MLPs above. The score is a ratio of KL divergences, summed over the scored predictions (those of
`evaluate`) of the samples in which the latent is active:

    Σ KL(model ‖ without cross) / Σ KL(model ‖ without any)

0: the cross writes do nothing. 1: they do all of it. Where the two kinds of writes cancel each
other it can be above 1. In one run every row of a batch is rid of another latent.

A small change of predictions may be rounding alone. So the model is also run with every MLP's
write moved by one unit in the last place, up or down at random; where KL without any is less than
`RESOLVED` times the KL of that, there is no ratio.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from sparsify_vlm.analysis.bootstrap import ratio_interval
from sparsify_vlm.analysis.tables import Table
from sparsify_vlm.analysis.tokens import ModelTokens, TokenBatch
from sparsify_vlm.coders import Latents
from sparsify_vlm.errors import UserError
from sparsify_vlm.progress import Progress
from sparsify_vlm.replacement import VLMReplacementModel
from sparsify_vlm.replacement.evaluate import scored_tokens
from sparsify_vlm.replacement.measures import prediction_terms

COLUMNS = (
    *("source", "latent", "kl_without_cross", "kl_without_any", "ratio", "low", "high"),
    *("n_tokens", "kl_of_rounding"),
)
RESOLVED = 100.0
"""KL grows as the square of a small change: an effect ten times as large as that of rounding."""
Latent = tuple[int, int]
"""Source layer and index."""


def random_latents(alive: Tensor, n: int, seed: int = 0) -> list[Latent]:
    """`n` different latents of every source layer, of those that are `alive` (bool [S, F]); all of
    them where there are fewer."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for s, row in enumerate(alive.cpu()):
        (places,) = row.nonzero(as_tuple=True)
        drawn = places[torch.randperm(len(places), generator=generator)[:n]]
        found += [(s, int(i)) for i in drawn.sort().values]
    return found


@torch.no_grad()
def causal_scores(
    model: VLMReplacementModel,
    latents: Sequence[Latent],
    tokens: ModelTokens,
    *,
    max_samples: int | None = 128,
    seed: int = 0,
    quiet: bool = False,
) -> Table:
    """The table "causal" of `latents`, on the first `max_samples` samples of `tokens`.

    Columns as in `COLUMNS`: mean KL in nats per scored prediction of the samples in which the
    latent is active, their ratio with its interval over those samples, and at how many tokens the
    latent is active. What is undefined (never active, or without an effect that stands out from
    that of rounding, `kl_of_rounding`) is None.
    Raises `UserError` for a latent there is not.
    """
    _check(model, latents)
    some = tokens.with_logits(max_samples)
    sums: list[list[Tensor]] = [[] for _ in latents]
    with Progress("Removing latents", some.size, unit="samples", quiet=quiet) as progress:
        for batch in some:
            for place, row in _Removal(model, latents, batch, seed).sums():
                sums[place].append(row)
            progress.update(len(batch.rows))
    rows = [
        _row(latent, torch.stack(own).numpy() if own else np.zeros((0, 5)), seed)
        for latent, own in zip(latents, sums, strict=True)
    ]
    return Table.from_rows(rows, COLUMNS)


def _check(model: VLMReplacementModel, latents: Sequence[Latent]) -> None:
    cfg = model.clt.cfg
    for s, i in latents:
        if s not in cfg.source_layers() or not 0 <= i < cfg.num_latents:
            raise UserError(
                f"there is no latent {i} of layer {s}: the coder has {cfg.num_latents} of each of "
                f"the layers 0 to {cfg.source_layers()[-1]}"
            )


def _row(latent: Latent, sums: np.ndarray, seed: int) -> dict[str, object]:
    """`sums` [samples, 5]: KL without cross, without any, scored predictions, tokens, KL of
    rounding."""
    cross, every, scored, active, rounding = sums.sum(0)
    seen = every > RESOLVED * max(rounding, scored * torch.finfo(torch.float64).eps)
    ratio = ratio_interval(sums[:, 0], sums[:, 1], seed=seed).estimate() if seen else None
    return {
        "source": latent[0],
        "latent": latent[1],
        "kl_without_cross": float(cross / scored) if scored else None,
        "kl_without_any": float(every / scored) if scored else None,
        "ratio": ratio.value if ratio else None,
        "low": ratio.low if ratio else None,
        "high": ratio.high if ratio else None,
        "n_tokens": int(active),
        "kl_of_rounding": float(rounding / scored) if scored else None,
    }


class _Removal:
    """The latents of one batch, and what predictions become without each."""

    def __init__(
        self,
        model: VLMReplacementModel,
        latents: Sequence[Latent],
        batch: TokenBatch,
        seed: int = 0,
    ) -> None:
        assert batch.encoded is not None
        assert batch.logits is not None
        self.model, self.latents, self.batch, self.seed = model, latents, batch, seed
        inputs, device = batch.encoded.inputs, model.loaded.device
        scored = scored_tokens(batch.encoded, model.loaded.stack.roles(inputs))[:, 1:]
        self.scored = scored.to(device)
        self.labels = inputs["input_ids"].to(device)[:, 1:][self.scored]
        self.own = batch.logits[:, :-1][self.scored].double().log_softmax(-1)
        self._written()

    def _written(self) -> None:
        """u of the latents at every token, and the decoders they are multiplied with."""
        clt, batch = self.model.clt, self.batch
        active = clt.encode(batch.x)
        self.u: dict[tuple[int, int], Tensor] = {}
        """By (place in `latents`, target): [T]."""
        self.row: dict[tuple[int, int], Tensor] = {}
        """By (place in `latents`, target): [d]."""
        chosen = {
            s: [p for p, one in enumerate(self.latents) if one[0] == s] for s, _ in self.latents
        }
        self.active = torch.zeros(len(self.latents), len(batch), dtype=torch.bool)
        for t in clt.cfg.target_layers():
            written = clt.written_to(t, active)
            for (s, k), u in zip(clt.cfg.sources(t), written, strict=True):
                if s not in chosen:
                    continue
                latents = active[s]
                assert latents is not None
                table = Latents(u, latents.indices).dense(clt.cfg.num_latents)
                decoder = clt.decoder_matrix(s, k)
                for place in chosen[s]:
                    index = self.latents[place][1]
                    self.u[place, t] = table[:, index].clone()
                    self.row[place, t] = decoder[index].clone()
                    self.active[place] |= (table[:, index] != 0).cpu()

    def sums(self) -> list[tuple[int, Tensor]]:
        """(place in `latents`, KL without cross, without any, scored predictions, active tokens,
        KL of rounding), one for every sample in which the latent is active."""
        samples = len(self.batch.rows)
        local = self.batch.local.cpu()
        counts = torch.zeros(len(self.latents), samples, dtype=torch.long)
        counts.index_add_(1, local, self.active.long())
        queues = [counts[:, row].nonzero()[:, 0].tolist() for row in range(samples)]
        scored, rounding = self.scored.sum(1).cpu(), self._rounding()
        found = []
        for turn in range(max(map(len, queues), default=0)):
            removed = {row: queue[turn] for row, queue in enumerate(queues) if turn < len(queue)}
            kl = [self._kl(removed, first=first) for first in (False, True)]
            for row, place in removed.items():
                values = [kl[0][row], kl[1][row], scored[row], counts[place, row], rounding[row]]
                found.append((place, torch.stack([v.double() for v in values])))
        return found

    def _kl(self, removed: dict[int, int], first: bool) -> Tensor:
        """Σ KL of every row's scored predictions, [B], each row without its latent's writes; those
        to its first target stay unless `first`."""
        position = {layer: i for i, layer in enumerate(self.model.layers)}

        def write(layer: int, y: Tensor) -> Tensor | None:
            change = self._change(position[layer], removed, first)
            return None if change is None else y - change.to(y)

        return self._kl_with(write)

    def _rounding(self) -> Tensor:
        """Σ KL of every row's scored predictions, [B], with every write off by one rounding."""
        generator = torch.Generator().manual_seed(self.seed)

        def write(layer: int, y: Tensor) -> Tensor:
            up = (torch.rand(y.shape, generator=generator) < 0.5).to(y)
            return y * (1 + (2 * up - 1) * torch.finfo(y.dtype).eps)

        return self._kl_with(write)

    def _kl_with(self, write: Callable[[int, Tensor], Tensor | None]) -> Tensor:
        """Σ KL of every row's scored predictions, [B], with MLPs' writes changed by `write`."""
        model, batch = self.model, self.batch
        assert batch.encoded is not None
        with model.loaded.stack.replacing(write, "mlp_out", model.layers):
            logits = model.loaded.forward(batch.encoded.inputs, logits=True).logits
        terms = prediction_terms(logits[:, :-1][self.scored], self.labels, self.own)
        assert terms.kl is not None
        rows = self.scored.nonzero()[:, 0]
        kl = torch.zeros(len(batch.rows), dtype=torch.float64, device=rows.device)
        return kl.index_add_(0, rows, terms.kl).cpu()

    def _change(self, t: int, removed: dict[int, int], first: bool) -> Tensor | None:
        """What is subtracted from the writes of layer t, [B, S, d]; None for nothing."""
        counted, local = self.batch.counted, self.batch.local
        assert counted is not None
        offset = self.model.clt.cfg.target_offset
        change = None
        for row, place in removed.items():
            cross = t - self.latents[place][0] > offset
            if (place, t) not in self.u or not (cross or first):
                continue
            if change is None:
                d = self.model.clt.cfg.d_model
                change = torch.zeros(*counted.shape, d, device=counted.device)
            u = self.u[place, t][local == row]
            change[row, counted[row]] = (u[:, None] * self.row[place, t]).to(change)
        return change
