"""What `train` can be told: sparsify's own settings and those of a cross-layer transcoder.

Fields that are not repeated here, with their defaults and meanings, are sparsify's (`config.py`
there). Settings of sparsify that this trainer does not have yet are refused by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from simple_parsing import field

from sparsify_vlm.errors import UserError
from sparsify_vlm.training import upstream

if TYPE_CHECKING:
    from sparsify_vlm.coders import Objective


@dataclass
class CoderConfig(upstream.SparseCoderConfig):
    """One coder per hookpoint, and the layers it writes to."""

    cross_layer: int = 0
    """Number of layers each coder writes to, counted in the list of hookpoints. 0: a coder per
    layer that writes to its own layer only."""

    target_offset: Literal[0, 1] = 0
    """First layer a coder writes to: 0 its own layer, 1 the next one."""

    post_encoder_scale: bool = False
    """Learn a scale per latent and target on the activation a decoder reads."""

    train_post_encoder: bool = False
    """Learn a bias per latent and target, added to active latents before a decoder reads them."""

    input_site: Literal["mlp_in", "resid_mid"] = "mlp_in"
    """What a transcoder reads: the MLP's input after its norm, or the residual stream before it."""

    activation: Literal["topk", "batchtopk", "groupmax", "relu", "jumprelu"] = "topk"
    """Which latents are active: the k largest of a token (`topk`), k per token on average over the
    batch (`batchtopk`), the largest of each of k groups (`groupmax`), all positive ones (`relu`),
    those above a learned threshold of their own (`jumprelu`). The last two need a `penalty`."""

    jumprelu_bandwidth: float = 0.001
    """Width of the window around a JumpReLU's threshold within which the threshold gets a gradient
    (Rajamanoharan et al. 2024)."""

    jumprelu_init_threshold: float = 0.001
    """Threshold a JumpReLU starts training from."""

    coalesce_topk: Literal["none", "concat", "per-layer"] = "none"
    """Where the decoders are kept: `none`: with the sources, one per target. `concat`: one with
    each target, shared by all its sources. `per-layer`: with the target, one per source. With the
    last two only the target's own coder has a skip connection."""

    topk_coalesced: bool = False
    """Of what all sources write to a target only the k largest per token are kept."""

    per_source_tied: bool = False
    """One decoder per source, the same for all its targets."""

    secondary_target_tied: bool = False
    """Each target's own first decoder is also applied to what every source writes to it."""

    normalize_io: bool = False
    """Work on x scaled to a mean norm of sqrt(d_model), and scale outputs back to y's."""

    divide_cross_layer: bool = False
    """Divide the sum of what the other layers' coders write to a target by their number."""

    def __post_init__(self) -> None:
        _check_coder(self)

    @property
    def n_targets(self) -> int:
        """The number of targets asked of each coder, at least 1."""
        return max(self.cross_layer, 1)


@dataclass
class RunConfig:
    """The model that is trained on, and how it is loaded."""

    model: str | None = None
    """Model: a Hub id, a local folder, or `llava`, `tiny-llava`, `tiny-llama`."""

    revision: str | None = None
    """Model revision to use for training."""

    device: str | None = None
    """Device, such as `cpu` or `cuda:1`. Default: a CUDA device if there is one."""

    dtype: str | None = None
    """The model's floating-point type. Default: bfloat16 on CUDA, float32 on the CPU."""

    trust_remote_code: bool = False
    """Allow the model's repository to bring code that is run on this machine."""

    load_in_8bit: bool = False
    """Load the model in 8-bit mode (needs bitsandbytes)."""

    load_in_4bit: bool = False
    """Load the model in 4-bit mode (NF4)."""

    # The token is left out of what simple-parsing writes to files.
    hf_token: str | None = field(default=None, repr=False, encoding_fn=lambda _: None)
    """Hugging Face API token for downloading models."""


@dataclass
class TrainConfig(upstream.TrainConfig):
    """How the coders are trained."""

    sae: CoderConfig

    loss_fn: Literal["fvu", "ce", "kl", "kl-fvu"] = "fvu"
    """What the coders are trained for: to reconstruct what the MLPs write (`fvu`), the predictions
    of the model with all MLPs replaced (`ce`: of the next token, `kl`: the model's own), or both
    (`kl-fvu`). All but `fvu` need the running model."""

    kl_coeff: float = 1.0
    """Weight of the predictions' part of `ce`, `kl` and `kl-fvu`."""

    penalty: Literal["none", "l1", "tanh", "l0"] = "none"
    """Sparsity penalty: the sum over latents of the activation times its decoder's norm (`l1`), of
    a tanh of it (`tanh`), or the number of active latents (`l0`, which trains `jumprelu`'s
    thresholds). Mean over tokens."""

    penalty_coefficient: float = 0.001
    """Weight of the penalty in the loss."""

    penalty_warmup_steps: int = 0
    """Number of steps over which the penalty's weight rises linearly from 0."""

    tanh_scale: float = 4.0
    """Factor within the `tanh` of the penalty."""

    penalty_norm: Literal["concat", "sum"] = "concat"
    """Norm of a latent's decoders in the penalty: that of all of them in one vector, or the sum of
    the norms of each target's."""

    bf16_selection: bool = False
    """Find the candidates of `topk` in bfloat16; their exact activations decide."""

    activations: str | None = None
    """Train from this activation store (see `capture`) instead of the running model."""

    batch_tokens: int = 4096
    """Batch size measured in tokens, for `--activations`; per process, like `batch_size`."""

    max_steps: int | None = None
    """Number of optimizer steps, whatever `epochs` says: the data is repeated if need be. Needed
    where a dataset's length is unknown and the learning rate decays (`adam`, `muon`)."""

    epochs: int = 1
    """Number of passes through the dataset, if `max_steps` does not say how long the run is."""

    filter_bos: bool = True
    """Leave the beginning-of-sequence token out of training and of every figure."""

    remove_first_token: bool = False
    """Leave the first token of every sample out, whatever it is."""

    stream_activations: bool = False
    """Run the model on `micro_acc_steps` parts of a batch, one after the other, so that never more
    than one part's activations are in memory. The model runs twice over every batch: first for
    the variances that the loss divides by."""

    bf16_moments: bool = False
    """Keep Adam's two moments in bfloat16: 4 bytes per parameter instead of 8."""

    tp: int = 1
    """Number of processes that hold one coder together (tensor parallel); it divides the number of
    processes of the run. The others share out the tokens."""

    tp_layout: Literal["auto", "feature", "column"] = "auto"
    """How `--tp` divides the coders: everything by latents (`feature`), or encoders by latents and
    decoders by columns of `d_model` (`column`). `auto` takes what sends less."""

    resume: bool = False
    """Continue the run of this name exactly where its last checkpoint stands."""

    overwrite: bool = False
    """Start anew in the place of the run of this name, which is deleted when the new one has saved
    for the first time."""

    log_to_wandb: bool = False
    """Log to Weights & Biases (`pip install 'sparsify-vlm[log]'`)."""

    log_to_tensorboard: bool = False
    """Write TensorBoard event files into the run's folder."""

    log_to_trackio: bool = False
    """Log to trackio."""

    log_every: int = 1
    """Write a line of metrics.jsonl every so many steps."""

    run_name: str | None = None
    """Name of the run: its folder within `save_dir`. Default: `unnamed`."""

    wandb_log_frequency: int = 1
    """Log to Weights & Biases, TensorBoard and trackio every so many lines of metrics.jsonl."""

    save_dir: str = "checkpoints"
    """Folder that holds the runs."""

    def __post_init__(self) -> None:
        _check_hookpoints(self)
        _check_counts(self)
        _check_streaming(self)
        _check_objective(self)
        _check_parallel(self)
        _check_supported(self)
        if self.resume and self.overwrite:
            raise UserError("--resume continues a run and --overwrite deletes it: give only one")
        super().__post_init__()

    def objective(self, step: int = 0) -> Objective:
        """What step `step` (from 0) minimises beside the FVU."""
        from sparsify_vlm.coders import Objective

        share = min(1.0, (step + 1) / max(self.penalty_warmup_steps, 1))
        return Objective(
            penalty=self.penalty,
            coefficient=self.penalty_coefficient * share,
            tanh_scale=self.tanh_scale,
            penalty_norm=self.penalty_norm,
            auxk_alpha=self.auxk_alpha,
        )

    @property
    def seed(self) -> int:
        """The one seed of the coders' initial weights."""
        return self.init_seeds[0]


_LARGEST = 3.4e38  # of what float32, in which the coders are trained, can hold
_MOST = {"num_latents": 10**12, "expansion_factor": 10**7}  # keeps numbers of bytes in 64 bits


def _check_coder(cfg: CoderConfig) -> None:
    if cfg.cross_layer < 0:
        raise UserError(
            f"--cross_layer {cfg.cross_layer} is negative: give the number of layers each coder "
            "writes to, or 0 for per-layer coders"
        )
    if cfg.cross_layer > 0 and not cfg.transcode:
        raise UserError(
            "--cross_layer needs --transcode: an autoencoder has no other layer to write to"
        )
    if cfg.target_offset not in (0, 1):
        raise UserError(f"--target_offset {cfg.target_offset}: must be 0 or 1")
    if cfg.target_offset == 1 and cfg.cross_layer == 0:
        raise UserError("--target_offset 1 needs --cross_layer: a per-layer coder has no next one")
    if not cfg.transcode and cfg.input_site != "mlp_in":
        raise UserError(
            f"--input_site {cfg.input_site} needs --transcode: an autoencoder reads what it writes"
        )
    if cfg.k < 1:
        raise UserError(f"--k {cfg.k}: at least 1 latent must be active")
    if cfg.num_latents < 0 or (cfg.num_latents == 0 and cfg.expansion_factor < 1):
        raise UserError("give --expansion_factor or --num_latents as a positive number")
    if cfg.num_latents and cfg.k > cfg.num_latents:
        raise UserError(
            f"--k {cfg.k} is larger than --num_latents {cfg.num_latents}: lower --k or raise the "
            "number of latents"
        )
    for name, most in _MOST.items():
        if getattr(cfg, name) > most:
            raise UserError(f"--{name} {getattr(cfg, name)}: {most} is the most")
    if cfg.jumprelu_init_threshold > _LARGEST or cfg.jumprelu_bandwidth < 1 / _LARGEST:
        raise UserError(
            "--jumprelu_init_threshold is too large or --jumprelu_bandwidth too small for float32"
        )
    if cfg.multi_topk:
        raise UserError("--multi_topk is not supported yet: leave it out")


def _check_hookpoints(cfg: TrainConfig) -> None:
    if cfg.layers and cfg.hookpoints:
        raise UserError("--layers and --hookpoints name the same thing: give only one")
    if cfg.layers and cfg.layer_stride != 1:
        raise UserError("--layers and --layer_stride exclude each other: give only one")
    if len(set(cfg.layers)) < len(cfg.layers) or any(layer < 0 for layer in cfg.layers):
        raise UserError(f"--layers {cfg.layers}: give every layer once, counted from 0")


_AT_LEAST_ONE = (
    "batch_size",
    "batch_tokens",
    "grad_acc_steps",
    "micro_acc_steps",
    "epochs",
    "layer_stride",
    "save_every",
    "log_every",
    "wandb_log_frequency",
)


def _check_counts(cfg: TrainConfig) -> None:
    for name in _AT_LEAST_ONE:
        if getattr(cfg, name) < 1:
            raise UserError(f"--{name} {getattr(cfg, name)}: must be at least 1")
    if cfg.max_steps is not None and cfg.max_steps < 1:
        raise UserError(f"--max_steps {cfg.max_steps}: must be at least 1")
    if cfg.lr is not None and not 0 < cfg.lr <= _LARGEST:
        raise UserError(f"--lr {cfg.lr}: must be positive and finite")
    for name in ("lr_warmup_steps", "k_decay_steps", "dead_feature_threshold"):
        if getattr(cfg, name) < 0:
            raise UserError(f"--{name} {getattr(cfg, name)}: must not be negative")
    for name in (*_AT_LEAST_ONE, "dead_feature_threshold"):
        if getattr(cfg, name) >= 2**63:
            raise UserError(f"--{name} {getattr(cfg, name)}: too large a number")
    if any(not 0 <= token < 2**63 for token in cfg.exclude_tokens):
        raise UserError(f"--exclude_tokens {cfg.exclude_tokens}: tokens are numbers from 0 on")


def _check_streaming(cfg: TrainConfig) -> None:
    if not cfg.stream_activations:
        return
    if cfg.activations is not None:
        raise UserError(
            "--stream_activations runs the model in parts; with --activations lower --batch_tokens"
        )
    if cfg.micro_acc_steps == 1 or cfg.batch_size % cfg.micro_acc_steps:
        raise UserError(
            f"--stream_activations runs the model on --micro_acc_steps parts of a batch: "
            f"{cfg.micro_acc_steps} does not divide --batch_size {cfg.batch_size} into equal ones; "
            "give a divisor from 2 on"
        )


def _check_objective(cfg: TrainConfig) -> None:
    for name in ("penalty_coefficient", "tanh_scale", "auxk_alpha", "kl_coeff"):
        if not 0 <= getattr(cfg, name) < math.inf:
            raise UserError(f"--{name} {getattr(cfg, name)}: must be a finite number from 0 on")
    if cfg.penalty_warmup_steps < 0:
        raise UserError("--penalty_warmup_steps must not be negative")
    if cfg.penalty == "none" and cfg.sae.activation in ("relu", "jumprelu"):
        raise UserError(
            f"--activation {cfg.sae.activation} is not sparse of itself: give --penalty l1 or tanh"
            + (", or l0" if cfg.sae.activation == "jumprelu" else "")
        )
    if cfg.penalty == "l0" and cfg.sae.activation != "jumprelu":
        raise UserError("--penalty l0 trains the thresholds of --activation jumprelu only")
    if cfg.penalty != "none" and cfg.sae.secondary_target_tied:
        raise UserError("--penalty is not defined for --secondary_target_tied: leave one out")
    if cfg.k_decay_steps and cfg.sae.activation in ("groupmax", "relu", "jumprelu"):
        raise UserError(
            f"--k_decay_steps lowers k step by step, which --activation {cfg.sae.activation} cannot"
        )
    if cfg.loss_fn != "fvu" and cfg.activations is not None:
        raise UserError(
            f"--loss_fn {cfg.loss_fn} runs the model on its own text: leave --activations out"
        )
    if cfg.bf16_moments and cfg.optimizer == "signum":
        raise UserError(
            "--bf16_moments is about the two moments of Adam, which --optimizer signum does not "
            "keep: leave it out or take adam"
        )
    if cfg.bf16_selection and cfg.sae.activation != "topk":
        raise UserError("--bf16_selection is for --activation topk only")


def _check_parallel(cfg: TrainConfig) -> None:
    if cfg.tp < 1:
        raise UserError(f"--tp {cfg.tp}: must be at least 1")
    if cfg.tp == 1:
        return
    if cfg.optimizer == "muon":
        raise UserError("--tp divides the matrices that --optimizer muon needs whole: take adam")
    if cfg.loss_fn != "fvu":
        raise UserError(
            f"--tp divides the coders, which --loss_fn {cfg.loss_fn} needs whole: take fvu"
        )
    if cfg.tp_layout == "column" and not cfg.sae.transcode:
        raise UserError(
            "--tp_layout column needs --transcode: autoencoders read what they write. Take feature"
        )


def _check_supported(cfg: TrainConfig) -> None:
    refused = {
        "--distribute_modules": (cfg.distribute_modules, "every process trains all coders"),
        "--save_best": (cfg.save_best, "leave it out"),
        "more than one of --init_seeds": (len(cfg.init_seeds) > 1, "train a run per seed"),
    }
    for what, (asked, instead) in refused.items():
        if asked:
            raise UserError(f"{what} is not supported yet: {instead}")
    if not cfg.init_seeds:
        raise UserError("--init_seeds needs one seed")
    if (name := cfg.run_name) is not None and (name in ("", "..") or Path(name).name != name):
        raise UserError(
            f"--run_name {name or 'is empty'}: give the name of one folder, made in --save_dir"
        )
    if not -(2**63) <= cfg.seed < 2**63:
        raise UserError(f"--init_seeds {cfg.seed}: a seed has 64 bits, give a smaller number")
