"""One module per command. What the commands share: the fields of `Config` as options."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import typing
from typing import Any

from fastpref.config import GROUPS, Config, field_types, load_config


def show_log() -> None:
    """What fastpref logs, on stderr; other libraries' messages only from warnings up."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for name in ("fastpref", "fastpref_kernels"):
        logging.getLogger(name).setLevel(logging.INFO)


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """An optional YAML file, and every field of `Config` as `--field value`, grouped, with help."""
    parser.usage = "%(prog)s [CONFIG.yaml] [--field VALUE ...]"
    parser.add_argument(
        "config", nargs="?", metavar="CONFIG.yaml", help="flat `key: value` lines; options win"
    )
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    for spec in dataclasses.fields(Config):
        kind = field_types()[spec.name]
        extra: dict[str, Any] = {"metavar": "VALUE"}
        if kind is bool:
            extra = {"metavar": "true|false", "nargs": "?", "const": "true"}
        elif typing.get_origin(kind) is tuple:
            extra = {"metavar": "VALUE", "nargs": "*"}
        elif spec.metadata["choices"]:
            extra = {"metavar": "|".join(spec.metadata["choices"])}
        shown = spec.default if spec.default not in ((), None) else "none given"
        groups[spec.metadata["group"]].add_argument(
            f"--{spec.name}",
            default=argparse.SUPPRESS,
            help=f"{spec.metadata['help']} [{shown}]".replace("%", "%%"),
            **extra,
        )


def config_from_options(options: argparse.Namespace) -> Config:
    """The `Config` of the file and options that `add_config_options` parsed, or ValueError."""
    names = {spec.name for spec in dataclasses.fields(Config)}
    given = {name: value for name, value in vars(options).items() if name in names}
    return load_config(options.config, given)
