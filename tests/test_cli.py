"""How command lines are read, told wrong and ended; with stand-in configs, so without torch."""

from __future__ import annotations

import errno
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from sparsify_vlm import cli
from sparsify_vlm.cli import COMMANDS, Command, main, run_command
from sparsify_vlm.errors import UserError
from sparsify_vlm.flags import HelpRequested, UsageError, flags_of, parse


@dataclass
class Coder:
    """What to train."""

    k: int = 32
    """Active latents."""
    transcode: bool = False
    """Predict the output from the input."""
    tied: bool | None = None
    """Three states: asked for, refused, left to the program."""


@dataclass
class Train:
    """How to train."""

    model: str
    """The model's name."""
    sae: Coder
    dataset: str | None = None
    """The dataset's name."""
    cross_layer: int = 0
    """Layers written to."""
    lr: float | None = None
    """Learning rate."""
    filter_bos: bool = True
    """Leave the first token out."""
    optimizer: Literal["adam", "muon"] = "adam"
    """The optimizer."""
    hookpoints: list[str] = field(default_factory=list)
    """Where to train."""
    layers: list[int] = field(default_factory=list)
    """Layers to train on."""

    def __post_init__(self) -> None:
        if self.cross_layer < 0:
            raise UserError("--cross_layer is negative")
        if self.layers and self.hookpoints:
            raise ValueError("Cannot specify both")


CONFIGS = {"cfg": Train}


def read(line: str) -> Train:
    return parse(CONFIGS, ("model", "dataset"), line.split(), "prog train")["cfg"]


@pytest.mark.parametrize(
    "line",
    [
        "llava ds --transcode --cross_layer 4 --k 8",
        "--transcode --cross_layer 4 --k 8 llava ds",
        "llava --transcode ds --cross-layer 4 -k 8",
        "--transcode llava --k=8 ds --cross-layer=4",
        "--transcode=True llava ds --cross_layer=4 --k 8",
        "llava --transcode yes ds --cross_layer 4 --k 8",
        "--model llava --dataset ds --transcode true --cross_layer 4 --k 8",
        "--k 2 llava ds --transcode --cross_layer 4 --k 8",
        "--transcode --cross_layer 4 --k 8 -- llava ds",
    ],
)
def test_spellings_mean_the_same(line: str) -> None:
    assert read(line) == Train("llava", Coder(8, True), "ds", cross_layer=4)


def test_values_of_each_kind() -> None:
    assert read("m --lr 1e-3").lr == 1e-3
    assert read("m --lr=-1").lr == -1.0
    assert read("m --hookpoints a b --k 3").hookpoints == ["a", "b"]
    assert read("m --hookpoints=a").hookpoints == ["a"]
    assert read("--layers 0 1 m ds") == Train("m", Coder(), "ds", layers=[0, 1])
    for off in ("--filter_bos False", "--filter_bos=no", "--nofilter_bos", "--no-filter-bos"):
        assert read(f"m {off}").filter_bos is False
    assert read("m --filter_bos").filter_bos is True
    tied = [read(f"m {line}").sae.tied for line in ("", "--tied", "--tied no", "--notied")]
    assert tied == [None, True, False, False]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", "MODEL is missing"),
        ("m --corss_layer 4", "unknown flag --corss_layer; did you mean --cross_layer?"),
        ("m --cross 4", "unknown flag --cross; did you mean --cross_layer?"),
        ("m --zzz", "unknown flag --zzz; --help lists"),
        ("m ds extra", "unexpected argument 'extra'; expected MODEL DATASET"),
        ("m --transcode maybe extra", "unexpected argument 'extra'"),
        ("m --model n", "MODEL is given twice: 'm' and --model"),
        ("m --k", "--k needs a value"),
        ("m --k many", "--k: invalid int value: 'many'"),
        ("m --transcode=maybe", "--transcode"),
        ("m --optimizer sgd", "--optimizer: invalid choice: 'sgd'"),
        ("--hookpoints a b llava", "--hookpoints took 'llava' for its values: put MODEL"),
        ("--hookpoints a b some ds", "--hookpoints took 'a b some ds' for its values: put MODEL"),
        ("m --hookpoints a org/ds", "--hookpoints took 'org/ds' for its values: put DATASET"),
    ],
)
def test_unreadable_lines(line: str, expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(line)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_combinations_keep_their_own_words() -> None:
    with pytest.raises(UserError, match="--cross_layer is negative"):
        read("m --cross_layer -3")
    with pytest.raises(UserError, match="Cannot specify both"):
        read("m --layers 1 --hookpoints a")


def test_config_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: llava\ndataset: ds\ncross-layer: 4\nk: 8\ntranscode: true\n"
        "lr: 1e-3\nlayers: [0, 2]\nhookpoints:\n"
    )
    expected = Train("llava", Coder(8, True), "ds", cross_layer=4, lr=1e-3, layers=[0, 2])
    assert read(f"--config {file}") == expected
    changed = read(f"other --config={file} --k 2 --notranscode --layers")
    assert changed == Train("other", Coder(2, False), "ds", cross_layer=4, lr=1e-3)
    assert read(f"--config {file} --hookpoints org/x --layers") == Train(
        "llava", Coder(8, True), "ds", cross_layer=4, lr=1e-3, hookpoints=["org/x"]
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kk: 3\n", "unknown key 'kk'; did you mean --k?"),
        ("sae: {k: 3}\n", "unknown key 'sae'"),
        ("k: [1, 2]\n", "k must be a single value"),
        ("k: {a: 1}\n", "k must be a single value"),
        ("- k\n", "must hold lines like"),
        ("k: [\n", "cannot be read"),
        (None, "No such file"),
    ],
)
def test_bad_config_files(text: str | None, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UsageError) as caught:
        read(f"m --config {file}")
    assert str(file) in str(caught.value)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_help_shows_every_field_with_its_docstring() -> None:
    for line in ("--help", "m -h", "--k many --help"):
        with pytest.raises(HelpRequested) as caught:
            read(line)
    text = caught.value.text
    assert text.startswith("usage: prog train MODEL [DATASET] [options]")
    for words in ("Active latents.", "Layers written to.", "Where to train.", "--config FILE"):
        assert words in text
    for name in flags_of(CONFIGS):
        assert f"--{name}" in text


def test_a_field_may_stand_in_for_another() -> None:
    def optional(line: str) -> Coder:
        return parse({"c": Coder}, ("k",), line.split(), "prog", {"k": "transcode"})["c"]

    assert optional("3") == Coder(3)
    assert optional("--transcode") == Coder(transcode=True)
    with pytest.raises(UsageError, match=r"K \(or --transcode\) is missing"):
        optional("")


def test_two_configs_may_not_share_a_flag() -> None:
    with pytest.raises(TypeError, match="'k'"):
        flags_of({"a": Coder, "b": Train})


def ending(function: Callable[..., object], capsys: pytest.CaptureFixture[str], *argv: str):
    """Exit status, stdout and stderr of a command that runs `function`."""
    command = Command("", ("model", "dataset"), lambda: (CONFIGS, function), "add --resume")
    status = run_command(command, ["m", *argv], "prog")
    return status, *capsys.readouterr()


def raising(error: BaseException) -> Callable[..., object]:
    def function(cfg: Train) -> None:
        raise error

    return function


def test_runs_and_returns_zero(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Train] = []
    assert ending(seen.append, capsys, "--k", "5") == (0, "", "")
    assert seen == [Train("m", Coder(5))]


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("no such\nmodel"), 1, "error: no such model"),
        (UsageError("no such flag"), 2, "error: no such flag"),
        (KeyboardInterrupt(), 130, "error: interrupted; add --resume"),
        (
            OSError(errno.ENOSPC, "No space left on device", "out/x"),
            1,
            "error: no space left on the disk of out/x; what was complete before is untouched",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "out"), 1, "out: Permission denied"),
        (MemoryError(), 1, "error: out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "error: out of memory"),
    ],
)
def test_users_mistakes_are_one_line(
    error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    got, out, err = ending(raising(error), capsys)
    assert (got, out) == (status, "")
    assert line in err
    assert err.count("\n") == 1


def test_own_mistakes_keep_their_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    for own in (ValueError("a bug"), OSError("without a file")):
        with pytest.raises(type(own)):
            ending(raising(own), capsys)
    with pytest.raises(UserError):
        ending(raising(UserError("x")), capsys, "--debug")


def test_ranks_print_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert ending(lambda cfg: print("hello"), capsys) == (0, "", "")
    assert ending(print, capsys, "--zzz") == (2, "", "")
    assert ending(print, capsys, "--help") == (0, "", "")
    # An error while running may be this rank's alone.
    assert ending(raising(UserError("disk")), capsys) == (1, "", "[rank 1] error: disk\n")


def test_overview_and_unknown_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    overview = capsys.readouterr().out
    assert all(name in overview for name in COMMANDS)
    assert main(["--version"]) == 0
    assert main(["tarin"]) == 2
    assert "did you mean train?" in capsys.readouterr().err
    assert main(["--k", "3"]) == 2
    assert "the command comes first" in capsys.readouterr().err


WITHOUT_READER = """
import sys
from dataclasses import dataclass
from pathlib import Path
from rich.console import Console
from sparsify_vlm import cli
@dataclass
class C:
    k: int = 1
def go(cfg):
    for stream in (sys.stdout, sys.stderr):
        for i in range(2000): print("x" * 100, file=stream)
    Console().print("y" * 10000)
    Path(sys.argv[1]).write_text("done")
    if cfg.k == 2: raise cli.UserError("no such k")
cli.COMMANDS["go"] = cli.Command("", (), lambda: ({"cfg": C}, go))
print("ready", flush=True)
sys.stdin.read()
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("arguments", "status", "done"),
    [(["go"], 0, True), (["go", "--k", "2"], 1, True), (["go", "--help"], 0, False)],
    ids=["good", "error", "help"],
)
def test_work_goes_on_without_a_reader(
    arguments: list[str], status: int, done: bool, tmp_path: Path
) -> None:
    """As behind `2>&1 | head`: the command does what it does and ends as it would have."""
    command = [sys.executable, "-c", WITHOUT_READER, str(tmp_path / "file"), *arguments]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        process.stdin.close()
        assert process.wait(60) == status
    assert (tmp_path / "file").exists() == done


AT_ONCE = WITHOUT_READER.replace('print("ready", flush=True)\nsys.stdin.read()\n', "")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_work_goes_on_with_closed_streams(closed: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(AT_ONCE)} {file} go {closed}"
    assert subprocess.run(command, shell=True, timeout=60).returncode == 0
    assert file.read_text() == "done"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no full device")
def test_output_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", AT_ONCE, str(tmp_path / "file"), "go"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    [line] = [line for line in done.stderr.splitlines() if set(line) != {"x"}]
    assert line == "error: the standard output cannot be written: No space left on device"


def test_help_needs_no_torch() -> None:
    program = (
        "import sys; from sparsify_vlm.cli import COMMANDS, main\n"
        "for line in [[], *([name, '--help'] for name in COMMANDS)]:\n"
        "    assert main(line) == 0\n"
        "    assert 'torch' not in sys.modules, line"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_real_commands_document_every_option(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """No clash of flags between rooms, no field without a docstring, no trap unforeseen."""
    from simple_parsing.docstring import get_attribute_docstring

    configs, _ = COMMANDS[name].load()
    flags = flags_of(configs)
    assert set(COMMANDS[name].positionals) <= set(flags)
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    for flag in flags:
        assert f"--{flag}" in text
    for owner, attribute in _fields(list(configs.values())):
        assert get_attribute_docstring(owner, attribute).help_string, f"{owner}.{attribute}"


def _fields(owners: list[type]) -> list[tuple[type, str]]:
    from dataclasses import fields, is_dataclass
    from typing import get_type_hints

    found: list[tuple[type, str]] = []
    for owner in owners:
        hints = get_type_hints(owner)
        for one in fields(owner):
            if is_dataclass(hints[one.name]):
                found += _fields([hints[one.name]])
            else:
                found.append((owner, one.name))
    return found


def test_kinds_known_to_the_dispatcher_are_the_commands() -> None:
    """`python -m sparsify` is sorted before our configs are imported: both must agree."""
    from sparsify_vlm._dispatch import KINDS

    configs, _ = cli.COMMANDS["train"].load()
    for name, flag in flags_of(configs).items():
        assert KINDS.get(name, "one") == flag.kind, name
