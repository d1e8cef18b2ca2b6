"""Whose command line is this: `python -m sparsify …` ours or upstream's?

Ours are: `--cross_layer` with anything but 0, a model that sees images (an alias, or a config with
a vision part, from the folder, the Hub's cache or, if neither has it, the Hub), and the embedded
models. Standard library only, nothing printed, nothing written: where the answer is "upstream's",
upstream must behave to the byte as if this package were not installed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from importlib import metadata
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit
from urllib.request import Request, url2pathname, urlopen

from sparsify_vlm.aliases import EMBEDDED, HUB_ALIASES
from sparsify_vlm.argv import Kind, scan

UPSTREAM = "eai-sparsify"
STAND_IN = Path(__file__).with_name("_sparsify_main.py")
HUB_TIMEOUT = 5.0  # seconds

# What upstream's and our own training flags take; every other flag takes one value.
KINDS: dict[str, Kind] = {
    **dict.fromkeys(
        (
            *("h", "help", "debug", "transcode", "skip_connection", "normalize_decoder"),
            *("multi_topk", "post_encoder_scale", "train_post_encoder", "filter_bos"),
            *("bf16_moments", "bf16_selection", "topk_coalesced", "per_source_tied"),
            "stream_activations",
            *("secondary_target_tied", "normalize_io", "divide_cross_layer"),
            *("remove_first_token", "distribute_modules", "save_best", "resume", "overwrite"),
            *("log_to_wandb", "log_to_tensorboard", "log_to_trackio", "load_in_8bit"),
            "load_in_4bit",
            *("trust_remote_code", "skip_bad", "streaming"),
        ),
        "bool",
    ),
    **dict.fromkeys(("exclude_tokens", "init_seeds", "layers"), "ints"),
    "hookpoints": "list",
}

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_OFF = {"", "0", "false", "no", "off"}


def find_main(fullname: str, path: Sequence[str] | None, argv: Sequence[str]) -> ModuleSpec | None:
    """The spec of our stand-in for `sparsify.__main__`, or None where upstream's own is to run."""
    if not _is_the_command(argv[0]):
        return None
    upstream = PathFinder.find_spec(fullname, path)
    if upstream is None or upstream.origin is None or not _is_upstream(Path(upstream.origin)):
        return None
    return spec_from_file_location(fullname, STAND_IN) if is_wanted(argv[1:]) else None


def _is_the_command(program: str) -> bool:
    """Whether the process is `python -m sparsify` or the script `sparsify`, not a user's own
    program that imports from `sparsify.__main__`."""
    # `python -m` shows "-m" until the module is found; workers it spawns show the module's file.
    if program in ("-m", str(STAND_IN)):
        return True
    name = Path(program).name
    return re.sub(r"(-script\.pyw?|\.exe)$", "", name) == "sparsify" or (
        name == "__main__.py" and Path(program).parent.name == "sparsify"
    )


def _is_upstream(main_file: Path) -> bool:
    """Whether `main_file` is the installed `eai-sparsify`'s, and one without cross-layer coders."""
    if not _belongs_to_distribution(main_file.resolve()):
        return False
    sources = (main_file.with_name("config.py"), main_file)
    return not any("cross_layer" in source.read_text(encoding="utf-8") for source in sources)


def _belongs_to_distribution(file: Path) -> bool:
    try:
        distribution = metadata.distribution(UPSTREAM)
    except metadata.PackageNotFoundError:
        return False
    if Path(str(distribution.locate_file("sparsify/__main__.py"))).resolve() == file:
        return True
    editable = json.loads(distribution.read_text("direct_url.json") or "{}")
    if not editable.get("dir_info", {}).get("editable"):
        return False
    source = Path(url2pathname(unquote(urlsplit(editable["url"]).path))).resolve()
    return source in file.parents


def is_wanted(argv: Sequence[str]) -> bool:
    """Whether the arguments behind `python -m sparsify` ask for this package."""
    found = scan(argv, KINDS)
    if found.options.get("cross_layer", ["0"]) != ["0"]:
        return True  # a negative or unreadable one too: we can say what is wrong with it
    if found.positionals:
        return sees_images(found.positionals[0], found.value("revision"), found.value("hf_token"))
    # `--hookpoints a b llava` leaves no positional: the model went into the list.
    return any(_is_known(value) for value in found.options.get("hookpoints", []))


def _is_known(name: str) -> bool:
    return name in EMBEDDED or name in HUB_ALIASES or name in HUB_ALIASES.values()


def sees_images(name: str, revision: str | None = None, token: str | None = None) -> bool:
    """Whether the model `name` (alias, local folder or Hub id) is one of ours or has vision."""
    if _is_known(name):
        return True
    if Path(name).is_dir():
        return _has_vision(_read_json(Path(name) / "config.json"))
    if not _HUB_ID.fullmatch(name):
        return False
    revision = revision or "main"
    config = _cached_config(name, revision)
    return _has_vision(_hub_config(name, revision, token) if config is None else config)


def _has_vision(config: Any) -> bool:
    """Whether a config, or one of the configs nested in it, has a `vision_config`."""
    if not isinstance(config, dict):
        return False
    return "vision_config" in config or any(_has_vision(part) for part in config.values())


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _hub_home() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get("HF_HOME", f"{cache}/huggingface")).expanduser()


def _cached_config(name: str, revision: str) -> Any:
    """config.json of `name` from the Hub's cache; None if it is not there."""
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    folder = Path(cache).expanduser() if cache else _hub_home() / "hub"
    folder = folder / f"models--{name.replace('/', '--')}"
    try:
        commit = (folder / "refs" / revision).read_text(encoding="utf-8").strip()
    except OSError:
        commit = revision
    return _read_json(folder / "snapshots" / commit / "config.json")


def _hub_config(name: str, revision: str, token: str | None) -> Any:
    """config.json of `name` from the Hub; None when offline, missing or not permitted."""
    offline = (os.environ.get(key, "") for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    if any(value.lower() not in _OFF for value in offline):
        return None
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    request = Request(f"{endpoint}/{name}/resolve/{quote(revision, safe='')}/config.json")
    if token := token or _stored_token():
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        with urlopen(request, timeout=HUB_TIMEOUT) as answer:
            return json.loads(answer.read())
    except (OSError, ValueError):
        return None


def _stored_token() -> str | None:
    if token := os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN"):
        return token.strip()
    file = Path(os.environ.get("HF_TOKEN_PATH", _hub_home() / "token")).expanduser()
    try:
        return file.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None
