"""What a training run holds in memory, in closed form.

With S coders (layers that have a target), P (source, target) pairs, F latents, d_model d, N tokens
per batch, M = N / micro_acc_steps of them at a time, G = grad_acc_steps:

    P           = n S − n (n − 1) / 2                      for n targets at most, n ≤ S
    parameters  = S (F d + F) + P F d + L d                (+ P (d² + F + F) for skip, post-encoder)
    weights, gradients    4 bytes each per parameter
    optimizer   signum 4 (z of schedule-free), adam 8, muon 4 per matrix and 8 per vector entry
    tokens      x and y of G batches, and of one more while uncounted tokens are taken out
    latents     per active one 36 bytes (value, index, gradient, three orders), and the [M, F]
                matrices of the dense path; x in float32 where it is not
    encoding    the pre-activations of one coder, as many as are made at a time
    step        four [M, d] matrices; on the dense path an [M, F] one; a gradient being added

The peak is the largest of four moments: the model's forward pass, encoding (with the gradients of
the parts before), the coders' backward pass, and saving, when schedule-free's averages stand beside
the weights.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from sparsify_vlm.coders import CltConfig
from sparsify_vlm.coders.clt import PRE_ACTIVATIONS_AT_ONCE
from sparsify_vlm.coders.kernels import prefers_dense
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
    def in_parts(self) -> bool:
        """Whether gradients of several parts are added up before a step."""
        return self.micro_acc_steps * self.grad_acc_steps > 1

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
    latents: int
    """Active latents of all coders, and what is kept beside them during a step."""
    encoding: int
    """Pre-activations of one coder."""
    step: int
    """What the coders' backward pass needs beside them."""
    saving: int
    gradients_while_encoding: bool

    @property
    def peak(self) -> int:
        """The most that is held at any moment."""
        held = self.weights + self.optimizer + self.model + self.tokens
        return held + max(self.forward, self.coders, self.saving)

    @property
    def coders(self) -> int:
        """The most that the coders' forward and backward pass holds."""
        before = self.gradients if self.gradients_while_encoding else 0
        return self.latents + max(before + self.encoding, self.gradients + self.step)

    def as_dict(self) -> dict[str, int]:
        """All parts and the peak."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        del parts["gradients_while_encoding"]
        return parts | {"peak": self.peak}


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
        latents=_latent_bytes(job),
        encoding=_encoding_bytes(job),
        step=_step_bytes(job),
        saving=weights if job.optimizer == "signum" else 0,
        gradients_while_encoding=job.in_parts,
    )


def _forward_bytes(job: Job) -> int:
    """One layer's intermediate results and the residual stream, without gradients."""
    if job.model is None:
        return 0
    width = 8 * job.model.d_model + 3 * job.model.intermediate
    return job.tokens * width * job.number_bytes


def _latent_bytes(job: Job) -> int:
    cfg, M, F = job.clt, job.micro_tokens, job.clt.num_latents
    copied = 0 if job.number_bytes == FLOAT else M * cfg.d_model * FLOAT
    arranged = M * F * FLOAT if job.dense else F * 8
    return len(cfg.source_layers()) * (copied + M * cfg.k * PER_ACTIVE_LATENT + arranged)


def _encoding_bytes(job: Job) -> int:
    F = job.clt.num_latents
    limit = PRE_ACTIVATIONS_AT_ONCE.get(job.device.type, PRE_ACTIVATIONS_AT_ONCE["cpu"])
    return min(job.micro_tokens * F, max(limit, F)) * FLOAT


def _step_bytes(job: Job) -> int:
    M, F, d = job.micro_tokens, job.clt.num_latents, job.clt.d_model
    return (4 * M * d + (F * d if job.in_parts else 0) + (M * F if job.dense else 0)) * FLOAT
