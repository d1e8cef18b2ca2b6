"""Reading a command line before any parser: which tokens are flags, values and positionals.

Standard library only, because it runs before it is known whose command line this is. A flag's kind
says what it takes: a boolean takes the next token only if that is a boolean word, a list takes
tokens up to the next flag, a list of integers only while they are integers, any other flag takes
one token. Dashes and underscores in a flag's name are the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Literal

Kind = Literal["bool", "list", "ints", "one"]

# What simple-parsing's `str2bool` accepts.
BOOLEAN_WORDS = frozenset({"yes", "true", "t", "y", "1", "no", "false", "f", "n", "0"})

_NUMBER = re.compile(r"-\d+(\.\d*)?(e[+-]?\d+)?|-\.\d+", re.IGNORECASE)
_INTEGER = re.compile(r"[+-]?\d+")


@dataclass
class Scan:
    """`positionals` in order; `options` maps a flag's name (underscores) to its last values."""

    positionals: list[str] = field(default_factory=list)
    options: dict[str, list[str]] = field(default_factory=dict)

    def value(self, name: str) -> str | None:
        """The first value given to the flag `name`; None without the flag or a value."""
        values = self.options.get(name)
        return values[0] if values else None


def is_flag(token: str) -> bool:
    """Whether `token` is written as a flag: it starts with a dash and is no negative number."""
    return token.startswith("-") and token != "-" and not _NUMBER.fullmatch(token)


def flag_name(token: str) -> str:
    """`--cross-layer=4` and `--cross_layer` -> `cross_layer`."""
    return token.split("=", 1)[0].lstrip("-").replace("-", "_")


def scan(argv: Sequence[str], kinds: Mapping[str, Kind]) -> Scan:
    """Sort `argv` (without the program's name) into positionals and options.

    Flags that `kinds` does not know are taken to have one value. A boolean's negation
    (`--noresume`, `--no_resume`) is reported as the boolean with the value `false`.
    """
    found = Scan()
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        if token == "--":
            found.positionals += rest
            break
        if not is_flag(token):
            found.positionals.append(token)
            continue
        name, equals, value = flag_name(token), "=" in token, token.partition("=")[2]
        if name not in kinds and (negated := _negated(name, kinds)):
            found.options[negated] = ["false"]
        else:
            taken = [value] if equals else _take(rest, kinds.get(name, "one"))
            found.options[name] = taken
    return found


def _negated(name: str, kinds: Mapping[str, Kind]) -> str | None:
    """The boolean flag that `name` (`noresume`, `no_resume`) negates, if it does."""
    if not name.startswith("no"):
        return None
    positive = name[2:].lstrip("_")
    return positive if kinds.get(positive) == "bool" else None


def _take(rest: list[str], kind: Kind) -> list[str]:
    """Remove from the front of `rest` the values of a flag of this kind."""
    belongs: dict[Kind, Callable[[str], object]] = {
        "bool": lambda token: token.lower() in BOOLEAN_WORDS,
        "ints": _INTEGER.fullmatch,
    }
    values = list(takewhile(belongs.get(kind, lambda token: not is_flag(token)), rest))
    if kind in ("bool", "one"):
        values = values[:1]
    del rest[: len(values)]
    return values
