"""The joint loss over all layers and its gradient.

    loss = Σ_t FVU_t + penalties,  FVU_t = Σ‖y_t − ŷ_t‖² / V_t,  V_t = Σ‖y_t − ȳ_t‖²  (over tokens)

`joint_loss` (loss.py) is the loss in plain differentiable torch. `forward_backward` computes the
same loss and its gradient without autograd: with e_t = y_t − ŷ_t and G_t = −2 e_t / V_t the
gradient of ŷ_t, u_{s,k} what source s writes to its k-th target:

    b_dec[t]        Σ_tokens G_t
    W_dec[s][k]     u_{s,k}ᵀ G_t                     (rows of active latents only)
    u_{s,k}         g = ⟨G_t, W_dec[s][k] rows⟩      (at active latents only)
    post_scale      Σ_tokens (a + post_enc [a>0]) g
    post_enc        Σ_tokens post_scale g [a>0]
    a_s             Σ_k post_scale[s][k] g
    W_skip[s][k]    G_tᵀ x_s
    W_enc[s], b_enc[s]   through [a_s > 0], summed over the active latents' tokens

Every source is encoded once and its entries are sorted once, however many targets it has. A
decoder's gradient is known when its target has been decoded and may be spent at once
(gradients.py): no other target needs that decoder any more, unless it is shared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from sparsify_vlm.coders.clt import Clt
from sparsify_vlm.coders.gradients import Accumulated, Gradients, Ledger
from sparsify_vlm.coders.kernels import Entries, Kernels, kernels_for
from sparsify_vlm.coders.objective import Objective, auxk_size, decoder_norms, norm_slopes
from sparsify_vlm.coders.sharing import ALONE, Sharing
from sparsify_vlm.coders.source import Source, kept_of_all
from sparsify_vlm.errors import UserError

Layers = Sequence[Tensor] | Tensor


@dataclass
class JointStats:
    """What a step reports. NaN stands at layers no coder writes to, or without a coder (`l0`)."""

    loss: Tensor
    """reconstruction · Σ_t sse_t / variance_t + penalty + auxk, float64 scalar; parts of one batch
    add up to the batch's loss."""

    sse: Tensor
    """[L] float64: Σ‖y_t − ŷ_t‖² over these tokens."""

    variance: Tensor
    """[L] float64: the V_t that was used."""

    fvu: Tensor
    """[L] float64: sse / variance."""

    l0: Tensor
    """[L] float64: mean count of active latents per token."""

    active: Tensor
    """[S, T] int64: active latents per token of each of the S layers with a coder."""

    fired: list[Tensor]
    """Per layer with a coder: bool [F], which latents (those here, of a divided coder) were active
    at any of these tokens."""

    errors: Tensor
    """[L, T]: ‖y_t − ŷ_t‖² per token, in the coder's dtype."""

    penalty: Tensor
    """float64 scalar, 0 without a penalty."""

    auxk: Tensor
    """float64 scalar, 0 without AuxK."""

    lowest: list[Tensor | None]
    """Per layer with a coder: the smallest activation of these tokens (`batchtopk`)."""


def target_variance(
    y: Layers, mean_y: Layers | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """[L] float64: Σ‖y_t − mean_y[t]‖² over tokens; without `mean_y` about these tokens' mean.

    Differences are taken in `dtype`, one layer at a time.
    """
    rows = []
    for t in range(len(y)):
        y_t = y[t].to(dtype)
        mean = y_t.mean(0) if mean_y is None else mean_y[t].to(y_t)
        rows.append((y_t - mean).square().sum(dtype=torch.float64))
    return torch.stack(rows)


def checked_variance(clt: Clt, y: Layers, mean_y: Layers | None, variance: Tensor | None) -> Tensor:
    """`variance`, or that of y; raises `UserError` where a target has none."""
    if variance is None:
        variance = target_variance(y, mean_y, torch.promote_types(clt.dtype, torch.float32))
    written = variance[clt.cfg.target_offset :]
    if not bool((written > 0).all()):
        layer = clt.cfg.target_offset + int((~(written > 0)).nonzero()[0])
        if variance[layer].isnan():
            raise UserError(f"the outputs of {clt.cfg.hookpoints[layer]} hold NaN")
        raise UserError(
            f"the outputs of {clt.cfg.hookpoints[layer]} have no variance over this batch's "
            f"{y[layer].shape[0]} tokens; FVU is undefined, take larger batches"
        )
    return variance.double()


@torch.no_grad()
def forward_backward(
    clt: Clt,
    x: Layers,
    y: Layers,
    *,
    mean_y: Layers | None = None,
    variance: Tensor | None = None,
    weight: float = 1.0,
    k: int | None = None,
    objective: Objective | None = None,
    tokens: int | None = None,
    dead: Sequence[Tensor] | None = None,
    gradients: Gradients | None = None,
    bf16_selection: bool = False,
    reconstruction: float = 1.0,
    sharing: Sharing = ALONE,
) -> JointStats:
    """Hand the gradient of `weight * loss` to `gradients` and report the loss.

    x, y [L, T, d] hold counted tokens only (no padding). `variance` [L] and `tokens` are given
    where these tokens are a part of the batch (a micro-batch, or one rank's share): the parts'
    gradients then sum to the whole batch's. Otherwise they are taken from y, the variance about
    `mean_y` [L, d] if given. `k` overrides the config's number of active latents; `dead` [F] bool
    per layer with a coder are the latents AuxK revives; without `gradients`, they are added to
    the parameters' `.grad`. `bf16_selection`: see selecting.py. `reconstruction` weighs Σ_t FVU_t
    in the loss (0: only the figures are made).

    If `clt` is one of several parts of a coder, all processes in `sharing` call this together, with
    the whole of the same x and y; each gets the gradient of its part and the figures of the whole.

    Raises `UserError` for targets of no variance.
    """
    variance = checked_variance(clt, y, mean_y, variance)
    step = _Pass(clt, x, k or clt.cfg.k, objective or Objective(), bf16_selection, sharing)
    step.variance, step.weight, step.dead = variance, weight, dead
    step.reconstruction = reconstruction
    step.open(gradients or Accumulated(), tokens or step.tokens)
    for t in clt.cfg.target_layers():
        step.target(t, y[t])
    for source in step.sources:
        source.finish(step.ledger)
    return step.stats()


class _Pass:
    """The tokens of one call on their way through the coder and back."""

    ledger: Ledger
    variance: Tensor
    weight: float
    reconstruction: float
    dead: Sequence[Tensor] | None

    def __init__(
        self,
        clt: Clt,
        x: Layers,
        k: int,
        objective: Objective,
        bf16: bool,
        sharing: Sharing,
    ) -> None:
        self.clt, self.k, self.objective = clt, min(k, clt.cfg.num_latents), objective
        self.sharing = sharing
        selecting = kernels_for(clt.W_enc[0], self.k)
        self.sources = [
            Source(clt, s, x[s], self.k, selecting, bf16, sharing) for s in clt.cfg.source_layers()
        ]
        density = max(source.density for source in self.sources)
        self.kernels: Kernels = kernels_for(clt.W_dec[0][0], density)
        self.tokens = len(self.sources[0].x)
        self.errors = self.sources[0].x.new_full((clt.cfg.n_layers, self.tokens), torch.nan)
        self.penalty = self.errors.new_zeros((), dtype=torch.float64)
        self.auxk = torch.zeros_like(self.penalty)

    def open(self, gradients: Gradients, tokens: int) -> None:
        """Count each table's uses, and take the penalty's part in the gradients."""
        decays: dict[nn.Parameter, Tensor] = {}
        if self.objective.penalises:
            for source in self.sources:
                self._penalise(source, self.objective.coefficient / tokens, decays)
        self.ledger = Ledger(gradients, self.kernels, self._uses(), decays)

    def _uses(self) -> Counter[nn.Parameter]:
        uses: Counter[nn.Parameter] = Counter(self.clt.W_enc)
        for s in self.clt.cfg.source_layers():
            for k in range(len(self.clt.cfg.targets(s))):
                uses.update(self.clt.tables(s, k))
            if self._revived(s) is not None:
                uses.update([self.clt.W_enc[s], *self.clt.tables(s, 0)])
        return uses

    # ---- one target

    def target(self, t: int, y_t: Tensor) -> None:
        """Decode layer t, and go back from its error."""
        clt = self.clt
        pairs = [(self.sources[s], k) for s, k in clt.cfg.sources(t)]
        written = [source.written(k) for source, k in pairs]
        kept: list[Tensor | None] = [None] * len(pairs)
        if clt.cfg.topk_coalesced:
            kept = list(kept_of_all([source for source, _ in pairs], written, self.k))
            written = [s.written(k, keep) for (s, k), keep in zip(pairs, kept, strict=True)]
        out = self._decode(t, pairs, written)
        error = torch.sub(self.sharing.own_columns(y_t).to(clt.dtype), out, out=out)
        self.errors[t] = error.square().sum(1)
        scale = float(clt.out_scale(t))
        own = clt.cfg.sources(t)[-1]
        if own[1] == 0 and (dead := self._revived(own[0])) is not None:
            self._revive(self.sources[own[0]], t, dead, error, scale)
        share = self.weight * self.reconstruction
        G = error.mul_(-2 * share * scale / self.variance[t].to(clt.dtype))
        self.ledger.add(clt.b_dec[t], G.sum(0))
        for (source, k), entries, keep in zip(pairs, written, kept, strict=True):
            self._back(source, k, entries, keep, G)

    def _decode(self, t: int, pairs: list[tuple[Source, int]], written: list[Entries]) -> Tensor:
        clt = self.clt
        bias = clt.b_dec[t].expand(self.tokens, -1)
        out = torch.zeros_like(bias) if self.sharing.decodes_partly else bias.clone()
        parts = [
            (entries, table)
            for (source, k), entries in zip(pairs, written, strict=True)
            for table in clt.tables(source.s, k)
        ]
        self.kernels.decode(out, parts)
        if self.sharing.decodes_partly:
            out = self.sharing.sum_outputs(out).add_(bias)
        for source, k in pairs:
            if (skip := clt.skip(source.s, k)) is not None:
                out.addmm_(source.x, skip.T, alpha=clt.write_factor(source.s, t))
        scale = float(clt.out_scale(t))
        return out if scale == 1 else out.mul_(scale)

    def _back(
        self, source: Source, k: int, entries: Entries, kept: Tensor | None, G: Tensor
    ) -> None:
        clt, s = self.clt, source.s
        if (skip := clt.skip(s, k)) is not None:
            factor = clt.write_factor(s, clt.cfg.targets(s)[k])
            self.ledger.add(skip, (G.T @ source.x).mul_(factor))
        for table in clt.tables(s, k):
            source.take(k, self.ledger.table(table, G, entries), self.ledger, kept)

    # ---- beside the loss of reconstruction

    def _penalise(
        self, source: Source, coefficient: float, decays: dict[nn.Parameter, Tensor]
    ) -> None:
        clt, s, col, sharing = self.clt, source.s, source.selection.col, self.sharing
        if self.objective.penalty == "l0":
            self.penalty += coefficient * source.active.sum().double()
            if source.threshold_grad is not None:
                source.threshold_grad += self.weight * coefficient
            return
        kind = self.objective.penalty_norm
        norms = decoder_norms(clt, s, kind, sharing)
        values = source.base.values
        z = norms[col] * values
        self.penalty += coefficient * self.objective.curve(z).sum(dtype=torch.float64)
        slope = self.objective.slope(z) * (self.weight * coefficient)
        if sharing.counts_once:
            source.grad += slope * norms[col]
        pull = source.selection.totals(slope * values)
        for k, q in enumerate(norm_slopes(clt, s, kind, norms, sharing)):
            (table,) = clt.tables(s, k)
            decays[table] = decays[table] + pull * q if table in decays else pull * q

    def _revived(self, s: int) -> Tensor | None:
        """The dead latents of layer s, of those here, if AuxK is to revive any of this layer's."""
        if self.objective.auxk_alpha == 0 or self.dead is None:
            return None
        return self.dead[s] if auxk_size(self.clt, self.dead[s], self.sharing)[0] else None

    def _revive(self, source: Source, t: int, dead: Tensor, error: Tensor, scale: float) -> None:
        """AuxK: the gradient of dead latents that predict what is left of the first target."""
        clt, s, sharing = self.clt, source.s, self.sharing
        size, factor = auxk_size(clt, dead, sharing)
        entries = self._dead_entries(source, sharing.own_latents(dead), size)
        left = torch.zeros_like(error)
        self.kernels.decode(left, [(entries, table) for table in clt.tables(s, 0)])
        left = sharing.sum_outputs(left).mul_(scale).sub_(error)
        share = self.objective.auxk_alpha * factor / self.variance[t]
        self.auxk += share * left.square().sum(dtype=torch.float64)
        G = left.mul_(2 * self.weight * scale * float(share))
        grad = torch.zeros_like(entries.values)
        for table in clt.tables(s, 0):
            grad += self.ledger.table(table, G, entries)
        source.revive(self.ledger, Entries(entries.selection, grad * (entries.values > 0)))

    def _dead_entries(self, source: Source, dead: Tensor, size: int) -> Entries:
        """The `size` most active of all dead latents; `dead`: those of the encoder's rows here."""
        clt, s, F = self.clt, source.s, self.clt.cfg.num_latents
        latents = dead.nonzero().flatten()
        pre = torch.addmm(clt.b_enc[s][latents], source.read, clt.W_enc[s][latents].T)
        found = pre.topk(min(size, len(latents)), dim=1, sorted=False)
        # All processes hand over as many, also those that have fewer.
        missing = (0, size - found.indices.shape[1])
        numbers = functional.pad(latents[found.indices], missing)
        values = functional.pad(found.values, missing, value=-torch.inf)
        crow, col, pre = self.sharing.global_top(values, numbers, size, F)
        width = None if self.sharing.decodes_partly else size
        selection = self.kernels.selection(crow, col, self.sharing.latents_here(F), width)
        return Entries(selection, pre.relu())

    # ---- figures

    def stats(self) -> JointStats:
        """What the step reports."""
        cfg, sharing = self.clt.cfg, self.sharing
        errors = sharing.sum_columns(self.errors)
        sse = errors.sum(1, dtype=torch.float64)
        counts = torch.stack([s.selection.counts(s.active) for s in self.sources])
        counts = sharing.sum_features(counts)
        l0 = torch.full_like(sse, torch.nan)
        l0[: len(self.sources)] = counts.double().mean(1)
        fired = []
        for source in self.sources:
            hit = torch.zeros(source.selection.num_latents, dtype=torch.bool, device=sse.device)
            hit[source.selection.col[source.active]] = True
            fired.append(hit)
        fvu = sse / self.variance
        penalty, auxk = self.penalty, self.auxk
        if self.objective.penalises:
            penalty = sharing.sum_features(penalty)
        if self.objective.auxk_alpha:
            auxk = sharing.sum_columns(auxk)
        loss = self.reconstruction * fvu[cfg.target_offset :].sum() + penalty + auxk
        lowest = [source.selected.lowest for source in self.sources]
        return JointStats(
            loss, sse, self.variance, fvu, l0, counts, fired, errors, penalty, auxk, lowest
        )
