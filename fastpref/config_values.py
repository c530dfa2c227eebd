"""Configuration values: text or YAML -> typed, checked values, or an error that names the key.

`fastpref.config` holds the fields themselves, `fastpref.config_rules` what must hold between them.
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import json
import math
import os
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from fastpref.config_names import ALIASES, LATER

# Named values that go on to an optimizer or a schedule, sorted by name.
Options = tuple[tuple[str, bool | int | float | str], ...]
NAME_NUMBER = ("lora_rank_pattern", "lora_alpha_pattern")  # lists that may stand as a mapping
DATA = (".jsonl", ".csv", ".parquet", ".arrow")  # endings that no configuration has

RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "positive": ("more than 0", lambda v: v > 0),
    "negative": ("less than 0", lambda v: v < 0),
    "more than 1": ("more than 1", lambda v: v > 1),
    "at least 1": ("1 or more", lambda v: v >= 1),
    "at least 0": ("0 or more", lambda v: v >= 0),
    "fraction": ("0 <= value < 1", lambda v: 0 <= v < 1),
    "mixup": ("0 < value <= 1", lambda v: 0 < v <= 1),
    "ratio": ("0 <= value <= 1", lambda v: 0 <= v <= 1),
    "smoothing": ("0 <= value < 0.5 (at 0.5 there is nothing to learn)", lambda v: 0 <= v < 0.5),
    "steps": ("-1 (let num_train_epochs decide) or 1 or more", lambda v: v == -1 or v >= 1),
    "warmup": (
        "a whole number of steps, or a part of all steps below 1",
        lambda v: 0 <= v < 1 or v == int(v) >= 1,
    ),
    "length": ("2 or more (one prompt and one completion token)", lambda v: v >= 2),
    "seed": ("0 <= value < 2**63", lambda v: 0 <= v < 2**63),
    "date": ("a day as YYYY-MM-DD", lambda v: _is_date(v)),
}


def _is_date(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


class ConfigError(ValueError):
    """A wrong value; `field` names the key it belongs to."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


def option(
    default: Any, group: str, text: str, choices: tuple[str, ...] = (), within: str = ""
) -> Any:
    """A field of the configuration: its ``group`` and help ``text``; what it may be, as a list of
    ``choices`` or as a name of RANGES."""
    metadata = {"group": group, "help": text, "choices": choices, "within": within}
    return dataclasses.field(default=default, metadata=metadata)


def read_yaml(path: Path) -> list[tuple[str, int, Any]]:
    """(key, line, value) of every entry of a flat YAML mapping."""
    if path.is_dir() or path.name.removesuffix(".gz").removesuffix(".zst").endswith(DATA):
        raise ValueError(
            f"{path} is a {'folder' if path.is_dir() else 'file of data'}, not a configuration; "
            f"to train on it: --dataset_name {path}"
        )
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
        try:
            return parse_value(name, kind, value)
        except ConfigError as error:
            raise ConfigError(name, error.reason.replace(", got", " or null, got", 1)) from None
    if kind == Options:
        return _parse_options(name, value)
    parsers: dict[Any, Callable[[str, Any], Any]] = {
        bool: _parse_bool, int: _parse_int, float: _parse_float, str: _parse_str
    }  # fmt: skip
    if typing.get_origin(kind) is tuple:
        items = value if isinstance(value, list | tuple) else [] if value is None else [value]
        if isinstance(value, dict) and name in NAME_NUMBER:
            items = [f"{key}={number}" for key, number in value.items()]
        parsed = tuple(parsers[typing.get_args(kind)[0]](name, item) for item in items)
    else:
        parsed = parsers[kind](name, value)
    return ALIASES.get((name, parsed), parsed)


def _parse_options(name: str, value: Any) -> Options:
    """From a mapping, pairs, JSON text, or `key=value` text (several: comma or list)."""
    found: dict[str, bool | int | float | str] = {}
    for key, item in _option_items(name, value):
        if not isinstance(key, str) or not key:
            raise ConfigError(name, f"expected names of options, got {key!r}")
        if key in found:
            raise ConfigError(name, f"{key} stands twice")
        found[key] = _scalar(name, key, item)
    return tuple(sorted(found.items()))


def _option_items(name: str, value: Any) -> Iterator[tuple[Any, Any]]:
    if value is None:
        return
    if isinstance(value, dict):
        yield from value.items()
        return
    for item in value if isinstance(value, list | tuple) else [value]:
        if isinstance(item, list | tuple) and len(item) == 2:
            yield item[0], item[1]
        elif isinstance(item, str) and item.lstrip().startswith("{"):
            try:
                yield from json.loads(item).items()
            except ValueError as error:
                raise ConfigError(name, f"not valid JSON: {error}, got {item!r}") from None
        elif isinstance(item, str):
            for part in filter(None, (word.strip() for word in item.split(","))):
                key, equals, text = (word.strip() for word in part.partition("="))
                if not equals:
                    raise ConfigError(name, f"expected key=value,key=value or JSON, got {part!r}")
                yield key, text
        else:
            raise ConfigError(name, f"expected key=value,key=value or a mapping, got {item!r}")


def _scalar(name: str, key: str, value: Any) -> bool | int | float | str:
    if isinstance(value, str):
        if value.lower() in ("true", "false"):
            return value.lower() == "true"
        for kind in (int, float):
            try:
                value = kind(value)
                break
            except ValueError:
                continue
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(name, f"{key}: expected a finite number, got {value!r}")
    if not isinstance(value, bool | int | float | str) or value == "":
        raise ConfigError(name, f"{key}: expected a number, true, false or text, got {value!r}")
    return value


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
    if name == "resume_from_checkpoint" and str(value).lower() in ("true", "false"):
        word = "auto" if str(value).lower() == "true" else "none"
        raise ConfigError(name, f"set {word} or a folder, got {value}")
    if isinstance(value, datetime.date) and name == "template_date":
        return value.isoformat()  # YAML reads a day without quotes as a date
    if isinstance(value, list | tuple):
        raise ConfigError(name, f"expected one value, got a list of {len(value)}: {value!r}")
    if not isinstance(value, str):
        raise ConfigError(name, f"expected text, got {value!r}; put it in quotes if text is meant")
    if not value:
        raise ConfigError(name, "expected text, got an empty string")
    return value


def check_value(spec: dataclasses.Field[Any], value: Any) -> None:
    choices, within = spec.metadata["choices"], spec.metadata["within"]
    if choices and value not in choices:
        near = difflib.get_close_matches(value.lower(), choices, n=1, cutoff=0.5)
        later = LATER.get((spec.name, value)) or (f"; did you mean {near[0]}?" if near else "")
        listed = " or ".join(choices) if len(choices) < 5 else f"one of {', '.join(choices)}"
        raise ConfigError(spec.name, f"expected {listed}, got {value!r}{later}")
    if within and value is not None:
        text, holds = RANGES[within]
        for item in value if isinstance(value, tuple) else (value,):
            if not holds(item):
                raise ConfigError(spec.name, f"expected {text}, got {item!r}")
