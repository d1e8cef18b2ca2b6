"""The switch between image tokens and pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import served
from made_up_graph import CIRCLE, COLUMNS, ROWS, build, position, write

from sparsify_vlm.errors import UserError
from sparsify_vlm.report.graph_page import write_standalone
from sparsify_vlm.report.viewer.folder import read_folder

pytestmark = pytest.mark.slow


def with_pixels() -> tuple[dict[str, Any], np.ndarray]:
    """The made-up graph with pixels of twice as many patches as there are image tokens."""
    graph = build()
    values = np.random.default_rng(0).uniform(-0.1, 0.1, (2 * ROWS, 2 * COLUMNS))
    values[4:8, 10:14] = 0.5
    values[6, 13] = 1.0
    vlm = graph["metadata"]["vlm"]
    target = vlm["patch_effects"][0]["target"]
    vlm["pixel_effects"] = [{"target": target, "image": 0, "values": values.tolist()}]
    vlm["patch_gradient"] = "frozen"
    return graph, values


def drawn(page: Any) -> np.ndarray:
    script = """return [...document.querySelectorAll('.patch')].map(
        e => [+e.dataset.row, +e.dataset.column, +e.dataset.value])"""
    found = np.array(page.js(script))
    table = np.zeros((int(found[:, 0].max()) + 1, int(found[:, 1].max()) + 1))
    table[found[:, 0].astype(int), found[:, 1].astype(int)] = found[:, 2]
    return table


def test_pixels_and_tokens_can_be_switched(tmp_path: Path, chromium: Any) -> None:
    graph, pixels = with_pixels()
    tokens = np.array(graph["metadata"]["vlm"]["patch_effects"][0]["values"])
    with served(write(tmp_path / "graph", graph), chromium) as page:
        assert np.allclose(drawn(page), tokens)
        assert page.one('[data-source="tokens"]').get_attribute("aria-pressed") == "true"
        page.one('[data-source="pixels"]').click()
        assert page.one('[data-source="pixels"]').get_attribute("aria-pressed") == "true"
        assert np.allclose(drawn(page), pixels)
        assert "through the vision tower, its attention patterns" in page.text(".legend .note")
        assert page.texts(".strongest button")[0].split("\n") == ["row 7, column 14", "+1.00"]
        # of a token that is chosen, all of its patches are framed
        page.choose(f"E_{position(*CIRCLE[0])}_{position(*CIRCLE[0])}")
        frame = page.one(".overlay .chosen")
        row, column = CIRCLE[0]
        box = [float(frame.get_attribute(name)) for name in ("y", "x", "height", "width")]
        assert box == [2 * row, 2 * column, 2, 2]
        # of other nodes pixels are not known: image tokens are shown, and again pixels after them
        page.choose("3_12_74")
        assert drawn(page).shape == (ROWS, COLUMNS)
        assert not page.one('[data-source="pixels"]').is_enabled()
        look = "return +getComputedStyle(document.querySelector('[data-source=pixels]')).opacity"
        assert page.js(look) < 0.6
        page.keys("\ue00c")
        assert drawn(page).shape == (2 * ROWS, 2 * COLUMNS)
        # a patch of pixels leads to the token around it
        page.one('.patch[data-row="7"][data-column="13"]').click()
        chosen = page.js("return +document.querySelector('.node[aria-pressed=true]').dataset.node")
        assert page.ids[chosen] == f"E_{position(3, 6)}_{position(3, 6)}"
        page.driver.save_screenshot(str(tmp_path / "pixels.png"))


def test_without_pixels_there_is_no_switch(tmp_path: Path, chromium: Any) -> None:
    with served(write(tmp_path / "graph"), chromium) as page:
        assert not page.one('[data-source="pixels"]').is_displayed()


def test_the_standalone_page_has_the_switch(tmp_path: Path, chromium: Any) -> None:
    graph, pixels = with_pixels()
    folder = read_folder(write(tmp_path / "graph", graph))
    file = write_standalone(folder, str(tmp_path / "page.html"))
    chromium.get(file.as_uri())
    chromium.find_element("css selector", '[data-source="pixels"]').click()
    assert len(chromium.find_elements("css selector", ".patch")) == pixels.size


@pytest.mark.parametrize("values", [[[1.0], [1.0, 2.0]], [[float("inf")]], "none", [[0.0] * 1025]])
def test_damaged_tables_are_refused(tmp_path: Path, values: Any) -> None:
    graph, _ = with_pixels()
    graph["metadata"]["vlm"]["pixel_effects"][0]["values"] = values
    with pytest.raises(UserError, match=r"pixel_effects\[0\]\.values|not JSON"):
        read_folder(write(tmp_path / "graph", graph))
