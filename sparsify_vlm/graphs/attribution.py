"""From a prompt to its attribution graph.

1. The local replacement model of the prompt is built (`replacement/local.py`): one forward pass
   with attention patterns and norm scales frozen, every MLP's write cut into features and error.
2. The active features, errors and tokens are the columns (`columns.py`); with every feature's
   decoder rows for the layers it writes to.
3. The targets are found: the likeliest next tokens, or what was asked for (`targets.py`).
4. Their rows are made, going backwards layer by layer with many targets at once (`rows.py`):

       A[t, feature s] = Σ_{l' that s writes to, before t reads} ⟨G[l'][p_s], u_s W_{s→l'}⟩
       A[t, error (l, p)] = ⟨G[l][p], y_l − ŷ_l⟩        A[t, token p] = ⟨g[p], embedding[p]⟩

5. Rows of features follow: all of them, or with `max_feature_nodes` the most influential first, in
   rounds (`selection.py`).
6. Rows and columns are put in order: features by (layer, position, index), errors, tokens, targets.

Biases are no nodes: a row adds up to what its target would read without them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from sparsify_vlm.errors import UserError
from sparsify_vlm.graphs.columns import Columns
from sparsify_vlm.graphs.edge_list import EdgeList
from sparsify_vlm.graphs.graph import AttributionGraph
from sparsify_vlm.graphs.influence import Edges
from sparsify_vlm.graphs.rows import Reads, RowMaker
from sparsify_vlm.graphs.selection import HeldRows
from sparsify_vlm.graphs.targets import Target, Targets, resolve_targets, text
from sparsify_vlm.replacement import VLMReplacementModel
from sparsify_vlm.replacement.local import LocalModel, freed, one_prompt
from sparsify_vlm.replacement.local_size import expected_bytes, held_bytes

ROUND = 256
"""Features that get their rows before influence is computed anew."""

TOGETHER = 4096
"""Targets times positions that go backwards together: enough for matrix products to be quick."""

BATCH = 256
"""Targets that go backwards together, at most."""

BYTES, EDGE_BYTES = 4, 20
"""Of a number, and of an edge while the graph is made; half of all possible edges are there."""

MEMORY = 4 << 30
"""Bytes for all that is held beside model and coder, where nothing is said."""


def attribute(
    model: VLMReplacementModel,
    inputs: Mapping[str, Any] | LocalModel,
    *,
    max_n_logits: int = 10,
    desired_logit_prob: float = 0.95,
    max_feature_nodes: int | None = None,
    targets: Sequence[Target] | Tensor | None = None,
    memory: int | None = None,
    batch_size: int | None = None,
    fast: bool | None = None,
) -> AttributionGraph:
    """The graph of one prompt.

        graph = attribute(model, inputs)
        graph = attribute(model, inputs, targets=["red", Difference("red", "blue")])

    Args:
        inputs: a processor's batch of one prompt, or `input_ids` [1, S], with `inputs_embeds`
            [1, S, d] in their place if given; or the prompt's `LocalModel`, which is then kept.
        max_n_logits: explain at most this many of the likeliest next tokens,
        desired_logit_prob: as few as reach this probability together.
        max_feature_nodes: the most features that become nodes; None or 0: all that are active.
        targets: what to explain instead: tokens (ids, text), `Difference`, `Feature`, directions
            [d_model] in the stream after the final norm.
        memory: bytes for all that is held beside model and coder; None: 4 GiB.
        batch_size: targets going backwards together; None: as many as are quick and fit.
        fast: read matrices off the attention layers (`maps.py`); None: where it pays.

    Raises `UserError` for inputs or targets that cannot be used, where nothing is active, and where
    the prompt or the graph does not fit into `memory`.
    """
    memory = MEMORY if memory is None else memory
    if max_feature_nodes is not None and max_feature_nodes < 0:
        raise UserError(f"max_feature_nodes {max_feature_nodes}: must be at least 0, for all")
    with _local(model, inputs, memory) as local:
        rest = memory - held_bytes(local)
        columns = Columns(local, max(rest, 0) // 4)
        if not columns.n_features:
            raise UserError("no feature of the coder is active on this prompt: nothing to trace")
        found = resolve_targets(local, targets, max_n_logits, desired_logit_prob)
        wanted = min(max_feature_nodes or columns.n_features, columns.n_features)
        _check_size(columns, wanted, memory, rest)
        maker = RowMaker(local, columns, wanted + len(found.weights), rest // 4, fast)
        most = _batch_size(local, columns, rest // 4)
        tracer = _Tracer(local, columns, maker, batch_size, most)
        if wanted == columns.n_features:
            return _graph(local, columns, found, *tracer.everything(found))
        held = HeldRows(columns.n_features, columns.n, rest // 8 // BYTES)
        return _graph(local, columns, found, *tracer.best(found, wanted, held))


def check_prompt_fits(
    model: VLMReplacementModel, inputs: Mapping[str, Any], memory: int | None = None
) -> None:
    """Raise `UserError` if the prompt's local replacement model alone takes more than `memory`."""
    memory, S = MEMORY if memory is None else memory, len(one_prompt(inputs))
    needed = expected_bytes(model, S)
    if needed > memory:
        raise UserError(
            f"a prompt of {S:,} positions takes {_size(needed)} in this model before anything is "
            f"traced, more than the {_size(memory)} it may: give a shorter one or more --memory"
        )


def _local(
    model: VLMReplacementModel, inputs: Mapping[str, Any] | LocalModel, memory: int
) -> AbstractContextManager[LocalModel]:
    if isinstance(inputs, LocalModel):
        return nullcontext(inputs)
    check_prompt_fits(model, inputs, memory)
    return freed(LocalModel(model, inputs))


def _check_size(columns: Columns, wanted: int, memory: int, rest: int) -> None:
    """Raise `UserError` if the edges between so many features do not fit into what is left."""
    each = EDGE_BYTES / 2
    needed = wanted * (wanted + columns.n_errors) * each
    if needed <= rest:
        return
    errors = columns.n_errors
    fitting = int(((errors**2 + 4 * max(rest, 0) / each) ** 0.5 - errors) / 2)
    fewer = f"--max_feature_nodes {fitting} or fewer, or " if fitting else ""
    raise UserError(
        f"a graph of {wanted:,} features takes {_size(needed)}, the prompt's own model "
        f"{_size(memory - rest)}, together more than the {_size(memory)} they may: give {fewer}"
        "more --memory"
    )


def _size(n_bytes: float) -> str:
    """In GiB, or MiB below one."""
    gib = n_bytes / 2**30
    return f"{gib:,.2f} GiB" if gib >= 1 else f"{1024 * gib:,.1f} MiB"


def _batch_size(local: LocalModel, columns: Columns, most: int) -> int:
    """As many targets as fit into `most` bytes: gradients with what products make of them, and
    rows."""
    each = BYTES * (6 * local.n_positions * local.stack.d_model + 4 * columns.n)
    return max(1, min(BATCH, most // each))


class _Tracer:
    def __init__(
        self,
        local: LocalModel,
        columns: Columns,
        maker: RowMaker,
        batch_size: int | None,
        most: int,
    ) -> None:
        self.local, self.columns, self.maker = local, columns, maker
        self.most = batch_size or most
        self.together = TOGETHER if batch_size is None else batch_size * local.n_positions

    def everything(self, found: Targets) -> tuple[Tensor, Edges]:
        """All active features as nodes."""
        n, N = self.columns.n_features, self.columns.n + len(found.weights)
        edges = EdgeList(N, (n + len(found.weights)) * self.columns.n)
        features = torch.arange(n)
        for first, reads in ((0, self._feature_reads(features)), (self.columns.n, found.reads)):
            for places, rows in self._made(reads):
                edges.add(places + first, rows)
        self.columns.forget()
        return features, edges.joined()

    def best(self, found: Targets, wanted: int, held: HeldRows) -> tuple[Tensor, Edges]:
        """The `wanted` most influential features as nodes."""
        made = list(self._made(found.reads))
        order = torch.cat([places for places, _ in made]).argsort()
        held.add(torch.full_like(order, -1), torch.cat([rows for _, rows in made])[order])
        while (done := int((held.nodes >= 0).sum())) < wanted:
            chosen = held.next(found.weights, min(ROUND, wanted - done), wanted - done)
            for places, rows in self._made(self._feature_reads(chosen)):
                held.add(chosen[places], rows)
        return _selected(held, self.columns, len(found.weights))

    def _feature_reads(self, features: Tensor) -> Reads:
        table = self.columns.features[features.to(self.columns.features.device)]
        d = self.local.stack.d_model
        vectors = self.local.errors.new_empty(len(table), d)
        for layer in table[:, 0].unique().tolist():
            here = table[:, 0] == layer
            rows = self.local.encoder_rows(layer, table[here, 2])
            vectors[here] = rows.to(vectors)
        return Reads(table[:, 0], table[:, 1], vectors)

    def _made(self, reads: Reads) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of rows: (which of the targets, rows [T, columns] on the CPU). Targets of near
        positions go together, so that none carries positions it cannot look at."""
        order = reads.position.argsort(stable=True)
        for places in order.split(self._sizes(reads.position[order].tolist())):
            yield places.cpu(), self.maker.rows(reads.at(places)).cpu()

    def _sizes(self, positions: list[int]) -> list[int]:
        """How many targets go together, for targets at ascending positions."""
        sizes = [0]
        for position in positions:
            if sizes[-1] and (
                sizes[-1] == self.most or (sizes[-1] + 1) * (position + 1) > self.together
            ):
                sizes.append(0)
            sizes[-1] += 1
        return sizes


def _selected(held: HeldRows, columns: Columns, n_targets: int) -> tuple[Tensor, Edges]:
    """Chosen features, ascending, and the edges between the nodes there are."""
    selected = held.nodes[held.nodes >= 0].sort().values
    m, others = len(selected), columns.n - columns.n_features
    N = m + others + n_targets
    node = torch.full((columns.n,), -1, dtype=torch.int64)
    node[selected] = torch.arange(m)
    node[columns.n_features :] = torch.arange(m, m + others)
    kept = node[held.held] >= 0
    targets = torch.where(held.nodes >= 0, node[held.nodes.clamp(min=0)], 0)
    targets[held.nodes < 0] = torch.arange(N - n_targets, N)
    edges = EdgeList(N, len(targets) * N)
    edges.add(targets, held.rows[:, kept], node[held.held[kept]])
    return selected, edges.joined()


def _graph(
    local: LocalModel,
    columns: Columns,
    found: Targets,
    selected: Tensor,
    edges: Edges,
) -> AttributionGraph:
    stack, clt = local.stack, local.clt
    ids = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in local.inputs.items()}
    placed = "inputs_embeds" not in local.inputs
    S = local.n_positions
    return AttributionGraph(
        active_features=columns.features.cpu(),
        activation_values=columns.activations.float().cpu(),
        selected_features=selected,
        edges=edges,
        logit_token_ids=found.token_ids,
        logit_probabilities=found.weights,
        target_labels=found.labels,
        error_vectors=local.errors.float().cpu(),
        logits=local.logits[-1].float().cpu(),
        input_ids=local.input_ids.cpu(),
        tokens=[text(local, int(i)) for i in local.input_ids],
        roles=stack.roles(ids)[0],
        patches=stack.patches(ids)[0] if placed else torch.full((S, 2), -1, dtype=torch.int16),
        images=stack.images(ids)[0] if placed else torch.full((S,), -1, dtype=torch.int16),
        zeroed=local.zeroed.cpu(),
        info={
            "model": local.loaded.name,
            "revision": local.loaded.revision,
            "prompt": local.loaded.tokenizer.decode(local.input_ids),
            "hookpoints": list(stack.hookpoints),
            "num_latents": clt.cfg.num_latents,
            "activation": clt.cfg.activation,
            "input_site": clt.cfg.input_site,
        },
    )
