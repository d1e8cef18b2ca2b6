"""What a training run holds in memory, from its sizes.

A run is gone through moment by moment, with S coders (layers that have a target), F latents, width
d, N tokens in a batch of one process, M of them in a pass (N / micro_acc_steps), e entries
(active latents) per token and coder. Always held:

    weights     4 bytes per parameter, counted on a coder that is built without memory
    optimizer   signum 4 (z of schedule-free); adam 8, with bf16_moments 4; muon 4 per number of a
                matrix and adam's for the others
    model       its parameters in its dtype
    tokens      x and y of one batch, or with stream_activations of one piece. On a CPU also what is
                prepared ahead, two that are ready and one in the making: of an activation store
                whole batches, of a running model its images

and beside them the largest of these moments, each with the gradients that are there by then:

    forward     the model's own pass: one layer's intermediate results
    moments     of one layer: float64 copies of x or y, differences and squares
    encoding    entries of all coders, and pre-activations of one, as many as are made at a time
    step        entries of all coders, arranged; two [M, d] matrices; tables' gradients in flight
    update      what the optimizer needs for one table beside its gradient
    saving      schedule-free's averages beside the weights

Gradients: where every table's gradient is spent as soon as it is whole (a single pass, fvu), only
tables that are shared wait, and none is whole where the kernels make Adam's update in the same
pass. Otherwise all are kept, and one more while passes are added up.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields

import torch
from torch import nn

from sparsify_vlm.coders import Clt, CltConfig
from sparsify_vlm.coders.clt import PRE_ACTIVATIONS_AT_ONCE
from sparsify_vlm.coders.kernels import Kernels, kernels_for
from sparsify_vlm.coders.kernels.portable import GROUPS
from sparsify_vlm.models.skeleton import Skeleton
from sparsify_vlm.training.adam import AT_ONCE

FLOAT, LONG = 4, 8  # bytes; coders are trained in float32
AHEAD = 3
"""Batches that are ready or in the making while one is trained on (`data.batching.prefetched`)."""
RAGGED = ("batchtopk", "relu", "jumprelu")
"""Activations with any number of entries per token."""


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters of a coder."""

    encoders: int
    decoders: int
    rest: int
    """Biases of the targets, skip connections, post-encoders, thresholds."""
    vectors: int
    """Those of one dimension, among all of the above."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.encoders + self.decoders + self.rest


def n_pairs(cfg: CltConfig) -> int:
    """How many (source, target) pairs there are."""
    sources = len(cfg.source_layers())
    n = min(cfg.n_targets, sources)
    return n * sources - n * (n - 1) // 2


def count_parameters(cfg: CltConfig) -> Parameters:
    """The parameters of `Clt(cfg)`, shared ones once."""
    clt = Clt(cfg, "meta")
    encoders = sum(p.numel() for p in [*clt.W_enc, *clt.b_enc])
    decoders = sum(W.numel() for W in {W for tables in clt.W_dec for W in tables})
    return Parameters(
        encoders=encoders,
        decoders=decoders,
        rest=sum(p.numel() for p in clt.parameters()) - encoders - decoders,
        vectors=sum(p.numel() for p in clt.parameters() if p.ndim == 1),
    )


@dataclass(frozen=True)
class Job:
    """Everything memory and time depend on."""

    clt: CltConfig
    optimizer: str
    tokens: int
    """Tokens in a batch of one process."""
    samples: int
    """Samples they come from; 0 when they come from an activation store."""
    grad_acc_steps: int
    micro_acc_steps: int
    device: torch.device
    model: Skeleton | None
    """None: trained from an activation store."""
    weight_bytes: int
    """Bytes per weight of the model."""
    number_bytes: int
    """Bytes per number of x and y."""
    bf16_moments: bool = False
    bf16_selection: bool = False
    stream_activations: bool = False
    loss_fn: str = "fvu"
    penalised: bool = False
    """Whether there is a sparsity penalty."""
    auxk: bool = False
    """Whether dead latents are revived."""
    kernels: Kernels = field(init=False, repr=False)
    """Those that the step takes."""

    def __post_init__(self) -> None:
        table = torch.empty(self.clt.num_latents, 0, device=self.device)
        object.__setattr__(self, "kernels", kernels_for(table, self.entries))

    @property
    def micro_tokens(self) -> int:
        """Tokens the coders see at a time."""
        return -(-self.tokens // self.micro_acc_steps)

    @property
    def held_tokens(self) -> int:
        """Tokens whose x and y are in memory at a time."""
        return self.micro_tokens if self.stream_activations else self.tokens

    @property
    def entries(self) -> int:
        """Entries per token and coder. Of an activation that is not sparse of itself every second
        latent is active when training starts."""
        dense = self.clt.activation in ("relu", "jumprelu")
        return self.clt.num_latents // 2 if dense else self.clt.k

    @property
    def in_parts(self) -> bool:
        """Whether gradients of several passes are added up before a step."""
        return self.micro_acc_steps * self.grad_acc_steps > 1

    @property
    def at_once(self) -> bool:
        """Whether tables' gradients are spent as soon as they are whole."""
        unit_norm = self.clt.normalize_decoder and not self.clt.transcode
        return not self.in_parts and self.loss_fn == "fvu" and not unit_norm

    @property
    def fused(self) -> bool:
        """Whether a decoder's gradient goes into Adam without having been whole."""
        return self.at_once and self.optimizer == "adam" and self.kernels.fuses_adam

    @property
    def fused_encoders(self) -> bool:
        """The same of encoders."""
        return self.fused and self.kernels.fuses_adam_without_dots

    @property
    def dense(self) -> bool:
        """Whether the coders' products go through dense matrices."""
        return self.kernels.name == "dense"


@dataclass(frozen=True)
class Footprint:
    """Bytes; `peak` is less than the sum, since not all are held at once."""

    weights: int
    gradients: int
    """Those that are kept for the step's end."""
    optimizer: int
    model: int
    tokens: int
    """x and y, and what is prepared ahead."""
    forward: int
    moments: int
    selected: int
    """Entries of all coders as they were chosen."""
    latents: int
    """The same once they are arranged for the products."""
    encoding: int
    step: int
    update: int
    saving: int
    gradients_before: bool
    """Whether gradients of other passes are there when a pass begins."""

    @property
    def held(self) -> int:
        """What is there at every moment."""
        return self.weights + self.optimizer + self.model + self.tokens

    @property
    def coders(self) -> int:
        """The most that the coders' forward and backward pass holds."""
        before = self.gradients if self.gradients_before else 0
        encoding = before + self.selected + self.encoding
        return max(encoding, self.gradients + self.latents + self.step)

    @property
    def peak(self) -> int:
        """The most that is held at any moment."""
        before = self.gradients if self.gradients_before else 0
        return self.held + max(
            before + self.forward,
            before + self.moments,
            self.coders,
            self.gradients + self.update,
            self.saving,
        )

    def as_dict(self) -> dict[str, int]:
        """All parts and the peak."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        del parts["gradients_before"]
        return parts | {"peak": self.peak}


def footprint(job: Job) -> Footprint:
    """What `job` holds in memory."""
    clt = Clt(job.clt, "meta")
    count = count_parameters(job.clt)
    tables = {*clt.W_enc, *(W for tables in clt.W_dec for W in tables)}
    of_tables = sum(W.numel() for W in tables)
    at_the_end = count.total - (of_tables if job.at_once else 0)
    return Footprint(
        weights=FLOAT * count.total,
        gradients=FLOAT * at_the_end,
        optimizer=_optimizer_bytes(job, count),
        model=job.model.parameters * job.weight_bytes if job.model else 0,
        tokens=_token_bytes(job),
        forward=_forward_bytes(job),
        moments=_moments_bytes(job),
        selected=_selected_bytes(job),
        latents=_selected_bytes(job) + _arranged_bytes(job),
        encoding=_encoding_bytes(job),
        step=_step_bytes(job, clt),
        update=_update_bytes(job),
        saving=_saving_bytes(job, count),
        gradients_before=job.in_parts,
    )


def _table_bytes(job: Job) -> int:
    return job.clt.num_latents * job.clt.d_model * FLOAT


def _optimizer_bytes(job: Job, count: Parameters) -> int:
    moment = 2 if job.bf16_moments else FLOAT
    match job.optimizer:
        case "adam":
            return 2 * moment * count.total
        case "muon":
            return FLOAT * (count.total - count.vectors) + 2 * moment * count.vectors
    return FLOAT * count.total


def _token_bytes(job: Job) -> int:
    batch = 2 * job.clt.n_layers * job.held_tokens * job.clt.d_model * job.number_bytes
    if job.device.type != "cpu":
        return batch
    if job.model is None:
        return batch * (1 + AHEAD)
    images = job.samples * job.model.image_numbers * FLOAT
    parts = job.micro_acc_steps if job.stream_activations else 1
    return batch + images + images * AHEAD // parts


def _forward_bytes(job: Job) -> int:
    """Residual stream, its normed form, queries, keys, values, results of attention; the MLP's
    gate, up projection and their product. For `ce` and `kl` the results of every layer, and the
    scores of every word: the model's own and the spliced one's, each with its logarithm, and the
    gradient."""
    if job.model is None:
        return 0
    width = 8 * job.model.d_model + 3 * job.model.intermediate
    one = job.held_tokens * width * job.number_bytes
    if job.loss_fn == "fvu":
        return one
    kept = job.model.n_layers * 8 * job.model.d_model * job.number_bytes
    coders = len(job.clt.source_layers()) * (
        2 * job.clt.d_model * FLOAT + job.entries * 2 * (FLOAT + LONG)
    )
    passes = job.clt.num_latents * 2 * FLOAT  # pre-activations and their gradient, of one coder
    scores = job.model.vocabulary * (job.number_bytes + 4 * FLOAT)
    return one + job.held_tokens * (kept + coders + passes + scores)


def _moments_bytes(job: Job) -> int:
    """Of one layer's y: difference, its square, and that in float64 for an exact sum."""
    converted = 0 if job.number_bytes == FLOAT else FLOAT
    return job.held_tokens * job.clt.d_model * (converted + FLOAT + FLOAT + LONG)


def _selected_bytes(job: Job) -> int:
    """Per entry: latent, activation, gradient, whether active; where they differ from the
    activation the pre-activation, and a threshold's gradient. x where it is not read as it is."""
    cfg, M = job.clt, job.micro_tokens
    entry = LONG + FLOAT + FLOAT + 1
    entry += {"batchtopk": 0, "relu": 0, "jumprelu": 2 * FLOAT}.get(cfg.activation, FLOAT)
    copies = (job.number_bytes != FLOAT or cfg.normalize_io) + (not cfg.transcode)
    return len(cfg.source_layers()) * M * (job.entries * entry + copies * cfg.d_model * FLOAT)


def _arranged_bytes(job: Job) -> int:
    """Per entry: the order by latent, and tokens in it; with torch's kernels also tokens in the
    first order, and activations in the other. On the dense path a [M, F] matrix."""
    M, F, ragged = job.micro_tokens, job.clt.num_latents, job.clt.activation in RAGGED
    entry = {"compiled": 2 * LONG, "dense": LONG * ragged, "eager": LONG}
    each = M * job.entries * entry.get(job.kernels.name, 3 * LONG + FLOAT)
    each += M * F * FLOAT if job.dense else F * LONG
    return len(job.clt.source_layers()) * each


def _encoding_bytes(job: Job) -> int:
    """Pre-activations of one piece, with torch's kernels also the maxima of groups. Entries that
    are looked for one by one come with a mask and as (token, latent, value), which are then joined;
    batch top-k begins with all positive ones and sorts them out as (value, index)."""
    F, M = job.clt.num_latents, job.micro_tokens
    limit = PRE_ACTIVATIONS_AT_ONCE.get(job.device.type, PRE_ACTIVATIONS_AT_ONCE["cpu"])
    piece = min(M * F, max(limit, F))
    if job.clt.activation in RAGGED:
        found = M * F // 2
        joined = LONG + FLOAT
        each = max(2 * LONG + FLOAT + joined, joined + LONG + 2 * LONG)
        return piece * (FLOAT + 1) + found * each
    if job.bf16_selection and job.clt.activation == "topk":
        widened = FLOAT if job.kernels.name == "compiled" else 0
        return piece * (2 + widened) + F * job.clt.d_model * 2
    maxima = piece // GROUPS if job.kernels.name in ("torch", "dense") else 0
    return (piece + maxima) * FLOAT


def _step_bytes(job: Job, clt: Clt) -> int:
    cfg, M, F, d = job.clt, job.micro_tokens, job.clt.num_latents, job.clt.d_model
    entries = M * job.entries
    held = 2 * M * d * FLOAT + entries * FLOAT  # ŷ and the error's square, gradients of entries
    if job.dense:
        held += M * F * FLOAT
    elif job.kernels.name == "eager":
        held += 2 * entries * d * FLOAT  # rows gathered, and multiplied
    if cfg.train_post_encoder or cfg.post_encoder_scale or cfg.divide_cross_layer:
        held += cfg.n_targets * _written_bytes(job)
    if cfg.topk_coalesced:  # places (token, number), tables of values, the mask
        held += cfg.n_targets * (_written_bytes(job) + entries * (2 * LONG + 2 * FLOAT + 2))
    if job.penalised:  # norms · a, slope, their product, the pull on the decoders
        held += 4 * entries * FLOAT + n_pairs(cfg) * F * FLOAT
    if job.auxk:  # all latents dead: their encoder, pre-activations; error, guess, exact sum
        held += F * d * FLOAT + M * F * FLOAT + M * d * (2 * FLOAT + LONG)
    return (
        held
        + _tables_in_flight(job, clt) * _table_bytes(job)
        + (_update_bytes(job) if job.at_once else 0)
    )


def _written_bytes(job: Job) -> int:
    """What one source writes to one target, where it is not the activations themselves."""
    arranged = job.clt.num_latents if job.dense else 0
    return job.micro_tokens * (job.entries + arranged) * FLOAT


def _tables_in_flight(job: Job, clt: Clt) -> int:
    """How many tables' gradients are held at most that no parameter keeps yet: the one that is
    being made, and those of shared tables that wait for their other uses."""
    waiting = _waiting_tables(clt, job.fused)
    if job.at_once:
        encoders = len(clt.cfg.source_layers()) if job.auxk else 0  # used twice
        return max(waiting, 0 if job.fused_encoders else 1) + encoders
    if job.in_parts:
        return max(waiting, 1)
    return min(waiting - 1, 1)  # of a shared table, before it is added to what is there


def _waiting_tables(clt: Clt, fused: bool) -> int:
    pairs = [(s, k) for t in clt.cfg.target_layers() for s, k in clt.cfg.sources(t)]
    uses: Counter[nn.Parameter] = Counter(W for s, k in pairs for W in clt.tables(s, k))
    waiting: set[nn.Parameter] = set()
    most = 0
    for s, k in pairs:
        for table in clt.tables(s, k):
            if fused and uses[table] == 1 and table not in waiting:
                continue
            most = max(most, len(waiting) + 1)
            uses[table] -= 1
            waiting = waiting | {table} if uses[table] else waiting - {table}
    return most


def _update_bytes(job: Job) -> int:
    """Signum: the gradient's sign. Muon: four bfloat16 copies in its iteration. Adam: bfloat16
    moments in float32, a piece at a time."""
    if job.fused_encoders:
        return 0
    match job.optimizer:
        case "signum":
            return _table_bytes(job)
        case "muon":
            return 4 * _table_bytes(job) * 2 // FLOAT
    return 2 * min(AT_ONCE * FLOAT, _table_bytes(job)) if job.bf16_moments else 0


def _saving_bytes(job: Job, count: Parameters) -> int:
    averages = FLOAT * count.total if job.optimizer == "signum" else 0
    joined = job.clt.n_targets * _table_bytes(job) if job.clt.coalesce_topk == "per-layer" else 0
    return averages + joined
