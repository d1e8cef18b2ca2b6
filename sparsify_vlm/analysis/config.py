"""What `analyze` and `compare` can be told. Read without importing torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from sparsify_vlm.data.config import DataConfig
from sparsify_vlm.errors import UserError
from sparsify_vlm.replacement.config import ReplacedConfig

EXPERIMENTS = ("weights", "ablation", "features", "distance")
"""In the order of the report."""
WITHOUT_DATA = ("weights", "features", "distance")


def chosen(only: Sequence[str]) -> list[str]:
    """The experiments named in `only`, separated by spaces or commas, in the report's order.

    None named: all. Raises `UserError` for a name that is no experiment's.
    """
    names = [name for text in only for name in text.replace(",", " ").split()]
    for name in names:
        if name not in EXPERIMENTS:
            near = get_close_matches(name, EXPERIMENTS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(EXPERIMENTS)}"
            raise UserError(f"--only {name}: no such experiment; {hint}")
    return [name for name in EXPERIMENTS if not names or name in names]


def read_labels(file: str | None) -> dict[tuple[int, int], str]:
    """Texts by (layer, latent), from a JSON file like `{"3_117": "text"}` or `{"3/117": "text"}`.

    The first form is `trace --labels`'s. Raises `UserError` for a file of another content.
    """
    if file is None:
        return {}
    try:
        value = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not readable as JSON"
        raise UserError(f"--labels {file}: {reason}") from error
    if not isinstance(value, dict):
        raise UserError(f'--labels {file}: must be like {{"3_117": "text"}}')
    labels = {}
    for key, text in value.items():
        parts = key.replace("/", "_").split("_")
        if len(parts) != 2 or not all(p.isdecimal() for p in parts) or not isinstance(text, str):
            raise UserError(f'--labels {file}: {key!r} is not like "3_117": "text" (layer, latent)')
        labels[int(parts[0]), int(parts[1])] = text
    return labels


def _at_least(config: object, **bounds: int) -> None:
    for name, least in bounds.items():
        if (value := getattr(config, name)) < least:
            raise UserError(f"--{name} {value}: must be at least {least}")


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed {seed}: must be from 0 to 2^63 - 1")


@dataclass(kw_only=True)
class AnalyzeConfig(ReplacedConfig, DataConfig):
    """Which coder is analysed, on which tokens."""

    clt: str
    """Coder: a folder or a Hub id, in any readable format."""

    dataset: str | None = None
    """Dataset to measure on: `shapes`, a Hub id, or a local file or folder. Default: none, the
    weights alone."""

    activations: str | None = None
    """Activation store to read tokens from, instead of running the model on a dataset."""

    split: str = ""
    """Split to read. Default: heldout for shapes, validation for others."""

    max_examples: int | None = 500
    """Read at most this many samples."""

    batch_size: int = 16
    """Samples run through the model together."""

    only: list[str] = field(default_factory=list)
    """Experiments: weights, ablation, features, distance. Default: all, without a dataset all but
    ablation."""

    output_dir: str | None = None
    """Folder of report, figures and data. Default: analysis/NAME, by the coder's name."""

    plt: str | None = None
    """Per-layer transcoders trained alike, to compare the ablation with."""

    fit_activations: str | None = None
    """Activation store to refit same-layer decoders on, such as the one the coder was trained on.
    Default: one half of the measured samples for the other half."""

    refit_gib: float = 4.0
    """Memory for the refit's sums of one layer; where they need more, it is left out."""

    labels: str | None = None
    """JSON file of texts by latent (`{"LAYER_INDEX": "text"}`), shown with the top latents."""

    top: int = 5
    """Latents listed of each layer, those with the largest cross-layer scores."""

    causal: int = 16
    """Top latents, and as many random ones, whose writes are also removed in the model, one latent
    at a time; 0: none."""

    bootstrap: int | None = None
    """Resamples behind intervals over source layers. Default: 2000, with fewer than 30 layers
    20000."""

    seed: int = 0
    """Seed of all that is random."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.only = chosen(self.only) if self.only else []
        _at_least(self, batch_size=1, top=1, causal=0)
        _check_seed(self.seed)
        if self.bootstrap is not None:
            _at_least(self, bootstrap=100)
        if self.activations and (self.dataset or self.dataset_mix):
            raise UserError("--activations and --dataset exclude each other; give one of them")
        if "ablation" in self.only and not self.has_data:
            raise UserError("--only ablation measures on tokens: give a DATASET or --activations")
        for flag in ("plt", "fit_activations"):
            if getattr(self, flag) and "ablation" not in self.experiments():
                need = "--only ablation" if self.has_data else "a DATASET or --activations"
                raise UserError(f"--{flag} is used in the ablation only: give {need} too")
        read_labels(self.labels)

    @property
    def has_data(self) -> bool:
        """Whether there are tokens to weigh by."""
        return bool(self.dataset or self.dataset_mix or self.activations)

    def experiments(self) -> list[str]:
        """What is to be done, in order."""
        return self.only or list(EXPERIMENTS if self.has_data else WITHOUT_DATA)


@dataclass(kw_only=True)
class CompareConfig:
    """Which two coders are compared: two CLTs, or folders that `analyze` wrote."""

    text_clt: str | None = None
    """CLT of a text model, or the folder that analyze wrote about it."""

    vlm_clt: str | None = None
    """CLT of a vision-language model, or the folder that analyze wrote about it."""

    text: list[str] = field(default_factory=list)
    """Several of the text model's instead, one per training seed."""

    vlm: list[str] = field(default_factory=list)
    """Several of the vision-language model's instead, one per training seed."""

    text_dataset: str | None = None
    """Dataset that the text model's CLTs are analysed on, where they are not yet."""

    vlm_dataset: str | None = None
    """Dataset that the vision-language model's CLTs are analysed on, where they are not yet."""

    max_examples: int | None = 500
    """Read at most this many samples of each dataset."""

    split: str = ""
    """Split of both datasets. Default: heldout for shapes, validation for others."""

    only: list[str] = field(default_factory=list)
    """Experiments: weights, ablation, features, distance. Default: all that both sides have."""

    output_dir: str = "comparison"
    """Folder of report, figures and data."""

    device: str | None = None
    """Where models and coders run. Default: cuda if there, else cpu."""

    dtype: str | None = None
    """Type of the models' numbers. Default: float32 on a CPU, bfloat16 elsewhere."""

    seed: int = 0
    """Seed of all that is random."""

    def __post_init__(self) -> None:
        self.only = chosen(self.only) if self.only else []
        _check_seed(self.seed)
        for one, several in (("text_clt", "text"), ("vlm_clt", "vlm")):
            if getattr(self, one) and getattr(self, several):
                raise UserError(f"{one.upper()} and --{several} exclude each other")
            given = [getattr(self, one) or "", *getattr(self, several)]
            split = [part for text in given for part in text.split(",") if part]
            if not split:
                raise UserError(f"{one.upper()} (or --{several}) is missing: what is compared?")
            setattr(self, several, split)
