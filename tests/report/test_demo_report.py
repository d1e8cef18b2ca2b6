"""The demo's report, made from small invented data and opened in a browser."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import made_up_graph
import pytest
from PIL import Image

from sparsify_vlm.errors import UserError
from sparsify_vlm.report.demo import write_report
from sparsify_vlm.report.pictures import png

ATTACK = "<script>document.title = 'owned'</script>"
L = 3


def evaluation(image: float, text: float, lost: float) -> dict[str, Any]:
    both = {"all": image, "image": image, "text": text}
    layer = {"fvu": both, "fvu_same_layer_only": both, "dead": {"all": 0.25}, "sigma": 1.0}
    types = {"all": lost, "colour": lost, "shape": lost, "count": None, "existence": lost}
    arm = {
        "cross_entropy": 0.125,
        "kl": 0.0625,
        "top1_match": 0.975,
        "ce_recovered_mean": 0.987,
        "exact_match": {"all": 1 - lost},
        "changed_of_correct": types,
    }
    return {
        "n_samples": 321,
        "layers": [layer | {"hookpoint": f"layers.{i}.mlp"} for i in range(L)],
        "mean_fvu": both,
        "mean_fvu_same_layer_only": both,
        "baseline": {"cross_entropy": 0.001, "exact_match": {"all": 0.9975}},
        "replacement": {"full": arm, "same_layer_only": arm},
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A demo's folder as its stages leave it."""

    def put(name: str, value: Any) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(value))

    settings = {
        **{"train_scenes": 10, "num_latents": 77, "k": 5, "steps": 9, "lr": 0.002},
        "batch_tokens": 64,
    }
    stages = [{"name": "capture", "what": "x", "seconds": 61.0}]
    put("demo.json", {"settings": settings, "stages": stages, "versions": {"torch": "9.9"}})
    put("clt.eval.json", evaluation(0.0123, 0.0341, 0.01))
    put("plt.eval.json", evaluation(0.0456, 0.0567, 0.02))
    fvu = {"all": 0.5, "image": 0.5, "text": 0.25}
    line = {
        "id": "a",
        "type": "colour",
        "question": ATTACK,
        "truth": "red",
        "answers": {"model": "red", "full": "red", "same_layer_only": None},
        "right": {"model": True, "full": True, "same_layer_only": False},
    }
    for name in ("clt", "plt"):
        put(f"{name}/metrics.jsonl", {"step": 1, "tokens": 2_000_000, "fvu": fvu})
        put(f"{name}.answers.jsonl", line)
    put("decoders.json", {"mean_norm_by_sigma": [[1.0, 0.5, 0.2], [None, 1.0, 0.4], [None] * 3]})
    put("examples.json", {"first": [0], "differing": [0]})
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("scene-0.png", "red-3.png"):
        (pictures / name).write_bytes(png(Image.new("RGB", (12, 12), "red")))
    scores = {"precision": 0.91, "recall": 0.82, "f1": 0.86, "always": 0.11}
    put(
        "concepts.json",
        [{"concept": "red", "layer": 2, "latent": 41, "images": ["red-3.png"]} | scores],
    )
    made_up_graph.write(tmp_path / "graph")
    return tmp_path


class Sources(HTMLParser):
    """Everything a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [v or "" for name, v in attrs if name in ("src", "href", "xlink:href")]


def test_it_shows_the_numbers_of_the_files_and_fetches_nothing(folder: Path) -> None:
    page = write_report(folder).read_text("utf-8")
    for shown in ("0.012", "0.034", "0.046", "99.0 %", "0.987", "75 %", "2.0 M", "321", "n/a"):
        assert shown in page, shown
    assert "(goes on)" in page
    assert "Which patches made it say “red”?" in page
    assert "of 64 patches carry half of the push" in page
    assert ATTACK not in page
    assert "&lt;script&gt;" in page
    sources = Sources()
    sources.feed(page)
    assert sources.found
    assert [s for s in sources.found if not s.startswith(("data:", "#"))] == ["graph.html"]


def test_a_missing_stage_is_said(folder: Path) -> None:
    (folder / "decoders.json").unlink()
    with pytest.raises(UserError, match=r"decoders\.json: not there; run the demo"):
        write_report(folder)


@pytest.mark.slow
def test_it_opens_without_errors_and_fits_1280_pixels(folder: Path, chromium: Any) -> None:
    browser = chromium
    browser.set_window_size(1280, 1000)
    browser.get(write_report(folder).as_uri())
    assert browser.get_log("browser") == []
    assert browser.title == "A cross-layer transcoder of tiny-llava"
    widths = browser.execute_script(
        "return [...document.images].map(i => i.complete ? i.naturalWidth : 0)"
    )
    assert len(widths) == 5
    assert min(widths) > 0
    overflow = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert browser.execute_script(overflow) <= 0
    assert len(browser.find_elements("css selector", "figure svg")) == 3
