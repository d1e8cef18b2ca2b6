"""Not waiting for a Hub that cannot be reached."""

from __future__ import annotations

import os
import socket
import sys
import urllib.request
from functools import cache
from urllib.parse import urlsplit


@cache
def offline_if_unreachable() -> None:
    """Where the Hub's host has no address, work from the local cache from here on.

    huggingface_hub would otherwise retry each file for half a minute before it says so. Asked once
    per process; nothing is changed where a proxy is set, which resolves names itself.
    """
    from huggingface_hub import constants

    url = urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE or urllib.request.getproxies() or url.hostname is None:
        return
    try:
        socket.getaddrinfo(url.hostname, url.port or 443)
    except OSError:
        print(f"{url.hostname} cannot be reached: looking in the local cache only", file=sys.stderr)
        os.environ["HF_HUB_OFFLINE"] = "1"  # for what is imported later, and for child processes
        constants.HF_HUB_OFFLINE = True
        if "datasets" in sys.modules:
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True
