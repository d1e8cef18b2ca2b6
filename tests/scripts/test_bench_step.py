"""The benchmark of a step: its baselines, its roofline, its page."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparsify_vlm.coders import joint_loss
from sparsify_vlm.errors import UserError

_SCRIPTS = Path(__file__).parents[2] / "scripts"
_MODULES = (
    "clock",
    "machine",
    "measure",
    "memory",
    "peers",
    "roofline",
    "sizes",
    "systems",
    "tables",
)


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """The benchmark's modules by name, and its two scripts."""
    sys.path.insert(0, str(_SCRIPTS))
    try:
        found = {name: importlib.import_module(f"bench.{name}") for name in _MODULES}
        scripts = {name: importlib.import_module(name) for name in ("bench_step", "bench_report")}
        yield SimpleNamespace(**found, **scripts)
    finally:
        sys.path.remove(str(_SCRIPTS))


@pytest.fixture(scope="module")
def small(bench: Any) -> Any:
    return bench.sizes.Size(layers=3, d_model=12, num_latents=40, k=4, tokens=30)


@pytest.fixture
def hurried(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rates are measured on little."""
    monkeypatch.setattr(bench.machine, "MATRIX", {"cpu": 128})
    monkeypatch.setattr(bench.machine, "COPIED", {"cpu": 1 << 20})
    monkeypatch.setattr(bench.machine, "TABLES", {"cpu": (1 << 16, 1 << 18)})


# ---- systems


@pytest.mark.parametrize("name", ["dense_loss", "sparse_loss", "loss_of_chosen"])
def test_a_baseline_has_the_loss_and_the_gradients_of_autograd(bench, small, name):
    clt = bench.sizes.build(small).double()
    x, y = (part.double() for part in bench.sizes.draw(small))
    expected = joint_loss(clt, x, y)
    expected.backward()
    wanted = [p.grad.clone() for p in clt.parameters()]
    clt.zero_grad()
    if name == "loss_of_chosen":
        last = [clt.pre_activations(s, x[s]).topk(small.k).indices for s in range(small.layers)]
    else:
        last = bench.clock.Clock()
    loss = getattr(bench.peers, name)(clt, x, y, last)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for p, want in zip(clt.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, want, rtol=1e-10, atol=1e-14)


def test_systems_share_moments_and_take_the_same_step(bench, small):
    """From equal weights, each system's first step leads to the same weights and moments."""
    x, y = bench.sizes.draw(small)
    ends = []
    for system in bench.systems.systems([None, "eager", "torch"], ["fp32", "bf16"]):
        state = bench.systems.State(bench.sizes.build(small))
        clock = bench.clock.Clock()
        clock.begin()
        system.make(state)(x, y, clock)
        phases = clock.end()
        assert all(phases[name] > 0 for name in ("encode", "decode", "backward")), system.name
        assert all(p.grad is None for p in state.clt.parameters()), system.name
        moments = state.optimizers.state()[0].values()
        ends.append([*state.clt.parameters(), *moments])
    assert len(ends) == 2 + 3 * 2
    for end in ends[1:]:
        for found, expected in zip(end, ends[0], strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_kernels_that_cannot_be_used_are_refused(bench):
    with pytest.raises(UserError, match="SPARSIFY_VLM_KERNELS=triton"):
        bench.systems.taken("triton", torch.empty(4096, 1), 16)


def test_ours_is_compared_with_autograd_and_adam(bench, small):
    system = bench.systems.System("ours", bench.systems.ours(None, "fp32"))
    found = bench.measure.compare(small, system, "random", "cpu")
    assert found.apart < 1e-6 < 1e-4 < found.moved
    assert found.entries == 10 * small.layers * small.tokens * small.k
    assert found.gap < bench.bench_step.TIE
    slower = bench.systems.System("ours", _at_half_the_rate(bench))
    assert bench.measure.compare(small, slower, "random", "cpu").apart > bench.bench_step.TOLERANCE


def _at_half_the_rate(bench: Any) -> Any:
    def make(state: Any) -> Any:
        state.optimizers.lr /= 2
        return bench.systems.ours(None, "fp32")(state)

    return make


def test_latents_that_are_not_the_top_ones_are_counted(bench, small):
    clt, (x, _) = bench.sizes.build(small), bench.sizes.draw(small)
    top = [clt.pre_activations(s, x[s]).topk(small.k + 1) for s in range(small.layers)]
    chosen = [each.indices[:, : small.k].clone() for each in top]
    chosen[1][7, small.k - 1] = top[1].indices[7, small.k]  # the next one instead of the last
    found = bench.measure.Comparison()
    bench.measure._count(found, clt, x, chosen)
    assert (found.entries, found.other) == (3 * 30 * 4, 1)
    gap = (top[1].values[7, small.k - 1] - top[1].values[7, small.k]).detach()
    assert found.gap == pytest.approx(float(gap), rel=1e-6)


# ---- the clock


def test_an_inner_phase_interrupts_the_outer_one(bench, monkeypatch):
    now = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0])
    monkeypatch.setattr(bench.clock.time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(bench.clock.time, "process_time", lambda: next(now))
    clock = bench.clock.Clock()
    clock.begin()
    with clock.phase("backward"), clock.phase("update"):
        pass
    assert clock.end() == {
        "encode": 0, "decode": 0, "backward": 2 + 4, "update": 3, "other": 1 + 5,
    }  # fmt: skip


# ---- sizes


def test_the_widest_size_fits_and_the_next_does_not(bench):
    sizes = bench.sizes
    room = sizes.MACHINE - sizes.SYSTEM
    wide = sizes.SIZES["gpt2"]
    assert (wide.layers, wide.d_model) == (12, 768)
    assert wide.largest_system <= room < sizes.GPT2.largest_system
    larger = sizes.replace(wide, num_latents=wide.num_latents + 2048)
    assert larger.largest_system > room


def test_the_largest_system_by_hand(bench, small):
    weights = (6 + 3) * 40 * 12  # six decoders and three encoders
    numbers = 4 * weights + 3 * 3 * 30 * 40 + 2 * 3 * 30 * 12
    assert (
        small.weights
        == weights
        == sum(p.numel() for p in bench.sizes.build(small).parameters() if p.ndim == 2)
    )
    assert small.largest_system == 4 * numbers


def test_zipf_latents_are_active_as_often_as_asked(bench):
    size = bench.sizes.Size(layers=1, d_model=64, num_latents=512, k=8, tokens=4096)
    wanted = bench.sizes.zipf_frequencies(512, 8)
    assert float(wanted.sum()) == pytest.approx(8, rel=1e-6)
    assert float(wanted.max()) == bench.sizes.FREQUENT
    found = {}
    for data in bench.sizes.DATA:
        x, _ = bench.sizes.draw(size, data)
        latents = bench.sizes.build(size, data).encode_layer(0, x[0])
        assert bool((latents.values > 0).float().mean() > 0.99)
        counts = torch.bincount(latents.indices.flatten(), minlength=512).sort(descending=True)
        found[data] = counts.values / 4096
    share = {data: float(f[:26].sum() / f.sum()) for data, f in found.items()}
    expected = float(wanted[:26].sum() / 8)  # 26: the most frequent twentieth
    assert share["zipf"] == pytest.approx(expected, abs=0.12)
    assert share["random"] < 0.15 < 0.4 < expected


# ---- roofline


@pytest.fixture
def rates(bench: Any) -> Any:
    return bench.machine.Rates(fp32=2e6, bf16=8e6, copy=1e6, gather=4e6, gather_large=2e6)


def test_the_least_work_by_hand(bench):
    """L=2, d=4, F=10, k=3, 5 tokens: 3 pairs, 15 active latents per source, 16 bytes per row."""
    size = bench.sizes.Size(layers=2, d_model=4, num_latents=10, k=3, tokens=5)
    work = bench.roofline.work(size)
    assert work["encode"].operations == 2 * 2 * 5 * 10 * 4
    assert work["encode"].streamed == 2 * 10 * 16 + 2 * 5 * 16  # encoders and x
    assert work["decode"].gathered == 3 * 15 * 16
    assert work["decode"].streamed == 3 * 10 * 16 + 2 * 5 * 16  # decoders and y
    assert work["backward"].gathered == 3 * 15 * 16 + 2 * 15 * 16
    assert work["update"].streamed == (3 + 2) * 10 * 16 * 6  # weight, two moments, there and back
    rescored = bench.roofline.work(size, "bf16")["encode"]
    assert rescored.gathered == 2 * 5 * (3 + 8) * 16


def test_the_least_time_by_hand(bench, rates):
    size = bench.sizes.Size(layers=2, d_model=4, num_latents=10, k=3, tokens=5)
    seconds = bench.roofline.least(size, rates)
    assert seconds == pytest.approx(
        {
            "encode": max(800 / 2e6, 480 / 1e6),
            "decode": max(720 / 4e6, 640 / 1e6),
            "backward": 1200 / 4e6,
            "update": 4800 / 1e6,
        }
    )
    rough = bench.roofline.least(size, rates, "bf16")["encode"]
    assert rough == pytest.approx(max(800 / 8e6, 480 / 1e6) + 1760 / 4e6)


def test_rates_are_measured(bench, hurried):
    found = vars(bench.machine.measure())
    assert all(1e7 < rate < 1e15 for rate in found.values()), found


# ---- memory


@pytest.mark.slow
def test_the_peak_of_a_system_holds_its_weights_and_gradients(bench):
    """Autograd keeps weights, gradients and both moments."""
    size = bench.sizes.SIZES["tiny"]
    peak = bench.memory.of_system(bench.systems.SPARSE, ["--config", "tiny", "--threads", "1"])
    assert 4 * 4 * size.weights < peak < size.largest_system + 400 * bench.tables.MIB


def test_a_system_whose_memory_cannot_be_measured_is_named(bench, tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text("import sys; sys.exit('error: too small')")
    monkeypatch.setattr(bench.memory, "SCRIPT", script)
    with pytest.raises(UserError, match="memory of 'ours' could not be measured: error: too small"):
        bench.memory.of_system("ours", [])


# ---- what is stored and the page


def _stored(bench: Any, small: Any, rates: Any) -> dict[str, Any]:
    """A run with round figures."""
    chosen = bench.systems.systems([None], ["fp32"])
    each = (
        ([0.4, 0.2, 0.3], [0.8, 0.6, 0.7]),
        ([0.2, 0.1, 0.3], [0.3, 0.3, 0.2]),
        ([0.1, 0.1, 0.1], [0.1, 0.1, 0.1]),
    )
    phases = dict.fromkeys(bench.clock.PHASES, 0.02)
    timings = [bench.measure.Timing(wall, core, phases) for wall, core in each]
    rows = bench.measure.results(small, chosen, timings, rates)
    for row in rows:
        row |= {"peak": 5 * 2**20, "select": "fp32", "kernels": ""}
    size = {
        "name": "small", "text": str(small), "tokens": small.tokens, "data": "random", "rounds": 3,
        "systems": rows, "checks": [{"text": "equal: within 1e-7", "good": True}],
    }  # fmt: skip
    return {
        "command": "python scripts/bench_step.py --config small",
        "machine": bench.machine.describe(), "rates": vars(rates), "sizes": [size],
    }  # fmt: skip


def test_the_table_of_a_stored_run_by_hand(bench, small, rates):
    table = bench.tables.step_table(_stored(bench, small, rates)["sizes"][0])
    row = dict(zip(table.headings, table.rows[0], strict=True))
    least = sum(bench.roofline.least(small, rates).values())
    assert (row["wall s"], row["core s"]) == ("0.300", "0.600")
    assert row["tokens/s"] == "100"
    assert row["peak MiB"] == "5"
    assert row["× roofline"] == f"{5 * 0.02 / least:.2f}"
    ours = dict(zip(table.headings, table.rows[2], strict=True))
    assert (ours["sparse ÷"], ours["dense ÷"]) == ("2.00", "6.00")
    bound = dict(zip(table.headings, table.rows[3], strict=True))
    assert bound["system"].startswith("roofline")
    assert bound["wall s"] == f"{least:.3f}"


def test_the_page_is_made_from_stored_files(bench, small, rates, tmp_path, monkeypatch):
    bench.tables.write(tmp_path / "step.json", "step", _stored(bench, small, rates))
    captured = {
        "command": "python scripts/bench_capture.py", "machine": bench.machine.describe(),
        "samples": 7, "tokens": 300, "megabytes": 4.0, "batch_size": 2, "rounds": 3,
        "systems": [
            {"system": name, "wall": wall, "least": wall, "core": wall}
            for name, wall in (("forward", 2.0), ("data + forward", 2.5), ("capture", 3.0))
        ],
    }  # fmt: skip
    bench.tables.write(tmp_path / "capture.json", "capture", captured)
    page = tmp_path / "page.md"
    files = [str(tmp_path / name) for name in ("step.json", "capture.json")]
    monkeypatch.setattr(sys, "argv", ["bench_report.py", *files, "--output", str(page)])
    bench.bench_report.main()
    text = page.read_text()
    for expected in (
        "`python scripts/bench_step.py --config small`",
        "| sparse autograd |",
        "equal: within 1e-7.",
        "| memory copied (read + written) | 0.0 GB/s |",
        "| capture | 3.00 | 1.50 | 1.20 | 3.00 | 1.50 | 1.20 | 3.00 | 100 | 1 |",
    ):
        assert expected in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("{", "is no JSON file"),
        ("[]", "was not written by a benchmark"),
        (json.dumps({"format": "sparsify-vlm-benchmark", "version": 99}), "version 99"),
    ],
)
def test_files_that_are_no_figures_are_refused(bench, tmp_path, content, message):
    file = tmp_path / "x.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=message):
        bench.tables.read(file)


@pytest.mark.parametrize(("tolerance", "status"), [(1e-5, 0), (-1.0, 1)])
def test_the_program_measures_checks_and_stores(
    bench, small, hurried, tmp_path, monkeypatch, capsys, tolerance, status
):
    """-1: a tolerance that no weights keep to."""
    monkeypatch.setitem(bench.sizes.SIZES, "tiny", small)
    monkeypatch.setattr(bench.bench_step, "TOLERANCE", tolerance)
    file = tmp_path / "deep" / "step.json"
    arguments = "--config tiny --rounds 2 --threads 1 --no_memory --check --data zipf --json"
    monkeypatch.setattr(sys, "argv", ["bench_step.py", *arguments.split(), str(file)])
    with pytest.raises(SystemExit) as left:
        bench.bench_step.main()
    assert left.value.code == status
    assert ("NOT EQUAL" if status else "tiny: equal") in capsys.readouterr().out
    (size,) = bench.tables.read(file)["sizes"]
    assert [row["system"] for row in size["systems"]] == [
        bench.systems.DENSE, bench.systems.SPARSE, bench.systems.OURS
    ]  # fmt: skip
    for row in size["systems"]:
        assert len(row["wall"]) == 2
        assert row["core"] > 0
        assert row["times_least"] == pytest.approx(
            sum(row["phases"].values()) / sum(row["least"].values())
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--device cuda", "error: --device cuda: there is no CUDA device here"),
        ("--config gpt2 --check", "error: --check trains two coders side by side"),
        ("--config tiny --kernels triton", "error: SPARSIFY_VLM_KERNELS=triton"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    bench, hurried, monkeypatch, capsys, arguments, message
):
    monkeypatch.setattr(bench.bench_step.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench_step.py", "--threads", "1", *arguments.split()])
    with pytest.raises(SystemExit) as left:
        bench.bench_step.main()
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith(message)
