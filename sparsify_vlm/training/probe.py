"""How fast this device is at a training step: a small one is measured, a large one inferred.

A coder of one layer with the real width and k, but fewer latents (F_p), is timed on T tokens and on
a sixteenth of them: a whole step, encoding alone, and the products of one more target. From two
times each follows a cost as slope · tokens + constant. To F latents are scaled

    the constants (tables written once per step)                 by F / F_p
    of a source's slope what encoding takes (a dense product)    by F / F_p
    the other slopes (active latents only)                       not; by F / F_p on the dense path

and the optimizer's time by the number of parameters. Where the kernels update a decoder in the pass
that makes its gradient, that is part of the products of a target, and of the step. The model's
forward pass is its FLOPs over the rate of one matrix product in its dtype; memory traffic beyond
that is not modelled. With `stream_activations` it is made twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsify_vlm.coders import Clt, CltConfig, forward_backward
from sparsify_vlm.coders.config import WITHOUT_K
from sparsify_vlm.coders.kernels import Entries
from sparsify_vlm.coders.selecting import Selected, select
from sparsify_vlm.training.adam import Adam
from sparsify_vlm.training.at_once import UpdatedAtOnce
from sparsify_vlm.training.config import CoderConfig, TrainConfig
from sparsify_vlm.training.distributed import World
from sparsify_vlm.training.footprint import Job, count_parameters, n_pairs
from sparsify_vlm.training.optimizers import Optimizers

RUNS, MEASURED_SECONDS = (3, 50), 0.3
"""Each measurement is repeated at least and at most this often, and for so long."""
MOST_WEIGHTS = 1 << 22
"""In a table of the probe's coder."""
FEWER = 16
"""The second time is taken on this many times fewer tokens."""
TOKENS = {"cpu": (512, 8192), "cuda": (8192, 8192)}
"""At least and at most this many are measured on, of a batch. As many as is cheap: where threads
wait for a busy machine, each operation takes a scheduler's time slice, however small it is."""
MOST_PRODUCTS = 1 << 29
"""Of tokens, latents and width, or of rows, width and columns: what counts as cheap."""
EXPECTED_FLOPS = 0.5
"""Share of a single product's rate that a whole forward pass reaches."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step of a job, by part."""

    model: float
    coders: float
    optimizer: float
    tokens: int

    @property
    def total(self) -> float:
        """All parts."""
        return self.model + self.coders + self.optimizer

    @property
    def tokens_per_s(self) -> float:
        """Tokens trained on per second, in one process."""
        return self.tokens / self.total


@dataclass(frozen=True)
class _Line:
    """seconds = slope · tokens + constant."""

    slope: float
    constant: float

    @classmethod
    def measured(cls, seconds: Callable[[int], float], tokens: int) -> _Line:
        """From the times of `tokens` and of few of them; noise cannot make either term negative."""
        few = max(tokens // FEWER, 1)
        part, whole = seconds(few), seconds(tokens)
        slope = max(whole - part, 0.0) / (tokens - few)
        return cls(slope, max(part - slope * few, 0.0))

    def __sub__(self, other: _Line) -> _Line:
        return _Line(max(self.slope - other.slope, 0.0), max(self.constant - other.constant, 0.0))

    def at(self, tokens: int, slope_growth: float, growth: float) -> float:
        """Seconds for `tokens` with the slope and the constant scaled."""
        return self.slope * slope_growth * tokens + self.constant * growth


def measure_step(job: Job) -> StepTime:
    """Probe `job.device` and scale to `job`. Takes some seconds."""
    latents = _probe_latents(job)
    tokens = _affordable(job, latents * job.clt.d_model, max(job.micro_tokens, 64))
    cfg = replace(
        job.clt,
        hookpoints=["0"],
        num_latents=latents,
        target_offset=0,
        n_targets=1,
        transcode=True,  # an autoencoder's step takes the same products
    )
    coders = _coders_seconds(job, cfg, tokens)
    return StepTime(
        model=_model_seconds(job),
        coders=coders * job.grad_acc_steps * job.micro_acc_steps,
        optimizer=_optimizer_seconds(job, cfg),
        tokens=job.tokens * job.grad_acc_steps,
    )


def _probe_latents(job: Job) -> int:
    """As many latents as is cheap, on the same path (sparse or dense) as the job's."""
    latents = job.clt.num_latents
    least = 2 * (1 if job.clt.activation in WITHOUT_K else job.clt.k)
    while latents > least and latents * job.clt.d_model > MOST_WEIGHTS:
        half = latents // 2
        if job.clt.activation == "groupmax" and half % job.clt.k:
            break
        if replace(job, clt=replace(job.clt, num_latents=half)).dense != job.dense:
            break
        latents = half
    return latents


def _affordable(job: Job, per_token: int, wanted: int) -> int:
    """`wanted` tokens or as many as are cheap, where one takes `per_token` multiplications."""
    least, most = TOKENS.get(job.device.type, TOKENS["cpu"])
    return min(wanted, max(least, min(most, MOST_PRODUCTS // per_token)))


def _coders_seconds(job: Job, cfg: CltConfig, tokens: int) -> float:
    """Of one micro-batch's forward and backward."""
    clt = _random_coder(cfg, job)

    def timed(make: Callable[[Job, Clt, Tensor], Callable[[], object]]) -> _Line:
        def seconds(n: int) -> float:
            x = torch.randn(1, n, cfg.d_model, device=job.device)
            return _seconds(make(job, clt, x), job.device)

        return _Line.measured(seconds, tokens)

    pair, encode = timed(_one_more_target), timed(_encoding)
    others = timed(_whole_step) - pair - encode
    grown = job.clt.num_latents / cfg.num_latents
    active = grown if job.dense else 1.0
    M, S, P = job.micro_tokens, len(job.clt.source_layers()), n_pairs(job.clt)
    per_source = encode.at(M, grown, grown) + others.at(M, active, grown)
    return S * per_source + P * pair.at(M, active, grown)


def _random_coder(cfg: CltConfig, job: Job) -> Clt:
    clt = Clt(cfg, job.device)
    with torch.no_grad():
        for parameter in clt.parameters():
            parameter.normal_(std=0.02)
    return clt


def _whole_step(job: Job, clt: Clt, x: Tensor) -> Callable[[], object]:
    optimizers = _optimizers(job, clt) if job.fused else None

    def step() -> None:
        clt.zero_grad()
        at_once = None
        if optimizers is not None:
            optimizers.begin(1)
            at_once = UpdatedAtOnce(clt, optimizers, World())
        forward_backward(clt, x, x, gradients=at_once, bf16_selection=job.bf16_selection)

    return step


def _encoding(job: Job, clt: Clt, x: Tensor) -> Callable[[], object]:
    return lambda: _selected(job, clt, x)


@torch.no_grad()
def _selected(job: Job, clt: Clt, x: Tensor) -> Selected:
    return select(
        clt, 0, x[0], min(clt.cfg.k, clt.cfg.num_latents), job.kernels, job.bf16_selection
    )


def _one_more_target(job: Job, clt: Clt, x: Tensor) -> Callable[[], object]:
    """The products that a step takes for each (source, target) pair."""
    cfg, G, W, kernels = clt.cfg, x[0], clt.W_dec[0][0], job.kernels
    selected = _selected(job, clt, x)
    selection, values = selected.selection, selected.values
    if not job.dense:
        selection.order  # noqa: B018  # once per source, not per pair
    out = torch.zeros_like(G)
    skip = None if clt.W_skip is None else clt.W_skip[0][0].detach()
    adam = Adam(W, torch.bfloat16 if job.bf16_moments else None)

    @torch.no_grad()
    def pair() -> None:
        entries = Entries(selection, values)
        for _ in range(1 + cfg.secondary_target_tied):
            kernels.decode(out, [(entries, W)])
            if job.fused:
                kernels.backward_adam(G, entries, W, adam.next(lr=1e-6))
            else:
                kernels.backward(G, entries, W)
        for _ in range(cfg.train_post_encoder + cfg.post_encoder_scale):
            selection.totals(values)
        if skip is not None:
            G.T @ (G @ skip)

    return pair


def _optimizers(job: Job, clt: Clt) -> Optimizers:
    parameters = [p for p in clt.parameters() if p.requires_grad]
    settings = TrainConfig(
        CoderConfig(), optimizer=job.optimizer, bf16_moments=job.bf16_moments, lr=1e-6
    )
    return Optimizers(parameters, settings, clt.cfg.num_latents, total=10)


def _optimizer_seconds(job: Job, cfg: CltConfig) -> float:
    if job.fused:  # in the step
        return 0.0
    clt = _random_coder(cfg, job)
    parameters = [p for p in clt.parameters() if p.requires_grad]
    gradients = [parameter.detach().clone() for parameter in parameters]
    optimizers = _optimizers(job, clt)

    def step() -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizers.begin(1)
        optimizers.finish()

    step()  # makes the states
    seconds = _seconds(step, job.device) / count_parameters(cfg).total
    if job.optimizer == "muon":  # a matrix is multiplied with itself along its shorter side
        d = cfg.d_model
        seconds *= min(job.clt.num_latents, d) / min(cfg.num_latents, d)
    return seconds * count_parameters(job.clt).total


def _model_seconds(job: Job) -> float:
    if job.model is None:
        return 0.0
    dtype = torch.float32 if job.number_bytes == 4 else torch.bfloat16
    width, hidden = job.model.d_model, min(job.model.intermediate, 4 * job.model.d_model)
    rows = _affordable(job, width * hidden, job.tokens)
    a = torch.randn(rows, width, device=job.device, dtype=dtype)
    b = torch.randn(width, hidden, device=job.device, dtype=dtype)
    rate = 2 * rows * width * hidden / _seconds(lambda: a @ b, job.device)
    passes = job.grad_acc_steps * (1 + job.stream_activations)
    flops = job.model.forward_flops(job.tokens, job.samples) * passes
    return flops / (EXPECTED_FLOPS * rate)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """The shortest of some runs, after one to warm up: what else the machine does only adds."""
    call()
    times = [_once(call, device)]
    while len(times) < RUNS[0] or (sum(times) < MEASURED_SECONDS and len(times) < RUNS[1]):
        times.append(_once(call, device))
    return min(times)


def _once(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
