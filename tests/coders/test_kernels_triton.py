"""The Triton kernels against float64 loops: interpreted, and on a GPU if there is one.

Triton reads TRITON_INTERPRET when it is first imported, and importing sparsify imports it. So the
cases run in a process of their own, which runs this file; each is reported as a test here.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparsify_vlm.coders.kernels import eager as eager_products
from sparsify_vlm.coders.kernels import rounding
from sparsify_vlm.coders.kernels import triton_launch as launch
from sparsify_vlm.coders.kernels.base import Functions
from sparsify_vlm.coders.kernels.entries import AdamState, Entries, Selection
from sparsify_vlm.coders.kernels.triton_path import TritonKernels

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.system() != "Linux", reason="Triton is published for Linux alone"),
]

SHAPES = {  # T, F, d, k: tiles are 4 tokens and 32 columns
    "odd": (11, 24, 41, 3),
    "one": (5, 9, 32, 1),
    "wide": (6, 10, 100, 4),
    "single": (1, 3, 7, 3),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def close(found: Tensor, expected: Tensor, relative: float = 2e-6) -> None:
    """Within `relative` of the largest number expected."""
    assert found.shape == expected.shape
    if not found.numel():
        return
    error = (found.double() - expected).abs().max()
    assert error <= relative * expected.abs().max().clamp(min=1), error


def selection(shape: str, seed: int = 0) -> tuple[Selection, Tensor]:
    """k entries a token over the first half of the latents or all k, and their values."""
    T, F, _, k = SHAPES[shape]
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    among = max(k, F // 2)
    col = torch.stack([torch.randperm(among, generator=generator)[:k] for _ in range(T)])
    values = torch.randn(T * k, generator=generator)
    values[::4] = 0
    return Selection(torch.arange(T + 1) * k, col.flatten(), F, k), values


def ragged(shape: str, seed: int = 0) -> tuple[Selection, Tensor]:
    """From no latent at the first token to all at the last, and values."""
    T, F, _, _ = SHAPES[shape]
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    mask = torch.rand(T, F, generator=generator) < torch.linspace(0, 1, T)[:, None]
    mask[0], mask[-1] = False, True
    crow = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    return Selection(crow, mask.nonzero()[:, 1], F), torch.randn(int(crow[-1]))


KINDS = {"uniform": selection, "ragged": ragged}


def entry_list(chosen: Selection, values: Tensor) -> Iterator[tuple[int, int, int, float]]:
    """(number, token, latent, value) of each entry."""
    for t in range(chosen.tokens):
        for e in range(int(chosen.crow[t]), int(chosen.crow[t + 1])):
            yield e, t, int(chosen.col[e]), float(values[e])


def sorted_entries(chosen: Selection, values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return chosen.order, chosen.start, chosen.token, values


def decodes(shape: str, kind: str, dtype: torch.dtype, sources: int) -> None:
    T, F, d, _ = SHAPES[shape]
    out = torch.randn(T, d)
    expected, parts = out.double(), []
    for s in range(sources):
        chosen, values = KINDS[kind](shape, s)
        W = torch.randn(F, d).to(dtype)
        parts.append((chosen.crow, chosen.col, values, W))
        for _, t, i, value in entry_list(chosen, values):
            expected[t] += value * W[i].double()
    launch.decode(out, parts)
    close(out, expected)


def backwards(shape: str, kind: str, dtype: torch.dtype, dots: bool) -> None:
    """`out` begins as nan: rows without entries have to be written too."""
    T, F, d, _ = SHAPES[shape]
    chosen, values = KINDS[kind](shape)
    G, W = torch.randn(T, d).to(dtype), torch.randn(F, d).to(dtype)
    gradient, out = torch.zeros(F, d).double(), torch.full((F, d), float("nan"))
    products = torch.zeros(len(values)).double()
    for e, t, i, value in entry_list(chosen, values):
        gradient[i] += value * G[t].double()
        products[e] = G[t].double() @ W[i].double()
    found = launch.backward(G, *sorted_entries(chosen, values), W if dots else None, out=out)
    close(out, gradient)
    close(found, products if dots else products[:0])
    close(launch.dots(G, chosen.crow, chosen.col, W), products)


def adam(
    shape: str, kind: str, moments: torch.dtype, decay: bool, dots: bool, table: torch.dtype
) -> None:
    """Four steps beside torch.optim.Adam in float64, moments rounded as the kernel's are.

    The interpreter cuts bfloat16 off where a GPU rounds to the nearest: a whole unit of the last
    place is allowed for what is stored in it.
    """
    T, F, d, _ = SHAPES[shape]
    chosen, values = KINDS[kind](shape)
    W = torch.randn(F, d).to(table)
    first, second = torch.zeros(F, d, dtype=moments), torch.zeros(F, d, dtype=moments)
    q = torch.rand(F) if decay else None
    for step in range(1, 5):
        G = torch.randn(T, d)
        parameter = torch.nn.Parameter(W.double())
        parameter.grad = torch.zeros(F, d).double()
        products = torch.zeros(len(values)).double()
        for e, t, i, value in entry_list(chosen, values):
            parameter.grad[i] += value * G[t].double()
            products[e] = G[t].double() @ W[i].double()
        if q is not None:
            parameter.grad += q[:, None].double() * W.double()
        optimizer = torch.optim.Adam([parameter], lr=0.01)
        optimizer.state[parameter] = {
            "step": torch.tensor(step - 1.0, device="cpu"),
            "exp_avg": first.double(),
            "exp_avg_sq": second.double(),
        }
        optimizer.step()
        found = launch.backward_adam(
            G, *sorted_entries(chosen, values), W, AdamState(first, second, step, 0.01), q,
            want_dots=dots,
        )  # fmt: skip
        close(found, products if dots else products[:0])
        for stored, exact in (
            (W, parameter.data),
            (first, optimizer.state[parameter]["exp_avg"]),
            (second, optimizer.state[parameter]["exp_avg_sq"]),
        ):
            unit = 2e-6 if stored.dtype == torch.float32 else 2**-7
            assert ((stored.double() - exact).abs() <= unit * exact.abs() + 1e-6).all()


def rounds_the_second_moment_as_torch_does() -> None:
    """Without a gradient a step is one multiplication, of which nothing else can differ."""
    chosen, values = selection("wide")
    T, F, d, _ = SHAPES["wide"]
    W, G, first = torch.zeros(F, d), torch.zeros(T, d), torch.zeros(F, d).bfloat16()
    second = torch.logspace(-30, 38, F * d).view(F, d).bfloat16()
    second[0, :3] = torch.tensor([0.0, math.inf, math.nan])
    expected = second.clone()
    columns = rounding.column_keys(d, W.device)
    for step in range(1, 9):
        rows = rounding.row_keys(step, F, W.device)
        rounding.store(expected, expected.float() * 0.999, rows, columns)
        state = AdamState(first, second, step, 0.01)
        launch.backward_adam(G, *sorted_entries(chosen, values), W, state)
        assert torch.equal(second.isnan(), expected.isnan())
        assert torch.equal(second.nan_to_num(-1), expected.nan_to_num(-1))


def encodes(precision: str, T: int, F: int, d: int) -> None:
    """Products rounded to bfloat16 within one unit, and maxima of what was written."""
    x, W, b = torch.randn(T, d), torch.randn(F, d), torch.randn(F)
    if precision == "bf16":
        exact = x.bfloat16().double() @ W.bfloat16().double().T + b.double()
    else:
        exact = x.double() @ W.double().T + b.double()
    pre, maxima = launch.encode(x, W, b, precision=precision)
    assert pre.dtype == maxima.dtype == torch.bfloat16
    error = (pre[:, :F].double() - exact.relu()).abs()
    on_tensor_cores = precision == "tf32" and x.is_cuda
    assert (error <= 2**-7 * exact.relu() + (0.05 if on_tensor_cores else 1e-5)).all()
    assert (pre[:, F:] == -1).all()
    assert torch.equal(maxima, pre.view(T, -1, launch.GROUP).amax(2))


def encodes_in_float32() -> None:
    x, W, b = torch.randn(18, 40), torch.randn(50, 40), torch.randn(50)
    pre, _ = launch.encode(x, W, b, precision="ieee", pre_dtype=torch.float32)
    close(pre[:, :50], (x.double() @ W.double().T + b.double()).relu())


def selects(T: int, F: int, d: int, k: int) -> None:
    """The same latents as torch.topk of the float64 product, as far as they are active: no token's
    k-th is nearly a tie."""
    x, W, b = torch.randn(T, d), torch.randn(F, d), 0.1 * torch.randn(F)
    exact = (x.double() @ W.double().T + b.double()).relu()
    expected = exact.topk(k, dim=1)
    values, latents = launch.top(x, W, b, k)
    chosen, wanted = torch.zeros(2, T, F).bool()
    assert torch.equal(
        chosen.scatter(1, latents, values > 0), wanted.scatter(1, expected.indices, expected[0] > 0)
    )
    assert all(len(set(row)) == k for row in latents.tolist())
    close(values, exact.gather(1, latents))


def selects_where_bfloat16_does_not() -> None:
    """Two latents apart by less than bfloat16 tells: the rescoring orders them."""
    x = torch.ones(3, 32)
    W = torch.zeros(400, 32)
    W[:, 0] = torch.linspace(0, 0.5, 400)
    W[7, 0], W[300, 0], W[301, 0] = 1.0, 1.0001, 1.0002
    values, latents = launch.top(x, W, torch.zeros(400), 2)
    assert (latents.sort(1).values == torch.tensor([300, 301])).all()
    close(values.sort(1).values, torch.tensor([[1.0001, 1.0002]]).double().expand(3, 2))


def largest_lie_in_the_largest_groups(F: int, count: int) -> None:
    pre = torch.randn(7, F).relu()
    pre[0] = pre[0].round()  # ties
    padded = torch.nn.functional.pad(pre, (0, -F % launch.GROUP), value=-1.0)
    values, latents = launch.largest(padded, padded.view(7, -1, launch.GROUP).amax(2), count)
    assert torch.equal(values.sort(1).values, pre.sort(1).values[:, -count:])
    assert torch.equal(pre.gather(1, latents), values)
    assert all(len(set(row)) == count for row in latents.tolist())


def rescores() -> None:
    x, W, b = torch.randn(5, 70), torch.randn(20, 70), torch.randn(20)
    candidates = torch.stack([torch.randperm(20)[:6] for _ in range(5)])
    exact = x.double() @ W.double().T + b.double()
    close(launch.rescore(x, W, b, candidates), exact.gather(1, candidates))


def tuned_tiles_change_no_bit() -> None:
    """What a GPU tunes at run time must not show in the result."""
    chosen, values = ragged("wide")
    parts = [(chosen.crow, chosen.col, values, torch.randn(10, 100))] * 2
    kernel, found = launch._kernels().decode, []
    for tiles in (
        {"BLOCK_T": 4, "BLOCK_D": 32, "UNROLL": 2},
        {"BLOCK_T": 2, "BLOCK_D": 128, "UNROLL": 3},
    ):
        launch._decoder = lambda tiles=tiles: (kernel, tiles)
        found.append(torch.zeros(6, 100))
        launch.decode(found[-1], parts)
    assert torch.equal(*found)


def order_of_rows_changes_no_bit() -> None:
    chosen, values = selection("odd")
    G, outs = torch.randn(11, 41), [torch.zeros(24, 41) for _ in range(2)]
    entries = sorted_entries(chosen, values)
    launch.backward(G, *entries, out=outs[0])
    launch.backward(G, *entries, out=outs[1], rows=torch.arange(24))
    assert torch.equal(*outs)
    assert launch.busiest_first(chosen.start)[0] == chosen.start.diff().argmax()


def nothing_active() -> None:
    """A process may have none of a batch's tokens, a source no active latent."""
    for tokens in (0, 3):
        chosen = Selection(torch.zeros(tokens + 1, dtype=torch.int64), torch.zeros(0).long(), 4)
        values, W, G = torch.zeros(0), torch.ones(4, 5), torch.ones(tokens, 5)
        launch.decode(G, [(chosen.crow, chosen.col, values, W)])
        assert (G == 1).all()
        out = torch.ones(4, 5)
        found = launch.backward(G, *sorted_entries(chosen, values), W, out=out)
        assert not out.any()
        assert found.shape == launch.dots(G, chosen.crow, chosen.col, W).shape == (0,)
    assert launch.encode(torch.zeros(0, 5), W, torch.zeros(4))[0].shape == (0, launch.GROUP)


def unaligned_tables() -> None:
    chosen, values = selection("odd")
    W = torch.randn(24 * 41 + 1)[1:].view(24, 41)
    out, expected = torch.zeros(11, 41), torch.zeros(11, 41).double()
    launch.decode(out, [(chosen.crow, chosen.col, values, W)])
    for _, t, i, value in entry_list(chosen, values):
        expected[t] += value * W[i].double()
    close(out, expected)


def refusals() -> None:
    chosen, values = selection("odd")
    part = chosen.crow, chosen.col, values
    with pytest.raises(ValueError, match="contiguous"):
        launch.decode(torch.zeros(41, 11).T, [(*part, torch.zeros(24, 41))])
    with pytest.raises(ValueError, match="float64"):
        launch.decode(torch.zeros(11, 41), [(*part, torch.zeros(24, 41).double())])
    tables = torch.zeros(24, 41), torch.zeros(24, 41).bfloat16()
    with pytest.raises(ValueError, match="one type"):
        launch.decode(torch.zeros(11, 41), [(*part, W) for W in tables])


def serves_as_path() -> None:
    """Through what the training step calls, on tables that require a gradient."""
    kernels, eager = TritonKernels(), Functions("eager", eager_products, eager_products)
    chosen, values = selection("odd")
    W = torch.nn.Parameter(torch.randn(24, 41))
    G, b = torch.randn(11, 41), torch.randn(24)
    table, b2 = W.detach().double(), b.double()
    entries = Entries(kernels.ragged(chosen.crow, chosen.col, 24), values)
    exact = Entries(chosen, values.double())
    out, expected = torch.zeros(11, 41), torch.zeros(11, 41).double()
    kernels.decode(out, [(entries, W), (entries, W)])
    eager.decode(expected, [(exact, table), (exact, table)])
    close(out, expected)
    for found, right in zip(
        kernels.backward(G, entries, W), eager.backward(G.double(), exact, table), strict=True
    ):
        close(found, right)
    candidates = chosen.col.view(11, 3)
    right = eager.rescore(G.double(), table, b2, candidates)
    close(kernels.rescore(G, W, b, candidates), right)
    assert torch.equal(kernels.top(right, 2)[0].sort(1).values, right.sort(1).values[:, 1:])
    before = W.detach().clone()
    state = AdamState(torch.zeros(24, 41), torch.zeros(24, 41), 1, 0.5)
    kernels.backward_adam(G, entries, W, state)
    gradient = eager.backward(G.double(), exact, table)[0]
    assert torch.equal((before - W.detach()).sign(), gradient.sign().float())


def is_available() -> None:
    here = torch.get_default_device().type
    assert launch.available(here)
    assert not launch.available({"cpu": "cuda", "cuda": "cpu"}[here])


def interpreted_cases() -> dict[str, Callable[[], None]]:
    cases: dict[str, Callable[[], None]] = {}
    for shape, kind, (name, dtype) in product(SHAPES, KINDS, DTYPES.items()):
        sources = 3 if shape == "odd" else 1
        cases[f"decode {shape} {kind} {name}"] = partial(decodes, shape, kind, dtype, sources)
        dots = partial(backwards, shape, kind, dtype)
        cases[f"backward {shape} {kind} {name}"] = partial(dots, True)
    cases["backward without dots"] = partial(backwards, "odd", "uniform", torch.float32, False)
    single = torch.float32
    for (name, moments), decay in product(DTYPES.items(), (False, True)):
        label = f"adam {name} moments{' decay' if decay else ''}"
        cases[label] = partial(adam, "odd", "uniform", moments, decay, True, single)
    cases["adam ragged"] = partial(adam, "wide", "ragged", single, False, True, single)
    cases["adam without dots"] = partial(adam, "one", "uniform", single, False, False, single)
    cases["adam bfloat16 table"] = partial(
        adam, "odd", "uniform", single, True, True, torch.bfloat16
    )
    for precision, shape in product(("bf16", "tf32", "ieee"), ((18, 50, 41), (3, 16, 16))):
        cases[f"encode {precision} {shape}"] = partial(encodes, precision, *shape)
    cases["encode in float32"] = encodes_in_float32
    for shape in ((9, 400, 41, 5), (17, 330, 48, 1), (4, 64, 20, 32)):
        cases[f"top {shape}"] = partial(selects, *shape)
    cases["top where bfloat16 ties"] = selects_where_bfloat16_does_not
    for F, count in ((400, 13), (100, 1), (50, 30), (333, 20)):
        cases[f"largest {count} of {F}"] = partial(largest_lie_in_the_largest_groups, F, count)
    for case in (
        rescores, tuned_tiles_change_no_bit, order_of_rows_changes_no_bit, nothing_active,
        rounds_the_second_moment_as_torch_does, unaligned_tables, refusals, serves_as_path,
        is_available,
    ):  # fmt: skip
        cases[case.__name__] = case
    return cases


CASES = interpreted_cases()


def run_cases(device: str, names: list[str]) -> None:
    """Print a line of each case: its name and what went wrong, or nothing."""
    torch.set_default_device(device)
    for name in names:
        torch.manual_seed(0)
        try:
            CASES[name]()
            problem = ""
        except Exception:  # noqa: BLE001 - whatever it is, it is reported as that case's failure
            problem = traceback.format_exc()
        print(json.dumps([name, problem]), flush=True)


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(scope="module")
def problems(request: pytest.FixtureRequest) -> dict[str, dict[str, str]]:
    """For each device, what went wrong in the cases that were asked for."""
    here = [item for item in request.session.items if item.path == Path(__file__)]
    asked = [item.callspec.params for item in here if hasattr(item, "callspec")]
    return {
        device: in_a_process(device, [one["case"] for one in asked if one["device"] == device])
        for device in DEVICES
    }


def in_a_process(device: str, names: list[str]) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, __file__, device, *names],
        env={**os.environ, "TRITON_INTERPRET": "1" if device == "cpu" else "0"},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    found = dict.fromkeys(names, f"not reached:\n{done.stderr}")
    return found | dict(json.loads(line) for line in done.stdout.splitlines() if line[:1] == "[")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("device", DEVICES)
def test_kernels(device: str, case: str, problems: dict[str, dict[str, str]]) -> None:
    if problems[device][case]:
        pytest.fail(problems[device][case], pytrace=False)


def test_not_for_the_cpu_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not launch.available("cpu")
    assert launch.available("cuda") == torch.cuda.is_available()


def test_not_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    assert not launch.available("cpu")


if __name__ == "__main__":
    run_cases(sys.argv[1], sys.argv[2:])
