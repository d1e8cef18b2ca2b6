"""The viewer's page in a browser: everything on it is clicked, and nothing leaves the machine."""

from __future__ import annotations

import json
import random
import shutil
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Page, served
from made_up_graph import CIRCLE, WORD, Graph, build, position, write

from sparsify_vlm.report.graph_page import write_standalone
from sparsify_vlm.report.viewer.folder import read_folder
from sparsify_vlm.report.viewer.server import ViewerServer

pytestmark = pytest.mark.slow
ORACLES = Path(__file__).parent.parent / "oracles" / "attribution" / "cases"
ATTACK = "<script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\">"


@pytest.fixture
def page(tmp_path: Path, chromium: Any) -> Iterator[Page]:
    with served(write(tmp_path / "graph"), chromium) as page:
        yield page


def effects(graph: dict[str, Any], node_id: str, direct: bool = False) -> np.ndarray:
    """[8, 8]: what each patch adds to a node, from the matrix of all links, in closed form."""
    nodes, n = graph["nodes"], len(graph["nodes"])
    number = {node["node_id"]: i for i, node in enumerate(nodes)}
    A = np.zeros((n, n))
    for link in graph["links"]:
        A[number[link["target"]], number[link["source"]]] += link["weight"]
    activation = np.array([node["activation"] or np.inf for node in nodes])
    total = A if direct else A @ np.linalg.inv(np.eye(n) - A / activation[:, None])
    values = np.zeros((8, 8))
    for row in range(8):
        for column in range(8):
            at = position(row, column)
            if f"E_{at}_{at}" in number:
                values[row, column] = total[number[node_id], number[f"E_{at}_{at}"]]
    return values


def weights(page: Page, which: str) -> list[float]:
    script = "return [...document.querySelectorAll(arguments[0])].map(e => +e.dataset.weight)"
    return page.js(script, f'[data-list="{which}"] button')


def test_a_newcomer_sees_which_patches_made_it_say_red(page: Page) -> None:
    assert page.text("h1") == "What color is the circle? red"
    assert page.driver.title == "What color is the circle? red"
    assert page.text(".picture h2") == "Which patches made it say “red”?"
    assert page.text(".summary").startswith("Outlined: 4 patches of 64, with 8")
    given = build()["metadata"]["vlm"]["patch_effects"][0]["values"]
    assert np.allclose(page.heat(), given)
    strong = page.find(".patch[data-strong]")
    places = [(e.get_attribute("data-row"), e.get_attribute("data-column")) for e in strong]
    assert [(int(row), int(column)) for row, column in places] == CIRCLE
    assert page.texts(".strongest button")[0].split("\n") == ["row 4, column 7", "+1.60"]
    opacity = page.js(
        "return [...document.querySelectorAll('.patch')].map(e => +e.getAttribute('fill-opacity'))"
    )
    assert np.allclose(np.array(opacity).reshape(8, 8), 0.9 * np.abs(given) / 1.6)
    colours = {
        page.js(
            "return getComputedStyle(document.querySelector(arguments[0])).fill", f".patch.{side}"
        )
        for side in ("for", "against")
    }
    assert len(colours) == 2
    assert page.text(".legend .ends").split("\n") == ["−1.60 against", "0", "for +1.60"]
    assert {"62 %", "30 %", "8.0 %", "81 %"} <= set(page.texts(".scores dd"))


@pytest.mark.parametrize("width", [1280, 1024])
def test_it_fits(page: Page, width: int) -> None:
    page.driver.set_window_size(width, 800)
    overflow = "const e = document.documentElement; return e.scrollWidth - e.clientWidth"
    assert page.js(overflow) <= 0
    picture = page.one(".frame").rect
    assert picture["width"] > 190
    assert picture["height"] == pytest.approx(picture["width"], abs=1)
    boxes = [page.one(part).rect for part in (".left", ".middle", ".right")]
    assert all(a["x"] + a["width"] <= b["x"] + 1 for a, b in pairwise(boxes))


def test_the_answer_is_seen_in_a_narrow_window(page: Page) -> None:
    page.driver.set_window_size(700, 800)
    hidden = "const e = document.querySelector('h1'); return e.scrollHeight - e.clientHeight"
    assert page.js(hidden) < 10  # less than a line
    assert page.one("h1 .answer").rect["width"] > 20
    assert page.one("h1").rect["width"] > 400


def test_nodes_stand_by_layer_and_token(page: Page) -> None:
    def place(id: str) -> tuple[float, float]:
        box = page.node(id).rect
        return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    last = 74
    ladder = ["4_7_74", f"3_12_{last}", f"2_30_{WORD['circle']}", f"1_41_{position(2, 5)}"]
    ladder += [f"0_40_{position(2, 5)}", f"E_{position(2, 5)}_{position(2, 5)}"]
    heights = [place(id)[1] for id in ladder]
    assert heights == sorted(heights)
    (x, y), (right, _), (_, below) = (
        place(f"0_40_{position(*p)}") for p in ((2, 5), (2, 6), (3, 5))
    )
    assert right - x == pytest.approx(below - y, abs=1)
    assert right - x > 5
    words = [f"E_{WORD[w]}_{WORD[w]}" for w in ("What", "color", "circle", "?")]
    assert [place(w)[0] for w in words] == sorted(place(w)[0] for w in words)
    assert page.texts(".columns span:not(.corner)")[:4] == ["picture", "What", "color", "circle"]


def test_choosing_a_node_lights_up_what_feeds_it(page: Page) -> None:
    graph = build()
    for id in ("3_12_74", f"2_30_{WORD['circle']}"):
        page.choose(id)
        assert page.node(id).get_attribute("aria-pressed") == "true"
        expected = effects(graph, id)
        assert np.allclose(page.heat(), expected, rtol=1e-9)
        assert (expected != 0).sum() >= 4
    circle = page.one('.word[title^="circle"]')
    assert float(circle.get_attribute("data-value")) == pytest.approx(1.5)
    page.one('[data-direct="true"]').click()
    assert not page.heat().any()
    assert page.text(".summary") == "No patch feeds it directly."
    page.choose(f"0_40_{position(2, 5)}")
    assert np.allclose(page.heat(), effects(graph, f"0_40_{position(2, 5)}", direct=True))
    assert page.heat()[2, 5] == 2.0


def test_details_are_sorted_and_complete(page: Page) -> None:
    graph = build()
    page.choose("3_12_74")
    assert page.text(".details h2") == "say red"
    assert "4.000" in page.texts(".details dd")
    for which, end in (("inputs", "target"), ("outputs", "source")):
        expected = [link["weight"] for link in graph["links"] if link[end] == "3_12_74"]
        expected.sort(key=abs, reverse=True)
        found = weights(page, which)
        assert found == expected[: len(found)]
        assert len(found) == min(12, len(expected))
    assert page.texts(".example .words")[0].split() == ["it", "is", "red"]
    page.find('[data-list="outputs"] button')[0].click()
    assert page.text(".details h2") == "“red”"
    more = page.one('[aria-label="inputs"] ~ .more')
    more.click()
    found = weights(page, "inputs")
    assert len(found) == sum(link["target"] == "4_7_74" for link in graph["links"])
    assert [abs(w) for w in found] == sorted((abs(w) for w in found), reverse=True)
    page.choose(f"0_40_{position(2, 5)}")
    assert len(page.find(".example .veil i")) == 64


def test_patches_and_words_can_be_chosen(page: Page) -> None:
    at = position(*CIRCLE[0])
    page.find(".strongest button")[0].click()
    assert page.text(".details h2") == "row 4, column 7"
    page.driver.find_element("css selector", '.patch[data-row="2"][data-column="5"]').click()
    assert page.node(f"E_{at}_{at}").get_attribute("aria-pressed") == "true"
    assert "row 3, column 6" in page.text(".readout")
    page.one('.word[title^="circle"]').click()
    assert page.text(".details h2") == "“circle”"
    page.one('[data-look="plain"]').click()
    style = "return getComputedStyle(document.querySelector('.frame img')).filter"
    assert page.js(style) == "none"


def test_the_slider_removes_nodes(page: Page) -> None:
    slide = (
        "const s = document.getElementById('threshold'); s.value = arguments[0];"
        "s.dispatchEvent(new Event('input'))"
    )
    graph = build()
    everything = page.shown()
    page.js(slide, 40)
    kinds = {node["node_id"]: node for node in graph["nodes"]}
    expected = {
        id
        for id, node in kinds.items()
        if node["feature_type"] != "embedding"
        and (node["influence"] is None or node["influence"] <= 0.4)
    }
    left = page.shown()
    assert {id for id in left if kinds[id]["feature_type"] != "embedding"} == expected
    assert len(left) < len(everything)
    assert page.text(".shown").startswith(f"{len(left)} of ")
    page.js(slide, 100)
    page.one("#errors").click()
    assert {id for id in everything - page.shown()} == {f"e_{layer}_74" for layer in range(4)}


def test_pins_groups_and_labels_survive_a_reload(page: Page) -> None:
    from selenium.webdriver.common.keys import Keys

    first, second = (f"0_40_{position(*patch)}" for patch in CIRCLE[:2])
    for id in (first, second):
        page.choose(id)
        page.one(".pin").click()
    label = page.one("#label")
    label.send_keys("sees red", Keys.ENTER)
    for tick in page.find(".pins input"):
        tick.click()
    page.one("#group-name").send_keys("red things", Keys.ENTER)
    page.wait(lambda: page.text(".status") == "saved in marks.json")
    page.open(page.driver.current_url)
    assert len(page.find(".pins li")) == 2
    assert page.one(".rename").get_attribute("value") == "red things"
    page.choose(second)
    assert page.text(".details h2") == "sees red"
    assert page.one("#label").get_attribute("value") == "sees red"
    page.find(".groups .go")[0].click()
    assert page.text(".details h2") == "red things"
    graph = build()
    assert np.allclose(page.heat(), effects(graph, first) + effects(graph, second))
    page.find(".groups .drop")[0].click()
    page.find(".pins .drop")[0].click()
    page.wait(lambda: page.text(".status") == "saved in marks.json")
    page.open(page.driver.current_url)
    assert (len(page.find(".pins li")), len(page.find(".groups li"))) == (1, 0)


def test_a_click_that_ends_the_writing_of_a_label_still_counts(page: Page) -> None:
    page.choose("3_12_74")
    page.one("#label").send_keys("says it")
    page.choose(f"0_40_{position(2, 5)}")
    assert page.text(".details h2") == "red patch"
    page.choose("3_12_74")
    assert page.text(".details h2") == "says it"


@pytest.mark.parametrize(
    ("query", "id"),
    [("say red", "3_12_74"), ("2/30", f"2_30_{WORD['circle']}"), ("3_12_74", "3_12_74"),
     ("feature 12", "3_12_74"), ("“color”", f"E_{WORD['color']}_{WORD['color']}")],
)  # fmt: skip
def test_search(page: Page, query: str, id: str) -> None:
    from selenium.webdriver.common.keys import Keys

    page.keys("/")
    page.keys(query, Keys.ENTER)
    assert page.node(id).get_attribute("aria-pressed") == "true"
    assert page.focused() == id
    page.keys("/", "no such node")
    assert page.text(".results") == "no node of this name"
    page.keys(Keys.ESCAPE)
    assert not page.one(".results").is_displayed()


def test_it_can_be_used_with_the_keyboard_alone(page: Page) -> None:
    from selenium.webdriver.common.keys import Keys

    for _ in range(40):
        page.keys(Keys.TAB)
        if page.js("return document.activeElement.closest('.nodes') !== null"):
            break
    assert page.focused() == "4_7_74"
    page.open(page.driver.current_url)
    page.keys(Keys.TAB)
    assert page.js("return document.activeElement.innerText") == "Go to the graph"
    page.keys(Keys.ENTER)
    assert page.focused() == "4_7_74"
    outline = "return getComputedStyle(document.activeElement.querySelector('rect')).stroke"
    assert page.js(outline) in ("rgb(26, 95, 180)", "rgb(122, 183, 255)")
    page.keys(Keys.ARROW_DOWN)  # its strongest input
    assert page.focused() == "3_12_74"
    page.keys(Keys.ENTER)
    assert page.text(".details h2") == "say red"
    page.keys("p")
    assert page.texts(".pins b") == ["say red"]
    assert page.focused() == "3_12_74"
    page.keys(Keys.ARROW_LEFT)
    assert page.focused().startswith("3_")
    page.keys(Keys.ARROW_RIGHT, Keys.ARROW_UP)
    assert page.focused() == "4_7_74"
    page.keys(Keys.ARROW_RIGHT)
    assert page.focused() == "4_9_74"
    page.keys(Keys.ENTER, Keys.ESCAPE)
    assert page.text(".picture h2") == "Which patches made it say “red”?"
    assert page.find('.node[aria-pressed="true"]') == []
    page.js("document.querySelector('[data-list=inputs] button').focus()")
    page.keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_UP)
    second = page.ids[int(page.find("[data-list=inputs] button")[1].get_attribute("data-node"))]
    assert page.focused() == second
    page.keys(Keys.ENTER)
    assert page.node(second).get_attribute("aria-pressed") == "true"


def test_everything_has_a_name_for_screen_readers(page: Page) -> None:
    page.choose("3_12_74")
    page.one(".pin").click()
    nameless = page.js("""
        const label = e => e.getAttribute('aria-label') || e.innerText || e.textContent
            || (e.labels && e.labels[0] && e.labels[0].innerText) || e.alt;
        return [...document.querySelectorAll('button, input, [role=button], img, section')]
            .filter(e => !(label(e) || '').trim()).map(e => e.outerHTML)""")
    assert nameless == []
    assert page.js("return document.querySelectorAll('.node[tabindex=\"0\"]').length") == 1
    spoken = page.node("3_12_74").get_attribute("aria-label")
    assert spoken == "feature say red, layer 3 · “:”, activation 4.00, pinned"


def hostile(folder: Path) -> Path:
    graph = build()
    vlm = graph["metadata"]["vlm"]
    for key in ("question", "answer", "model", "clt"):
        vlm[key] = ATTACK + key
    for token in vlm["tokens"]:
        token["text"] = ATTACK
    for node in graph["nodes"]:
        node["clerp"] = ATTACK
        node["node_id"] += ATTACK
    for link in graph["links"]:
        link["source"] += ATTACK
        link["target"] += ATTACK
    vlm["patch_effects"][0]["target"] += ATTACK
    write(folder, graph)
    examples = json.loads((folder / "examples.json").read_text())
    examples["features"]["3_12"][0]["tokens"] = [ATTACK] * 3
    (folder / "examples.json").write_text(json.dumps(examples))
    marks = {
        "pinned": ["3_12_74" + ATTACK],
        "labels": {"3_12_74" + ATTACK: ATTACK, "__proto__": "x"},
    }
    marks["supernodes"] = [{"name": ATTACK, "nodes": ["3_12_74" + ATTACK]}]
    marks |= {"format": "sparsify-vlm marks", "version": 1}
    (folder / "marks.json").write_text(json.dumps(marks))
    return folder


def click_through(page: Page) -> None:
    page.choose("3_12_74" + ATTACK)
    page.keys("/", "<script>")
    assert page.find(".results button")
    page.find(".results button")[0].click()
    page.find(".groups .go")[0].click()
    assert page.text(".details h2") == ATTACK
    assert page.find("#app script") == []
    assert page.find("img[src=x]") == []
    assert page.driver.title.startswith("<script>document.title = 'owned'</script>")


def test_hostile_strings_stay_text(tmp_path: Path, chromium: Any) -> None:
    with served(hostile(tmp_path / "graph"), chromium) as page:
        click_through(page)


def test_hostile_strings_stay_text_in_the_standalone_page(tmp_path: Path, chromium: Any) -> None:
    read = read_folder(hostile(tmp_path / "graph"))
    page = Page(chromium, write_standalone(read, str(tmp_path / "page.html")).as_uri())
    page.ids = [node["id"] for node in read.page["nodes"]]
    click_through(page)
    page.log()
    assert page.errors == []


def test_the_standalone_page_needs_nothing_but_itself(tmp_path: Path, chromium: Any) -> None:
    folder = write(tmp_path / "graph")
    read = read_folder(folder)
    file = write_standalone(read, str(tmp_path / "page.html"))
    shutil.rmtree(folder)
    page = Page(chromium, file.as_uri())
    page.ids = [node["id"] for node in read.page["nodes"]]
    assert page.js("return Math.min(...[...document.images].map(i => i.naturalWidth))") == 128
    assert page.text(".picture h2") == "Which patches made it say “red”?"
    page.choose("3_12_74")
    assert np.allclose(page.heat(), effects(build(), "3_12_74"))
    page.keys("p")
    page.wait(lambda: "download" in page.text(".status"))
    page.one(".download").click()
    saved = chromium.downloads / "marks.json"
    page.wait(saved.is_file)
    assert json.loads(saved.read_text())["pinned"] == ["3_12_74"]
    blocked = "return fetch('https://example.org').then(() => 'sent', () => 'blocked')"
    assert page.js(blocked) == "blocked"
    page.driver.get_log("browser")  # the browser's own line on what it blocked
    page.log()
    assert page.errors == []
    other = [url for url in page.requests if not url.startswith(("file:", "data:", "blob:"))]
    assert [url for url in other if "example.org" not in url] == []


def test_a_change_that_cannot_be_saved_is_said(tmp_path: Path, chromium: Any) -> None:
    folder = write(tmp_path / "graph")
    with ViewerServer(read_folder(folder), 0) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        page = Page(chromium, server.url)
        page.ids = [node["id"] for node in read_folder(folder).page["nodes"]]
        server.shutdown()
    page.choose("3_12_74")
    page.one(".pin").click()
    page.wait(lambda: page.text(".status").startswith("not saved: "))
    page.driver.get_log("browser")


@pytest.mark.parametrize("case", ["llama_relu", "llama_soft_tokens", "llama_topk"])
def test_circuit_tracers_text_graphs_are_shown(case: str, tmp_path: Path, chromium: Any) -> None:
    folder = tmp_path / case
    shutil.copytree(ORACLES / case / "graph_json", folder)
    with served(folder, chromium) as page:
        assert page.find(".picture") == []
        assert "picture" not in page.text(".guide")
        assert page.find(".word")
        page.find(".node.feature")[0].click()
        found = [abs(w) for w in weights(page, "inputs")]
        assert found == sorted(found, reverse=True)


def test_tens_of_thousands_of_links_stay_quick(tmp_path: Path, chromium: Any) -> None:
    g, rng = Graph(), random.Random(1)
    graph = build()
    red = g.add("9_7_74", "logit", 9, 74, is_target_logit=True, token_prob=0.9, influence=None)
    layers = [[g.token(at) for at in range(75)]]
    for layer in range(8):
        layers.append([
            g.feature(layer, i, rng.randrange(75), influence=rng.random()) for i in range(75)
        ])  # fmt: skip
    for high, targets in enumerate(layers):
        for target in targets:
            for low in layers[:high]:
                for source in rng.sample(low, 15):
                    g.link(source, target, rng.uniform(-0.1, 0.1))
    for source in layers[-1]:
        g.link(source, red, rng.uniform(-1, 1))
    graph |= {"nodes": g.nodes, "links": g.links}
    del graph["metadata"]["vlm"]["patch_effects"]
    assert len(g.links) > 40_000
    with served(write(tmp_path / "graph", graph), chromium) as page:
        milliseconds = page.js("""
            const start = performance.now();
            for (const node of [...document.querySelectorAll('.node.feature')].slice(0, 10)) {
                document.querySelector(`.nodes [data-node="${node.dataset.node}"]`)
                    .dispatchEvent(new MouseEvent('click', { bubbles: true }));
            }
            return (performance.now() - start) / 10""")
        print(f"{milliseconds:.0f} ms per choice of a node")
        assert milliseconds < 1000
