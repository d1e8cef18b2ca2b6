"""Measuring systems in turn, and holding ours to autograd."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bench import machine, memory
from bench.clock import Clock
from bench.peers import loss_of_chosen
from bench.roofline import least
from bench.sizes import Size, build, draw
from bench.systems import State, System, chosen_latents
from sparsify_vlm.coders import Clt

CHECKED_STEPS = 10
WARM_UP = Size(layers=2, d_model=64, num_latents=512, k=4, tokens=64)


@dataclass
class Timing:
    """Of one system."""

    wall: list[float] = field(default_factory=list)
    """Seconds of each round."""

    core: list[float] = field(default_factory=list)
    """Processor seconds of each round, over all threads."""

    phases: dict[str, float] = field(default_factory=dict)
    """Seconds of the quickest round by phase, as `Clock` takes them."""

    def add(self, wall: float, core: float, phases: dict[str, float]) -> None:
        """One round."""
        if not self.phases or sum(phases.values()) < sum(self.phases.values()):
            self.phases = phases
        self.wall.append(wall)
        self.core.append(core)


def in_turn(size: Size, systems: list[System], rounds: int, data: str, device: str) -> list[Timing]:
    """All systems once per round, on one coder; a round before them is not counted."""
    state = State(build(size, data, device))
    x, y = (part.to(device) for part in draw(size, data))
    clock = Clock(device)
    steps = [system.make(state) for system in systems]
    timings = [Timing() for _ in systems]
    for number in range(rounds + 1):
        for step, timing in zip(steps, timings, strict=True):
            wall, core = time.perf_counter(), time.process_time()
            clock.begin()
            step(x, y, clock)
            phases = clock.end()
            if number:
                ends = time.perf_counter(), time.process_time()
                timing.add(ends[0] - wall, ends[1] - core, phases)
    return timings


def peak_of(size: Size, system: System, data: str, device: str) -> int:
    """Bytes by which this process's peak grows over some steps of `system`; call it once."""
    _train(WARM_UP, system, data, device)  # libraries and compiled code are not what is asked for
    before = memory.peak(device)
    _train(size, system, data, device)
    return memory.peak(device) - before


def _train(size: Size, system: System, data: str, device: str) -> None:
    state = State(build(size, data, device))
    x, y = (part.to(device) for part in draw(size, data))
    step, clock = system.make(state), Clock(device)
    for _ in range(memory.STEPS):
        clock.begin()
        step(x, y, clock)
        clock.end()


@dataclass
class Comparison:
    """Ten steps of a system of ours beside autograd and Adam, each step on other tokens.

    Rounding decides between latents whose pre-activations are equal but for it, and one such choice
    moves a whole row: the reference takes the latents that the system took, and says how far from
    its own top k they are.
    """

    apart: float = 0.0
    """The largest difference of any weight at the end."""

    moved: float = 0.0
    """The largest distance that a weight of the reference has moved."""

    entries: int = 0
    """Active latents, over all steps, tokens and layers."""

    other: int = 0
    """Those among them that are not in the reference's top k."""

    gap: float = 0.0
    """How much smaller one of those was than the reference's k-th largest, at most."""


def compare(size: Size, system: System, data: str, device: str) -> Comparison:
    """Train both from the same weights on the same tokens."""
    mine, reference = State(build(size, data, device)), State(build(size, data, device))
    step, clock, found = system.make(mine), Clock(device), Comparison()
    for number in range(CHECKED_STEPS):
        x, y = (part.to(device) for part in draw(size, data, seed=number))
        clock.begin()
        with chosen_latents() as chosen:
            step(x, y, clock)
        _count(found, reference.clt, x, chosen)
        loss_of_chosen(reference.clt, x, y, chosen).backward()
        reference.adam.step()
        reference.adam.zero_grad(set_to_none=True)
    start = build(size, data, device)
    found.apart = _largest(reference.clt, mine.clt)
    found.moved = _largest(reference.clt, start)
    return found


@torch.no_grad()
def _count(found: Comparison, clt: Clt, x: Tensor, chosen: list[Tensor]) -> None:
    for x_s, W, b, indices in zip(x, clt.W_enc, clt.b_enc, chosen, strict=True):
        pre = torch.nn.functional.linear(x_s, W, b)
        top = pre.topk(clt.cfg.k, dim=1)
        kept = torch.zeros_like(pre, dtype=torch.bool).scatter_(1, top.indices, True)
        foreign = ~kept.gather(1, indices)
        gaps = (top.values[:, -1:] - pre.gather(1, indices)) * foreign
        found.entries += indices.numel()
        found.other += int(foreign.sum())
        found.gap = max(found.gap, float(gaps.max()))


@torch.no_grad()
def _largest(these: Clt, those: Clt) -> float:
    pairs = zip(these.parameters(), those.parameters(), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


def results(
    size: Size, systems: list[System], timings: list[Timing], rates: machine.Rates
) -> list[dict[str, object]]:
    """The figures of each system, as they are stored."""
    found = []
    for system, timing in zip(systems, timings, strict=True):
        bound = least(size, rates, system.select)
        found.append(
            {
                "system": system.name,
                "phases": timing.phases,
                "wall": timing.wall,
                "wall_median": statistics.median(timing.wall),
                "core": min(timing.core),
                "tokens_per_second": size.tokens / statistics.median(timing.wall),
                "least": bound,
                "times_least": sum(timing.phases.values()) / sum(bound.values()),
            }
        )
    return found
