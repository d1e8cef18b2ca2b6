"""A coder divided over processes, on plain tensors: the step equals autograd's on the whole one."""

from __future__ import annotations

import multiprocessing as mp
import os
import socket
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from sparsify_vlm.errors import UserError
from sparsify_vlm.training.distributed import World, joined_world
from sparsify_vlm.training.parallel import Kind, Layout, best_kind, check_divisible, mesh

S, T, D, F, K = 3, 24, 6, 16, 4
WHOLE = Layout()


class Step(NamedTuple):
    """What one step finds: ŷ, squared errors [S, T], active latents, gradients."""

    y_hat: Tensor
    errors: Tensor
    active: list[Tensor]
    gradients: dict[str, Tensor]


def made() -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Weights by name, x and y [S, T, D]: every source writes to itself and to all later layers."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weights = {f"W_enc.{s}": normal(F, D) for s in range(S)}
    weights |= {f"b_enc.{s}": normal(F) for s in range(S)}
    weights |= {f"W_dec.{s}.{k}": normal(F, D) for s in range(S) for k in range(S - s)}
    weights |= {f"b_dec.{t}": normal(D) for t in range(S)}
    weights |= {f"W_skip.{s}.0": normal(D, D) for s in range(S)}
    weights |= {f"post_scale.{s}.{k}": normal(F) for s in range(S) for k in range(S - s)}
    return weights, normal(S, T, D), normal(S, T, D)


def by_autograd() -> Step:
    weights, x, y = made()
    weights = {name: w.requires_grad_() for name, w in weights.items()}
    active, y_hat = [], [weights[f"b_dec.{t}"].expand(T, D) for t in range(S)]
    for s in range(S):
        pre = x[s] @ weights[f"W_enc.{s}"].T + weights[f"b_enc.{s}"]
        top = pre.topk(K, dim=1)
        active.append(torch.zeros_like(pre).scatter(1, top.indices, top.values.relu()))
        for k in range(S - s):
            u = active[s] * weights[f"post_scale.{s}.{k}"]
            y_hat[s + k] = y_hat[s + k] + u @ weights[f"W_dec.{s}.{k}"]
        y_hat[s] = y_hat[s] + x[s] @ weights[f"W_skip.{s}.0"].T
    errors = (y - torch.stack(y_hat)).square().sum(2)
    errors.sum().backward()
    gradients = {name: w.grad for name, w in weights.items() if w.grad is not None}
    assert gradients.keys() == weights.keys()
    detached = [a.detach() for a in active]
    return Step(torch.stack(y_hat).detach(), errors.detach(), detached, gradients)


def by_parts(layout: Layout) -> Step:
    """The same without autograd, calling the layout where the row has to talk; own parts."""
    weights, x, y = made()
    own = {name: layout.own(name, w) for name, w in weights.items()}
    column = layout.kind == "column"
    rows = torch.arange(T)
    entries, values = [], []
    for s in range(S):
        pre = x[s] @ own[f"W_enc.{s}"].T + own[f"b_enc.{s}"]
        top = pre.topk(min(K, pre.shape[1]), dim=1)
        crow, latent, chosen = layout.global_top(top.values, top.indices, K, F)
        entries.append((rows.repeat_interleave(crow.diff()), latent))
        values.append(chosen.relu())
    y = y.chunk(layout.parts, 2)[layout.place] if column else y
    gradients: dict[str, Tensor] = {}
    y_hat, value_grads = torch.zeros_like(y), [torch.zeros_like(v) for v in values]
    for t in range(S):
        for s in range(t + 1):
            row, col = entries[s]
            u = values[s] * own[f"post_scale.{s}.{t - s}"][col]
            y_hat[t].index_add_(0, row, u[:, None] * own[f"W_dec.{s}.{t - s}"][col])
        layout.sum_outputs(y_hat[t])
        y_hat[t] += own[f"b_dec.{t}"] + x[t] @ own[f"W_skip.{t}.0"].T
        G = -2 * (y[t] - y_hat[t])
        gradients[f"b_dec.{t}"], gradients[f"W_skip.{t}.0"] = G.sum(0), G.T @ x[t]
        for s in range(t + 1):
            row, col = entries[s]
            name, W = f"W_dec.{s}.{t - s}", own[f"W_dec.{s}.{t - s}"]
            scale = own[f"post_scale.{s}.{t - s}"]
            u = values[s] * scale[col]
            gradients[name] = torch.zeros_like(W).index_add_(0, col, u[:, None] * G[row])
            dots = (G[row] * W[col]).sum(1)
            of_scale = torch.zeros_like(scale).index_add_(0, col, dots * values[s])
            gradients[f"post_scale.{s}.{t - s}"] = layout.sum_columns(of_scale)
            value_grads[s] += dots * scale[col]
    for s in range(S):
        row, col = entries[s]
        g = layout.sum_value_gradients(value_grads[s]) * (values[s] > 0)
        here, latent = layout.own_entries(col, F)
        W, b = own[f"W_enc.{s}"], own[f"b_enc.{s}"]
        pulled = g[here][:, None] * x[s][row[here]]
        gradients[f"W_enc.{s}"] = torch.zeros_like(W).index_add_(0, latent, pulled)
        gradients[f"b_enc.{s}"] = torch.zeros_like(b).index_add_(0, latent, g[here])
    errors = layout.sum_columns((y - y_hat).square().sum(2))
    found = []
    for (row, col), value in zip(entries, values, strict=True):
        width = F if column else F // layout.parts
        found.append(torch.zeros(T, width, dtype=value.dtype).index_put_((row, col), value))
    return Step(y_hat, errors, found, gradients)


def test_one_part_is_the_whole() -> None:
    """That `by_parts` is right as such."""
    expected, found = by_autograd(), by_parts(WHOLE)
    torch.testing.assert_close(found.y_hat, expected.y_hat)
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in found.gradients.items():
        torch.testing.assert_close(gradient, expected.gradients[name], msg=name)


# ---- in two processes


def compare_steps(world: World, kind: Kind) -> None:
    data, layout = mesh(world, 2, kind)
    assert (data.rank, data.size, data.is_first) == (0, 1, world.rank == 0)
    expected, found = by_autograd(), by_parts(layout)
    column = kind == "column"
    ours = expected.y_hat.chunk(2, 2)[world.rank] if column else expected.y_hat
    torch.testing.assert_close(found.y_hat, ours)
    torch.testing.assert_close(found.errors, expected.errors)
    for value, whole in zip(found.active, expected.active, strict=True):
        torch.testing.assert_close(value, whole if column else whole.chunk(2, 1)[world.rank])
    for name, whole in expected.gradients.items():
        torch.testing.assert_close(found.gradients[name], layout.own(name, whole), msg=name)
        size = whole.shape[layout.axis(name) or 0]
        gathered = layout.gather(name, found.gradients[name], size)
        torch.testing.assert_close(gathered, whole, msg=name)


def compare_entries(world: World, kind: Kind) -> None:
    """Activations with any number of latents per token, some tokens with none."""
    _, layout = mesh(world, 2, kind)
    generator = torch.Generator().manual_seed(11)
    pre = torch.randn(T, F, generator=generator) - 1
    pre[::5] = -1
    own = pre.chunk(2, 1)[world.rank]
    own_latent = (own > 0).nonzero()[:, 1]
    crow = torch.cat([torch.zeros(1, dtype=torch.long), (own > 0).sum(1).cumsum(0)])
    crow, latent, value = layout.all_entries(crow, own_latent, own[own > 0], F)
    wanted = (pre if kind == "column" else own).relu()
    row = torch.arange(T).repeat_interleave(crow.diff())
    assert len(row) == int((wanted > 0).sum())
    assert torch.equal(torch.zeros_like(wanted).index_put_((row, latent), value), wanted)
    total = torch.tensor([float(world.rank + 1)])
    assert layout.sum_features(total.clone()).item() == (3 if kind == "feature" else world.rank + 1)
    assert layout.sum_columns(total.clone()).item() == (3 if kind == "column" else world.rank + 1)


def sum_over_the_mesh(world: World, kind: Kind) -> None:
    """Four processes: rows (0, 1) and (2, 3) hold a coder each, columns share out tokens."""
    data, layout = mesh(world, 2, kind)
    value = torch.tensor([float(10**world.rank)])
    data.sum_([tokens := value.clone()])
    layout.sum_([part := value.clone()])
    assert tokens.item() == (101 if world.rank % 2 == 0 else 1010)
    assert part.item() == (11 if world.rank < 2 else 1100)
    assert data.gather(world.rank) == [world.rank % 2, world.rank % 2 + 2]
    assert data.is_first == (world.rank == 0)
    data.barrier()


KINDS: tuple[Kind, ...] = ("feature", "column")


def process(jobs: list[Any], variables: dict[str, str], output: Path) -> None:
    with output.open("ab") as file:
        os.dup2(file.fileno(), 2)
    os.environ.update(variables)
    torch.set_num_threads(1)
    with joined_world() as world:
        for job in jobs:
            for kind in KINDS:
                job(world, kind)


@pytest.mark.parametrize(
    ("size", "jobs"), [(2, [compare_steps, compare_entries]), (4, [sum_over_the_mesh])]
)
def test_in_processes(size: int, jobs: list[Any], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["sparsify_vlm.training.parallel"])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_WORLD_SIZE": str(size)}
    processes = []
    for rank in map(str, range(size)):
        variables = {**common, "WORLD_SIZE": str(size), "RANK": rank, "LOCAL_RANK": rank}
        arguments = (jobs, variables, tmp_path / "err.txt")
        processes.append(context.Process(target=process, args=arguments))
        processes[-1].start()
    for one in processes:
        one.join(60)
    assert [one.exitcode for one in processes] == [0] * size, (tmp_path / "err.txt").read_text()


# ---- what can be asked for


def test_wrong_divisions_are_told() -> None:
    with pytest.raises(UserError, match="--tp 3 does not divide the 4 processes"):
        mesh(World(size=4), 3, "feature")
    with pytest.raises(UserError, match="--tp 3 does not divide 64 latents"):
        check_divisible("feature", 3, 64, 9)
    with pytest.raises(UserError, match="--tp 4 does not divide 6 columns"):
        check_divisible("column", 4, 64, 6)
    check_divisible("feature", 4, 64, 6)
    world = World(rank=1, size=4)
    assert mesh(world, 1, "feature") == (world, Layout())


@pytest.mark.parametrize(
    ("d_model", "k", "parts", "kind"),
    [(4096, 32, 8, "column"), (768, 32, 8, "feature"), (768, 32, 2, "column")],
)
def test_choice_of_layout(d_model: int, k: int, parts: int, kind: Kind) -> None:
    assert best_kind(d_model, k, parts) == kind
