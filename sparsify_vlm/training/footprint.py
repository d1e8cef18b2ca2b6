"""What a training run holds in memory, in closed form.

With S coders (layers that have a target), P (source, target) pairs, F latents, d_model d, N tokens
per batch, M = N / micro_acc_steps of them at a time, G = grad_acc_steps:

    P           = n S − n (n − 1) / 2                      for n targets at most, n ≤ S
    parameters  = S (F d + F) + P F d + L d                (+ P (d² + F + F) for skip, post-encoder)
    weights, gradients    4 bytes each per parameter
    optimizer   signum 4 (z of schedule-free), adam 8, muon 4 per matrix and 8 per vector entry
    tokens      x and y of G batches, and of one more while uncounted tokens are taken out
    step        x in float32, per active latent 36 bytes (value, index, gradient, three orders), or
                the [M, F] matrices of the dense path; pre-activations; four [M, d] matrices

The peak is the largest of three moments: the model's forward pass, the coders' step, and saving,
when schedule-free's averages stand beside the weights.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from sparsify_vlm.coders import CltConfig
from sparsify_vlm.coders.clt import PRE_ACTIVATIONS_AT_ONCE
from sparsify_vlm.coders.sparse_ops import prefers_dense
from sparsify_vlm.models.skeleton import Skeleton

FLOAT = 4  # bytes; coders are trained in float32
PER_ACTIVE_LATENT = 36
STATES_PER_WEIGHT = {"signum": 1, "adam": 2, "muon": 1}


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters of a coder."""

    encoders: int
    decoders: int
    rest: int
    """Biases of the targets, skip connections, post-encoders."""
    vectors: int
    """Those of one dimension, among all of the above."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.encoders + self.decoders + self.rest


def n_pairs(cfg: CltConfig) -> int:
    """How many (source, target) pairs there are, each with a decoder of its own."""
    sources = len(cfg.source_layers())
    n = min(cfg.n_targets, sources)
    return n * sources - n * (n - 1) // 2


def count_parameters(cfg: CltConfig) -> Parameters:
    """The parameters of `Clt(cfg)`."""
    S, P, F, d = len(cfg.source_layers()), n_pairs(cfg), cfg.num_latents, cfg.d_model
    posts = P * F * (cfg.train_post_encoder + cfg.post_encoder_scale)
    biases = cfg.n_layers * d
    return Parameters(
        encoders=S * (F * d + F),
        decoders=P * F * d,
        rest=biases + posts + P * d * d * cfg.skip_connection,
        vectors=S * F + biases + posts,
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

    @property
    def micro_tokens(self) -> int:
        """Tokens the coders see at a time."""
        return -(-self.tokens // self.micro_acc_steps)

    @property
    def dense(self) -> bool:
        """Whether the coders' products go through dense matrices."""
        table = torch.empty(self.clt.num_latents, 0, device=self.device)
        return prefers_dense(self.clt.k, table)


@dataclass(frozen=True)
class Footprint:
    """Bytes; `peak` is less than the sum, since not all are held at once."""

    weights: int
    gradients: int
    optimizer: int
    model: int
    tokens: int
    """x and y."""
    forward: int
    """What the model's forward pass needs beside them."""
    step: int
    """What the coders' step needs beside them."""
    saving: int

    @property
    def peak(self) -> int:
        """The most that is held at any moment."""
        held = self.weights + self.optimizer + self.model + self.tokens
        return held + max(self.forward, self.gradients + self.step, self.saving)

    def as_dict(self) -> dict[str, int]:
        """All parts and the peak."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"peak": self.peak}


def footprint(job: Job) -> Footprint:
    """What `job` holds in memory."""
    parameters = count_parameters(job.clt)
    weights = FLOAT * parameters.total
    states = STATES_PER_WEIGHT[job.optimizer] * weights
    if job.optimizer == "muon":
        states += FLOAT * parameters.vectors
    batch = 2 * job.clt.n_layers * job.tokens * job.clt.d_model * job.number_bytes
    return Footprint(
        weights=weights,
        gradients=weights,
        optimizer=states,
        model=job.model.parameters * job.weight_bytes if job.model else 0,
        tokens=batch * (job.grad_acc_steps + 1),
        forward=_forward_bytes(job),
        step=_step_bytes(job),
        saving=weights if job.optimizer == "signum" else 0,
    )


def _forward_bytes(job: Job) -> int:
    """One layer's intermediate results and the residual stream, without gradients."""
    if job.model is None:
        return 0
    width = 8 * job.model.d_model + 3 * job.model.intermediate
    return job.tokens * width * job.number_bytes


def _step_bytes(job: Job) -> int:
    cfg, M, F = job.clt, job.micro_tokens, job.clt.num_latents
    S, d = len(cfg.source_layers()), cfg.d_model
    copied = 0 if job.number_bytes == FLOAT else S * M * d * FLOAT
    matrices = (S + 1) * M * F * FLOAT if job.dense else S * F * 8
    limit = PRE_ACTIVATIONS_AT_ONCE.get(job.device.type, PRE_ACTIVATIONS_AT_ONCE["cpu"])
    pre = 2 * min(M * F, max(limit, F)) * FLOAT
    again = job.grad_acc_steps * job.micro_acc_steps > 1
    new_gradient = F * d * FLOAT if again else 0
    return (
        copied
        + S * M * cfg.k * PER_ACTIVE_LATENT
        + matrices
        + pre
        + 4 * M * d * FLOAT
        + new_gradient
    )
