"""What a cross-layer transcoder is, apart from its weights.

Layers are positions in `hookpoints`. With offset o and at most n targets, the coder of layer l
reads x_l and writes to y_t for t = l+o … min(l+o+n, L) − 1. A layer that would have no target has
no coder; a layer no coder writes to has no reconstruction.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sparsify_vlm.errors import UserError

ACTIVATIONS = ("topk", "batchtopk", "groupmax", "relu", "jumprelu")
WITHOUT_K = ("relu", "jumprelu")
COALESCE = ("none", "concat", "per-layer")
INPUT_SITES = ("mlp_in", "resid_mid", "mlp_out")


@dataclass
class CltConfig:
    """Shape and meaning of a `Clt`. Raises `UserError` for values that contradict each other."""

    d_model: int
    """Width of x and y."""

    hookpoints: list[str]
    """One name per layer, in the model's order."""

    num_latents: int = 0
    """Latents per coder. If 0, `d_model * expansion_factor`."""

    k: int = 32
    """Active latents per token of one coder; the mean of it for `batchtopk`, the number of groups
    for `groupmax`. Set to `num_latents` for `relu` and `jumprelu`."""

    n_targets: int = 1
    """The most layers one coder writes to. 1 with `target_offset` 0 is a per-layer transcoder."""

    target_offset: int = 0
    """0: a coder's first target is its own layer. 1: the next layer."""

    activation: str = "topk"
    """`topk`: the k largest after a ReLU. `batchtopk`: the k·T largest of a batch of T tokens, when
    used those above one learned threshold. `groupmax`: the largest of each of k groups of
    neighbouring latents. `relu`: all positive ones. `jumprelu`: those above a threshold of their
    own."""

    jumprelu_bandwidth: float = 0.001
    """Width of the window around a JumpReLU's threshold within which the threshold gets a gradient
    (Rajamanoharan et al. 2024)."""

    jumprelu_init_threshold: float = 0.001
    """Threshold a JumpReLU starts training from."""

    transcode: bool = True
    """False: sparse autoencoders, x and y are the same and b_dec is subtracted before encoding."""

    skip_connection: bool = False
    """Add a linear map of x to each target."""

    own_skip_only: bool = False
    """A skip connection to the first target only."""

    train_post_encoder: bool = False
    """Add a trained bias per target to the activations of active latents."""

    post_encoder_scale: bool = False
    """Multiply the activations by a trained factor per target."""

    coalesce_topk: str = "none"
    """Where the decoders are kept: `none`: with the sources, one per target. `concat`: one with
    each target, shared by all its sources. `per-layer`: with the target, one per source. With the
    last two only the target's own coder has a skip connection."""

    topk_coalesced: bool = False
    """Of what all sources write to a target only the k largest per token are kept."""

    per_source_tied: bool = False
    """One decoder per source, the same for all its targets."""

    secondary_target_tied: bool = False
    """Each target's own first decoder is also applied to what every source writes to it."""

    divide_cross_layer: bool = False
    """Divide the sum of what the other layers' coders write to a target by their number."""

    normalize_io: bool = False
    """Work on x scaled to a mean norm of sqrt(d_model), and scale outputs back to y's."""

    normalize_decoder: bool = True
    """Keep decoder rows at unit norm (sparse autoencoders only)."""

    expansion_factor: int = 32
    """Latents per input dimension where `num_latents` is 0."""

    input_site: str = "mlp_in"
    """Where x is read: `mlp_in` (after the norm), `resid_mid` (before it) or `mlp_out` (x is y)."""

    model: str | None = None
    """Name or path of the model the coder was trained on."""

    revision: str | None = None
    """Revision of that model."""

    training: dict[str, Any] = field(default_factory=dict)
    """Summary of the training run, kept with the checkpoint."""

    def __post_init__(self) -> None:
        self.num_latents = self.num_latents or self.d_model * self.expansion_factor
        self.hookpoints = list(self.hookpoints)
        if self.activation in WITHOUT_K:
            self.k = self.num_latents
        if faults := self._faults():
            raise UserError(faults[0])

    def _faults(self) -> list[str]:
        checks = [
            (bool(self.hookpoints), "a coder needs at least one hookpoint"),
            (
                len(set(self.hookpoints)) == len(self.hookpoints),
                "a hookpoint is named more than once",
            ),
            (
                self.activation in ACTIVATIONS,
                f"activation '{self.activation}' is not supported; "
                f"choose one of {', '.join(ACTIVATIONS)}",
            ),
            (
                1 <= self.k <= self.num_latents,
                f"--k {self.k}: choose between 1 and the number of latents, {self.num_latents}",
            ),
            (
                self.activation != "groupmax" or self.num_latents % max(self.k, 1) == 0,
                f"--k {self.k}: groupmax needs a divisor of the number of latents, "
                f"{self.num_latents}",
            ),
            (
                self.jumprelu_bandwidth > 0,
                f"--jumprelu_bandwidth {self.jumprelu_bandwidth}: choose a positive width",
            ),
            (
                self.jumprelu_init_threshold >= 0,
                f"--jumprelu_init_threshold {self.jumprelu_init_threshold}: choose 0 or more",
            ),
            (self.n_targets >= 1, f"n_targets is {self.n_targets}; it must be at least 1"),
            (self.target_offset in (0, 1), f"--target_offset {self.target_offset}: choose 0 or 1"),
            (
                self.target_offset < max(len(self.hookpoints), 1),
                "--target_offset 1 leaves a single layer without a target; take more hookpoints",
            ),
            (
                self.input_site in INPUT_SITES,
                f"input_site '{self.input_site}' is none of {', '.join(INPUT_SITES)}",
            ),
            (
                self.transcode or (self.n_targets == 1 and self.target_offset == 0),
                "cross-layer targets need --transcode; an autoencoder writes to its own layer only",
            ),
            *self._decoder_checks(),
        ]
        return [message for good, message in checks if not good]

    def _decoder_checks(self) -> list[tuple[bool, str]]:
        """Whether the ways of keeping and combining decoders go together."""
        coalesced, second = self.coalesce_topk != "none", self.secondary_target_tied
        flag = f"--coalesce_topk {self.coalesce_topk}"
        at_target = flag if coalesced else "--secondary_target_tied"
        return [
            (
                self.coalesce_topk in COALESCE,
                f"{flag} is not supported; choose one of {', '.join(COALESCE)}",
            ),
            (
                not self.topk_coalesced or coalesced,
                "--topk_coalesced needs --coalesce_topk concat or per-layer",
            ),
            (
                not self.topk_coalesced or self.activation not in WITHOUT_K,
                f"--topk_coalesced needs a k, which activation {self.activation} has not",
            ),
            (
                not (coalesced and self.per_source_tied),
                f"{flag} keeps decoders with the targets, --per_source_tied with the sources: "
                "choose one",
            ),
            (
                not (coalesced and second),
                f"--secondary_target_tied adds decoders to those of the sources; {flag} has none",
            ),
            (
                not (coalesced and self.divide_cross_layer),
                f"--divide_cross_layer has no meaning with {flag}: leave one of them out",
            ),
            (
                not (second and self.divide_cross_layer),
                "--divide_cross_layer would divide one of two decoders with "
                "--secondary_target_tied: leave one of them out",
            ),
            (
                self.target_offset == 0 or not (coalesced or second),
                f"{at_target} needs --target_offset 0: a target's own coder keeps the decoder",
            ),
            (
                self.transcode or not (coalesced or second),
                f"{at_target} needs --transcode",
            ),
        ]

    @property
    def n_layers(self) -> int:
        """Number of hookpoints, L."""
        return len(self.hookpoints)

    def targets(self, source: int) -> range:
        """Layers the coder of layer `source` writes to, nearest first; empty if it has no coder."""
        first = source + self.target_offset
        return range(first, max(first, min(first + self.n_targets, self.n_layers)))

    def sources(self, target: int) -> list[tuple[int, int]]:
        """`(source, index of this target among the source's targets)` for each coder that writes
        to layer `target`, in the order of the layers."""
        last = target - self.target_offset
        first = max(0, last - self.n_targets + 1)
        return [(s, last - s) for s in range(first, last + 1)]

    def source_layers(self) -> range:
        """Layers that have a coder: all but the last `target_offset`."""
        return range(self.n_layers - self.target_offset)

    def target_layers(self) -> range:
        """Layers that some coder writes to: all but the first `target_offset`."""
        return range(self.target_offset, self.n_layers)

    def write_factor(self, source: int, target: int) -> float:
        """What all that layer `source` writes to layer `target` is multiplied with."""
        if not self.divide_cross_layer or source == target:
            return 1.0
        return 1 / max(1, sum(other != target for other, _ in self.sources(target)))
