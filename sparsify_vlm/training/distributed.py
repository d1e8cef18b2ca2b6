"""The processes of a data-parallel run, and what they tell each other.

Every process holds all coders and sees its own part of each batch. Sums over tokens (means,
variances, gradients, counts) are added up over the processes, so that N processes do what one
process with the N-fold batch does, up to the rounding of those sums. A single process is the case
where nothing has to be sent.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparsify_vlm.training.parallel_watch import Watch

SETUP_TIMEOUT = timedelta(hours=6)
"""How long processes wait for each other: one may have to download the model for all. That they
are there is seen to by the watch, within seconds."""

# How mpirun (Intel's and MPICH's, Open MPI's) says what torchrun says in the first of each row;
# `accelerate launch --mpirun_hostfile` leaves it at that.
_MPI_NAMES = {
    "RANK": ("PMI_RANK", "OMPI_COMM_WORLD_RANK"),
    "WORLD_SIZE": ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE"),
    "LOCAL_RANK": ("MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "LOCAL_WORLD_SIZE": ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE"),
}


@dataclass(frozen=True)
class World:
    """This process's place among those that share out the tokens of each batch."""

    rank: int = 0
    size: int = 1
    device: torch.device | None = None
    """The CUDA device torchrun gave this process; None: none, or a single process."""
    watch: Watch | None = None
    """What ends this process when another one is gone; None for a single process."""
    group: Any = None
    """The process group of those that share out the tokens; None: all processes of the run."""
    place: tuple[int, int] | None = None
    """Rank among all processes, and their number, where several processes see the same tokens."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and prints."""
        return (self.place or (self.rank, self.size))[0] == 0

    @property
    def processes(self) -> int:
        """The number of all processes of the run."""
        return (self.place or (self.rank, self.size))[1]

    def sharing_tokens(self, rank: int, size: int, group: Any) -> World:
        """The world of `group`, whose `size` processes share out the tokens."""
        return replace(self, rank=rank, size=size, group=group, place=(self.rank, self.size))

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Add each tensor up over all processes, in place."""
        self._reduce(tensors, dist.ReduceOp.SUM)

    def max_(self, tensors: Iterable[Tensor]) -> None:
        """Take the maximum of each tensor over all processes, in place."""
        self._reduce(tensors, dist.ReduceOp.MAX)

    def _reduce(self, tensors: Iterable[Tensor], operation: Any) -> None:
        if self.size == 1:
            return
        with self.losing_others():
            works = [
                dist.all_reduce(t, op=operation, group=self.group, async_op=True) for t in tensors
            ]
            for work in works:
                work.wait()

    def barrier(self) -> None:
        """Wait for all processes of the run."""
        if self.processes > 1:
            with self.losing_others():
                dist.barrier()

    def gather(self, value: Any) -> list[Any]:
        """The `value` of each process that shares out the tokens, in the order of the ranks."""
        values = [value] * self.size
        if self.size > 1:
            with self.losing_others():
                dist.all_gather_object(values, value, group=self.group)
        return values

    def first_then_others(self, make: Callable[[], Any]) -> Any:
        """`make()` in the first process, then in the others: what it downloads is there then."""
        if not self.is_first:
            self.barrier()
        made = make()
        if self.is_first:
            self.barrier()
        return made

    def resumes_from(self, last_step: Callable[[], int | None]) -> None:
        """Have the line that ends the run say from which step it can be resumed."""
        if self.watch is not None:
            self.watch.last_step = last_step

    @contextmanager
    def losing_others(self) -> Iterator[None]:
        """Turn torch's account of a broken connection into one line."""
        try:
            yield
        except RuntimeError as error:  # DistBackendError and gloo's own errors
            if self.watch is None:
                raise
            self.watch.connection_broke(error)


@contextmanager
def joined_world() -> Iterator[World]:
    """The `World` that torchrun, `accelerate launch` or mpirun describes in the environment, joined
    for the duration.

    Uses NCCL where every process has a CUDA device, gloo otherwise. Without a launcher, or within a
    process group that is already there, nothing is set up or torn down.
    """
    if dist.is_initialized():
        yield World(dist.get_rank(), dist.get_world_size(), _device())
        return
    _take_mpi_names()
    if "LOCAL_RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World()
        return
    device = _device()
    if device is not None:
        torch.cuda.set_device(device)
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    of_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    holder = "the launcher" if of_launcher else f"process 0 of {size}"
    with Watch(rank, size, _store_of_watch, holder) as watch:
        world = World(rank, size, device, watch)
        with world.losing_others():
            dist.init_process_group(
                "gloo" if device is None else "nccl", timeout=SETUP_TIMEOUT, device_id=device
            )
        watch.meet()
        yield world
        # Not after an exception: the others know by then, an orderly end would wait for them.
        world.barrier()
    dist.destroy_process_group()


def _store_of_watch() -> dist.Store:
    """A connection of its own to the store that the launcher, or process 0, holds."""
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=SETUP_TIMEOUT,
        wait_for_workers=False,
    )
    return dist.PrefixStore(f"watch {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _take_mpi_names() -> None:
    """Set torchrun's variables from mpirun's where a launcher has set only those."""
    if "RANK" in os.environ or "MASTER_ADDR" not in os.environ:
        return
    for name, others in _MPI_NAMES.items():
        for value in filter(None, map(os.environ.get, others)):
            os.environ[name] = value


def _device() -> torch.device | None:
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    refused = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if refused or not torch.cuda.is_available() or torch.cuda.device_count() < here:
        return None
    return torch.device("cuda", local_rank)
