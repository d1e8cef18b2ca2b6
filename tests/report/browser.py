"""The viewer's page in headless Chromium, by what a reader sees and does."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from sparsify_vlm.report.viewer.folder import read_folder
from sparsify_vlm.report.viewer.server import ViewerServer


class Page:
    """The page in the browser, by what a reader sees and does."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver = driver
        driver.set_window_size(1280, 900)
        self.errors: list[Any] = []
        self.requests: list[str] = []
        self.log()
        self.errors, self.requests = [], []
        self.open(url)

    def open(self, url: str) -> None:
        self.driver.get(url)
        self.wait(lambda: self.js("return document.body.dataset.ready") == "true")

    def js(self, script: str, *values: Any) -> Any:
        return self.driver.execute_script(script, *values)

    def wait(self, condition: Callable[[], bool]) -> None:
        for _ in range(200):
            if condition():
                return
            time.sleep(0.05)
        raise AssertionError("did not happen within 10 seconds")

    def log(self) -> None:
        """Collect console messages and requests since the last time."""
        self.errors += self.driver.get_log("browser")
        for entry in self.driver.get_log("performance"):
            event = json.loads(entry["message"])["message"]
            if event["method"] == "Network.requestWillBeSent":
                self.requests.append(event["params"]["request"]["url"])

    def find(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def one(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        found = self.js("return document.querySelector(arguments[0]).innerText", selector)
        return found.replace("\xa0", " ")

    def texts(self, selector: str) -> list[str]:
        every = "return [...document.querySelectorAll(arguments[0])].map(e => e.innerText)"
        return [text.replace("\xa0", " ") for text in self.js(every, selector)]

    def node(self, id: str) -> Any:
        """The node's element, found by what its number stands for in the data."""
        return self.one(f'.nodes [data-node="{self.ids.index(id)}"]')

    def shown(self) -> set[str]:
        numbers = self.js(
            "return [...document.querySelectorAll('.node')].map(e => +e.dataset.node)"
        )
        return {self.ids[i] for i in numbers}

    def choose(self, id: str) -> None:
        from selenium.webdriver import ActionChains

        dot = self.node(id).find_element("css selector", ".hit, rect")
        ActionChains(self.driver).move_to_element(dot).click().perform()

    def heat(self) -> np.ndarray:
        script = "return [...document.querySelectorAll('.patch')].map(e => +e.dataset.value)"
        return np.array(self.js(script)).reshape(8, 8)

    def keys(self, *keys: str) -> None:
        from selenium.webdriver import ActionChains

        for key in keys:
            ActionChains(self.driver).send_keys(key).perform()

    def focused(self) -> str:
        return self.ids[self.js("return +document.activeElement.dataset.node")]

    ids: list[str]


@contextmanager
def served(folder: Path, driver: Any) -> Iterator[Page]:
    """The folder's page from a server; at the end, nothing was wrong and nothing went elsewhere."""
    read = read_folder(folder)
    with ViewerServer(read, 0) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        page = Page(driver, server.url)
        page.ids = [node["id"] for node in read.page["nodes"]]
        yield page
        page.log()
        server.shutdown()
    assert page.errors == []
    assert [url for url in page.requests if not url.startswith((server.url, "data:"))] == []
    assert any(url.endswith("/data.json") for url in page.requests)
