"""Reaching `python -m sparsify`: ours when wanted, upstream's own to the byte otherwise."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from forks import Forks

from sparsify_vlm import _dispatch
from sparsify_vlm._dispatch import KINDS, STAND_IN, find_main, is_wanted

BIN = Path(sys.executable).parent
SPARSIFY = [sys.executable, "-m", "sparsify"]


def run(
    command: list[str], cwd: Path, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "COLUMNS": "100", **(environment or {})},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub cache with one VLM, one VLM whose vision config is nested, and one text model."""
    configs = {
        "org/vlm": {"model_type": "llava", "vision_config": {}},
        "org/omni": {"thinker_config": {"vision_config": {}}},
        "org/text": {"model_type": "llama"},
    }
    for name, config in configs.items():
        folder = tmp_path / f"models--{name.replace('/', '--')}"
        snapshot = folder / "snapshots" / "abc123"
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text(json.dumps(config))
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("abc123")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    "line",
    [
        "gpt2 ds --transcode --cross_layer 16",
        "gpt2 ds --cross-layer 16",
        "gpt2 --cross_layer=2 ds",
        "--cross-layer=2 gpt2 ds",
        "gpt2 --cross_layer -1",
        "gpt2 --cross_layer four",
        "gpt2 --cross_layer",
        "--cross_layer 4 --help",
        "llava",
        "llava --help",
        "-h llava",
        "llava-hf/llava-1.5-7b-hf --k 4",
        "tiny-llava",
        "tiny-llama --transcode",
        "--transcode tiny-llava",
        "--transcode True tiny-llava",
        "--k 32 tiny-llava shapes",
        "--layers 0 1 2 tiny-llava",
        "--hookpoints a b --transcode llava",
        "--hookpoints a b llava",
        "org/vlm ds",
        "org/omni ds",
        "org/vlm ds --revision abc123",
    ],
)
def test_wanted(line: str, hub_cache: Path) -> None:
    assert is_wanted(line.split())


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--help",
        "gpt2 ds",
        "gpt2 ds --transcode --cross_layer 0",
        "gpt2 ds --cross-layer=0",
        "gpt2 llava",
        "gpt2 ds --run_name llava",
        "gpt2 ds --run_name=tiny-llava --finetune tiny-llava",
        "--no_such_flag llava",
        "--hookpoints a b gpt2",
        "org/text ds",
        "org/absent ds",
        "org/vlm ds --revision other",
        "../../etc",
        "./",
    ],
)
def test_not_wanted(line: str, hub_cache: Path) -> None:
    assert not is_wanted(line.split())


def test_local_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vision_config": {}}')
    assert is_wanted([str(tmp_path), "ds"])
    (tmp_path / "config.json").write_text("{broken")
    assert not is_wanted([str(tmp_path), "ds"])


def test_hub_is_asked_last_and_never_offline(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def answer(request: object, timeout: float) -> object:
        asked.append(request.full_url)  # type: ignore[attr-defined]
        raise OSError("no network")

    monkeypatch.setattr(_dispatch, "urlopen", answer)
    assert not is_wanted(["org/absent"])
    assert asked == []
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert is_wanted(["org/vlm"])
    assert not is_wanted(["org/text"])
    assert asked == []
    assert not is_wanted(["org/absent", "--revision", "a/b"])
    assert asked == ["https://huggingface.co/org/absent/resolve/a%2Fb/config.json"]


@pytest.mark.parametrize(
    ("program", "ours"),
    [
        ("-m", True),
        ("/usr/bin/sparsify", True),
        ("sparsify.exe", True),
        ("/x/sparsify-script.py", True),
        ("/x/site-packages/sparsify/__main__.py", True),
        (str(STAND_IN), True),
        ("/home/me/train_my_fork.py", False),
        ("pytest", False),
        ("", False),
    ],
)
def test_only_the_command_itself(program: str, ours: bool) -> None:
    """A program of the user's that imports from `sparsify.__main__` gets upstream's module."""
    upstream = str(installed_upstream())
    spec = find_main("sparsify.__main__", [upstream], [program, "tiny-llava"])
    assert (spec is not None) == ours
    if spec is not None:
        assert spec.origin == str(STAND_IN)


def installed_upstream() -> Path:
    from importlib.metadata import distribution

    return Path(str(distribution("eai-sparsify").locate_file("sparsify")))


def test_fork_and_users_folder_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "sparsify"
    shutil.copytree(installed_upstream(), copy, ignore=shutil.ignore_patterns("__pycache__"))
    argv = ["-m", "tiny-llava", "--cross_layer", "4"]
    assert find_main("sparsify.__main__", [str(copy)], argv) is None
    # Installed in place of the original, an unchanged copy is served, a fork with CLTs is not.
    monkeypatch.setattr(_dispatch, "_belongs_to_distribution", lambda file: True)
    assert find_main("sparsify.__main__", [str(copy)], argv) is not None
    with (copy / "config.py").open("a") as config:
        config.write("\n# cross_layer: int = 0\n")
    assert find_main("sparsify.__main__", [str(copy)], argv) is None


def test_editable_install_of_upstream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clone = tmp_path / "clone with space"
    shutil.copytree(installed_upstream(), clone / "sparsify")
    info = tmp_path / "site" / "eai_sparsify-1.3.3.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: eai-sparsify\nVersion: 1.3.3\n")
    (info / "direct_url.json").write_text(
        json.dumps({"url": clone.as_uri(), "dir_info": {"editable": True}})
    )
    monkeypatch.syspath_prepend(str(info.parent))
    argv = ["-m", "tiny-llava"]
    assert find_main("sparsify.__main__", [str(clone / "sparsify")], argv) is not None
    assert find_main("sparsify.__main__", [str(installed_upstream())], argv) is None


def test_flag_kinds_agree_with_upstream() -> None:
    """`KINDS` is written by hand because it may not import upstream; its source must agree."""
    source = "".join((installed_upstream() / f).read_text() for f in ("config.py", "__main__.py"))
    fields = dict(re.findall(r"^    (\w+): ([\w\[\]. |]+?)(?: =|$)", source, re.MULTILINE))
    kinds = {"bool": "bool", "list[int]": "ints", "list[str]": "list"}
    assert len(fields) > 30
    for name, annotation in fields.items():
        assert KINDS.get(name, "one") == kinds.get(annotation, "one"), name


def test_hook_imports_nothing_and_cannot_raise() -> None:
    """`import torch` runs it everywhere: stdlib only, and quiet with the worst of `sys`."""
    program = """
import sys
before = set(sys.modules)
import sparsify_vlm._hook as hook
new = {name.split(".")[0] for name in set(sys.modules) - before}
assert new - set(sys.stdlib_module_names) == {"sparsify_vlm"}, new
assert "sparsify_vlm._dispatch" not in sys.modules
hook.install(); hook.install()
assert sum(f is hook.SparsifyMainFinder for f in sys.meta_path) == 1
del sys.argv
assert hook.SparsifyMainFinder.find_spec("sparsify.__main__", ["/nowhere"]) is None
sys.meta_path = None
hook.install()
"""
    done = run([sys.executable, "-c", program], Path.cwd())
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_switched_off() -> None:
    program = "import sys, sparsify_vlm._hook as h; h.install(); print(len(sys.meta_path))"
    with_hook = run([sys.executable, "-c", program], Path.cwd())
    without = run([sys.executable, "-c", program], Path.cwd(), {"SPARSIFY_VLM_HOOK": "0"})
    assert int(with_hook.stdout) == int(without.stdout) + 1


@pytest.fixture(scope="module")
def sparsify() -> Iterator[Callable[..., dict[str, Any]]]:
    """What `python -m sparsify` does, without the seconds in which it is imported."""
    environment = {"COLUMNS": "100", "SPARSIFY_VLM_HOOK": "1"}
    forks = Forks(Path(__file__).with_name("process_of_sparsify.py"), environment)

    def call(
        line: str, program: str = "-m", run_name: str = "__main__", hook: bool = True
    ) -> dict[str, Any]:
        arguments = [program, *line.split()]
        found = forks.ask({"arguments": arguments, "run_name": run_name, "hook": hook})
        assert isinstance(found, dict)
        return found

    yield call
    forks.end()


@pytest.mark.slow
def test_upstream_is_untouched(tmp_path: Path) -> None:
    """Same bytes and exit status as with the hook off."""
    with ThreadPoolExecutor() as pool:
        hook = ({"SPARSIFY_VLM_HOOK": "1"}, {"SPARSIFY_VLM_HOOK": "0"})
        ours, upstream = pool.map(
            lambda environment: run([*SPARSIFY, "--help"], tmp_path, environment), hook
        )
    assert "usage" in upstream.stdout
    assert ours.stdout == upstream.stdout
    assert ours.stderr == upstream.stderr
    assert ours.returncode == upstream.returncode


@pytest.mark.slow
def test_upstreams_own_errors(sparsify: Callable[..., dict[str, Any]]) -> None:
    ours, upstream = (sparsify("no/such-model ds --k 4", hook=hook) for hook in (True, False))
    assert "in load_artifacts" in upstream["stderr"]  # a function of upstream's `__main__`
    assert upstream["status"] == 1
    assert ours == upstream


@pytest.mark.slow
def test_module_and_spawned_worker(sparsify: Callable[..., dict[str, Any]]) -> None:
    module = sparsify("llava --transcode --help")
    assert module["status"] == 0, module["stderr"]
    assert "--cross_layer" in module["stdout"]
    assert "usage: python -m sparsify MODEL [DATASET]" in module["stdout"]
    # What multiprocessing's spawn does in a worker to make the parent's `__main__` importable.
    worker = sparsify("tiny-llava", program=str(STAND_IN), run_name="__mp_main__")
    assert worker["status"] == 0, worker["stderr"]
    assert worker["run_is_of"] == "sparsify_vlm.cli"


@pytest.mark.slow
def test_torchrun_and_console_script_reach_our_command(tmp_path: Path) -> None:
    torchrun = [str(BIN / "torchrun"), "--nproc_per_node", "1", "-m", "sparsify"]
    distributed = run([*torchrun, "tiny-llava", "--help"], tmp_path)
    assert distributed.returncode == 0, distributed.stderr
    assert "--cross_layer" in distributed.stdout
    script = run([str(BIN / "sparsify"), "llava", "--no_such_flag", "3"], tmp_path)
    assert script.returncode == 2
    assert "unknown flag --no_such_flag" in script.stderr
    assert "Traceback" not in script.stderr


@pytest.mark.slow
def test_users_own_sparsify_folder(tmp_path: Path) -> None:
    folder = tmp_path / "sparsify"
    folder.mkdir()
    (folder / "__init__.py").write_text("import torch\n")
    (folder / "__main__.py").write_text("import sys; print('mine', sys.argv[1:])\n")
    done = run([*SPARSIFY, "tiny-llava", "--cross_layer", "4"], tmp_path)
    assert done.stdout == "mine ['tiny-llava', '--cross_layer', '4']\n"
    assert done.returncode == 0
