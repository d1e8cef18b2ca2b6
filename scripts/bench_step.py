"""Time one training step of a cross-layer transcoder against autograd, in the same process.

    python scripts/bench_step.py                      # the two standard sizes
    python scripts/bench_step.py --size tiny --threads 2 --repeats 10

Each step is forward, backward and fused Adam. The systems take turns, so that a busy machine slows
all of them alike; wall is the median, core the smallest processor time over all threads.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sparsify_vlm.coders import Clt, CltConfig, forward_backward, joint_loss


@dataclass(frozen=True)
class Size:
    layers: int
    d_model: int
    num_latents: int
    k: int
    tokens: int


SIZES = {
    "tiny": Size(layers=8, d_model=96, num_latents=768, k=16, tokens=3000),
    "A": Size(layers=8, d_model=256, num_latents=4096, k=16, tokens=2048),
    "B": Size(layers=12, d_model=768, num_latents=6144, k=32, tokens=1024),
}


def autograd(clt: Clt, x: Tensor, y: Tensor) -> None:
    """Plain PyTorch: embedding_bag decoders, gradients by autograd."""
    joint_loss(clt, x, y).backward()


def analytic(clt: Clt, x: Tensor, y: Tensor) -> None:
    """The trainer's step."""
    forward_backward(clt, x, y)


SYSTEMS: dict[str, Callable[[Clt, Tensor, Tensor], None]] = {
    "autograd": autograd,
    "analytic": analytic,
}


def build(size: Size, device: str) -> tuple[Clt, Tensor, Tensor]:
    """A coder with random decoders, and activations that its latents see: x, y [L, T, d]."""
    torch.manual_seed(0)
    shape = (size.layers, size.tokens, size.d_model)
    x, y = torch.randn(shape), torch.randn(shape)
    config = CltConfig(
        d_model=size.d_model,
        hookpoints=[f"layers.{i}.mlp" for i in range(size.layers)],
        num_latents=size.num_latents,
        k=size.k,
        n_targets=size.layers,
    )
    clt = Clt(config).initialise(x.mean(1), y.mean(1))
    with torch.no_grad():
        for tables in clt.W_dec:
            for W in tables:
                W.normal_(std=0.01)
    return clt.to(device), x.to(device), y.to(device)


def measure(size: Size, repeats: int, device: str) -> dict[str, tuple[float, float]]:
    """Per system: median wall seconds and smallest processor seconds of a step."""
    clt, x, y = build(size, device)
    optimizer = torch.optim.Adam(clt.parameters(), lr=1e-4, fused=True)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in SYSTEMS}
    for _ in range(repeats + 1):
        for name, system in SYSTEMS.items():
            wall, core = time.perf_counter(), time.process_time()
            optimizer.zero_grad(set_to_none=True)
            system(clt, x, y)
            optimizer.step()
            if device != "cpu":
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - wall, time.process_time() - core))
    return {
        name: (statistics.median(w for w, _ in rows[1:]), min(c for _, c in rows[1:]))
        for name, rows in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, nargs="*", default=["tiny", "A"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    table = Table("size", "system", "wall s", "core s", "tokens/s")
    for name in arguments.size:
        size = SIZES[name]
        for system, (wall, core) in measure(size, arguments.repeats, arguments.device).items():
            table.add_row(name, system, f"{wall:.3f}", f"{core:.3f}", f"{size.tokens / wall:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
