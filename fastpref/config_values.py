"""Configuration values: text or YAML -> typed, checked values, or an error that names the key.

`fastpref.config` holds the fields themselves, `fastpref.config_rules` what must hold between them.
"""

from __future__ import annotations

import dataclasses
import math
import os
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from fastpref.config_names import LATER

RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "positive": ("more than 0", lambda v: v > 0),
    "at least 1": ("1 or more", lambda v: v >= 1),
    "at least 0": ("0 or more", lambda v: v >= 0),
    "fraction": ("0 <= value < 1", lambda v: 0 <= v < 1),
    "mixup": ("0 < value <= 1", lambda v: 0 < v <= 1),
    "ratio": ("0 <= value <= 1", lambda v: 0 <= v <= 1),
    "smoothing": ("0 <= value < 0.5 (at 0.5 there is nothing to learn)", lambda v: 0 <= v < 0.5),
    "steps": ("-1 (let num_train_epochs decide) or 1 or more", lambda v: v == -1 or v >= 1),
    "length": ("2 or more (one prompt and one completion token)", lambda v: v >= 2),
    "seed": ("0 <= value < 2**63", lambda v: 0 <= v < 2**63),
}


class ConfigError(ValueError):
    """A wrong value; `field` names the key it belongs to."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


def read_yaml(path: Path) -> list[tuple[str, int, Any]]:
    """(key, line, value) of every entry of a flat YAML mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot read the configuration: {error}") from None
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return []
            if not isinstance(node, yaml.MappingNode):
                raise ValueError(
                    f"expected lines `key: value`, got a {type(node).__name__[:-4].lower()}"
                )
            return [
                (str(key.value), key.start_mark.line + 1, loader.construct_object(value, deep=True))
                for key, value in node.value
            ]
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError) as error:  # ValueError: dates and numbers that are none
        raise ValueError(f"{path}: not valid YAML of flat keys: {error}") from None


def parse_value(name: str, kind: Any, value: Any) -> Any:
    """`value`, typed or as text, as `kind`, the type of field `name`."""
    if types.NoneType in typing.get_args(kind):
        if value is None:
            return None
        kind = next(arg for arg in typing.get_args(kind) if arg is not types.NoneType)
    parsers: dict[Any, Callable[[str, Any], Any]] = {
        bool: _parse_bool, int: _parse_int, float: _parse_float, str: _parse_str
    }  # fmt: skip
    if typing.get_origin(kind) is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(parsers[typing.get_args(kind)[0]](name, item) for item in items)
    return parsers[kind](name, value)


def _parse_bool(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise ConfigError(name, f"expected true or false, got {value!r}")


def _parse_int(name: str, value: Any) -> int:
    try:
        if isinstance(value, int | str) and not isinstance(value, bool):
            return int(value)
    except ValueError:
        pass
    raise ConfigError(name, f"expected a whole number, got {value!r}")


def _parse_float(name: str, value: Any) -> float:
    # YAML 1.1 reads 1e-6 (no dot) as text, so text is accepted from files as well.
    try:
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            number = float(value)
            if math.isfinite(number):
                return number
    except (ValueError, OverflowError):
        pass
    raise ConfigError(name, f"expected a finite number, got {value!r}")


def _parse_str(name: str, value: Any) -> str:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, bool) and name in ("append_eos", "init_lora_weights"):
        return str(value).lower()
    if isinstance(value, bool) and name == "resume_from_checkpoint":
        raise ConfigError(name, f"set {'auto' if value else 'none'} or a folder, got {value}")
    if isinstance(value, list | tuple):
        raise ConfigError(name, f"expected one value, got a list of {len(value)}: {value!r}")
    if not isinstance(value, str):
        raise ConfigError(name, f"expected text, got {value!r}; put it in quotes if it is meant")
    if not value:
        raise ConfigError(name, "expected text, got an empty string")
    return value


def check_value(spec: dataclasses.Field[Any], value: Any) -> None:
    choices, within = spec.metadata["choices"], spec.metadata["within"]
    if choices and value not in choices:
        later = LATER.get((spec.name, value), "")
        raise ConfigError(spec.name, f"expected {' or '.join(choices)}, got {value!r}{later}")
    if within and value is not None:
        text, holds = RANGES[within]
        if not holds(value):
            raise ConfigError(spec.name, f"expected {text}, got {value!r}")
