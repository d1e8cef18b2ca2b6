"""The command line: `sparsify-vlm COMMAND …`, and what `python -m sparsify …` runs when it is ours.

Each command is one or more config dataclasses, which `flags.py` makes a command line of, and a
function of the room that does the work. Rooms are imported when their command is asked for.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from sparsify_vlm import __version__
from sparsify_vlm.errors import UserError
from sparsify_vlm.flags import HelpRequested, UsageError, parse
from sparsify_vlm.pipes import readers_may_leave

INTERRUPTED = 130  # what shells report for a process ended by Ctrl-C


@dataclass(frozen=True)
class Command:
    """A word behind `sparsify-vlm`."""

    summary: str
    """One line of `sparsify-vlm --help`."""
    positionals: tuple[str, ...]
    """Fields that may be given without a flag, in order."""
    load: Callable[[], tuple[dict[str, type], Callable[..., object]]]
    """Imports the room; returns its configs and the function called with their instances."""
    after_interrupt: str = ""
    """How to go on after Ctrl-C."""
    substitutes: Mapping[str, str] = field(default_factory=dict)
    """Fields with a default that must be given all the same, unless the other field is."""


def _train() -> tuple[dict[str, type], Callable[..., object]]:
    from sparsify_vlm.data.config import DataConfig
    from sparsify_vlm.training import RunConfig, TrainConfig, train

    return {"run": RunConfig, "cfg": TrainConfig, "data": DataConfig}, train


def _capture() -> tuple[dict[str, type], Callable[..., object]]:
    from sparsify_vlm.data.capture import CaptureConfig, capture

    return {"cfg": CaptureConfig}, capture


def _evaluate() -> tuple[dict[str, type], Callable[..., object]]:
    from sparsify_vlm.replacement.config import EvaluateConfig

    def evaluate(cfg: EvaluateConfig) -> None:
        from sparsify_vlm.replacement.evaluate import evaluate

        evaluate(cfg)

    return {"cfg": EvaluateConfig}, evaluate


def _estimate() -> tuple[dict[str, type], Callable[..., object]]:
    from sparsify_vlm.training.estimate import EstimateConfig, estimate

    return {"cfg": EstimateConfig}, estimate


def _import_activations() -> tuple[dict[str, type], Callable[..., object]]:
    from sparsify_vlm.data.legacy import ImportActivationsConfig, import_activations

    return {"cfg": ImportActivationsConfig}, import_activations


def _trace() -> tuple[dict[str, type], Callable[..., object]]:
    from sparsify_vlm.graphs.config import TraceConfig

    def trace(cfg: TraceConfig) -> None:
        from sparsify_vlm.graphs.tracing import trace

        trace(cfg)

    return {"cfg": TraceConfig}, trace


def _verify() -> tuple[dict[str, type], Callable[..., object]]:
    from sparsify_vlm.graphs.config import VerifyConfig

    def verify(cfg: VerifyConfig) -> None:
        from sparsify_vlm.graphs.verify import verify

        verify(cfg)

    return {"cfg": VerifyConfig}, verify


def _examples() -> tuple[dict[str, type], Callable[..., object]]:
    from sparsify_vlm.features.config import ExamplesConfig

    def examples(cfg: ExamplesConfig) -> None:
        from sparsify_vlm.features.examples import examples

        examples(cfg)

    return {"cfg": ExamplesConfig}, examples


def _analyze() -> tuple[dict[str, type], Callable[..., object]]:
    from sparsify_vlm.analysis.config import AnalyzeConfig
    from sparsify_vlm.studies import run_analyze

    return {"cfg": AnalyzeConfig}, run_analyze


def _compare() -> tuple[dict[str, type], Callable[..., object]]:
    from sparsify_vlm.analysis.config import CompareConfig
    from sparsify_vlm.studies import run_compare

    return {"cfg": CompareConfig}, run_compare


def _demo() -> tuple[dict[str, type], Callable[..., object]]:
    from sparsify_vlm.demo import DemoConfig, run_demo

    return {"cfg": DemoConfig}, run_demo


def _export() -> tuple[dict[str, type], Callable[..., object]]:
    from sparsify_vlm.coders.export import ExportConfig, export

    return {"cfg": ExportConfig}, export


def _view() -> tuple[dict[str, type], Callable[..., object]]:
    from sparsify_vlm.report.viewer import ViewConfig, view

    return {"cfg": ViewConfig}, view


COMMANDS: dict[str, Command] = {
    "train": Command(
        "train a cross-layer transcoder, transcoders or SAEs on a model",
        ("model", "dataset"),
        _train,
        "the same command with --resume continues from the last checkpoint",
        {"model": "activations"},
    ),
    "capture": Command(
        "store a model's activations on a dataset",
        ("model", "dataset"),
        _capture,
        "the same command continues where it stopped",
    ),
    "evaluate": Command(
        "measure a trained coder and the model with its MLPs replaced",
        ("clt", "dataset"),
        _evaluate,
    ),
    "trace": Command(
        "trace one answer back to image patches and words, through a coder's features",
        ("clt",),
        _trace,
    ),
    "verify": Command(
        "check a traced graph by intervening on the model",
        ("graph",),
        _verify,
    ),
    "examples": Command(
        "find the samples in which features are strongest, with their words and patches",
        ("clt", "dataset"),
        _examples,
    ),
    "analyze": Command(
        "what the cross-layer connections of a coder do: four experiments and a report",
        ("clt", "dataset"),
        _analyze,
    ),
    "compare": Command(
        "the same experiments on a text model's coder and a vision-language model's",
        ("text_clt", "vlm_clt"),
        _compare,
    ),
    "estimate": Command(
        "memory and time a training run would take, before anything is loaded",
        ("model",),
        _estimate,
    ),
    "export": Command(
        "write a coder in another program's layout",
        ("clt", "format", "output_dir"),
        _export,
    ),
    "view": Command(
        "show an attribution graph in the browser, or as one HTML file",
        ("graph",),
        _view,
    ),
    "demo": Command(
        "everything once, on the embedded model and data, with a report",
        (),
        _demo,
        "the same command starts again",
    ),
    "import-activations": Command(
        "read activations stored in L{layer}/batch_{i}_{x,y}.pt",
        ("src", "dst"),
        _import_activations,
    ),
}


def main(argv: Sequence[str] | None = None, program: str = "sparsify-vlm") -> int:
    """Run `sparsify-vlm` with `argv` (default: the process's) and return its exit status.

    0: done; 1: something given cannot be used; 2: the command line cannot be read; 130: Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    with readers_may_leave():
        return _main(argv, program)


def _main(argv: list[str], program: str) -> int:
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help"):
        return _print(_overview(program))
    if name == "--version":
        return _print(f"{program} {__version__}")
    if name.replace("_", "-") not in COMMANDS:
        return _fail(UsageError(_unknown_command(name)), 2)
    name = name.replace("_", "-")
    return run_command(COMMANDS[name], argv[1:], f"{program} {name}")


def run_as_sparsify() -> int:
    """`python -m sparsify …` and the script `sparsify`, when the job is ours: `train`."""
    with readers_may_leave():
        return run_command(COMMANDS["train"], sys.argv[1:], "python -m sparsify")


def run_command(command: Command, argv: Sequence[str], program: str) -> int:
    """Parse `argv` for `command`, run it, and turn what a user can mend into one line."""
    debug = any(token.startswith("--debug") for token in argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty() or _rank() > 0:
        _hide_progress_bars()
    with _told_in_one_line(command, debug) as outcome, _only_first_rank_prints():
        outcome.parsing = True
        configs, function = command.load()
        parsed = parse(configs, command.positionals, argv, program, command.substitutes)
        outcome.parsing = False
        function(**parsed) if len(parsed) > 1 else function(*parsed.values())
    return outcome.status


def _hide_progress_bars() -> None:
    """Keep the libraries' bars out of logs; our own progress is plain lines there.

    The variables are read on import, and `python -m sparsify` has imported the libraries by now.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    for library, name in (
        ("huggingface_hub.utils", "disable_progress_bars"),
        ("transformers.utils.logging", "disable_progress_bar"),
        ("datasets.utils.logging", "disable_progress_bar"),
    ):
        if library in sys.modules:
            getattr(sys.modules[library], name)()


@dataclass
class _Outcome:
    status: int = 0
    parsing: bool = False


@contextmanager
def _told_in_one_line(command: Command, debug: bool) -> Iterator[_Outcome]:
    """Turn exceptions that are not our own mistakes into a line on stderr and an exit status."""
    outcome = _Outcome()
    try:
        yield outcome
        sys.stdout.flush()
    except HelpRequested as request:
        outcome.status = _print(request.text)
    except KeyboardInterrupt:
        hint = f"; {command.after_interrupt}" if command.after_interrupt else ""
        outcome.status = _fail(f"interrupted{hint}", INTERRUPTED)
    except Exception as error:
        line = _line_for(error)
        if debug or line is None:
            raise
        quiet = outcome.parsing and _rank() > 0  # every rank has read the same command line
        status = 2 if isinstance(error, UsageError) else 1
        outcome.status = status if quiet else _fail(line, status)


def _line_for(error: Exception) -> str | None:
    """What to tell the user of `error`; None where it is a mistake of this program."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    if _is_disk_full(error):
        where = getattr(error, "filename", None) or "the output directory"
        return f"no space left on the disk of {where}; what was complete before is untouched"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if _is_out_of_memory(error):
        return (
            "out of memory: a smaller --batch_size, --micro_acc_steps or fewer latents need less; "
            "sparsify-vlm estimate says how much"
        )
    return None


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out: torch has an exception for it on GPUs, not on CPUs."""
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def _is_disk_full(error: Exception) -> bool:
    """Whether `error` is "no space left", from Python or from safetensors, which has no errno."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return type(error).__name__ == "SafetensorError" and "os error 28" in str(error)


def _rank() -> int:
    names = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK")  # torchrun, MPICH, Open MPI
    return next((int(os.environ[name]) for name in names if name in os.environ), 0)


@contextmanager
def _only_first_rank_prints() -> Iterator[None]:
    """Under torchrun, keep the standard output of every process but the first."""
    if _rank() == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


def _print(text: str) -> int:
    if _rank() == 0:
        print(text.rstrip("\n"))
    return 0


def _fail(what: object, status: int) -> int:
    where = f"[rank {_rank()}] " if _rank() else ""
    print(f"{where}error: {what}", file=sys.stderr, flush=True)
    return status


def _unknown_command(name: str) -> str:
    if name.startswith("-"):
        return f"the command comes first, before {name}; one of {', '.join(COMMANDS)}"
    near = get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(COMMANDS)}"
    return f"unknown command {name!r}; {hint}"


def _overview(program: str, commands: Mapping[str, Command] = COMMANDS) -> str:
    width = max(len(name) for name in commands)
    lines: list[Any] = [
        f"usage: {program} COMMAND [options]",
        "",
        "Sparse coders and cross-layer transcoders for vision-language models.",
        "",
        *(f"  {name:<{width}}  {command.summary}" for name, command in commands.items()),
        "",
        f"{program} COMMAND --help lists a command's options. `python -m sparsify MODEL …` is the",
        "same as `train` whenever --cross_layer is given or MODEL sees images.",
    ]
    return "\n".join(lines)
