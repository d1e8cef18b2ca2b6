from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator

import pytest
from huggingface_hub import constants

from sparsify_vlm.errors import UserError
from sparsify_vlm.hub import offline_if_unreachable
from sparsify_vlm.models import load_model
from sparsify_vlm.models.skeleton import read_skeleton


@pytest.fixture(autouse=True)
def _asked_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    offline_if_unreachable.cache_clear()
    yield
    offline_if_unreachable.cache_clear()


def resolves(monkeypatch: pytest.MonkeyPatch, works: bool) -> list[str]:
    asked: list[str] = []

    def look_up(host: str, port: int) -> list[object]:
        asked.append(host)
        if not works:
            raise socket.gaierror(-2, "Name or service not known")
        return []

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return asked


def test_without_an_address_the_cache_is_all_there_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = resolves(monkeypatch, works=False)
    offline_if_unreachable()
    offline_if_unreachable()
    assert asked == ["huggingface.co"]
    assert constants.is_offline_mode()
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert "huggingface.co cannot be reached" in capsys.readouterr().err


def test_with_an_address_or_a_proxy_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    resolves(monkeypatch, works=True)
    offline_if_unreachable()
    assert not constants.is_offline_mode()
    offline_if_unreachable.cache_clear()
    asked = resolves(monkeypatch, works=False)
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": "http://proxy:3128"})
    offline_if_unreachable()
    assert asked == []
    assert not constants.is_offline_mode()


@pytest.mark.parametrize("read", [load_model, read_skeleton])
def test_a_model_is_not_asked_for_in_vain(
    read: Callable[[str], object],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Neither by what loads it nor by what reads its sizes: no line of a retry."""
    resolves(monkeypatch, works=False)
    with pytest.raises(UserError, match="not in the local cache"):
        read("nobody/no-such-model")
    (line,) = capfd.readouterr().err.splitlines()
    assert "looking in the local cache only" in line
