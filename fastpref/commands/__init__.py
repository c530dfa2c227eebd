"""One module per command. What the commands share: the fields of `Config` as options."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from fastpref.config import GROUPS, Config, field_types, load_config
from fastpref.config_values import Options


def show_log() -> None:
    """What fastpref logs, on stderr; other libraries' messages only from warnings up."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for name in ("fastpref", "fastpref_kernels"):
        logging.getLogger(name).setLevel(logging.INFO)


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """An optional YAML file, and every field of `Config` as `--field value`, grouped, with help."""
    parser.usage = "%(prog)s [CONFIG.yaml] [--field VALUE ...]"
    parser.epilog = (
        "In [brackets]: the default. docs/config.md has the same list and answers to names of\n"
        "TRL and transformers; docs/training.md explains the settings."
    )
    parser.add_argument(
        "config", nargs="?", metavar="CONFIG.yaml", help="flat `key: value` lines; options win"
    )
    groups = {name: parser.add_argument_group(f"{name} ({text})") for name, text in GROUPS.items()}
    for spec in dataclasses.fields(Config):
        _add_field(groups[spec.metadata["group"]], spec, spec.default)


def add_field_options(
    parser: argparse.ArgumentParser, names: Sequence[str], defaults: Mapping[str, Any]
) -> None:
    """The fields `names` of `Config` as `--field value`, shown with `defaults` where these differ.

    A field that is not given is not in what the parser returns.
    """
    fields = {spec.name: spec for spec in dataclasses.fields(Config)}
    for name in names:
        _add_field(parser, fields[name], defaults.get(name, fields[name].default))


def _add_field(parser: Any, spec: dataclasses.Field[Any], default: Any) -> None:
    kind = field_types()[spec.name]
    text, choices = spec.metadata["help"], spec.metadata["choices"]
    extra: dict[str, Any] = {"metavar": _metavar(kind)}
    if kind in (bool, bool | None):
        extra |= {"nargs": "?", "const": "true"}
    elif typing.get_origin(kind) is tuple:
        extra |= {"nargs": "*"}
    elif 0 < len(choices) <= SHORT:
        extra = {"metavar": "|".join(choices)}
    elif choices:
        text = f"{text} One of {', '.join(choices)}."
    parser.add_argument(
        f"--{spec.name}",
        default=argparse.SUPPRESS,
        help=f"{text} [{_shown(default)}]".replace("%", "%%"),
        **extra,
    )


SHORT = 4  # choices that are named in place of a value; more are named in the help text


def _metavar(kind: Any) -> str:
    plain = {bool: "true|false", int: "N", float: "X", str: "TEXT", tuple[str, ...]: "TEXT"}
    plain |= {Options: "KEY=VALUE"}
    own = next((arg for arg in typing.get_args(kind) if arg in (bool, int, float, str)), kind)
    return plain.get(kind) or plain[own]


def _shown(default: Any) -> str:
    if default is None or default == ():
        return "null" if default is None else "empty"
    return str(default).lower() if isinstance(default, bool) else str(default)


def config_from_options(options: argparse.Namespace) -> Config:
    """The `Config` of the file and options that `add_config_options` parsed, or ValueError."""
    names = {spec.name for spec in dataclasses.fields(Config)}
    given = {name: value for name, value in vars(options).items() if name in names}
    return load_config(options.config, given)
