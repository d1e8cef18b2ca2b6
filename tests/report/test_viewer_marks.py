"""Two pages of one graph do not overwrite each other's marks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from browser import served
from made_up_graph import write

pytestmark = pytest.mark.slow


def test_the_second_page_is_told_and_can_reload(tmp_path: Path, chromium: Any) -> None:
    folder = write(tmp_path / "graph")
    with served(folder, chromium) as page:
        first, url = page.driver.current_window_handle, page.driver.current_url
        page.driver.switch_to.new_window("tab")
        second = page.driver.current_window_handle
        page.open(url)
        page.choose("3_12_74")
        page.one(".pin").click()
        page.wait(lambda: page.text(".status") == "saved in marks.json")
        page.one("#label").send_keys("says red")
        page.one(".pin").click()  # another change, of what the page itself has saved
        page.wait(lambda: page.text(".status") == "saved in marks.json")
        saved = json.loads((folder / "marks.json").read_text())
        assert saved["labels"] == {"3_12_74": "says red"}

        page.driver.switch_to.window(first)
        assert not page.one(".stale").is_displayed()
        page.choose("3_12_74")
        page.one(".pin").click()
        page.wait(lambda: page.one(".stale").is_displayed())
        assert "another page" in page.text(".stale")
        assert page.text(".status").startswith("not saved: ")
        assert json.loads((folder / "marks.json").read_text()) == saved
        page.one(".reload").click()
        page.wait(lambda: page.js("return document.body.dataset.ready") == "true")
        page.wait(lambda: not page.one(".stale").is_displayed())
        page.choose("3_12_74")
        assert page.text(".details h2") == "says red"
        page.one(".pin").click()
        page.wait(lambda: page.text(".status") == "saved in marks.json")
        assert json.loads((folder / "marks.json").read_text())["labels"] == saved["labels"]
        page.driver.switch_to.window(second)
        page.driver.close()
        page.driver.switch_to.window(first)
        page.log()
        # the browser itself notes the refusal
        page.errors = [one for one in page.errors if "409" not in one["message"]]
