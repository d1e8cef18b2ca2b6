"""The compiled loops against float64 loops over single entries, and against torch's Adam."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from forks import Forks
from torch import Tensor

from sparsify_vlm.coders.kernels import compiled, rounding

pytestmark = pytest.mark.skipif(not compiled.available(), reason="needs numba")

CASES = {
    # tokens, latents, width, entries per token
    "usual": (23, 17, 12, 5),
    "many entries per latent": (40, 5, 37, 3),
    "one token": (1, 9, 16, 4),
    "one entry": (11, 6, 8, 1),
    "one latent": (7, 1, 5, 1),
    "one column": (6, 8, 1, 2),
    "wide": (9, 12, 200, 6),
}
EPSILON = {torch.float32: 1e-5, torch.float64: 1e-13}


class Case:
    """A selection of `entries` latents per token out of all but the last third, with its tables.

    The first tokens have fewer, so that rows differ in length, the very first none if it may.
    """

    def __init__(self, name: str, dtype: torch.dtype = torch.float64, ragged: bool = True) -> None:
        tokens, self.latents, d, k = CASES[name]
        self.tokens, self.dtype = tokens, dtype
        generator = torch.Generator().manual_seed(len(name))
        among = max(k, 2 * self.latents // 3)
        counts = [k - max(0, k - t) if ragged and tokens > k else k for t in range(tokens)]
        rows = [torch.randperm(among, generator=generator)[:n] for n in counts]
        self.crow = torch.tensor([0, *counts]).cumsum(0)
        self.col = torch.cat(rows)
        self.values = torch.randn(len(self.col), generator=generator).to(dtype)
        self.values[::7] = 0
        self.W = torch.randn(self.latents, d, generator=generator).to(dtype)
        self.G = torch.randn(tokens, d, generator=generator).to(dtype)
        self.sorted = compiled.sort(self.crow, self.col, self.latents)

    def entries(self) -> list[tuple[int, int, int, float]]:
        """(entry, token, latent, value)."""
        crow, col, values = self.crow.tolist(), self.col.tolist(), self.values.tolist()
        return [
            (e, t, col[e], values[e])
            for t in range(self.tokens)
            for e in range(crow[t], crow[t + 1])
        ]

    def expected(self) -> tuple[Tensor, Tensor]:
        """(gradient, dots) in float64."""
        G, W = self.G.double(), self.W.double()
        gradient, dots = torch.zeros_like(W), torch.zeros(len(self.col), dtype=torch.float64)
        for e, t, i, value in self.entries():
            gradient[i] += value * G[t]
            dots[e] = G[t] @ W[i]
        return gradient, dots

    def close(self, found: Tensor, expected: Tensor) -> None:
        assert found.dtype == self.dtype
        bound = EPSILON[self.dtype] * max(1.0, float(expected.abs().max()))
        assert (found.double() - expected).abs().max() <= bound


cases = pytest.mark.parametrize("name", CASES)
precisions = pytest.mark.parametrize("dtype", EPSILON, ids=str)


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@cases
def test_sort_is_the_stable_one(name: str) -> None:
    case = Case(name)
    order, start, token = case.sorted
    assert torch.equal(order, case.col.argsort(stable=True))
    row = torch.arange(case.tokens).repeat_interleave(case.crow.diff())
    assert torch.equal(token, row[order])
    counts = torch.bincount(case.col, minlength=case.latents)
    assert torch.equal(start, torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]))


@cases
@precisions
def test_products(name: str, dtype: torch.dtype, threads: int) -> None:
    case = Case(name, dtype)
    out, expected = torch.ones_like(case.G), torch.ones_like(case.G, dtype=torch.float64)
    for _, t, i, value in case.entries():
        expected[t] += value * case.W[i].double()
    compiled.decode_add(out, case.crow, case.col, case.values, case.W)
    case.close(out, expected)

    gradient, dots = case.expected()
    found = torch.full_like(case.W, float("nan"))
    case.close(compiled.backward(case.G, *case.sorted, case.values, case.W, found), dots)
    case.close(found, gradient)
    found.fill_(float("nan"))
    none = compiled.backward(case.G, *case.sorted, case.values, case.W, found, want_dots=False)
    assert none is None
    case.close(found, gradient)


@cases
@precisions
@pytest.mark.parametrize("decay", [False, True], ids=["", "decay"])
def test_ten_steps_of_adam(name: str, dtype: torch.dtype, decay: bool, threads: int) -> None:
    case = Case(name, dtype)
    q = torch.rand(case.latents).to(dtype) if decay else None
    reference = torch.nn.Parameter(case.W.double().clone())
    adam = torch.optim.Adam([reference], lr=1e-3, betas=(0.8, 0.99), eps=1e-6, fused=True)
    moments = torch.zeros_like(case.W), torch.zeros_like(case.W)
    for step in range(1, 11):
        gradient, dots = case.expected()
        reference.grad = gradient
        if q is not None:
            reference.grad = gradient + q[:, None].double() * case.W.double()
        adam.step()
        found = compiled.backward_adam(
            case.G,
            *case.sorted,
            case.values,
            case.W,
            *moments,
            step=step,
            lr=1e-3,
            beta1=0.8,
            beta2=0.99,
            eps=1e-6,
            decay=q,
            want_dots=step % 2 == 0,
        )
        if step % 2 == 0:
            case.close(found, dots)
        else:
            assert found is None
        case.G = case.G.roll(1, 0) * 1.1
    assert (case.W.double() - reference.detach()).abs().max() < 1e-6


def test_large_and_small_gradients_in_turn() -> None:
    """The second moment keeps its digits when a gradient is a thousand times the last."""
    case = Case("usual", torch.float32)
    reference = torch.nn.Parameter(case.W.clone())
    adam = torch.optim.Adam([reference], lr=1e-3, fused=True)
    moments = torch.zeros_like(case.W), torch.zeros_like(case.W)
    for step, scale in enumerate([1e-3, 1.0, 1e-4, 10.0, 1e-2], 1):
        G = case.G * scale
        reference.grad = torch.zeros_like(case.W)
        compiled.backward(G, *case.sorted, case.values, case.W, reference.grad)
        adam.step()
        compiled.backward_adam(G, *case.sorted, case.values, case.W, *moments, step=step, lr=1e-3)
    state = adam.state[reference]
    torch.testing.assert_close(moments[0], state["exp_avg"], rtol=2e-6, atol=1e-12)
    torch.testing.assert_close(moments[1], state["exp_avg_sq"], rtol=2e-6, atol=1e-12)
    assert (case.W - reference.detach()).abs().max() < 1e-6


def test_moments_in_bfloat16() -> None:
    """Arithmetic in float32; when kept the first is rounded to the nearest even, the second as
    `rounding` does."""
    case = Case("usual", torch.float32)
    W = case.W.clone()
    moments = [torch.zeros_like(W, dtype=torch.bfloat16) for _ in range(2)]
    first, second = torch.zeros_like(W), torch.zeros_like(W)
    gradient, kept = torch.empty_like(W), torch.empty_like(W, dtype=torch.bfloat16)
    for step in range(1, 11):
        compiled.backward(case.G, *case.sorted, case.values, W, gradient)
        first = first + (1 - 0.9) * (gradient - first)
        second = 0.999 * second + (1 - 0.999) * gradient.square()
        scale = 1 / (1 - 0.999**step) ** 0.5
        W -= 1e-2 / (1 - 0.9**step) * first / (second.sqrt() * scale + 1e-8)
        rows = rounding.row_keys(step, len(W), W.device)
        rounding.store(kept, second, rows, rounding.column_keys(W.shape[1], W.device))
        first, second = first.bfloat16().float(), kept.float()
        compiled.backward_adam(
            case.G, *case.sorted, case.values, case.W, *moments, step=step, lr=1e-2
        )
        case.G = case.G.roll(1, 0) * 1.1
    # A float32 that differs in its last digit may round to the other neighbour, now and then.
    same = (moments[0].float() == first) & (moments[1].float() == second)
    assert same.float().mean() > 0.98
    torch.testing.assert_close(moments[0].float(), first, rtol=2**-7, atol=0)
    torch.testing.assert_close(moments[1].float(), second, rtol=2**-7, atol=0)
    assert (case.W - W)[same].abs().max() < 1e-4
    assert (case.W - W).abs().median() < 1e-6


def test_bfloat16_rounding_of_every_kind() -> None:
    """The stored first moment is (1 - beta1) · gradient; beta1 0 stores the gradient itself."""
    bits = torch.arange(0, 2**32, 65537 * 3 + 1, dtype=torch.int64)
    halves = torch.tensor([0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0x7F7FFFFF, 0x80000001])
    x = torch.cat([bits, halves]).to(torch.int32).view(torch.float32)
    x = x[x.abs() < 1e18][None]  # squares stay finite
    W, nothing = torch.zeros_like(x), torch.zeros_like(x, dtype=torch.bfloat16)
    moments, one = (nothing, nothing.clone()), torch.ones(1)
    selection = compiled.sort(torch.tensor([0, 1]), torch.tensor([0]), 1)
    compiled.backward_adam(x, *selection, one, W, *moments, step=1, lr=0.0, beta1=0.0)
    assert torch.equal(moments[0], x.bfloat16())


def test_nan_stays_nan() -> None:
    case = Case("usual", torch.float32)
    case.G[3] = float("nan")
    hit = [i for _, t, i, _ in case.entries() if t == 3]
    for dtype in (torch.float32, torch.bfloat16):
        W, moments = case.W.clone(), [torch.zeros_like(case.W, dtype=dtype) for _ in range(2)]
        compiled.backward_adam(case.G, *case.sorted, case.values, W, *moments, step=1, lr=0.1)
        for table in (W, *moments):
            assert table.isnan().any(1).nonzero().flatten().tolist() == sorted(set(hit))


def _everything() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens, latents, d, k = 300, 500, 100, 7
    pre = torch.randn(tokens, latents, generator=generator)
    values, indices = compiled.top(pre, k)
    crow, col, values = torch.arange(0, tokens * k + 1, k), indices.flatten(), values.flatten()
    W, G = (torch.randn(n, d, generator=generator) for n in (latents, tokens))
    selection = compiled.sort(crow, col, latents)
    out, grad = torch.zeros(tokens, d), torch.empty(latents, d)
    compiled.decode_add(out, crow, col, values, W)
    dots = compiled.backward(G, *selection, values, W, grad)
    scores = compiled.rescore(G, W, torch.zeros(latents), indices)
    moments = torch.zeros_like(W), torch.zeros_like(W)
    compiled.backward_adam(G, *selection, values, W, *moments, step=1, lr=0.1)
    assert dots is not None
    return [values, indices, out, grad, dots, scores, W, *moments]


def test_same_bits_for_any_number_of_threads() -> None:
    before, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(_everything())
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_calls_from_several_threads_at_once(threads: int) -> None:
    expected, results = _everything(), []

    def call() -> None:
        for _ in range(5):
            results.append(_everything())

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 20
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@pytest.fixture(scope="module")
def fresh() -> Iterator[Forks]:
    """Processes that have imported `compiled` and used nothing of it."""
    forks = Forks(Path(__file__).with_name("process_of_compiled_kernels.py"), {})
    yield forks
    forks.end()


def test_a_forked_process_has_its_own_threads(fresh: Forks) -> None:
    assert fresh.ask({"call": "use_in_fork"}) == 7


def test_numba_is_not_imported_before_it_is_needed(fresh: Forks) -> None:
    assert fresh.ask({"call": "numba_is_imported"}) is False


def test_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: None)
    assert not compiled.available.__wrapped__()


def test_a_numba_that_does_not_work_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise ImportError("Numba needs NumPy 1.0 or less")

    monkeypatch.setattr(compiled.importlib, "import_module", refuse)
    with pytest.warns(UserWarning, match="Numba needs NumPy 1.0 or less"):
        assert not compiled.available.__wrapped__()


@pytest.mark.parametrize("writable", [True, False])
def test_where_compiled_code_is_kept(fresh: Forks, tmp_path: Path, writable: bool) -> None:
    """In numba's folder; where nothing can be written it is compiled for this process only."""
    folder = tmp_path / "cache"
    folder.mkdir()
    call = {"call": "sort_entries", "folder": str(folder), "writable": writable}
    assert fresh.ask(call) == [1, 0]
    assert bool(list(folder.rglob("*.nbi"))) == writable


def _check_top(pre: Tensor, k: int) -> None:
    values, indices = compiled.top(pre, k)
    assert all(len(set(row)) == k for row in indices.tolist())
    torch.testing.assert_close(pre.gather(1, indices), values, rtol=0, atol=0, equal_nan=True)
    expected = pre.topk(k).values
    found = values.sort(1, descending=True).values
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("width", "k"), [(1, 1), (5, 5), (24, 4), (100, 1), (257, 16), (777, 100), (1031, 33), (64, 60)]
)
def test_top(width: int, k: int, dtype: torch.dtype, threads: int) -> None:
    pre = torch.randn(50, width, dtype=dtype)
    _check_top(pre, k)
    _check_top(pre.relu(), k)
    _check_top(pre.abs().neg(), k)
    _check_top((2 * pre).round(), k)
    _check_top(pre.sort(1).values, k)
    _check_top(pre.exp().exp(), k)  # far apart: bisection does not arrive


@pytest.mark.parametrize("what", [float("nan"), float("inf"), -float("inf"), 0.0, 1e-45, -1e38])
@pytest.mark.parametrize("share", [0.01, 0.5, 1.0])
def test_top_with_strange_numbers(what: float, share: float) -> None:
    pre = torch.randn(40, 200)
    pre[torch.rand(pre.shape) < share] = what
    _check_top(pre, 9)
    _check_top(pre, 200)


def test_nan_of_either_sign_is_the_largest() -> None:
    pre = torch.zeros(1, 100)
    pre.view(torch.int32)[0, 17] = -0x400000  # 0xFFC00000, what processors make of 0 · ∞
    pre[0, 23] = float("nan")
    assert sorted(compiled.top(pre, 2)[1][0].tolist()) == [17, 23]


def test_top_of_more_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="6 largest of 5"):
        compiled.top(torch.zeros(3, 5), 6)


@precisions
@pytest.mark.parametrize("count", [1, 3, 4, 11])
def test_rescore(count: int, dtype: torch.dtype, threads: int) -> None:
    x, W, b = (torch.randn(shape).to(dtype) for shape in ((9, 21), (14, 21), (14,)))
    candidates = torch.stack([torch.randperm(14)[:count] for _ in range(9)])
    expected = (x.double() @ W.double().T + b.double()).gather(1, candidates)
    found = compiled.rescore(x, W, b, candidates)
    assert found.dtype == dtype
    assert (found.double() - expected).abs().max() < 10 * EPSILON[dtype]


def test_no_tokens() -> None:
    empty, nothing = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    G, W = torch.zeros(0, 6), torch.ones(4, 6)
    selection = compiled.sort(torch.zeros(1, dtype=torch.int64), empty, 4)
    compiled.decode_add(G, torch.zeros(1, dtype=torch.int64), empty, nothing, W)
    grad = torch.full_like(W, float("nan"))
    dots = compiled.backward(G, *selection, nothing, W, grad)
    assert dots is not None
    assert dots.shape == (0,)
    assert not grad.any()
    values, indices = compiled.top(torch.zeros(0, 7), 3)
    assert values.shape == indices.shape == (0, 3)
    assert compiled.rescore(G, W, torch.zeros(4), indices).shape == (0, 3)


def test_tensors_that_are_not_contiguous_are_refused() -> None:
    case = Case("usual", torch.float32)
    with pytest.raises(ValueError, match="strides"):
        compiled.decode_add(case.G, case.crow, case.col, case.values, case.W[:, ::2])
