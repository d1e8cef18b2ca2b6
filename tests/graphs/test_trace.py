"""`trace` from the command line: the folder it writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from families import D_MODEL, build, load, picture
from PIL import Image
from safetensors.torch import load_file

from sparsify_vlm import AttributionGraph, UserError
from sparsify_vlm.cli import main
from sparsify_vlm.coders import Clt, CltConfig, save_clt
from sparsify_vlm.data import ShapesDataset
from sparsify_vlm.graphs.config import in_bytes
from sparsify_vlm.graphs.effects import total_effects
from sparsify_vlm.models import load_model
from sparsify_vlm.report.viewer.folder import read_folder


def save_random_clt(model: str, hookpoints, d_model: int, folder: Path, **options) -> str:
    """A coder of random weights."""
    cfg = CltConfig(d_model, hookpoints, n_targets=len(hookpoints), num_latents=40, k=4, **options)
    cfg.model = model
    clt = Clt(cfg)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in clt.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * (0.2 if parameter.ndim > 1 else 0.05))
    save_clt(clt, folder)
    return str(folder)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    """Coders of tiny-llava, of a random text model and of a random VLM, and a picture."""
    folder = tmp_path_factory.mktemp("shelf")
    for name in ("llava", "llama"):
        build(name, folder)
        loaded = load(name, folder)
        save_random_clt(loaded.name, loaded.stack.hookpoints, D_MODEL, folder / f"{name}-clt")
    loaded = load_model("tiny-llava")
    save_random_clt("tiny-llava", loaded.stack.hookpoints, loaded.stack.d_model, folder / "clt")
    picture(40, 32).save(folder / "picture.png")
    return folder


def run(*argv: object) -> int:
    return main([str(arg) for arg in argv])


@pytest.fixture(scope="module")
def traced(shelf) -> Path:
    """The graph of held-out scene 4."""
    out = shelf / "graph"
    assert run("trace", shelf / "clt", "--scene", 4, "--output_dir", out) == 0
    return out


def slug_json(folder: Path) -> dict:
    (listed,) = json.loads((folder / "graph-metadata.json").read_text())["graphs"]
    return json.loads((folder / f"{listed['slug']}.json").read_text())


def test_the_folder_has_the_graph_and_its_prompt(traced):
    graph = AttributionGraph.load(traced)
    row = ShapesDataset("heldout", 5)[4]
    assert row["question"] in graph.info["prompt"].replace(" ?", "?")
    inputs = load_file(traced / "inputs.safetensors")
    assert torch.equal(inputs["input_ids"][0], graph.input_ids)
    logits = load_model("tiny-llava").forward(inputs).logits[0, -1]
    torch.testing.assert_close(graph.logits, logits, rtol=0, atol=1e-4)


def test_the_picture_is_what_the_processor_saw(traced):
    shown = np.asarray(Image.open(traced / "image-0.png"), dtype=int)
    assert np.abs(shown - np.asarray(ShapesDataset("heldout", 5)[4]["image"], dtype=int)).max() <= 1


def test_the_page_knows_tokens_patches_and_effects(traced):
    graph, page = AttributionGraph.load(traced), slug_json(traced)
    vlm = page["metadata"]["vlm"]
    assert vlm["question"] == ShapesDataset("heldout", 5)[4]["question"]
    assert vlm["images"] == [{"file": "image-0.png", "rows": 6, "columns": 6}]
    assert [t["patch"] for t in vlm["tokens"] if t["role"] == "image"] == [
        [row, column] for row in range(6) for column in range(6)
    ]
    effects = total_effects(graph)[:, graph.token_nodes][:, graph.roles == 1]
    for row, one in zip(effects, vlm["patch_effects"], strict=True):
        assert one["values"] == row.view(6, 6).tolist()
    at_images = [n for n in page["nodes"] if n["role"] == "image"]
    assert at_images
    for node in at_images:
        assert node["patch"] == [(node["ctx_idx"] - 2) // 6, (node["ctx_idx"] - 2) % 6]


def test_a_table_is_printed(shelf, tmp_path, capsys):
    out = tmp_path / "g"
    assert run("trace", shelf / "clt", "--scene", 4, "--output_dir", out) == 0
    printed = capsys.readouterr().out
    assert "right: purple" in printed
    assert "Largest total effects" in printed
    assert f"sparsify-vlm verify {out}" in printed


def test_the_same_graph_may_be_written_again_and_no_other(shelf, tmp_path, capsys):
    first = ["trace", shelf / "clt", "--scene", 4, "--output_dir", tmp_path, "--slug", "a"]
    assert run(*first) == run(*first) == 0
    assert run(*first[:-1], "b") == 1
    assert "holds another graph" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    assert run(*first[:4], "--output_dir", tmp_path / "mine", "--slug", "a") == 1
    assert "holds something else" in capsys.readouterr().err


def test_a_picture_of_the_users(shelf, tmp_path):
    """The processor crops it: what is shown is what it made of it."""
    out = tmp_path / "g"
    argv = ["--image", shelf / "picture.png", "--prompt", "what colour is the thing ?"]
    assert run("trace", shelf / "llava-clt", *argv, "--output_dir", out) == 0
    pixels = load_file(out / "inputs.safetensors")["pixel_values"]
    assert Image.open(out / "image-0.png").size == (pixels.shape[3], pixels.shape[2])


@pytest.mark.parametrize(
    ("name", "grid", "size"),
    [
        ("llava", (4, 4), (32, 32)),  # cropped by its processor
        ("gemma3", (2, 2), (32, 32)),  # squeezed
        ("qwen2_5_vl", (4, 6), (64, 48)),  # whole, in merged patches
        ("llava_next", (6, 8), (64, 48)),  # whole, from tiles
        ("pixtral", (4, 5), (40, 32)),  # smaller, and padded in its batch
        ("internvl", (0, 0), (64, 48)),  # several tiles, whose places are not known
    ],
)
def test_pictures_and_grids_of_families(tmp_path, name, grid, size):
    build(name, tmp_path)
    loaded = load(name, tmp_path)
    clt = save_random_clt(loaded.name, loaded.stack.hookpoints, D_MODEL, tmp_path / "clt")
    picture(64, 48).save(tmp_path / "p.png")
    argv = ["--image", tmp_path / "p.png", "--prompt", "what colour", "--max_feature_nodes", 50]
    assert run("trace", clt, *argv, "--output_dir", tmp_path / "g") == 0
    (shown,) = slug_json(tmp_path / "g")["metadata"]["vlm"]["images"]
    assert (shown["rows"], shown["columns"]) == grid
    assert Image.open(tmp_path / "g" / shown["file"]).size == size


def test_patches_of_pixels(shelf, traced, tmp_path, capsys):
    """The same graph, with what pixels add, in the folder, the page and the printed tables."""
    out = tmp_path / "g"
    assert run("trace", shelf / "clt", "--scene", 4, "--output_dir", out, "--patches") == 0
    graph, plain = AttributionGraph.load(out), AttributionGraph.load(traced)
    torch.testing.assert_close(graph.adjacency, plain.adjacency)
    assert graph.pixels is not None
    assert plain.pixels is None
    vlm = slug_json(out)["metadata"]["vlm"]
    assert vlm["patch_gradient"] == "frozen"
    for row, one in zip(graph.pixels.table(0), vlm["pixel_effects"], strict=True):
        assert one["values"] == row.tolist()
    assert [one["target"] for one in vlm["pixel_effects"]] == [
        one["target"] for one in vlm["patch_effects"]
    ]
    printed = capsys.readouterr().out
    table = printed.split("Patches of pixels, through the vision tower:")[1].split("\n")[3]
    strongest = graph.pixels.table(0)[0].abs().flatten().argmax()
    assert table.split()[1:3] == [str(int(strongest) // 6), str(int(strongest) % 6)]
    assert "pixel_effects" not in slug_json(traced)["metadata"]["vlm"]


@pytest.mark.parametrize(
    ("name", "grid", "options"),
    [
        ("qwen2_5_vl", (8, 12), []),  # 2 × 2 to an image token
        ("llava_next", (6, 8), ["--patch_gradient", "plain"]),
        ("smolvlm", (8, 8), ["--dtype", "bfloat16"]),
        ("pixtral", (4, 5), ["--dtype", "bfloat16"]),
    ],
)
def test_patches_of_pixels_of_families(tmp_path, name, grid, options):
    build(name, tmp_path)
    loaded = load(name, tmp_path)
    clt = save_random_clt(loaded.name, loaded.stack.hookpoints, D_MODEL, tmp_path / "clt")
    picture(64, 48).save(tmp_path / "p.png")
    argv = ["--image", tmp_path / "p.png", "--prompt", "what colour", "--max_feature_nodes", 50]
    out = tmp_path / "g"
    assert run("trace", clt, *argv, "--output_dir", out, "--patches", *options) == 0
    graph, page = AttributionGraph.load(out), read_folder(out).page
    assert tuple(graph.pixels.grids[0].tolist()) == grid
    assert graph.pixels.gradient == page["patch_gradient"]
    assert len(page["pixel_effects"]) == len(graph.target_labels)
    assert bool(graph.pixels.effects.any())


def test_a_picture_in_tiles_of_unknown_places_is_refused(tmp_path, capsys):
    build("internvl", tmp_path)
    loaded = load("internvl", tmp_path)
    clt = save_random_clt(loaded.name, loaded.stack.hookpoints, D_MODEL, tmp_path / "clt")
    picture(64, 48).save(tmp_path / "p.png")
    argv = ["--image", tmp_path / "p.png", "--prompt", "what", "--output_dir", tmp_path / "g"]
    assert run("trace", clt, *argv, "--patches") == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: --patches: the batch does not tell how an InternVL picture")
    assert not (tmp_path / "g").exists()


def test_a_text_model(shelf, tmp_path):
    out = tmp_path / "g"
    argv = ["--prompt", "what colour is the thing", "--target_tokens", "red", "blue"]
    argv += ["--difference", "red", "blue"]
    assert run("trace", shelf / "llama-clt", *argv, "--output_dir", out) == 0
    graph, page = AttributionGraph.load(out), slug_json(out)
    assert graph.target_labels == ["red", "blue", "red − blue"]
    assert graph.tokens[1:] == ["what", "colour", "is", "the", "thing"]
    assert page["metadata"]["vlm"]["images"] == []
    effects = total_effects(graph)
    torch.testing.assert_close(
        effects[0, :-3] - effects[1, :-3], effects[2, :-3], rtol=0, atol=1e-4
    )


def test_labels_and_examples_are_carried_along(shelf, traced, tmp_path):
    layer, _, index = AttributionGraph.load(traced).features[0].tolist()
    name = f"{layer}_{index}"
    (tmp_path / "labels.json").write_text(json.dumps({name: "edge"}))
    examples = {"format": "sparsify-vlm examples", "version": 1}
    examples["features"] = {name: [{"activation": 1.0, "image": "p.png"}]}
    others = {"99_0": [{"activation": 2.0, "image": "q.png"}]}  # of no node of this graph
    (tmp_path / "examples.json").write_text(
        json.dumps(examples | {"features": examples["features"] | others})
    )
    for name in ("p.png", "q.png"):
        (tmp_path / name).write_bytes((shelf / "picture.png").read_bytes())
    out = tmp_path / "g"
    argv = ["--labels", tmp_path / "labels.json", "--examples", tmp_path / "examples.json"]
    assert run("trace", shelf / "clt", "--scene", 4, *argv, "--output_dir", out) == 0
    assert json.loads((out / "examples.json").read_text()) == examples
    assert (out / "p.png").is_file()
    assert not (out / "q.png").exists()


def test_examples_without_their_pictures_are_refused_at_once(shelf, tmp_path, capsys):
    examples = {"format": "sparsify-vlm examples", "version": 1}
    examples["features"] = {"0_1": [{"activation": 1.0, "image": "p.png"}]}
    (tmp_path / "examples.json").write_text(json.dumps(examples))
    out = tmp_path / "g"
    argv = ["--scene", 4, "--examples", tmp_path / "examples.json", "--output_dir", out]
    assert run("trace", shelf / "clt", *argv) == 1
    assert "its picture p.png is not beside it" in capsys.readouterr().err
    assert not out.exists()


REFUSED = {
    "no prompt": (["{clt}"], "--prompt is missing"),
    "coder of another model": (
        ["{clt}", "--model", "{llama}", "--prompt", "red"],
        "the coder is 96 wide, LlamaForCausalLM is 32: it was trained on tiny-llava",
    ),
    "no image token": (
        ["{clt}", "--raw", "--prompt", "red", "--image", "{picture}"],
        "--raw prompt with 0 image tokens (<image>) for 1 pictures",
    ),
    "image token without picture": (
        ["{clt}", "--raw", "--prompt", "<image> red"],
        "--raw prompt with 1 image tokens (<image>) for 0 pictures",
    ),
    "image token in a turn": (
        ["{clt}", "--prompt", "<image> red", "--image", "{picture}"],
        "--prompt holds the image token <image>",
    ),
    "too long": (["{clt}", "--prompt", "red " * 300], "the prompt cannot be used: its prompt has"),
    "too long with a picture": (
        ["{clt}", "--raw", "--prompt", "red " * 300 + "<image>", "--image", "{picture}"],
        "image tokens lie beyond 256 tokens",
    ),
    "longer than a text model": (["{llama-clt}", "--prompt", "red " * 600], "reads 512 at most"),
    "several pieces": (
        ["{clt}", "--scene", "1", "--target_tokens", "red blue"],
        "target token 'red blue' is 2 tokens of this model",
    ),
    "a word that it does not know": (
        ["{clt}", "--scene", "1", "--target_tokens", "xyzzy"],
        "target token 'xyzzy' is not in this model's vocabulary",
    ),
    "a gradient of nothing": (
        ["{clt}", "--scene", "1", "--patch_gradient", "plain"],
        "--patch_gradient plain needs --patches",
    ),
    "no such picture": (
        ["{clt}", "--prompt", "red", "--image", "nowhere.png"],
        "--image nowhere.png: no such file",
    ),
    "picture for a text model": (
        ["{llama-clt}", "--prompt", "red", "--image", "{picture}"],
        "reads text only",
    ),
    "one token's difference": (
        ["{clt}", "--scene", "1", "--difference", "red"],
        "--difference takes two tokens, not 1",
    ),
    "no picture's patches": (
        ["{clt}", "--prompt", "red", "--patches"],
        "--patches needs a picture: give --image or --scene",
    ),
    "no size": (["{clt}", "--scene", "1", "--memory", "much"], "--memory 'much': give a size"),
    "no share": (
        ["{clt}", "--scene", "1", "--node_threshold", "80"],
        "--node_threshold 80.0: must be above 0",
    ),
    "no slug": (["{clt}", "--scene", "1", "--slug", "../x"], "--slug '../x'"),
    "labels that are none": (
        ["{clt}", "--scene", "1", "--labels", "{picture}"],
        "not readable as JSON",
    ),
    "examples that are none": (
        ["{clt}", "--scene", "1", "--examples", "{clt}/clt.json"],
        "no examples of features",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_one_clear_line(case, shelf, tmp_path, capsys, monkeypatch):
    argv, line = REFUSED[case]
    names = {"{clt}": shelf / "clt", "{picture}": shelf / "picture.png"}
    names |= {"{llama}": shelf / "llama", "{llama-clt}": shelf / "llama-clt"}

    def named(text: str) -> str:
        for name, path in names.items():
            text = text.replace(name, str(path))
        return text

    monkeypatch.chdir(tmp_path)
    assert run("trace", *map(named, argv)) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert "\n" not in error
    assert named(line) in error
    assert not list(tmp_path.iterdir())


def test_no_active_features(shelf, tmp_path, capsys):
    loaded = load_model("tiny-llava")
    cfg = CltConfig(loaded.stack.d_model, loaded.stack.hookpoints, n_targets=2, num_latents=8, k=2)
    cfg.model = "tiny-llava"
    clt = Clt(cfg)
    with torch.no_grad():
        for bias in clt.b_enc:
            bias.fill_(-1e6)
    save_clt(clt, tmp_path / "dead")
    assert run("trace", tmp_path / "dead", "--scene", 1, "--output_dir", tmp_path / "g") == 1
    assert "no feature of the coder is active on this prompt" in capsys.readouterr().err
    assert not (tmp_path / "g").exists()


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 << 30), ("512 MiB", 512 << 20), ("1.5gb", 1_500_000_000), ("1000", 1000)],
)
def test_sizes(text, size):
    assert in_bytes("--memory", text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "0", "8 apples"])
def test_no_sizes(text):
    with pytest.raises(UserError, match="--memory"):
        in_bytes("--memory", text)
