"""Every kernel path against float64 loops over single entries. A new path must pass this file."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from sparsify_vlm.coders import kernels
from sparsify_vlm.coders.kernels import AdamState, Entries, Kernels, kernels_for, prefers_dense
from sparsify_vlm.errors import UserError

T, F, D = 13, 24, 10


def paths() -> list[str]:
    return [*kernels.usable("cpu"), "dense"]


def path(name: str) -> Kernels:
    return kernels.path(name)


def uniform_case(kernel: Kernels, dtype: torch.dtype, k: int = 3) -> tuple[Entries, Tensor, Tensor]:
    """k entries a token over the first half of the latents; the others have none."""
    generator = torch.Generator().manual_seed(k)
    col = torch.stack([torch.randperm(F // 2, generator=generator)[:k] for _ in range(T)])
    values = torch.randn(T * k, generator=generator, dtype=torch.float64)
    values[::4] = 0
    return _case(kernel.uniform(col, F), values, dtype, generator)


def ragged_case(kernel: Kernels, dtype: torch.dtype) -> tuple[Entries, Tensor, Tensor]:
    """From 0 to F entries a token."""
    generator = torch.Generator().manual_seed(9)
    mask = torch.rand(T, F, generator=generator) < torch.linspace(0, 1.1, T)[:, None]
    mask[0], mask[-1] = False, True
    crow = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    values = torch.randn(int(mask.sum()), generator=generator, dtype=torch.float64)
    return _case(kernel.ragged(crow, mask.nonzero()[:, 1], F), values, dtype, generator)


def _case(selection, values, dtype, generator):
    G = torch.randn(T, D, generator=generator, dtype=torch.float64)
    W = torch.randn(F, D, generator=generator, dtype=torch.float64)
    return Entries(selection, values.to(dtype)), G.to(dtype), W.to(dtype)


CASES = {
    "uniform": uniform_case,
    "one entry": lambda kernel, dtype: uniform_case(kernel, dtype, 1),
    "ragged": ragged_case,
}


def entry_list(entries: Entries) -> list[tuple[int, int, float]]:
    """(token, latent, value) of each entry."""
    selection = entries.selection
    found = []
    for t in range(T):
        for e in range(int(selection.crow[t]), int(selection.crow[t + 1])):
            found.append((t, int(selection.col[e]), float(entries.values[e])))
    return found


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}[dtype]
    assert (found.double() - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1)


precisions = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


@pytest.mark.parametrize("name", paths())
@pytest.mark.parametrize("case", CASES)
@precisions
def test_products(name: str, case: str, dtype: torch.dtype) -> None:
    if name == "triton" and dtype == torch.float64:
        return test_a_path_is_not_taken_for_types_it_lacks(pytest.MonkeyPatch())
    kernel = path(name)
    entries, G, W = CASES[case](kernel, dtype)
    decoded, outer = G.double().clone(), torch.zeros(F, D, dtype=torch.float64)
    dots = []
    for t, i, value in entry_list(entries):
        decoded[t] += 2 * value * W[i].double()
        outer[i] += value * G[t].double()
        dots.append(G[t].double() @ W[i].double())
    out = G.clone()
    kernel.decode(out, [(entries, W), (entries, W)])
    close(out, decoded, dtype)
    gradient, products = kernel.backward(G, entries, W)
    close(gradient, outer, dtype)
    close(products, torch.stack(dots), dtype)
    close(kernel.backward(G, entries, W, dots=False)[0], outer, dtype)


@pytest.mark.parametrize("name", [n for n in paths() if path(n).fuses_adam])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("decay", [False, True])
def test_fused_adam_is_that_of_torch(name: str, case: str, decay: bool) -> None:
    kernel = path(name)
    entries, G, W = CASES[case](kernel, torch.float32)
    q = torch.rand(F) if decay else None
    reference = torch.nn.Parameter(W.double().clone())
    adam = torch.optim.Adam([reference], lr=1e-2)
    moments = torch.zeros_like(W), torch.zeros_like(W)
    for step in range(1, 6):
        expected = [float(G[t].double() @ reference[i].detach()) for t, i, _ in entry_list(entries)]
        gradient = torch.zeros(F, D, dtype=torch.float64)
        for t, i, value in entry_list(entries):
            gradient[i] += value * G[t].double()
        if q is not None:
            gradient += q[:, None].double() * reference.detach()
        reference.grad = gradient
        adam.step()
        state = AdamState(*moments, step, 1e-2)
        dots = kernel.backward_adam(G, entries, W, state, q)
        torch.testing.assert_close(
            dots.double(), torch.tensor(expected).double(), atol=1e-4, rtol=0
        )
        G = G.roll(1, 0) * 1.1
    assert (W.double() - reference.detach()).abs().max() < 2e-6


@pytest.mark.parametrize("name", paths())
@pytest.mark.parametrize(("rows", "width", "k"), [(7, 24, 4), (3, 5, 5), (33, 512, 16), (4, 96, 1)])
def test_top(name: str, rows: int, width: int, k: int) -> None:
    pre = torch.randn(rows, width)
    pre[0] = pre[0].round()  # ties
    values, indices = path(name).top(pre, k)
    torch.testing.assert_close(values.sort(1).values, pre.sort(1).values[:, -k:], rtol=0, atol=0)
    torch.testing.assert_close(pre.gather(1, indices), values, rtol=0, atol=0)
    assert all(len(set(row)) == k for row in indices.tolist())


@pytest.mark.parametrize("name", paths())
def test_rescore(name: str) -> None:
    x, W, b = torch.randn(6, D), torch.randn(F, D), torch.randn(F)
    candidates = torch.stack([torch.randperm(F)[:7] for _ in range(6)])
    exact = (x.double() @ W.double().T + b.double()).gather(1, candidates)
    close(path(name).rescore(x, W, b, candidates), exact, torch.float32)


@pytest.mark.parametrize("name", paths())
def test_no_tokens(name: str) -> None:
    """A process may have none of a batch's tokens."""
    kernel = path(name)
    entries = Entries(kernel.uniform(torch.zeros(0, 3, dtype=torch.int64), F), torch.zeros(0))
    out = torch.zeros(0, D)
    kernel.decode(out, [(entries, torch.ones(F, D))])
    gradient, dots = kernel.backward(out, entries, torch.ones(F, D))
    assert gradient.shape == (F, D)
    assert not gradient.any()
    assert dots.shape == (0,)


@pytest.mark.parametrize("name", kernels.PATHS)
def test_the_variable_forces_a_path(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.VARIABLE, name)
    if name in kernels.usable("cpu"):  # all but triton
        assert kernels_for(torch.zeros(1000, 4), 4).name == name
    else:
        with pytest.raises(UserError, match=f"{kernels.VARIABLE}={name}"):
            kernels_for(torch.zeros(1000, 4), 4)


def test_an_empty_variable_is_an_unset_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    usual = kernels_for(torch.zeros(1000, 4), 4).name
    monkeypatch.setenv(kernels.VARIABLE, "")
    assert kernels_for(torch.zeros(1000, 4), 4).name == usual


def test_a_path_is_not_taken_for_types_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, dtype in (("triton", torch.float64), ("compiled", torch.bfloat16)):
        with monkeypatch.context() as context:
            context.setenv(kernels.VARIABLE, name)
            with pytest.raises(UserError, match=f"{kernels.VARIABLE}={name} does not work"):
                kernels_for(torch.zeros(1000, 4, dtype=dtype), 4)


@pytest.mark.skipif(platform.system() != "Linux", reason="Triton is published for Linux alone")
@pytest.mark.slow
def test_triton_passes_this_file_in_its_interpreter() -> None:
    """In a process of its own: Triton reads the variable when it is first imported."""
    pytest_here = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(
        [*pytest_here, "-k", "triton and not file"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert int(run.stdout.split(" passed")[0].split()[-1]) >= 14


def test_unknown_path_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.VARIABLE, "cuda")
    with pytest.raises(UserError, match="choose one of eager, torch, compiled, triton"):
        kernels_for(torch.zeros(4, 4), 1)


def test_few_inactive_latents_go_through_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    assert kernels_for(torch.zeros(32, 4), 16).name == "dense"
    assert kernels_for(torch.zeros(3200, 4), 16).name != "dense"
    assert prefers_dense(1, torch.zeros(4000, 4, dtype=torch.bfloat16))
