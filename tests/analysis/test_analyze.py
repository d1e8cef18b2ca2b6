"""`analyze` and `compare` from the command line and from Python, on a small coder of tiny-llava."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sparsify_vlm
from sparsify_vlm.analysis.config import AnalyzeConfig, CompareConfig, chosen, read_labels
from sparsify_vlm.analysis.contrasts import minus
from sparsify_vlm.analysis.results import Results
from sparsify_vlm.cli import main
from sparsify_vlm.coders import Clt, CltConfig, load_clt, save_clt
from sparsify_vlm.data.capture import CaptureConfig, capture
from sparsify_vlm.errors import UserError
from sparsify_vlm.report.analysis.conclusions import conclusions

LAYERS, WIDTH = 8, 96
Check = Callable[..., str]


def coder(n_targets: int = LAYERS, layers: int = LAYERS, model: str = "tiny-llava") -> Clt:
    """Random weights, with decoders that halve from target to target."""
    torch.manual_seed(0)
    start = "language_model.model." if model == "tiny-llava" else ""
    clt = Clt(
        CltConfig(
            d_model=WIDTH,
            hookpoints=[f"{start}layers.{i}.mlp" for i in range(layers)],
            num_latents=64,
            k=4,
            n_targets=n_targets,
            model=model,
        )
    )
    with torch.no_grad():
        for s in range(layers):
            clt.W_enc[s].copy_(torch.randn(64, WIDTH))
            for k in range(len(clt.cfg.targets(s))):
                clt.tables(s, k)[0].copy_(torch.randn(64, WIDTH) * 0.5**k)
    return clt


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Coders of the embedded models, and the analysis of one on six scenes."""
    folder = tmp_path_factory.mktemp("shelf")
    save_clt(coder(), folder / "vlm")
    save_clt(coder(1), folder / "plt")
    save_clt(coder(model="tiny-llama"), folder / "llm")
    save_clt(coder(layers=4), folder / "short")
    data = ["shapes", "--max_examples", "6", "--causal", "2"]
    line = ["analyze", folder / "vlm", *data, "--plt", folder / "plt"]
    assert main([str(word) for word in [*line, "--output_dir", folder / "analysis"]]) == 0
    return folder


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Check:
    """Run a command that must be refused with one line; returns the line."""

    def run(argv: list[object], *words: str, status: int = 1) -> str:
        capfd.readouterr()
        assert main([str(word) for word in argv]) == status
        err = capfd.readouterr().err
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, err
        assert "Traceback" not in err
        for word in words:
            assert word in lines[0], lines[0]
        return lines[0]

    return run


def test_it_is_said_what_was_not_looked_at(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of Gemma Scope 2's files an analysis of the weights reads single slots of earlier layers."""
    clt = coder(model="")
    jump = Clt(replace(clt.cfg, activation="jumprelu", model=None))
    jump.load_state_dict({k: v for k, v in clt.state_dict().items()}, strict=False)
    with torch.no_grad():
        for threshold in jump.threshold:
            threshold.fill_(0.1)
    save_clt(jump, tmp_path / "ours")
    line = ["export", tmp_path / "ours", "gemma-scope-2", tmp_path / "theirs"]
    assert main([str(word) for word in line]) == 0
    for name, said in (("theirs", True), ("ours", False)):
        capfd.readouterr()
        line = ["analyze", tmp_path / name, "--only", "weights", "--bootstrap", "100"]
        line += ["--output_dir", tmp_path / f"{name}.analysis"]
        assert main([str(word) for word in line]) == 0
        assert ("looked for in 16 latents" in capfd.readouterr().err) == said
        report = (tmp_path / f"{name}.analysis" / "report.md").read_text()
        assert ("looked for in 16 latents" in report) == said


def test_a_coder_of_another_model_is_named(
    shelf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = ["shapes", "--max_examples", "4", "--only", "weights", "--model", "tiny-llava"]
    for name, said in (("llm", True), ("vlm", False)):
        capfd.readouterr()
        line = ["analyze", shelf / name, *data, "--output_dir", tmp_path / name]
        assert main([str(word) for word in line]) == 0
        err = capfd.readouterr().err
        assert ("is of tiny-llama; it was measured in tiny-llava" in err) == said


def test_everything_lands_in_the_folder(shelf: Path) -> None:
    folder = shelf / "analysis"
    stored = json.loads((folder / "results.json").read_text())
    assert (stored["format"], stored["version"]) == ("sparsify-vlm analysis", 1)
    assert list(stored["experiments"]) == ["weights", "ablation", "features", "distance"]
    names = {file.name for file in folder.iterdir()}
    assert names == {"results.json", "data", "figures", "report.html", "report.md"}
    results = Results.load(folder)
    assert results.provenance["coder"]["targets"] == list(range(LAYERS, 0, -1))
    assert results.provenance["data"]["samples"] == 6
    assert results.provenance["plt"] == str(shelf / "plt")
    for name in ("weight_heatmap", "fvu_comparison", "delta_loss", "top_features", "causal"):
        assert results.table(name) is not None, name
    text = (folder / "report.md").read_text()
    assert "## Experiment 2: ablation" in text
    assert "per-layer transcoder" in text


@pytest.mark.parametrize(
    "name",
    [
        *("energy_share_same", "block_share_same", "mean_reach", "mean_effective_targets"),
        *("mean_cross_score", "fvu_difference.same_only", "fvu_difference.plt"),
    ],
)
def test_roles_are_held_against_each_other_in_pairs(name: str, shelf: Path) -> None:
    """The difference is that of the two estimates; its interval is not wider than if the same
    layers or samples had been drawn apart."""
    results = Results.load(shelf / "analysis")
    image, text, paired = (results.estimate(f"{name}.{r}") for r in ("image", "text", "image-text"))
    apart = minus(image, text)
    assert paired is not None
    assert paired.value == pytest.approx(apart.value, rel=1e-6, abs=1e-12)
    ends = [(e.low, e.high) for e in (paired, apart)]
    width = [high - low for low, high in ends if low is not None and high is not None]
    assert 0 < width[0] < 1.1 * width[1]
    assert results.estimate(f"{name}.image-text_only") is None  # no such tokens here


def test_weights_alone_have_the_decay_they_were_made_with(shelf: Path, tmp_path: Path) -> None:
    """Rows of equal length on average, halved from target to target: 1/32 from 0 to 5, and a
    same-layer share of squared norms of L / Σ_s Σ_k 4^-k."""
    results = sparsify_vlm.analyze(shelf / "vlm", output_dir=tmp_path)
    assert list(results.experiments) == ["weights", "features", "distance"]
    factor = results.estimate("decay_factor_0_5")
    assert factor is not None
    assert factor.value == pytest.approx(1 / 32, rel=0.05)
    share = results.estimate("same_layer_share_squared_norm")
    assert share is not None
    whole = sum(0.25**k for s in range(LAYERS) for k in range(LAYERS - s))
    assert share.value == pytest.approx(LAYERS / whole, rel=0.02)
    text = (tmp_path / "report.md").read_text()
    assert "This is an analysis of the weights alone" in text
    assert not (tmp_path / "figures" / "delta_loss.png").exists()
    in_memory = sparsify_vlm.analyze(load_clt(shelf / "vlm"), only=["distance"])
    assert in_memory.estimate("decay_factor_0_5") == factor


def test_a_store_takes_the_place_of_the_model(shelf: Path, tmp_path: Path) -> None:
    """On the same samples the same activity; predictions need the model."""
    store = tmp_path / "store"
    data = {"dataset": "shapes", "split": "heldout", "max_examples": 6}
    capture(CaptureConfig(model="tiny-llava", output_dir=str(store), batch_size=6, **data))
    results = sparsify_vlm.analyze(shelf / "vlm", store, only=["weights", "ablation"])
    same = Results.load(shelf / "analysis")
    for name in ("block_share_same", "fvu.full", "fvu.same_only"):
        one, other = results.estimate(name), same.estimate(name)
        assert one is not None
        assert other is not None
        assert one.value == pytest.approx(other.value, rel=2e-2), name
    assert results.estimate("kl.full") is None
    assert same.estimate("kl.full") is not None


def test_compare_takes_coders_and_folders(shelf: Path, tmp_path: Path) -> None:
    found = sparsify_vlm.compare(shelf / "llm", shelf / "analysis", tmp_path / "a")
    same = found.contrasts["same_layer_share_mean_norm"].difference
    assert same.value == pytest.approx(0.0, abs=1e-3)  # other latents are dead on tokens
    assert not any("layers." in note for note in found.notes if "coders have" in note)
    line = ["compare", shelf / "short", shelf / "vlm", "--output_dir", tmp_path / "b"]
    assert main([str(word) for word in line]) == 0
    text = (tmp_path / "b" / "report.md").read_text()
    assert "The coders have 4 and 8 layers" in text
    seeds = ["--text", shelf / "llm", shelf / "llm", "--vlm", f"{shelf / 'vlm'},{shelf / 'vlm'}"]
    line = ["compare", *seeds, "--only", "weights", "--output_dir", tmp_path / "c"]
    assert main([str(word) for word in line]) == 0
    stored = json.loads((tmp_path / "c" / "results.json").read_text())
    assert (len(stored["text"]), len(stored["vlm"])) == (2, 2)
    assert stored["contrasts"]["uniform_null"]["difference"]["over"] == "seeds"


# ---- what is refused


def test_no_such_experiment(refused: Check, shelf: Path, tmp_path: Path) -> None:
    line = ["analyze", shelf / "vlm", "--output_dir", tmp_path / "o"]
    refused([*line, "--only", "wieghts,features"], "--only wieghts", "did you mean weights?")
    refused([*line, "--only", "ablation"], "--only ablation", "give a DATASET or --activations")
    assert not (tmp_path / "o").exists()
    compared = ["compare", shelf / "llm", shelf / "vlm", "--output_dir", tmp_path / "o"]
    refused([*compared, "--only", "ablation"], "--text_dataset", "is a CLT")
    refused([*compared, "--only", "all"], "--only all")
    refused(["compare", shelf / "llm"], "VLM_CLT (or --vlm) is missing")


def test_folders_that_hold_something_else(refused: Check, shelf: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    line = ["analyze", shelf / "vlm", "--only", "weights", "--output_dir"]
    refused([*line, tmp_path], f"--output_dir {tmp_path} holds something else (mine.txt)")
    refused([*line, tmp_path / "mine.txt"], "is a file")
    compared = ["compare", shelf / "llm", shelf / "vlm", "--output_dir", shelf / "analysis"]
    refused(compared, "holds something else (results.json)")
    assert (tmp_path / "mine.txt").read_text() == "keep"
    assert json.loads((shelf / "analysis" / "results.json").read_text())["experiments"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "No such file"),
        ("{", "not readable as JSON"),
        ("[1]", '{"3_117": "text"}'),
        ('{"3_x": "a"}', "'3_x'"),
        ('{"3_1": 2}', "'3_1'"),
    ],
)
def test_bad_labels(
    text: str | None, words: str, refused: Check, shelf: Path, tmp_path: Path
) -> None:
    file = tmp_path / "labels.json"
    if text is not None:
        file.write_text(text)
    line = ["analyze", shelf / "vlm", "--labels", file, "--output_dir", tmp_path / "o"]
    refused(line, f"--labels {file}", words)


def test_labels_of_both_spellings(tmp_path: Path) -> None:
    file = tmp_path / "labels.json"
    file.write_text('{"3_117": "a", "4/5": "b"}')
    assert read_labels(str(file)) == {(3, 117): "a", (4, 5): "b"}
    assert read_labels(None) == {}


def broken(shelf: Path, folder: Path, change: Callable[[Clt], None]) -> Path:
    clt = load_clt(shelf / "vlm")
    with torch.no_grad():
        change(clt)
    return save_clt(clt, folder)


def test_coders_that_cannot_be_read(refused: Check, shelf: Path, tmp_path: Path) -> None:
    out = ["--only", "weights", "--output_dir", tmp_path / "o"]
    (tmp_path / "empty").mkdir()
    refused(["analyze", tmp_path / "empty", *out], str(tmp_path / "empty"), "known format")
    refused(["analyze", tmp_path / "absent", *out], "no such checkpoint folder")
    last = broken(shelf, tmp_path / "missing", lambda clt: None)
    (last / f"language_model.model.layers.{LAYERS - 1}.mlp" / "sae.safetensors").unlink()
    refused(["analyze", last, *out], f"layers.{LAYERS - 1}")

    def spoil(clt: Clt) -> None:
        clt.tables(2, 1)[0][5, 7] = torch.nan

    nan = broken(shelf, tmp_path / "nan", spoil)
    refused(["analyze", nan, *out], "layers.2", "NaN")

    def spoil_bias(clt: Clt) -> None:
        clt.b_enc[4][3] = torch.inf

    infinite = broken(shelf, tmp_path / "infinite", spoil_bias)
    refused(["analyze", infinite, *out], "layers.4", "encoder.bias")


@pytest.mark.parametrize(
    ("field", "value"), [("num_latents", 32), ("d_in", 48), ("activation", "groupmax")]
)
def test_mixed_layers(
    field: str, value: object, refused: Check, shelf: Path, tmp_path: Path
) -> None:
    """A folder in which one layer's coder is of another shape or kind than the others."""
    mixed = broken(shelf, tmp_path / "mixed", lambda clt: None)
    file = mixed / "language_model.model.layers.5.mlp" / "cfg.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    line = ["analyze", mixed, "--only", "weights", "--output_dir", tmp_path / "o"]
    refused(line, "layers.5", field, str(value), "must agree")


def test_what_does_not_fit_is_refused_before_any_work(
    refused: Check, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reads(*_: object) -> None:
        raise AssertionError("decoders were read")

    monkeypatch.setattr("sparsify_vlm.analysis.analyze.read_decoders", reads)
    out = ["--output_dir", tmp_path / "o"]
    line = ["analyze", shelf / "vlm", "shapes", "--max_examples", "4", *out]
    refused([*line, "--plt", tmp_path / "absent"], "no such checkpoint folder")
    refused([*line, "--plt", shelf / "vlm"], f"--plt {shelf / 'vlm'} writes to 8 layers")
    refused([*line, "--fit_activations", tmp_path / "absent"], "no activation store")
    absent = ["analyze", shelf / "vlm", "--activations", tmp_path / "absent", *out]
    refused(absent, "no activation store")
    refused(["compare", shelf / "llm", tmp_path / "absent", *out], "no such checkpoint folder")


@pytest.mark.parametrize("existed", [False, True])
def test_an_interrupted_analysis_leaves_nothing(
    existed: bool, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sparsify_vlm.analysis.analyze.read_decoders", interrupted)
    out = tmp_path / "a" / "b"
    if existed:
        out.mkdir(parents=True)
    assert main(["analyze", str(shelf / "vlm"), "--output_dir", str(out)]) == 130
    assert [path.name for path in tmp_path.rglob("*")] == (["a", "b"] if existed else [])


def dead(clt: Clt) -> None:
    """No latent is ever active."""
    for W, b in zip(clt.W_enc, clt.b_enc, strict=True):
        W.zero_()
        b.fill_(-1.0)


def test_coders_with_nothing_to_measure() -> None:
    """One layer has no distances; decoders of zero have no live latents."""
    alone = sparsify_vlm.analyze(coder(layers=1), bootstrap=100)
    assert alone.estimate("same_layer_share_squared_norm").value == pytest.approx(1)
    assert "one layer only" in conclusions(alone)["Weights"][0]
    fresh = Clt(coder(layers=3).cfg)
    empty = sparsify_vlm.analyze(fresh, bootstrap=100)
    assert empty.estimate("dead_share").value == 1
    assert empty.estimate("same_layer_share_squared_norm").value is None
    assert all("undefined" in sentence for sentence in conclusions(empty)["Weights"])


@pytest.mark.slow
def test_a_coder_whose_latents_never_fire(shelf: Path, tmp_path: Path) -> None:
    """All that is left is its biases, 0: every arm without fitted decoders is the arm `zero`."""
    path = broken(shelf, tmp_path / "dead", dead)
    alone = sparsify_vlm.analyze(path, output_dir=tmp_path / "alone")
    gauge_free = alone.estimate("decay_factor_0_5.corrected")
    assert gauge_free is not None
    assert gauge_free.value is None
    results = sparsify_vlm.analyze(path, "shapes", output_dir=tmp_path / "o", max_examples=4)
    found = results.estimates()
    assert found["dead_share"].value == 1.0
    assert found["fvu.full"].value == pytest.approx(found["fvu.zero"].value, rel=1e-6)
    assert found["fvu_difference.same_only"].value == 0
    assert found["mean_reach"].value is None


def test_a_single_sample_has_no_refit_and_no_intervals(shelf: Path, tmp_path: Path) -> None:
    results = sparsify_vlm.analyze(
        shelf / "vlm", "shapes", only=["ablation"], output_dir=tmp_path, max_examples=1
    )
    cut = results.estimate("fvu_difference.same_only")
    assert cut is not None
    assert cut.value is not None
    assert cut.low is None
    assert results.estimate("fvu.refit") is None
    notes = " ".join(results.experiments["ablation"].notes)
    assert "refit was left out: with a single sample" in notes
    assert "nothing is claimed" in (tmp_path / "report.md").read_text()


def test_a_text_coder_on_images(refused: Check, shelf: Path, tmp_path: Path) -> None:
    """A dataset with images for the coder of a text model."""
    from PIL import Image

    Image.new("RGB", (28, 28), "red").save(tmp_path / "a.png")
    row = {"image": "a.png", "question": "what colour ?", "answer": "red"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    line = ["analyze", shelf / "llm", tmp_path / "rows.jsonl", "--split", "train"]
    refused([*line, "--output_dir", tmp_path / "o"], "image", "tiny-llama")


def test_a_damaged_analysis(refused: Check, shelf: Path, tmp_path: Path) -> None:
    results = sparsify_vlm.analyze(shelf / "llm", only=["weights"])
    results.save(tmp_path)
    line = ["compare", tmp_path, shelf / "vlm", "--output_dir", tmp_path / "o"]
    (tmp_path / "data" / "weight_heatmap.parquet").unlink()
    refused(line, "weight_heatmap.parquet", "run analyze again")
    content = json.loads((tmp_path / "results.json").read_text())
    (tmp_path / "results.json").write_text(json.dumps(content | {"version": 99}))
    refused(line, "version 99")
    (tmp_path / "results.json").write_text("{}")
    refused(line, "not written by analyze")


def test_flags_that_do_not_go_together() -> None:
    with pytest.raises(UserError, match="--activations and --dataset exclude"):
        AnalyzeConfig(clt="c", dataset="shapes", activations="a")
    for flag in ("plt", "fit_activations"):
        with pytest.raises(UserError, match=f"--{flag} is used in the ablation only: give a DATA"):
            AnalyzeConfig(clt="c", **{flag: "p"})
        with pytest.raises(UserError, match=f"--{flag} is used in .* give --only ablation too"):
            AnalyzeConfig(clt="c", dataset="shapes", only=["weights"], **{flag: "p"})
    with pytest.raises(UserError, match="--top 0: must be at least 1"):
        AnalyzeConfig(clt="c", top=0)
    plain = AnalyzeConfig(clt="c", only=["distance, weights"])
    assert plain.experiments() == ["weights", "distance"]
    assert replace(plain, only=[]).experiments() == ["weights", "features", "distance"]
    assert "ablation" in AnalyzeConfig(clt="c", dataset="shapes").experiments()
    assert chosen([]) == ["weights", "ablation", "features", "distance"]


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seeds_that_cannot_be(seed: int, tmp_path: Path) -> None:
    for config in (
        lambda: AnalyzeConfig(clt="clt", output_dir=str(tmp_path / "a"), seed=seed),
        lambda: CompareConfig(
            text_clt="text", vlm_clt="vlm", output_dir=str(tmp_path / "a"), seed=seed
        ),
    ):
        with pytest.raises(UserError, match=f"--seed {seed}: must be from 0"):
            config()
