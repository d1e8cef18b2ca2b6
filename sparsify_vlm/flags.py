"""From dataclasses to a command line, with simple-parsing as upstream does.

A command is described by config dataclasses whose fields, nested ones included, become flags, and
by the names of the fields that may be given without a flag, in order. simple-parsing makes types,
defaults and help of them; this module puts every way in which people write a command line (dashes,
`--flag=value`, positionals anywhere, a config file) into the one form that it understands, and says
in one line what cannot be read.
"""

from __future__ import annotations

import re
from argparse import SUPPRESS, Action
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from difflib import get_close_matches
from io import StringIO
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml
from simple_parsing import ArgumentParser, SimpleHelpFormatter

from sparsify_vlm.aliases import EMBEDDED, HUB_ALIASES
from sparsify_vlm.argv import Kind, Scan, scan
from sparsify_vlm.errors import UserError

GLOBAL_KINDS: dict[str, Kind] = {"h": "bool", "help": "bool", "debug": "bool", "config": "one"}


class UsageError(UserError):
    """A command line that cannot be read. The command line's exit status is 2."""


class HelpRequested(Exception):
    """`--help` was given; `text` is what to print."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


@dataclass(frozen=True)
class Flag:
    """One field of a config as the command line sees it."""

    kind: Kind
    required: bool


class _HelpFormatter(SimpleHelpFormatter):
    """Groups headed by the config's subject, not by its place in the namespace."""

    def start_section(self, heading: str | None) -> None:
        super().start_section((heading or "").split(" [", 1)[0].removesuffix("Config"))

    def _get_help_string(self, action: Action) -> str | None:
        tells_something = action.default not in (None, "", []) and action.option_strings
        text = super()._get_help_string(action) if tells_something else action.help
        # argparse reads "%" as the start of a format; docstrings write train[:10%].
        return None if text is None else re.sub(r"%(?!\()", "%%", text)


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(re.sub(r"^argument (-\w[^-]*, )?", "", message))


def flags_of(configs: Mapping[str, type]) -> dict[str, Flag]:
    """Every flag of the dataclasses `configs`, by its name with underscores.

    Raises `TypeError` if two of them have a flag of the same name.
    """
    found: dict[str, Flag] = {}
    for config in configs.values():
        for name, flag in _flags_of_one(config).items():
            if name in found:
                raise TypeError(f"two configs of one command have a field {name!r}")
            found[name] = flag
    return found


def _flags_of_one(config: type) -> dict[str, Flag]:
    found: dict[str, Flag] = {}
    hints = get_type_hints(config)
    for field in fields(config):
        hint = hints[field.name]
        if not field.init or field.metadata.get("cmd", True) is False:
            continue
        if isinstance(hint, type) and is_dataclass(hint):
            found |= _flags_of_one(hint)
            continue
        required = field.default is MISSING and field.default_factory is MISSING
        found[field.name] = Flag(_kind_of(hint), required)
    return found


def _kind_of(hint: Any) -> Kind:
    if get_origin(hint) in (Union, UnionType):
        hint = next(part for part in get_args(hint) if part is not type(None))
    if hint is bool:
        return "bool"
    if get_origin(hint) in (list, tuple):
        return "ints" if int in get_args(hint) else "list"
    return "one"


def parse(
    configs: Mapping[str, type],
    positionals: Sequence[str],
    argv: Sequence[str],
    program: str,
    substitutes: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Instances of the dataclasses `configs`, by the same names, as `argv` asks.

    `positionals` names the fields that may be given without a flag, in order. A field in
    `substitutes` must be given, unless the field it maps to is. Raises `UsageError` for a command
    line or config file that cannot be read, `HelpRequested` for `--help`, and lets the configs'
    own `UserError`s through.
    """
    substitutes = substitutes or {}
    flags = flags_of(configs)
    flags |= {name: Flag(flags[name].kind, required=True) for name in substitutes}
    kinds = {name: flag.kind for name, flag in flags.items()} | GLOBAL_KINDS
    found = scan(argv, kinds)
    parser = _build(configs, positionals, flags, program)
    if "help" in found.options or "h" in found.options:
        raise HelpRequested(_help_text(parser))
    _refuse_unknown(found.options, kinds)
    options = _read_config(found.value("config"), flags) if "config" in found.options else {}
    options |= {name: values for name, values in found.options.items() if name in flags}
    options |= _name_positionals(found, positionals)
    filled = {name for name, other in substitutes.items() if other in options}
    flags |= {name: Flag(flags[name].kind, required=False) for name in filled}
    _refuse_swallowed(found, options, flags, positionals)
    _refuse_missing(options, flags, positionals, substitutes)
    try:
        parsed = parser.parse_args(_canonical(options, flags))
    except ValueError as error:  # what configs raise for fields that do not go together
        raise UserError(str(error)) from error
    return {name: getattr(parsed, name) for name in configs}


def _build(
    configs: Mapping[str, type],
    positionals: Sequence[str],
    flags: Mapping[str, Flag],
    program: str,
) -> _Parser:
    usage = [program]
    for name in positionals:
        usage.append(name.upper() if flags[name].required else f"[{name.upper()}]")
    parser = _Parser(
        prog=program,
        usage=" ".join([*usage, "[options]"]),
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file of flags; flags typed here come before it"
    )
    parser.add_argument(
        "--debug", action="store_true", default=SUPPRESS, help="show tracebacks of errors"
    )
    for name, config in configs.items():
        parser.add_arguments(config, name)
    return parser


def _help_text(parser: _Parser) -> str:
    text = StringIO()
    parser.print_help(text)  # `format_help` alone knows nothing of the dataclasses
    return text.getvalue()


def _refuse_unknown(names: Mapping[str, object], known: Mapping[str, object]) -> None:
    for name in names:
        if name not in known:
            raise UsageError(f"unknown flag --{name}{_nearest(name, known)}")


def _nearest(name: str, known: Mapping[str, object]) -> str:
    starting = [other for other in known if other.startswith(name)]
    near = starting if len(starting) == 1 else get_close_matches(name, known, n=1)
    return f"; did you mean --{near[0]}?" if near else "; --help lists the flags"


def _read_config(file: str | None, flags: Mapping[str, Flag]) -> dict[str, list[str]]:
    if file is None:
        raise UsageError("--config needs the name of a YAML file")
    try:
        values = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--config {file} cannot be read: {_one_line(error)}") from error
    if not isinstance(values, dict):
        raise UsageError(f"--config {file} must hold lines like `cross_layer: 8`")
    options: dict[str, list[str]] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in flags:
            raise UsageError(f"--config {file}: unknown key {key!r}{_nearest(name, flags)}")
        if isinstance(value, dict) or (isinstance(value, list) and flags[name].kind == "one"):
            raise UsageError(f"--config {file}: {key} must be a single value")
        if value is not None:
            options[name] = [str(v) for v in (value if isinstance(value, list) else [value])]
    return options


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())


def _name_positionals(found: Scan, positionals: Sequence[str]) -> dict[str, list[str]]:
    """The positional tokens by the names of the fields they are for."""
    if len(found.positionals) > len(positionals):
        surplus = " ".join(found.positionals[len(positionals) :])
        expected = " ".join(name.upper() for name in positionals) or "only flags"
        raise UsageError(f"unexpected argument {surplus!r}; expected {expected}")
    named = {name: [value] for name, value in zip(positionals, found.positionals, strict=False)}
    for name in named:
        if name in found.options:
            raise UsageError(f"{name.upper()} is given twice: {named[name][0]!r} and --{name}")
    return named


def _refuse_swallowed(
    found: Scan,
    options: Mapping[str, list[str]],
    flags: Mapping[str, Flag],
    positionals: Sequence[str],
) -> None:
    """Notice that `--hookpoints a b llava data` took all four words as hookpoints."""
    missing = [name for name in positionals if name not in options]
    needed = any(flags[name].required for name in missing)
    for name, values in found.options.items():
        if not missing or not values or flags.get(name, Flag("one", False)).kind != "list":
            continue
        lost = [value for value in values if value in HUB_ALIASES or value in EMBEDDED]
        if name == "hookpoints":  # a hookpoint's name has no slash; ids and paths have
            lost += [value for value in values if "/" in value]
        if lost or needed:
            raise UsageError(
                f"--{name} took {' '.join(lost or values)!r} for its values: put "
                f"{' and '.join(other.upper() for other in missing)} before the flags, "
                f"as in `{missing[0].upper()} … --{name} a b`"
            )


def _refuse_missing(
    options: Mapping[str, list[str]],
    flags: Mapping[str, Flag],
    positionals: Sequence[str],
    substitutes: Mapping[str, str],
) -> None:
    for name, flag in flags.items():
        if flag.required and name not in options:
            shown = name.upper() if name in positionals else f"--{name}"
            shown += f" (or --{substitutes[name]})" if name in substitutes else ""
            raise UsageError(f"{shown} is missing; --help shows what the command takes")
    for name in positionals:
        if options.get(name) == [""]:
            raise UsageError(f"{name.upper()} is empty: an unset variable, perhaps?")
    for name, values in options.items():
        if flags[name].kind == "one" and not values:
            raise UsageError(f"--{name} needs a value")


def _canonical(options: Mapping[str, list[str]], flags: Mapping[str, Flag]) -> list[str]:
    """The one spelling of `options` that simple-parsing always reads as meant."""
    tokens: list[str] = []
    for name, values in options.items():
        if flags[name].kind in ("list", "ints"):
            tokens += [f"--{name}", *values]
        else:
            tokens.append(f"--{name}={values[0] if values else 'true'}")
    return tokens
