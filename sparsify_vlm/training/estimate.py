"""`estimate`: memory and time of a training run, before a weight is loaded.

Takes the flags of `train`. Memory is a closed form of the sizes (`footprint.py`), time is inferred
from a small step measured on the device (`probe.py`). Where the run would not fit, every single
option that brings it below the device's memory is listed, and one combination if none does alone.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sparsify_vlm.errors import UserError
from sparsify_vlm.training.config import CoderConfig

FORMAT, VERSION = "sparsify-vlm estimate", 1
BYTES = {"float32": 4, "fp32": 4, "bfloat16": 2, "bf16": 2, "float16": 2, "fp16": 2}
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
Figures = dict[str, Any]


@dataclass
class EstimatedCoder(CoderConfig):
    """One coder per hookpoint, and the layers it writes to."""

    transcode: bool = False
    """Whether we predict the output of a module given its input. Implied by --cross_layer."""

    def __post_init__(self) -> None:
        self.transcode = self.transcode or self.cross_layer > 0
        super().__post_init__()


@dataclass
class EstimateConfig:
    """The run whose size is asked for; flags have the meaning they have in `train`."""

    model: str
    """Model: a Hub id, a local folder, or `llava`, `tiny-llava`, `tiny-llama`. Only its
    configuration is read."""

    sae: EstimatedCoder = field(default_factory=EstimatedCoder)

    optimizer: Literal["adam", "muon", "signum"] = "signum"
    """The optimizer."""

    batch_size: int = 32
    """Samples in a batch of one process."""

    ctx_len: int = 2048
    """Tokens per sample; real samples may be shorter, this counts them as full."""

    grad_acc_steps: int = 1
    """Batches whose gradients are added up before a step."""

    micro_acc_steps: int = 1
    """Parts the coders see a batch in."""

    stream_activations: bool = False
    """Run the model on `micro_acc_steps` parts of a batch, one after the other."""

    bf16_moments: bool = False
    """Keep Adam's two moments in bfloat16."""

    bf16_selection: bool = False
    """Find the candidates of `topk` in bfloat16."""

    loss_fn: Literal["fvu", "ce", "kl", "kl-fvu"] = "fvu"
    """What the coders are trained for; all but `fvu` keep the model's own results for a backward
    pass."""

    penalty: Literal["none", "l1", "tanh", "l0"] = "none"
    """Sparsity penalty."""

    auxk_alpha: float = 0.0
    """Weight of the loss that revives dead latents; above 0 it is counted with all of them dead."""

    activations: str | None = None
    """An activation store the run would read instead of running the model (the name is enough, it
    need not be there)."""

    batch_tokens: int = 4096
    """Tokens in a batch, for --activations."""

    layers: list[int] = field(default_factory=list)
    """Layers to train on. Default: all."""

    layer_stride: int = 1
    """Train on every so many layers."""

    device: str | None = None
    """Device, such as `cpu` or `cuda:1`. Default: a CUDA device if there is one."""

    dtype: str | None = None
    """The model's floating-point type. Default: bfloat16 on CUDA, float32 on the CPU."""

    load_in_8bit: bool = False
    """Load the model in 8-bit mode."""

    revision: str | None = None
    """Model revision."""

    trust_remote_code: bool = False
    """Allow the model's repository to bring code that is run on this machine."""

    hf_token: str | None = field(default=None, repr=False)
    """Hugging Face API token."""

    output: str | None = None
    """JSON file to write the figures to."""

    def __post_init__(self) -> None:
        names = ("batch_size", "ctx_len", "grad_acc_steps", "micro_acc_steps", "batch_tokens")
        for name in (*names, "layer_stride"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least 1")
        if self.layers and self.layer_stride != 1:
            raise UserError("--layers and --layer_stride exclude each other: give only one")
        if self.stream_activations and self.batch_size % self.micro_acc_steps:
            raise UserError(
                f"--stream_activations: --micro_acc_steps {self.micro_acc_steps} does not divide "
                f"--batch_size {self.batch_size}"
            )
        if self.dtype is not None and self.dtype not in BYTES:
            raise UserError(f"--dtype {self.dtype} is none of {', '.join(BYTES)}")


def estimate(cfg: EstimateConfig, *, probe: bool = True) -> Figures:
    """Print what a training run would take and return it as plain data.

    `probe` False leaves out the measured step and with it all times. Raises `UserError` for a model
    or device that is not there, and for coders that cannot be.
    """
    import torch

    from sparsify_vlm.files import check_output, has_format, write_json
    from sparsify_vlm.models.skeleton import read_skeleton
    from sparsify_vlm.training.probe import measure_step
    from sparsify_vlm.training.tables import print_estimate

    if cfg.output is not None:
        check_output("--output", cfg.output, lambda text: has_format(text, FORMAT))
    device = _device(cfg.device, torch)
    source = {"revision": cfg.revision, "token": cfg.hf_token}
    skeleton = read_skeleton(cfg.model, **source, trust_remote_code=cfg.trust_remote_code)
    sizes = Sizes(skeleton, device)
    figures = _figures(cfg, sizes, device_bytes(device))
    if probe:
        time = measure_step(sizes.job(cfg))
        figures["seconds_per_step"] = {
            "model": time.model,
            "coders": time.coders,
            "optimizer": time.optimizer,
            "total": time.total,
        }
        figures["tokens_per_s"] = time.tokens_per_s
    if cfg.output is not None:
        write_json(Path(cfg.output), figures)
    print_estimate(figures)
    return figures


def _device(name: str | None, torch: Any) -> Any:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here: {error}") from error
    return device


def device_bytes(device: Any) -> int | None:
    """Memory of a device, of all processes together; of a CPU what this process may use at most.

    None where the system does not tell.
    """
    if device.type == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(device).total_memory)
    if (
        device.type != "cpu"
        or not hasattr(os, "sysconf")
        or "SC_PHYS_PAGES" not in os.sysconf_names
    ):
        return None
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = CGROUP_LIMIT.read_text().strip() if CGROUP_LIMIT.is_file() else "max"
    return min(physical, int(limit)) if limit.isdigit() else physical


class Sizes:
    """From a configuration to the sizes that memory and time depend on."""

    def __init__(self, skeleton: Any, device: Any) -> None:
        self.skeleton, self.device = skeleton, device

    def hookpoints(self, cfg: EstimateConfig) -> list[str]:
        n = self.skeleton.n_layers
        if beyond := [layer for layer in cfg.layers if not 0 <= layer < n]:
            raise UserError(f"--layers {beyond[0]}: {cfg.model} has {n} layers, counted from 0")
        chosen = sorted(set(cfg.layers)) or list(range(0, n, cfg.layer_stride))
        return [f"layers.{layer}.mlp" for layer in chosen]

    def job(self, cfg: EstimateConfig) -> Any:
        """The `Job` of a configuration."""
        from sparsify_vlm.training.footprint import Job
        from sparsify_vlm.training.run import coder_config

        clt = coder_config(cfg, self.skeleton.d_model, self.hookpoints(cfg))
        live = cfg.activations is None
        length = min(cfg.ctx_len, self.skeleton.max_positions)
        return Job(
            clt=clt,
            optimizer=cfg.optimizer,
            tokens=cfg.batch_size * length if live else cfg.batch_tokens,
            samples=cfg.batch_size if live else 0,
            grad_acc_steps=cfg.grad_acc_steps,
            micro_acc_steps=cfg.micro_acc_steps,
            device=self.device,
            model=self.skeleton if live else None,
            weight_bytes=1 if cfg.load_in_8bit else self._number_bytes(cfg),
            number_bytes=2 if cfg.load_in_8bit or not live else self._number_bytes(cfg),
            bf16_moments=cfg.bf16_moments,
            bf16_selection=cfg.bf16_selection,
            stream_activations=cfg.stream_activations and live,
            loss_fn=cfg.loss_fn,
            penalised=cfg.penalty != "none",
            auxk=cfg.auxk_alpha > 0,
        )

    def _number_bytes(self, cfg: EstimateConfig) -> int:
        default = "float32" if self.device.type == "cpu" else "bfloat16"
        return BYTES[cfg.dtype or default]

    def peak(self, cfg: EstimateConfig) -> int:
        """Bytes at the peak of a configuration."""
        from sparsify_vlm.training.footprint import footprint

        return footprint(self.job(cfg)).peak


def _figures(cfg: EstimateConfig, sizes: Sizes, memory: int | None) -> Figures:
    from sparsify_vlm.training.fitting import ways_to_fit
    from sparsify_vlm.training.footprint import count_parameters, footprint, n_pairs

    job = sizes.job(cfg)
    parameters, held = count_parameters(job.clt), footprint(job)
    fits = None if memory is None else held.peak <= memory
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": cfg.model,
        "device": str(job.device),
        "coders": len(job.clt.source_layers()),
        "decoders": n_pairs(job.clt),
        "num_latents": job.clt.num_latents,
        "d_model": job.clt.d_model,
        "n_targets": job.clt.n_targets,
        "parameters": {
            "encoders": parameters.encoders,
            "decoders": parameters.decoders,
            "rest": parameters.rest,
            "total": parameters.total,
            "model": sizes.skeleton.parameters,
        },
        "tokens_per_step": job.tokens * job.grad_acc_steps,
        "bytes": held.as_dict(),
        "checkpoint_bytes": 2 * held.weights + held.optimizer,
        "device_bytes": memory,
        "fits": fits,
        "options": [] if fits is not False or memory is None else ways_to_fit(cfg, sizes, memory),
        "seconds_per_step": None,
        "tokens_per_s": None,
    }
