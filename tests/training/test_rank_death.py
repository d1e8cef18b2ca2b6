"""A process that is killed, stopped or told to end: the others end with one line, --resume goes on.

The processes are forked from one that has imported everything, and get the variables a launcher
would set; test_data_parallel.py has torchrun itself.
"""

from __future__ import annotations

import ctypes
import multiprocessing as mp
import os
import random
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from sparsify_vlm import cli
from sparsify_vlm.data.store_writer import StoreWriter, TokenRows
from sparsify_vlm.errors import UserError
from sparsify_vlm.training.distributed import joined_world
from sparsify_vlm.training.parallel_peers import Peer, State
from sparsify_vlm.training.parallel_watch import SILENCE_VARIABLE, silence_allowed

LAYERS, WIDTH, TOKENS, STEPS = 3, 8, 640, 30
Job = Callable[[list[str]], int]
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
OPEN_MPI = tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An activation store of made-up rows."""
    folder = tmp_path_factory.mktemp("shared") / "store"
    sheet = {
        **{"model": "org/some-model", "revision": "abc", "dtype": "float32", "d_model": WIDTH},
        **{"dataset": {"name": "made-up", "fingerprint": "f"}, "bos_token_id": 1},
        **{"hookpoints": [f"layers.{i}.mlp" for i in range(LAYERS)], "shard_tokens": TOKENS},
        **{"n_targets": 2, "target_offset": 0, "sites": {"x": "mlp_in", "y": "mlp_out"}},
        **{"x_layers": list(range(LAYERS)), "y_layers": list(range(LAYERS))},
    }
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(LAYERS, TOKENS, WIDTH, generator=generator)
    with StoreWriter(folder, sheet, TOKENS) as writer:
        writer.add(
            TokenRows(
                x=x,
                y=torch.tanh(x @ torch.randn(WIDTH, WIDTH, generator=generator)).cumsum(0),
                input_ids=torch.arange(TOKENS, dtype=torch.int32),
                position=torch.arange(TOKENS, dtype=torch.int32),
                sample=torch.zeros(TOKENS, dtype=torch.int32),
                role=torch.ones(TOKENS, dtype=torch.uint8),
                patch=torch.full((TOKENS, 2), -1, dtype=torch.int16),
                samples=["s0"],
                skipped=[],
            )
        )
        writer.finish()
    return folder


def flags(store: Path, save_dir: Path, name: str, processes: int, steps: int = STEPS) -> list[str]:
    return [
        *("--activations", str(store), "--save_dir", str(save_dir), "--run_name", name),
        *("--batch_tokens", str(64 // processes), "--max_steps", str(steps), "--save_every", "3"),
        *("--transcode", "--cross_layer", "3", "--num_latents", "32", "--k", "4"),
        *("--optimizer", "adam", "--lr", "1e-3", "--lr_warmup_steps", "0", "--device", "cpu"),
    ]


# ---- what the processes do


def train(arguments: list[str]) -> int:
    return cli.main(["train", *arguments])


def hold_the_lock(arguments: list[str]) -> int:
    """The second process sits in a call that keeps Python's lock, longer than silence may last."""
    with joined_world() as world:
        if world.rank == 1:
            ctypes.PyDLL(None).sleep(int(arguments[0]))
        world.barrier()
    return 0


def fail(arguments: list[str]) -> int:
    """The processes named after the message give up with it."""
    message, *ranks = arguments
    try:
        with joined_world() as world:
            if str(world.rank) in ranks:
                raise UserError(message)
            world.barrier()
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
    return 1


def process(job: Job, arguments: list[str], variables: dict[str, str], output: Path) -> None:
    with output.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(variables)
    torch.set_num_threads(1)
    raise SystemExit(job(arguments))


# ---- starting and hurting them


class Pair:
    """Two processes of a run, or one; `agent`: the store lives outside them, as under torchrun."""

    def __init__(
        self,
        job: Job,
        arguments: list[str],
        output: Path,
        *,
        size: int = 2,
        agent: bool = False,
        names: tuple[str, ...] = TORCHRUN,
        silence: float = 45,
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        self.store = (
            dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
            if agent
            else None
        )
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        common |= {"TORCHELASTIC_USE_AGENT_STORE": str(agent), SILENCE_VARIABLE: str(silence)}
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["sparsify_vlm.cli", "sparsify_vlm.training.run"])
        self.output = output
        self.processes = []
        for rank in range(size):
            own = zip(names, (rank, size, rank, size), strict=True)
            variables = common | {name: str(value) for name, value in own}
            self.processes.append(
                context.Process(target=process, args=(job, arguments, variables, output))
            )
            self.processes[-1].start()

    def hurt(self, rank: int, number: int) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def ended(self, seconds: float, ranks: tuple[int, ...] = (0, 1)) -> list[int | None]:
        """Exit codes, None for what still runs after that time."""
        deadline = time.monotonic() + seconds
        for rank in ranks:
            self.processes[rank].join(max(deadline - time.monotonic(), 0.0))
        return [self.processes[rank].exitcode for rank in ranks]

    def lines(self) -> list[str]:
        """What the processes said of an end."""
        text = self.output.read_text()
        assert "Traceback" not in text, text
        return re.findall(r"^.*error: (.*)$", text, re.MULTILINE)


@contextmanager
def started(*arguments: object, **settings: object) -> Iterator[Pair]:
    pair = Pair(*arguments, **settings)  # type: ignore[arg-type]
    try:
        yield pair
    finally:
        for one in pair.processes:
            one.kill()
            one.join()


def until(condition: Callable[[], bool], pair: Pair, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        assert all(one.exitcode is None for one in pair.processes), pair.output.read_text()
        time.sleep(0.001)


def steps_done(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def steps_saved(run: Path) -> int:
    return max((int(p.name[5:]) for p in run.glob("resume/step-*")), default=0)


def saving(run: Path) -> bool:
    return any(run.glob("resume/.step-*"))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "resume" / f"step-{STEPS:08d}" / "tensors.safetensors")


# ---- the tests


@pytest.fixture(scope="module")
def whole(store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What an undisturbed run of two processes ends with."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with started(train, flags(store, folder, "whole", 2), folder / "out.txt") as pair:
        assert pair.ended(60) == [0, 0], pair.output.read_text()
        assert pair.lines() == []
    return weights(folder / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("agent", [False, True], ids=["rank 0 has the store", "a launcher has it"])
def test_killed_runs_resume_to_the_undisturbed_end(
    store: Path, whole: dict[str, torch.Tensor], tmp_path: Path, agent: bool
) -> None:
    run, chance = tmp_path / "killed", random.Random()
    command, again = flags(store, tmp_path, "killed", 2), []
    moments: dict[str, Callable[[], bool]] = {
        "setup": lambda: run.exists(),
        "step": lambda: steps_done(run) >= 8,
        "saving": lambda: saving(run) and steps_saved(run) >= 12,
    }
    for number, (moment, reached) in enumerate(moments.items()):
        victim = (number + agent) % 2
        output = tmp_path / f"{moment}.txt"
        with started(train, [*command, *again], output, agent=agent) as pair:
            until(reached, pair)
            time.sleep(chance.random() * (0.001 if moment == "saving" else 0.02))
            pair.hurt(victim, signal.SIGKILL)
            assert pair.ended(20) in ([-9, 1], [1, -9]), (moment, output.read_text())
            (line,) = pair.lines()
            assert f"process {victim} of 2 was killed" in line
            saved = steps_saved(run)
            assert (f"continues from step {saved}" if saved else "nothing was saved") in line
        again = ["--resume"]
    shutil.copytree(run, tmp_path / "alone")
    with started(train, [*command, "--resume"], tmp_path / "end.txt", agent=agent) as pair:
        assert pair.ended(60) == [0, 0], pair.output.read_text()
    command = [*flags(store, tmp_path, "alone", 1), "--resume"]
    with started(train, command, tmp_path / "alone.txt", size=1) as one:
        assert one.ended(60, (0,)) == [0], one.output.read_text()
    for key, value in whole.items():
        if value.is_floating_point():
            assert torch.equal(weights(run)[key], value), key
            torch.testing.assert_close(
                weights(tmp_path / "alone")[key], value, rtol=1e-3, atol=1e-5, msg=key
            )


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_stopped_process_is_noticed(store: Path, tmp_path: Path, victim: int) -> None:
    command = flags(store, tmp_path, "stopped", 2)
    with started(train, command, tmp_path / "out.txt", silence=2) as pair:
        until(lambda: steps_done(tmp_path / "stopped") >= 4, pair)
        pair.hurt(victim, signal.SIGSTOP)
        assert pair.ended(12, (1 - victim,)) == [1]
        (line,) = pair.lines()
        # Process 0 holds the store: nothing can be asked any more, but /proc tells.
        assert f"process {victim} of 2 is stopped" in line
        assert "--resume continues from step" in line


@pytest.mark.slow
def test_launcher_killed(store: Path, tmp_path: Path) -> None:
    command = flags(store, tmp_path, "orphans", 2, steps=2000)
    with started(train, command, tmp_path / "out.txt", agent=True) as pair:
        until(lambda: steps_done(tmp_path / "orphans") >= 4, pair)
        pair.store = None  # which ends its server
        assert pair.ended(20) == [1, 1]
        (line,) = pair.lines()
        assert line.startswith("the launcher, which holds the run's store, is gone")


@pytest.mark.slow
def test_sigterm_ends_all_within_seconds(store: Path, tmp_path: Path) -> None:
    command = flags(store, tmp_path, "ended", 2)
    with started(train, command, tmp_path / "out.txt") as pair:
        until(lambda: steps_done(tmp_path / "ended") >= 4, pair)
        pair.hurt(1, signal.SIGTERM)
        codes = pair.ended(5)
        assert codes[0] in (1, 143)
        assert codes[1] == 143
        (line,) = pair.lines()
        assert line.startswith("stopped by SIGTERM; --resume continues from step")


def test_long_call_is_no_death(tmp_path: Path) -> None:
    """Also: the variables of mpirun are taken."""
    with started(hold_the_lock, ["4"], tmp_path / "out.txt", silence=2, names=OPEN_MPI) as pair:
        assert pair.ended(30) == [0, 0], pair.output.read_text()


@pytest.mark.parametrize(
    ("ranks", "agent"), [(["1"], False), (["0", "1"], True)], ids=["one gives up", "both do"]
)
def test_own_message_is_the_only_one(tmp_path: Path, ranks: list[str], agent: bool) -> None:
    """Where the store goes with process 0, the other one may tell the same once more."""
    with started(fail, ["the disk is full", *ranks], tmp_path / "out.txt", agent=agent) as pair:
        assert pair.ended(30) == [1, 1]
        said = pair.output.read_text().splitlines()
        assert [line for line in said if not line.startswith("[")] == ["the disk is full"]


def test_states_of_a_process() -> None:
    context = mp.get_context("fork")
    child = context.Process(target=time.sleep, args=(60,))
    child.start()
    assert child.pid is not None
    own = Peer.own()
    started_at = int(Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19])
    peer = Peer(child.pid, own.place, started_at)
    assert own.is_near
    assert own.state() is peer.state() is State.RUNS
    assert not Peer(1, "another machine", 0).is_near
    assert Peer(child.pid, own.place, started_at - 1).state() is State.GONE
    for signal_, expected in (
        (signal.SIGSTOP, State.STOPPED),
        (signal.SIGKILL, State.GONE),  # a zombie: nobody has waited for it yet
    ):
        os.kill(child.pid, signal_)
        end = time.monotonic() + 20
        while peer.state() is not expected and time.monotonic() < end:
            time.sleep(0.02)
        assert peer.state() is expected
    child.join()


@pytest.mark.parametrize("text", ["soon", "0", "-3", "nan"])
def test_silence_must_be_seconds(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(SILENCE_VARIABLE, text)
    with pytest.raises(UserError, match=re.escape(f"{SILENCE_VARIABLE}={text}")):
        silence_allowed()
    monkeypatch.setenv(SILENCE_VARIABLE, "7.5")
    assert silence_allowed() == timedelta(seconds=7.5).total_seconds()
