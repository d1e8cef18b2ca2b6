"""The attribution benchmark: the case it writes, how it measures and compares, both processes."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from sparsify_vlm.errors import UserError

_SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def bench() -> Any:
    """The script, the cases, the clock."""
    sys.path.insert(0, str(_SCRIPTS))
    try:
        names = ("bench_attribution", "bench.attribution_case", "bench.timed_calls")
        found = [importlib.import_module(name) for name in names]
        yield SimpleNamespace(script=found[0], case=found[1], timed=found[2])
    finally:
        sys.path.remove(str(_SCRIPTS))


@pytest.fixture(scope="module")
def small(bench: Any) -> Any:
    return bench.case.Case(layers=3, d_model=32, positions=12, num_latents=40, active=90)


@pytest.fixture(scope="module")
def folder(bench: Any, small: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("case")
    bench.case.write(small, path, seed=3)
    return path


def test_as_many_features_are_active_as_asked(folder, small):
    """From the written tensors and transformers' own forward pass."""
    model = transformers.LlamaForCausalLM.from_pretrained(folder / "model")
    read: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _, x: read.append(x[0][0]))
    ids = torch.tensor(json.loads((folder / "ids.json").read_text()))
    with torch.no_grad():
        model(input_ids=ids[None])
    for i, x in enumerate(read):
        parts = load_file(folder / "clt" / f"W_enc_{i}.safetensors")
        pre = x.double() @ parts[f"W_enc_{i}"].double().T + parts[f"b_enc_{i}"].double()
        assert int((pre[1:] > 0).sum()) == small.active // small.layers
        assert float(pre[1:].abs().min()) > 1e-5  # rounding cannot move one across
        slots = load_file(folder / "clt" / f"W_dec_{i}.safetensors")[f"W_dec_{i}"]
        assert slots.shape == (small.num_latents, small.layers - i, small.d_model)
    assert len(ids) == small.positions


def test_a_case_follows_from_its_seed(bench, folder, small, tmp_path):
    for seed, same in ((3, True), (4, False)):
        bench.case.write(small, tmp_path / str(seed), seed)
        for file in ("model/model.safetensors", "clt/W_enc_1.safetensors", "ids.json"):
            found = (tmp_path / str(seed) / file).read_bytes()
            assert (found == (folder / file).read_bytes()) == same


MEASURED = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
from bench import timed_calls
held = torch.ones(1 << 26)  # 256 MiB before the call, which count as loaded
del held
result, figures = timed_calls.timed(lambda: float(torch.ones(1 << 25).sum()))
print(json.dumps([result, figures]))
"""


def test_a_call_is_measured():
    """In a process of its own: this one may keep what tests before have freed."""
    command = [sys.executable, "-c", MEASURED, str(_SCRIPTS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result, figures = json.loads(done.stdout)
    assert result == 1 << 25
    assert 100 << 20 < figures["peak"] - figures["loaded"] < 200 << 20
    assert figures["process_peak"] >= figures["peak"]
    assert figures["process_peak"] - figures["loaded"] > 200 << 20
    assert 0 < figures["wall"] < 60
    assert figures["core"] > 0


def _graph() -> dict[str, torch.Tensor]:
    return {
        "active_features": torch.tensor([[0, 1, 2], [1, 1, 0]]),
        "selected_features": torch.tensor([0, 1]),
        "logit_token_ids": torch.tensor([7]),
        "adjacency": torch.tensor([[0.0, 0.0, 0.0], [2.5, 0.0, 0.0], [1.0, -3.0, 0.0]]),
    }


def test_graphs_are_compared(bench):
    reference, other = _graph(), _graph()
    other["adjacency"][1, 0] += 1e-5
    found = bench.script.compare(other, reference)
    assert found["equal"]
    assert found["apart"] == pytest.approx(1e-5, rel=0.1)
    assert "2 active features and 1 targets; edges, of up to 3.00, are within" in found["text"]
    other["adjacency"][1, 0] += 1e-3
    assert not bench.script.compare(other, reference)["equal"]
    other["active_features"][0, 2] = 3
    assert bench.script.compare(other, reference) == {
        "equal": False, "apart": None, "text": "NOT EQUAL: active_features differ"
    }  # fmt: skip


def test_the_table_by_hand(bench):
    counts = {"active": 3000, "nodes": 3586, "edges": 12}
    runs = {
        name: [
            {"wall": wall, "core": core, "loaded": 2**29, "peak": p << 20, "process_peak": q << 20}
            | counts
            for wall, core, p, q in each
        ]
        for name, each in {
            "ours": [(3.0, 2.0, 712, 900), (2.5, 2.2, 812, 850)],
            "peer": [(50.0, 40.0, 1512, 1600)],
        }.items()
    }
    ours, peer = bench.script.table("t", runs).rows
    assert ours == ["ours", "2.50", "2.00", "1.0", "900", "300", "3,000", "3,586", "12"]
    assert peer[2:6] == ["40.0", "20.0", "1,600", "1,000"]


def test_the_peer_process_needs_nothing_of_ours():
    """It runs where this project is not installed."""
    for name in ("peer_attribution.py", "timed_calls.py"):
        tree = ast.parse((_SCRIPTS / "bench" / name).read_text())
        imported = [str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        for node in ast.walk(tree):
            imported += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert len(imported) > 3
        assert not [each for each in imported if each.startswith(("sparsify", "bench"))]


@pytest.mark.slow
def test_both_of_our_ways_give_the_same_graph(bench, small, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(bench.script.CASES, "text", small)
    file = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["bench_attribution.py", "--rounds", "1", "--json", str(file)])
    with pytest.raises(SystemExit) as left:
        bench.script.main()
    said = capsys.readouterr().out
    assert left.value.code == 0, said
    assert "equal: the same 90 active features" in said
    assert "circuit-tracer was not measured" in said
    runs = json.loads(file.read_text())["runs"]
    assert [run["active"] for each in runs.values() for run in each] == [90, 90]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--peer_venv /nowhere", "error: --peer_venv /nowhere: there is no /nowhere/bin/python"),
        ("--size llava --peer_venv x", "error: --peer_venv: circuit-tracer has no top-k coder"),
    ],
)
def test_what_cannot_be_measured_is_refused(bench, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["bench_attribution.py", *arguments.split()])
    with pytest.raises(SystemExit) as left:
        bench.script.main()
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith(message)


def test_a_process_that_fails_says_why(bench, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys; sys.exit('error: no such thing')")
    system = bench.script.System("peer", sys.executable, script)
    with pytest.raises(UserError, match="'peer' could not be measured: error: no such thing"):
        bench.script._run(system, tmp_path, tmp_path / "0", 1)
