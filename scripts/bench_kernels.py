"""Time the kernels of one training step at the size of one layer of LLaVA-1.5-7B.

    python scripts/bench_kernels.py --device cuda
    python scripts/bench_kernels.py --device cuda --tokens 16384 --skew 0
    python scripts/bench_kernels.py                     # a CPU: smaller, and the torch path only

One target that all sources write to; backward and Adam for one of its decoders. The Triton kernels
and the torch path run on the same tensors. `unique GB/s` counts every number that is read or
written once, `gathered GB/s` each time that an entry asks for a row. Both are to be read beside the
rate of a device copy, which the first table gives with that of a bfloat16 product. `error` is the
largest difference from the torch path over its largest number, `repeats` whether a second run gave
the same bits. Times are medians; compilation and tuning are not in them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.optim.adam import adam

from sparsify_vlm.coders.kernels import AdamState, Entries, Kernels, path
from sparsify_vlm.coders.kernels import triton_launch as launch

LR = 1e-3


@dataclass
class Clock:
    """Measures calls on one device."""

    device: torch.device
    repeats: int

    def seconds(self, call: Callable[[], object]) -> float:
        """The median over the repeats, after two calls that do not count."""
        for _ in range(2):
            call()
        if self.device.type != "cuda":
            return statistics.median(self._on_host(call) for _ in range(self.repeats))
        events = [
            tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(self.repeats)
        ]
        for begin, end in events:
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(begin.elapsed_time(end) / 1e3 for begin, end in events)

    @staticmethod
    def _on_host(call: Callable[[], object]) -> float:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin


@dataclass
class Slice:
    """The tensors of one target: S sources with a selection and a table W [F, d] each."""

    sources: int
    F: int
    d: int
    k: int
    T: int
    skew: float
    device: torch.device
    tables: list[Tensor] = field(init=False)
    columns: list[Tensor] = field(init=False)
    values: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.tables = [self.random(self.F, self.d) * 0.02 for _ in range(self.sources)]
        self.columns = [self._latents() for _ in range(self.sources)]
        self.values = [self.random(self.T * self.k).abs() for _ in range(self.sources)]
        self.G, self.x = self.random(self.T, self.d), self.random(self.T, self.d)
        self.W_enc, self.b_enc = self.random(self.F, self.d) / self.d**0.5, self.random(self.F)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device)

    def _latents(self) -> Tensor:
        """[T, k] distinct latents, whose frequencies spread by a factor of exp(skew)."""
        scores = self.skew * self.random(self.F)
        noise = torch.rand(self.T, self.F, device=self.device).log_().neg_().log_().neg_()
        return (scores + noise).topk(self.k, dim=1, sorted=False).indices

    def entries(self, kernels: Kernels) -> list[Entries]:
        """Sorted by latent already, as they are when the kernels of a step begin."""
        made = [
            Entries(kernels.uniform(col, self.F), values)
            for col, values in zip(self.columns, self.values, strict=True)
        ]
        for each in made:
            _ = each.selection.start
        return made


@dataclass
class Work:
    """Something timed: what it computes, and how much it moves or multiplies, in bytes and flop."""

    call: Callable[[], Tensor]
    unique: float = 0
    gathered: float = 0
    flop: float = 0


def products(at: Slice, kernels: Kernels) -> dict[str, Work]:
    """Decode, backward and selection by one path."""
    entries, row = at.entries(kernels), 4 * at.d
    parts = list(zip(entries, at.tables, strict=True))
    one, W = parts[0]
    used = sum(len(col.unique()) for col in at.columns)
    tokens, table, asked = at.T * row, at.F * row, at.T * at.k * row
    candidates = at.x @ at.W_enc.T + at.b_enc
    candidates = candidates.topk(at.k + launch.MARGIN, dim=1).indices
    scored = candidates.numel() * row

    def decode() -> Tensor:
        out = torch.zeros_like(at.G)
        kernels.decode(out, parts)
        return out

    def sort() -> Tensor:
        return kernels.uniform(at.columns[0], at.F).order

    return {
        f"decode, {at.sources} sources": Work(
            decode, used * row + 3 * tokens, at.sources * asked + 3 * tokens
        ),
        "sort of one source": Work(sort),
        "backward, gradient written": Work(
            lambda: kernels.backward(at.G, one, W)[0], tokens + 2 * table, asked + 2 * table
        ),
        "backward without dots": Work(
            lambda: kernels.backward(at.G, one, W, dots=False)[0], tokens + table, asked + table
        ),
        **{
            f"backward and Adam, {name} moments": Work(
                adam_step(at, kernels, one, W, dtype),
                tokens + (2 + share) * table,
                asked + (2 + share) * table,
            )
            for name, dtype, share in (
                ("float32", torch.float32, 4),
                ("bfloat16", torch.bfloat16, 2),
            )
            if kernels.fuses_adam or dtype == torch.float32
        },
        "rescoring": Work(
            lambda: kernels.rescore(at.x, at.W_enc, at.b_enc, candidates),
            tokens + table,
            tokens + scored,
        ),
    }


def adam_step(
    at: Slice, kernels: Kernels, one: Entries, W: Tensor, dtype: torch.dtype
) -> Callable[[], Tensor]:
    """A step on tensors of its own that gives the table; at the first call that of one step."""
    W = W.clone()
    first, second = torch.zeros_like(W, dtype=dtype), torch.zeros_like(W, dtype=dtype)
    step = torch.ones((), device=at.device)

    def fused() -> Tensor:
        kernels.backward_adam(at.G, one, W, AdamState(first, second, 1, LR))
        return W

    def separate() -> Tensor:
        gradient = kernels.backward(at.G, one, W)[0]
        adam(
            [W], [gradient], [first], [second], [], [step.zero_()],
            fused=True, amsgrad=False, beta1=0.9, beta2=0.999, lr=LR,
            weight_decay=0.0, eps=1e-8, maximize=False,
        )  # fmt: skip
        return W

    return fused if kernels.fuses_adam else separate


def encoder(at: Slice, triton: bool) -> dict[str, Work]:
    """The encoder's product and the selection from it."""
    flop = 2.0 * at.T * at.F * at.d
    narrow = at.x.bfloat16(), at.W_enc.bfloat16(), at.b_enc.bfloat16()
    count = at.k + launch.MARGIN
    if not triton:
        pre = torch.addmm(narrow[2], narrow[0], narrow[1].T).relu()
        return {
            "encoder, bfloat16": Work(
                lambda: torch.addmm(narrow[2], narrow[0], narrow[1].T).relu(), flop=flop
            ),
            f"{count} largest": Work(lambda: pre.topk(count, dim=1, sorted=True).values),
        }
    x, W, b = narrow[0], narrow[1], at.b_enc
    pre, maxima = launch.encode(x, W, b)
    return {
        "encoder, bfloat16": Work(lambda: launch.encode(x, W, b)[0][:, : at.F], flop=flop),
        f"{count} largest": Work(
            lambda: launch.largest(pre, maxima, count)[0].sort(1, descending=True).values
        ),
        "encoder, tf32": Work(
            lambda: launch.encode(at.x, at.W_enc, b, precision="tf32")[0][:, : at.F], flop=flop
        ),
        f"encoder to the {at.k} largest, exact": Work(
            lambda: launch.top(at.x, at.W_enc, b, at.k)[0].sort(1).values, flop=flop
        ),
    }


def rates(at: Slice, clock: Clock) -> Table:
    """What the device can do: a copy, counting bytes read and written, and a product."""
    table = Table("on this device", "ms", "rate")
    numbers = torch.zeros(2**28 if at.device.type == "cuda" else 2**24, device=at.device)
    target = torch.empty_like(numbers)
    seconds = clock.seconds(lambda: target.copy_(numbers))
    table.add_row("copy", f"{seconds * 1e3:.3f}", f"{8 * len(numbers) / seconds / 1e9:.0f} GB/s")
    x, W = at.x.bfloat16(), at.W_enc.bfloat16()
    seconds = clock.seconds(lambda: x @ W.T)
    rate = f"{2e-12 * at.T * at.F * at.d / seconds:.2f} TFLOP/s"
    table.add_row("bfloat16 product, x W_encᵀ", f"{seconds * 1e3:.3f}", rate)
    return table


def compare(at: Slice, clock: Clock, triton: bool) -> Table:
    """Each kernel beside the torch path, and whether they agree."""
    torch_path = path("torch")
    reference = products(at, torch_path) | encoder(at, False)
    ours = products(at, triton_kernels()) | encoder(at, True) if triton else {}
    table = Table(
        "kernel", "path", "ms", "unique GB/s", "gathered GB/s", "TFLOP/s", "error", "repeats"
    )
    for name in [*reference, *(name for name in ours if name not in reference)]:
        expected = None
        for label, works in (("torch", reference), ("triton", ours)):
            if name not in works:
                continue
            work = works[name]
            first = work.call().clone()
            agreement = ["", ""]
            if label == "torch":
                expected = first
            else:
                same = "" if "Adam" in name else str(torch.equal(first, work.call()))
                agreement = ["" if expected is None else f"{error(first, expected):.1e}", same]
            seconds = clock.seconds(work.call)
            amounts = (work.unique / 1e9, work.gathered / 1e9, work.flop / 1e12)
            shown = [f"{amount / seconds:.4g}" if amount else "" for amount in amounts]
            table.add_row(name, label, f"{seconds * 1e3:.3f}", *shown, *agreement)
    return table


def error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.float(), expected.float()
    return float((found - expected).abs().max() / expected.abs().max())


def triton_kernels() -> Kernels:
    from sparsify_vlm.coders.kernels.triton_path import TritonKernels

    return TritonKernels()


def main(argv: list[str] | None = None) -> None:
    """Measure and print; `argv` None: the command line's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sources", type=int)
    parser.add_argument("--num_latents", type=int)
    parser.add_argument("--d_model", type=int)
    parser.add_argument("--k", type=int)
    parser.add_argument("--tokens", type=int)
    parser.add_argument(
        "--skew", type=float, default=1.0, help="spread of the latents' frequencies; 0: all alike"
    )
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    triton = launch.available(device)
    size = (16, 8192, 4096, 32, 4096) if device.type == "cuda" else (4, 1024, 256, 16, 512)
    given = [getattr(arguments, n) for n in ("sources", "num_latents", "d_model", "k", "tokens")]
    size = tuple(default if own is None else own for own, default in zip(given, size, strict=True))
    at = Slice(*size, arguments.skew, device)
    console = Console(width=None if Console().is_terminal else 140)
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    console.print(
        f"{kind}, torch {torch.__version__}: {at.sources} sources, F = {at.F}, d = {at.d}, "
        f"k = {at.k}, {at.T} tokens, skew {at.skew:g}; the busiest latent is active at "
        f"{int(at.columns[0].flatten().bincount().max())} of them"
    )
    if device.type == "cpu":
        console.print("A CPU: a smaller size, and nothing here says how fast a GPU is.")
    if triton and device.type == "cpu":
        console.print("Triton's interpreter runs its kernels: only their errors mean something.")
    if not triton:
        console.print("The Triton kernels cannot be used here: the torch path alone is timed.")
    clock = Clock(device, arguments.repeats)
    console.print(rates(at, clock))
    console.print(compare(at, clock, triton))


if __name__ == "__main__":
    main()
