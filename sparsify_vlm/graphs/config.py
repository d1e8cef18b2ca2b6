"""What `trace` and `verify` can be told."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal, get_args

from sparsify_vlm.errors import UserError
from sparsify_vlm.replacement.config import ReplacedConfig

PatchGradient = Literal["frozen", "plain"]
PATCH_GRADIENTS: tuple[str, ...] = get_args(PatchGradient)

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}


def in_bytes(flag: str, text: str) -> int:
    """`8GiB`, `512 MB` or a number of bytes. Raises `UserError` for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].lower() not in _UNITS or float(found[1]) == 0:
        raise UserError(f"{flag} '{text}': give a size such as 8GiB or 512MiB")
    return int(float(found[1]) * _UNITS[found[2].lower()])


@dataclass(kw_only=True)
class TraceConfig(ReplacedConfig):
    """What is traced, and where the graph goes."""

    clt: str
    """Coder: a folder or a Hub id, in any readable format."""

    prompt: str | None = None
    """What is asked. A user's turn in the model's chat template, or see `--raw`."""

    image: list[str] = field(default_factory=list)
    """Pictures shown before the prompt: files or URLs."""

    scene: int | None = None
    """Trace this held-out scene of the embedded shapes (0, 1, …), with its question where there is
    no `--prompt`."""

    raw: bool = False
    """Take the prompt as it is, image tokens included, without a chat template. Text models without
    a template always do."""

    output_dir: str | None = None
    """Folder of the graph. Default: graphs/SLUG."""

    slug: str | None = None
    """Name of the graph: SLUG.json. Default: words of prompt and answer."""

    scan: str | None = None
    """The model's name at Neuronpedia. Default: the last part of the model's own."""

    max_n_logits: int = 10
    """Explain at most this many of the likeliest next tokens."""

    desired_logit_prob: float = 0.95
    """Explain as few of them as reach this probability together."""

    max_feature_nodes: int = 3000
    """Features that become nodes, the most influential first; 0: all that are active."""

    target_tokens: list[str] = field(default_factory=list)
    """Explain these tokens instead, each text that is one token of the model."""

    difference: list[str] = field(default_factory=list)
    """Explain the logit of the first of two tokens minus that of the second."""

    patches: bool = False
    """Attribute image tokens on to the patches of pixels, through the vision tower."""

    # PatchGradient, whose name simple-parsing would look for in the module of the base class.
    patch_gradient: Literal["frozen", "plain"] = "frozen"
    """Gradient through the vision tower, for --patches: frozen (attention patterns and norm scales
    are constants) or plain."""

    memory: str = "4GiB"
    """Memory for rows and gradients, beside model and coder."""

    node_threshold: float = 0.8
    """Share of the influence that the nodes of SLUG.json hold; graph.safetensors has them all."""

    edge_threshold: float = 0.98
    """Share of the influence that its edges hold."""

    labels: str | None = None
    """JSON file of texts by feature (`{"LAYER_INDEX": "text"}`), carried along."""

    examples: str | None = None
    """File examples.json of another graph folder, carried along with its pictures."""

    def __post_init__(self) -> None:
        if self.difference and len(self.difference) != 2:
            raise UserError(f"--difference takes two tokens, not {len(self.difference)}")
        if self.patch_gradient != "frozen" and not self.patches:
            raise UserError(f"--patch_gradient {self.patch_gradient} needs --patches")
        for name in ("desired_logit_prob", "node_threshold", "edge_threshold"):
            if not 0 < (value := getattr(self, name)) <= 1:
                raise UserError(f"--{name} {value}: must be above 0 and at most 1")
        for name, least in (("max_n_logits", 1), ("max_feature_nodes", 0)):
            if (value := getattr(self, name)) < least:
                raise UserError(f"--{name} {value}: must be at least {least}")
        if self.scene is not None and (self.scene < 0 or self.image):
            raise UserError("--scene takes a number from 0, and no --image beside it")
        if self.scene is None and not self.prompt:
            raise UserError("--prompt is missing: what is the model asked?")
        if self.patches and self.scene is None and not self.image:
            raise UserError("--patches needs a picture: give --image or --scene")
        in_bytes("--memory", self.memory)


@dataclass(kw_only=True)
class VerifyConfig(ReplacedConfig):
    """Which graph, and how much of it is checked."""

    graph: str
    """Folder of a graph, as `trace` writes it."""

    clt: str | None = None
    """Coder. Default: the one the graph was made with."""

    samples: int = 50
    """Features set to 0, one after another: half of them the most influential, half random."""

    top: list[int] = field(default_factory=lambda: [1, 5, 10, 20])
    """How many features are set to 0 together, the strongest against random ones."""

    draws: int = 10
    """Random draws beside each of these."""

    seed: int = 0
    """Seed of all that is random."""

    def __post_init__(self) -> None:
        for name in ("samples", "draws"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least 1")
        if not self.top or min(self.top) < 1:
            raise UserError("--top takes numbers from 1")
