"""How fast this device is at a training step: a small one is measured, a large one inferred.

A coder of three layers with the real width and k, but fewer latents (F_p), takes steps with one and
with three targets each, on T and on T / 2 tokens. From the four times follow the cost of a source
and of a (source, target) pair, each as slope · tokens + constant. To F latents are scaled

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
from functools import partial

import torch

from sparsify_vlm.coders import Clt, CltConfig, forward_backward
from sparsify_vlm.coders.sparse_ops import prefers_dense
from sparsify_vlm.training.config import CoderConfig, TrainConfig
from sparsify_vlm.training.footprint import Job, count_parameters, n_pairs
from sparsify_vlm.training.optimizers import Optimizers

LAYERS = 3
RUNS, MEASURED_SECONDS = (3, 50), 0.3
"""Each measurement is repeated at least and at most this often, and for so long."""
MOST_PARAMETERS = 1 << 25
"""Of the probe's coder: a second or two on a laptop."""
TOKENS = {"cpu": 512, "cuda": 8192}
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
    def through(cls, tokens: int, whole: float, half: float) -> _Line:
        """From the times of `tokens` and of half as many; timing noise cannot make it negative."""
        slope = max(2 * (whole - half) / tokens, 0.0) or whole / tokens
        return cls(slope, max(whole - slope * tokens, 0.0))


def measure_step(job: Job) -> StepTime:
    """Probe `job.device` and scale to `job`. Takes some seconds."""
    latents = _probe_latents(job)
    tokens = min(TOKENS.get(job.device.type, TOKENS["cpu"]), max(job.micro_tokens, 64))
    cfg = replace(
        job.clt,
        hookpoints=[str(i) for i in range(LAYERS)],
        num_latents=latents,
        target_offset=0,
        n_targets=1,
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
    while latents > 2 * job.clt.k and 9 * latents * job.clt.d_model > MOST_PARAMETERS:
        table = torch.empty(latents // 2, 0, device=job.device)
        if prefers_dense(job.clt.k, table) != job.dense:
            break
        latents //= 2
    return latents


def _coders_seconds(job: Job, cfg: CltConfig, tokens: int) -> float:
    """Of one micro-batch's forward and backward."""
    one, many = _random_coder(cfg, job), _random_coder(replace(cfg, n_targets=LAYERS), job)
    pairs = n_pairs(many.cfg) - n_pairs(one.cfg)
    source_times, pair_times, encode_times = [], [], []
    for n in (tokens, tokens // 2):
        x = torch.randn(LAYERS, n, cfg.d_model, device=job.device)
        with_one = _seconds(partial(_step, one, x), job.device)
        with_many = _seconds(partial(_step, many, x), job.device)
        pair = max(with_many - with_one, 0.0) / pairs
        pair_times.append(pair)
        source_times.append(max(with_one - LAYERS * pair, 0.0) / LAYERS)
        encode_times.append(_seconds(partial(_encode, one, x), job.device))
    grown = job.clt.num_latents / cfg.num_latents
    pair_line, source, encode = (
        _Line.through(tokens, *times) for times in (pair_times, source_times, encode_times)
    )
    others = max(source.slope - encode.slope, 0.0)
    slope_growth = grown if job.dense else 1.0
    M, S, P = job.micro_tokens, len(job.clt.source_layers()), n_pairs(job.clt)
    per_source = (encode.slope * grown + others * slope_growth) * M + source.constant * grown
    per_pair = pair_line.slope * slope_growth * M + pair_line.constant * grown
    return S * per_source + P * per_pair


def _random_coder(cfg: CltConfig, job: Job) -> Clt:
    clt = Clt(cfg, job.device)
    with torch.no_grad():
        for parameter in clt.parameters():
            parameter.normal_(std=0.02)
    return clt


def _step(clt: Clt, x: torch.Tensor) -> None:
    clt.zero_grad()
    forward_backward(clt, x, x)


@torch.no_grad()
def _encode(clt: Clt, x: torch.Tensor) -> None:
    clt.encode_layer(0, x[0])


def _optimizer_seconds(job: Job, cfg: CltConfig) -> float:
    clt = _random_coder(cfg, job)
    parameters = [p for p in clt.parameters() if p.requires_grad]
    gradients = [parameter.detach().clone() for parameter in parameters]
    settings = TrainConfig(CoderConfig(), optimizer=job.optimizer)
    optimizers = Optimizers(parameters, settings, cfg.num_latents, total=10)

    def step() -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizers.step(1)

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
    rows = TOKENS.get(job.device.type, TOKENS["cpu"])
    width, hidden = job.model.d_model, min(job.model.intermediate, 4 * job.model.d_model)
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
