"""How fast this device is at a training step: a small one is measured, a large one inferred.

A coder of one layer with the real width and k, but fewer latents (F_p), is timed on T tokens and on
a sixteenth of them: a whole step, encoding alone, and the products of one more target. From two
times each follows a cost as slope · tokens + constant. To F latents are scaled

    the constants (tables written once per step)                 by F / F_p
    of a source's slope what encoding takes (a dense product)    by F / F_p
    the other slopes (active latents only)                       not; by F / F_p on the dense path

and the optimizer's time by the number of parameters. The model's forward pass is its FLOPs over the
rate of one matrix product in its dtype; memory traffic beyond that is not modelled.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsify_vlm.coders import Clt, CltConfig, forward_backward
from sparsify_vlm.coders.kernels import Entries, kernels_for, prefers_dense
from sparsify_vlm.training.config import CoderConfig, TrainConfig
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
    while latents > 2 * job.clt.k and latents * job.clt.d_model > MOST_WEIGHTS:
        table = torch.empty(latents // 2, 0, device=job.device)
        if prefers_dense(job.clt.k, table) != job.dense:
            break
        latents //= 2
    return latents


def _affordable(job: Job, per_token: int, wanted: int) -> int:
    """`wanted` tokens or as many as are cheap, where one takes `per_token` multiplications."""
    least, most = TOKENS.get(job.device.type, TOKENS["cpu"])
    return min(wanted, max(least, min(most, MOST_PRODUCTS // per_token)))


def _coders_seconds(job: Job, cfg: CltConfig, tokens: int) -> float:
    """Of one micro-batch's forward and backward."""
    clt = _random_coder(cfg, job)

    def timed(make: Callable[[Clt, Tensor], Callable[[], object]]) -> _Line:
        def seconds(n: int) -> float:
            return _seconds(
                make(clt, torch.randn(1, n, cfg.d_model, device=job.device)), job.device
            )

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


def _whole_step(clt: Clt, x: Tensor) -> Callable[[], object]:
    def step() -> None:
        clt.zero_grad()
        forward_backward(clt, x, x)

    return step


def _encoding(clt: Clt, x: Tensor) -> Callable[[], object]:
    def encode() -> None:
        with torch.no_grad():
            clt.encode_layer(0, x[0])

    return encode


def _one_more_target(clt: Clt, x: Tensor) -> Callable[[], object]:
    """The products that a step takes for each (source, target) pair."""
    cfg, G, W = clt.cfg, x[0], clt.W_dec[0][0].detach()
    with torch.no_grad():
        latents = clt.encode_layer(0, x[0])
    kernels = kernels_for(W, cfg.k)
    selection = kernels.uniform(latents.indices, cfg.num_latents)
    selection.order  # noqa: B018  # once per source, not per pair
    out, values = torch.zeros_like(G), latents.values.flatten()
    skip = None if clt.W_skip is None else clt.W_skip[0][0].detach()

    def pair() -> None:
        entries = Entries(selection, values)
        kernels.decode(out, [(entries, W)])
        kernels.backward(G, entries, W)
        for _ in range(cfg.train_post_encoder + cfg.post_encoder_scale):
            selection.totals(values)
        if skip is not None:
            G.T @ (G @ skip)

    return pair


def _optimizer_seconds(job: Job, cfg: CltConfig) -> float:
    clt = _random_coder(cfg, job)
    parameters = [p for p in clt.parameters() if p.requires_grad]
    gradients = [parameter.detach().clone() for parameter in parameters]
    settings = TrainConfig(CoderConfig(), optimizer=job.optimizer)
    optimizers = Optimizers(parameters, settings, cfg.num_latents, total=10)

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
    flops = job.model.forward_flops(job.tokens, job.samples) * job.grad_acc_steps
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
