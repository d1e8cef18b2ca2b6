"""Examples of features, against every sample looked at alone, with hooks on the model itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import D_MODEL, build, load
from PIL import Image

from sparsify_vlm.cli import main
from sparsify_vlm.coders import Clt, CltConfig, save_clt
from sparsify_vlm.data import ShapesDataset
from sparsify_vlm.data.config import DataConfig
from sparsify_vlm.data.encoding import encode
from sparsify_vlm.data.sources import open_samples
from sparsify_vlm.errors import UserError
from sparsify_vlm.features.config import ExamplesConfig
from sparsify_vlm.features.examples import Strongest, examples
from sparsify_vlm.models import load_model
from sparsify_vlm.replacement import VLMReplacementModel
from sparsify_vlm.report.viewer.folder import read_folder

F, K, N = 24, 3, 40
WANTED = [f"{layer}_{index}" for layer in (0, 3) for index in range(F)]


def random_clt(model: str, hookpoints: Any, d_model: int, folder: Path) -> Path:
    cfg = CltConfig(d_model, hookpoints, n_targets=2, num_latents=F, k=K)
    cfg.model = model
    clt = Clt(cfg)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in clt.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    save_clt(clt, folder)
    return folder


@pytest.fixture(scope="module")
def clt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    loaded = load_model("tiny-llava")
    folder = tmp_path_factory.mktemp("coder") / "clt"
    return random_clt("tiny-llava", loaded.stack.hookpoints, loaded.stack.d_model, folder)


def run(*argv: object) -> int:
    return main([str(arg) for arg in argv])


def every_activation(clt: Path, layer: int) -> list[np.ndarray]:
    """Activations [S, F] of each sample, from its MLP input and the coder's stored tensors."""
    from safetensors.torch import load_file

    loaded = load_model("tiny-llava")
    name = loaded.stack.hookpoints[layer]
    weights = load_file(clt / name / "sae.safetensors")
    options = {"dataset": "shapes", "split": "heldout", "data_args": f"size={N}"}
    found = []
    mlp = loaded.model.get_decoder().layers[layer].mlp
    for sample in open_samples(DataConfig(**options), loaded):
        inputs = encode(loaded, [sample], 2048).inputs
        kept: list[torch.Tensor] = []
        handle = mlp.register_forward_pre_hook(lambda _, args: kept.append(args[0]))  # noqa: B023
        with torch.no_grad():
            loaded.model(**inputs)
        handle.remove()
        pre = kept[0][0] @ weights["encoder.weight"].T + weights["encoder.bias"]
        top = pre.topk(K, dim=1)
        active = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
        active[inputs["input_ids"][0] == loaded.tokenizer.bos_token_id] = 0
        found.append(active.numpy())
    return found


def test_the_strongest_samples_of_every_feature(clt, tmp_path):
    argv = ["--split", "heldout", "--data_args", f"size={N}", "--batch_size", 7, "--top", 3]
    argv += ["--features", *WANTED, "--output_dir", tmp_path / "x", "--context", 6]
    assert run("examples", clt, "shapes", *argv) == 0
    written = json.loads((tmp_path / "x" / "examples.json").read_text())
    assert (written["format"], written["version"]) == ("sparsify-vlm examples", 1)
    loaded = load_model("tiny-llava")
    data = DataConfig(dataset="shapes", split="heldout", data_args=f"size={N}")
    samples = list(open_samples(data, loaded))
    kinds = set()
    for layer in (0, 3):
        activations = every_activation(clt, layer)
        for index in range(F):
            peaks = np.array([one[:, index].max() for one in activations])
            order = np.argsort(-peaks, kind="stable")[:3]
            order = order[peaks[order] > 0]
            found = written["features"].get(f"{layer}_{index}", [])
            assert [one["activation"] for one in found] == pytest.approx(peaks[order], rel=1e-3)
            for one, sample in zip(found, order, strict=True):
                values = activations[sample][:, index]
                ids = encode(loaded, [samples[sample]], 2048).inputs["input_ids"][0]
                image = (ids == loaded.config.image_token_id).numpy()
                patches = values[image].reshape(6, 6)
                if "tokens" in one:
                    words = np.flatnonzero(~image)
                    peak = int(np.flatnonzero(words == values.argmax())[0])
                    window = words[max(0, peak - 4) :][:6]
                    assert one["values"] == pytest.approx(values[window], rel=1e-3, abs=1e-6)
                    texts = [loaded.tokenizer.decode([int(ids[i])]) for i in window]
                    assert one["tokens"] == texts
                else:
                    assert image[values.argmax()]
                if "patches" in one:
                    np.testing.assert_allclose(one["patches"], patches, rtol=1e-3, atol=1e-6)
                else:
                    assert not patches.any()
                kinds.add(("tokens" in one, "patches" in one))
                shown = Image.open(tmp_path / "x" / one["image"])
                assert max(shown.size) <= 160
    assert {(True, False), (False, True)} <= kinds


def test_pictures_are_those_of_their_samples(clt, tmp_path):
    """In the dataset's own order, sample n is scene n."""
    argv = ["--split", "heldout", "--data_args", f"size={N}", "--shuffle_seed", -1]
    argv += ["--features", *WANTED, "--output_dir", tmp_path]
    assert run("examples", clt, "shapes", *argv) == 0
    rows = ShapesDataset("heldout", N)
    named = sorted(tmp_path.glob("example-*.png"))
    assert named
    for file in named:
        number = int(file.name.split("-")[1])
        shown = np.asarray(Image.open(file), dtype=int)
        truth = rows[number]["image"].copy()
        truth.thumbnail((160, 160))
        assert np.abs(shown - np.asarray(truth, dtype=int)).max() <= 2
    features = json.loads((tmp_path / "examples.json").read_text())["features"]
    used = {one["image"] for ones in features.values() for one in ones}
    assert used == {file.name for file in named}


def test_nothing_is_held_but_what_is_kept(clt):
    """Over a stream of samples the kept examples and pictures stay as many as they may be."""
    from sparsify_vlm.data.batching import batches

    model = VLMReplacementModel.from_pretrained("tiny-llava", clt)
    cfg = ExamplesConfig(clt=str(clt), features=["3_1"], output_dir="x", top=2)
    wanted = [(3, index) for index in range(4)]
    best = Strongest(model, wanted, cfg)
    data = DataConfig(dataset="shapes", split="heldout", data_args="size=60")
    for batch in batches(open_samples(data, model.loaded), model.loaded, 10, 2048):
        best.add(batch)
        assert all(len(kept) <= 2 for kept in best.kept.values())
        shown = {one.picture for kept in best.kept.values() for one in kept}
        assert set(best.pictures) == shown - {None}


def test_examples_of_a_graph_stand_in_its_folder_and_are_shown(clt, tmp_path):
    graph = tmp_path / "g"
    assert run("trace", clt, "--scene", 4, "--output_dir", graph, "--max_feature_nodes", 60) == 0
    argv = ["--graph", graph, "--split", "heldout", "--data_args", "size=20"]
    assert run("examples", clt, "shapes", *argv) == 0
    (slug,) = json.loads((graph / "graph-metadata.json").read_text())["graphs"]
    nodes = json.loads((graph / f"{slug['slug']}.json").read_text())["nodes"]
    page = read_folder(graph).page
    there = {f"{n['layer']}_{n['feature']}" for n in page["nodes"] if n["kind"] == "feature"}
    assert set(page["examples"]) == there
    assert len(nodes) == len(page["nodes"])
    # again, with fewer samples: the pictures that are not needed any more are gone
    assert run("examples", clt, "shapes", *argv[:-1], "size=3", "--top", 1) == 0
    assert {f.name.split("-")[1] for f in graph.glob("example-*.png")} <= {"0", "1", "2"}
    # and another trace carries them along
    argv = ["--scene", 4, "--examples", graph / "examples.json", "--output_dir", tmp_path / "h"]
    assert run("trace", clt, *argv) == 0
    assert read_folder(tmp_path / "h").page["examples"]


@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl", "llava_next"])
def test_other_families(name, tmp_path):
    build(name, tmp_path)
    loaded = load(name, tmp_path)
    clt = random_clt(loaded.name, loaded.stack.hookpoints, D_MODEL, tmp_path / "clt")
    argv = ["--data_args", "size=6", "--features", "all", "--output_dir", tmp_path / "x"]
    assert run("examples", clt, "shapes", *argv) == 0
    features = json.loads((tmp_path / "x" / "examples.json").read_text())["features"]
    assert features
    for ones in features.values():
        for one in ones:
            assert (tmp_path / "x" / one["image"]).is_file()
            if "patches" in one and "tokens" not in one and name != "llava_next":
                most = max(value for row in one["patches"] for value in row)
                assert most == pytest.approx(one["activation"], rel=1e-3)


def test_a_text_model(tmp_path):
    loaded = load_model("tiny-llama")
    folder = tmp_path / "clt"
    clt = random_clt("tiny-llama", loaded.stack.hookpoints, loaded.stack.d_model, folder)
    argv = ["--data_args", "size=6", "--features", "2_1", "2_2", "2_3", "2_4", "2_5"]
    assert run("examples", clt, "shapes", *argv, "--output_dir", tmp_path / "x") == 0
    for ones in json.loads((tmp_path / "x" / "examples.json").read_text())["features"].values():
        for one in ones:
            assert max(one["values"]) == one["activation"]
            assert "image" not in one


REFUSED = {
    "whose": ([], "whose examples? give --graph with a traced graph, or --features"),
    "where": (["--features", "1_1"], "--output_dir is missing"),
    "no feature": (["--features", "red", "--output_dir", "{out}"], "--features red: name them by"),
    "no such latent": (
        ["--features", "1_99", "--output_dir", "{out}"],
        "feature 1_99 is none of the coder's: layers 0 to 7, 24 latents each",
    ),
    "no graph": (["--graph", "{out}"], "graph-metadata.json cannot be read"),
    "another folder": (
        ["--features", "1_1", "--output_dir", "{mine}"],
        "holds something else: give another folder",
    ),
    "none kept": (["--features", "1_1", "--top", "0"], "--top must be at least 1, not 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_one_clear_line(case, clt, tmp_path, capsys):
    argv, line = REFUSED[case]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    names = {"{out}": str(tmp_path / "out"), "{mine}": str(tmp_path / "mine")}
    assert run("examples", clt, "shapes", *(names.get(a, a) for a in argv)) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert "\n" not in error
    assert line in error
    assert not (tmp_path / "out").exists()


def test_features_that_are_never_active_are_said(tmp_path):
    loaded = load_model("tiny-llava")
    cfg = CltConfig(loaded.stack.d_model, loaded.stack.hookpoints, n_targets=2, num_latents=8, k=2)
    clt = Clt(cfg)
    with torch.no_grad():
        for bias in clt.b_enc:
            bias.fill_(-1e6)
    model = VLMReplacementModel(loaded, clt)
    options = {"dataset": "shapes", "data_args": "size=4", "output_dir": str(tmp_path / "x")}
    with pytest.raises(UserError, match="none of the features is active"):
        examples(ExamplesConfig(clt="", features=["all"], **options), model)
    assert not (tmp_path / "x").exists()
