"""`verify`: what a graph predicts, against what the model does when features are set to 0.

1. The model runs the graph's prompt again; its active features must be the graph's.
2. One feature after another is set to 0, half of them the most influential, half random.
   constrained: every feature node and target must change by −A[t, s], edges that are not there
   included. free: nothing is frozen, the model's own MLPs carry the change on; it is compared with
   what the graph predicts over all paths (`changes_without`), for targets and for activations.
3. The features with the largest total effect on the first target are set to 0 together, and as
   many random ones.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sparsify_vlm.coders import load_clt
from sparsify_vlm.errors import UserError
from sparsify_vlm.files import write_json
from sparsify_vlm.graphs.config import VerifyConfig
from sparsify_vlm.graphs.effects import changes_without, total_effects
from sparsify_vlm.graphs.graph import AttributionGraph
from sparsify_vlm.graphs.tracing import INPUTS, INPUTS_FORMAT
from sparsify_vlm.replacement import Intervention, LocalModel, VLMReplacementModel
from sparsify_vlm.replacement.interventions import Intervened
from sparsify_vlm.replacement.loading import load_replacement

FORMAT, VERSION, OUTPUT = "sparsify-vlm verification", 1, "verify.json"
EXACT = 1e-4
"""Largest error of an exact prediction, in units of the largest change predicted or of 1."""
SAME = 1e-3
"""How far activations may be from the graph's, in the same units."""


@dataclass
class Agreement:
    """Predicted against measured changes.

    slope: of measured on predicted, through 0; worst: the largest error; largest: the largest
    prediction. correlation and slope are None where nothing varies.
    """

    n: int
    correlation: float | None
    slope: float | None
    worst: float
    largest: float

    @classmethod
    def of(cls, predicted: Tensor, measured: Tensor) -> Agreement:
        """Of changes [n]."""
        p, m = predicted.double(), measured.double()
        if not len(p):
            return cls(0, None, None, 0.0, 0.0)
        spread = p.std(correction=0) * m.std(correction=0)
        together = ((p - p.mean()) * (m - m.mean())).mean()
        power = (p * p).sum()
        return cls(
            len(p),
            float(together / spread) if spread > 0 else None,
            float((p * m).sum() / power) if power > 0 else None,
            float((p - m).abs().max()),
            float(p.abs().max()),
        )

    @property
    def exact(self) -> bool:
        """Whether no prediction is off by more than rounding."""
        return self.worst <= EXACT * max(1.0, self.largest)


@dataclass
class Together:
    """The first target's change without n features: strongest, and random draws."""

    n: int
    predicted: float
    measured: float
    random_predicted: float
    random_measured: float
    random_deviation: float
    """Standard deviation of the measured changes over draws."""


@dataclass
class Verification:
    """What `verify` found."""

    constrained: Agreement
    free_targets: Agreement
    free_features: Agreement
    together: list[Together]
    target: str
    samples: int


def verify(cfg: VerifyConfig) -> Verification:
    """Check the graph of a folder, print the figures and write verify.json.

    Raises `UserError` for a folder that is damaged or belongs to another model or coder.
    """
    folder = Path(cfg.graph)
    graph, inputs = AttributionGraph.load(folder), _inputs(folder)
    cfg.model = cfg.model or graph.info.get("model")
    cfg.dtype = cfg.dtype or graph.info.get("dtype")
    clt = cfg.clt or graph.info.get("clt")
    if clt is None:
        raise UserError(f"{folder} does not say which coder it was made with: give --clt")
    model = load_replacement(cfg, load_clt(clt), clt)
    found = verify_graph(model, graph, inputs, cfg, name=str(folder))
    told = {
        "format": FORMAT,
        "version": VERSION,
        "model": model.loaded.name,
        "clt": clt,
        "seed": cfg.seed,
        "exact": found.constrained.exact,
    }
    write_json(folder / OUTPUT, told | asdict(found))
    print(table(found))
    print(f"\nWritten to {folder / OUTPUT}.")
    return found


def verify_graph(
    model: VLMReplacementModel,
    graph: AttributionGraph,
    inputs: dict[str, Tensor],
    cfg: VerifyConfig,
    name: str = "the graph",
) -> Verification:
    """Check a graph against `model` on the prompt it was made of."""
    if not graph.n_features:
        raise UserError(f"{name} has no feature nodes: there is nothing to verify")
    readable = _readable(graph)
    if not readable:
        raise UserError(f"{name} has no target that is a token: its changes cannot be read")
    local = LocalModel(model, inputs)
    _check_same(graph, local, name)
    sampled = _sample(graph, cfg)
    runs = _Runs(model, local, graph, readable)
    direct, free_targets, free_features = _one_by_one(runs, sampled)
    return Verification(
        direct,
        free_targets,
        free_features,
        _sets(runs, cfg),
        graph.target_labels[readable[0]],
        len(sampled),
    )


def _inputs(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    path = folder / INPUTS
    if not path.is_file():
        raise UserError(f"{path}: no such file; `sparsify-vlm trace` writes it")
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: not readable as safetensors") from error
    if metadata != INPUTS_FORMAT or "input_ids" not in tensors:
        raise UserError(f"{path} is damaged: it holds no prompt")
    return tensors


def _check_same(graph: AttributionGraph, local: LocalModel, name: str) -> None:
    """Raise `UserError` unless the prompt's active features are the graph's."""
    other = UserError(
        f"{name}: with this model and coder other features are active than in the graph; give the "
        "--model and --clt that it was made with"
    )
    if local.n_positions != graph.n_positions or local.n_layers != graph.n_layers:
        raise other
    values = graph.activation_values
    found, total = torch.zeros_like(values), 0
    for layer, latents in local.latents.items():
        total += int((latents.values > 0).sum())
        here = graph.active_features[:, 0] == layer
        _, position, index = graph.active_features[here].T
        at = latents.indices.cpu()[position] == index[:, None]
        found[here] = (latents.values.cpu().float()[position] * at).sum(1)
    limit = SAME * max(1.0, float(values.abs().max()))
    if total != len(values) or float((found - values).abs().max()) > limit:
        raise other


def _readable(graph: AttributionGraph) -> list[int]:
    """The targets whose changes can be read off logits."""
    tokens = (graph.logit_token_ids >= 0).nonzero()[:, 0].tolist()
    more = [len(graph.target_labels) - 1] if "difference" in graph.info else []
    return sorted({*tokens, *more})


def _sample(graph: AttributionGraph, cfg: VerifyConfig) -> Tensor:
    """Feature nodes: the most influential, and random others."""
    n = min(cfg.samples, graph.n_features)
    order = graph.node_influence()[: graph.n_features].argsort(descending=True, stable=True)
    strongest, others = order[: (n + 1) // 2], order[(n + 1) // 2 :]
    generator = torch.Generator().manual_seed(cfg.seed)
    drawn = others[torch.randperm(len(others), generator=generator)[: n // 2]]
    return torch.cat([strongest, drawn])


class _Runs:
    """The model with features set to 0, and what its nodes change by."""

    def __init__(
        self,
        model: VLMReplacementModel,
        local: LocalModel,
        graph: AttributionGraph,
        readable: list[int],
    ) -> None:
        self.model, self.local, self.graph, self.readable = model, local, graph, readable
        self.base = {mode: self._run(mode, []) for mode in ("constrained", "free")}

    def without(
        self, mode: Literal["constrained", "free"], features: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Changes of the feature nodes [m] (pre-activations in `constrained`, else activations)
        and of the readable targets."""
        values, targets = self._run(mode, features)
        return values - self.base[mode][0], targets - self.base[mode][1]

    def _run(self, mode: Any, features: Sequence[int]) -> tuple[Tensor, Tensor]:
        table = self.graph.features
        places = [table[f].tolist() for f in features]
        changes = [Intervention(layer, p, latent, 0.0) for layer, p, latent in places]
        out = self.model.intervene(self.local, changes, mode)
        return out.features(table), self._targets(out)

    def _targets(self, out: Intervened) -> Tensor:
        logits = out.unembedded[-1].cpu().double()
        values = []
        for target in self.readable:
            token = int(self.graph.logit_token_ids[target])
            if token >= 0:
                values.append(logits[token] - logits.mean())
            else:
                plus, minus = self.graph.info["difference"]
                values.append(logits[plus] - logits[minus])
        return torch.stack(values)


def _one_by_one(runs: _Runs, sampled: Tensor) -> tuple[Agreement, Agreement, Agreement]:
    """Agreement of direct edges, and of total effects on targets and on features."""
    graph, m = runs.graph, runs.graph.n_features
    targets = graph.target_nodes.start + torch.tensor(runs.readable)
    nodes = torch.cat([torch.arange(m), targets])
    direct = _columns(graph, sampled)[:, nodes]
    total = changes_without(graph, [f[None] for f in sampled])[:, nodes]
    active = graph.activation_values[graph.selected_features].double()
    exact, free = [], []
    for feature in sampled.tolist():
        exact.append(torch.cat([c.double() for c in runs.without("constrained", [feature])]))
        free.append(torch.cat([c.double() for c in runs.without("free", [feature])]))
    measured = torch.stack(free)
    # an activation falls no further than to 0; the feature that is set says nothing
    clipped = torch.maximum(total[:, :m], -active)
    reached = (total[:, :m] != 0) & (torch.arange(m) != sampled[:, None])
    return (
        Agreement.of(-direct.flatten(), torch.stack(exact).flatten()),
        Agreement.of(total[:, m:].flatten(), measured[:, m:].flatten()),
        Agreement.of(clipped[reached], measured[:, :m][reached]),
    )


def _columns(graph: AttributionGraph, sources: Tensor) -> Tensor:
    """Edges [sources, N] that leave some features, 0 where there is none."""
    edges = graph.edges
    row = torch.full((graph.n_nodes,), -1, dtype=torch.int64)
    row[sources] = torch.arange(len(sources))
    here = row[edges.source] >= 0
    dense = torch.zeros(len(sources), graph.n_nodes, dtype=torch.float64)
    dense[row[edges.source[here]], edges.target[here]] = edges.weight[here].double()
    return dense


def _sets(runs: _Runs, cfg: VerifyConfig) -> list[Together]:
    """The first readable target without the strongest features, and without random ones."""
    graph = runs.graph
    node = graph.target_nodes.start + runs.readable[0]
    effects = total_effects(graph)[runs.readable[0], : graph.n_features]
    order = effects.argsort(descending=True, stable=True)
    generator = torch.Generator().manual_seed(cfg.seed + 1)
    found = []
    for n in sorted({min(n, graph.n_features) for n in cfg.top}):
        draws = [
            torch.randperm(graph.n_features, generator=generator)[:n] for _ in range(cfg.draws)
        ]
        sets = [order[:n], *draws]
        predicted = changes_without(graph, sets)[:, node].tolist()
        measured = [float(runs.without("free", one.tolist())[1][0]) for one in sets]
        found.append(
            Together(
                n,
                predicted[0],
                measured[0],
                statistics.mean(predicted[1:]),
                statistics.mean(measured[1:]),
                statistics.pstdev(measured[1:]),
            )
        )
    return found


def table(found: Verification) -> str:
    """The figures as text."""
    lines = [
        f"{found.samples} features set to 0, one after another:",
        "",
        f"  {'':<30} {'n':>8}  correlation   slope  worst error  largest change",
    ]
    for label, one in (
        ("constrained: edges", found.constrained),
        ("free: targets over all paths", found.free_targets),
        ("free: features over all paths", found.free_features),
    ):
        lines.append(
            f"  {label:<30} {one.n:>8}  {_number(one.correlation):>11}  {_number(one.slope):>6}"
            f"  {one.worst:>11.2g}  {one.largest:>14.3f}"
        )
    exact = "is exact" if found.constrained.exact else "is NOT EXACT: the graph is wrong"
    lines += [
        "",
        f"The constrained prediction {exact}.",
        "",
        f"Change of {found.target!r} when several are set to 0 together, nothing frozen:",
        "",
        "      n  strongest: predicted  measured   random: predicted  measured (deviation)",
    ]
    for row in found.together:
        lines.append(
            f"  {row.n:>5}  {row.predicted:>+20.3f}  {row.measured:>+8.3f}  "
            f"{row.random_predicted:>+18.3f}  {row.random_measured:>+8.3f} "
            f"({row.random_deviation:.3f})"
        )
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.4f}"
