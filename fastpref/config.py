"""One flat, frozen `Config` per run, read from YAML and `--field value`.

Names equal TRL's and transformers' where the concept is the same. A name of theirs that means
something else here, or that this version has not, is refused with a message that says what to set.
Every `Config` that exists is valid: types, choices, ranges and combinations are checked when it is
built, however it is built. The file this module writes (`to_yaml`) reads back to the same `Config`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fastpref.config_course import DEFAULT_TOKENS, CourseOptions
from fastpref.config_loss import resolve_losses
from fastpref.config_names import ELSEWHERE, ELSEWHERE_PREFIXES
from fastpref.config_rules import check_combinations
from fastpref.config_values import ConfigError, Options, check_value, parse_value, read_yaml

GROUPS = {
    "model": "what is trained, and in which precision",
    "lora": "which adapters learn, where trainable is lora",
    "data": "which pairs, and how they become tokens",
    "run": "where it is written, and how it goes on",
    "loss": "what is minimised",
    "optimizer": "how the weights move",
    "batch": "how many pairs make a step, and how many steps a run",
    "intervals": "how often something is written, evaluated, saved",
    "best": "which evaluation counts, when to stop early, which weights are the final ones",
    "loggers": "services that show the metrics; files are written in any case",
    "dynamics": "what is recorded about every pair and behavior",
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Config(CourseOptions):
    """Everything that decides a training run, valid since it exists.

    The fields stand in `config_input` and `config_course`; docs/config.md is made from them.
    """

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            value = parse_value(spec.name, field_types()[spec.name], getattr(self, spec.name))
            object.__setattr__(self, spec.name, value)
            check_value(spec, value)
        names = resolve_losses(self.loss_type, self.label_smoothing)
        object.__setattr__(self, "loss_type", names)
        check_combinations(self)

    @property
    def best_metric(self) -> str | None:
        """The metric by which evaluations are compared, None where nothing asks for that."""
        asked = self.load_best_model_at_end or self.early_stopping_patience is not None
        return self.metric_for_best_model or ("loss" if asked else None)

    @property
    def part_steps(self) -> int:
        """Steps per part of records/. It equals `save_steps`, so that every checkpoint stands at
        the end of a part and a resumed run rewrites whole parts only."""
        return self.save_steps

    def to_yaml(self) -> str:
        """The whole configuration as YAML; `load_config` of this text gives an equal `Config`."""
        lines: list[str] = []
        group = ""
        for spec in dataclasses.fields(self):
            if spec.metadata["group"] != group:
                group = spec.metadata["group"]
                lines.append(f"# {group}\n")
            value = getattr(self, spec.name)
            if field_types()[spec.name] == Options:
                value = dict(value)
            value = list(value) if isinstance(value, tuple) else value
            lines.append(yaml.safe_dump({spec.name: value}, allow_unicode=True, width=10**6))
        return "".join(lines)


def unplanned(config: Config) -> Config:
    """``config`` with its defaults in the place of what is left to the planner (`auto`, 0), which
    training alone asks: what the other commands go by."""
    left = config.gradient_checkpointing == "auto"
    return dataclasses.replace(
        config,
        gradient_checkpointing="none" if left else config.gradient_checkpointing,
        max_tokens_per_microbatch=config.max_tokens_per_microbatch or DEFAULT_TOKENS,
    )


def field_names() -> tuple[str, ...]:
    """Names of all fields of `Config`, in order."""
    return tuple(spec.name for spec in dataclasses.fields(Config))


@functools.cache
def field_types() -> dict[str, Any]:
    """Name -> resolved type: str, int, float, bool, one of them or None, a tuple of str or float,
    or Options."""
    return typing.get_type_hints(Config)


def explain_unknown(name: str) -> str:
    """What to say about a key that is no field: its replacement here, or the nearest name."""
    reason = ELSEWHERE.get(name)
    for prefix, text in ELSEWHERE_PREFIXES.items():
        reason = reason or (text if name.startswith(prefix) else None)
    if reason:
        return reason
    near = difflib.get_close_matches(name.replace("-", "_"), field_names(), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else "see docs/config.md for the list"
    return f"unknown name; {hint}"


def load_config(
    path: str | os.PathLike[str] | None = None, overrides: Mapping[str, Any] | None = None
) -> Config:
    """Read a YAML file of flat keys (or none) and lay `overrides` over it.

    Override values are text as typed on a command line, lists of text, or typed values; `null`
    unsets an optional field and empties a list. Raises ValueError naming file, line, key, what was
    expected and what came.
    """
    values: dict[str, Any] = {}
    where: dict[str, str] = {}
    if path is not None:
        for name, line, value in read_yaml(Path(path)):
            if name not in field_names():
                flat = "; names stand at the left margin, without groups"
                reason = explain_unknown(name) + (flat if isinstance(value, dict) else "")
                raise ValueError(f"{path}:{line}: {name}: {reason}")
            if name in values:
                raise ValueError(f"{path}:{line}: {name} stands twice, first at {where[name]}")
            values[name], where[name] = value, f"{path}:{line}: {name}"
    for name, value in (overrides or {}).items():
        if name not in field_names():
            raise ValueError(f"--{name}: {explain_unknown(name)}")
        kind = field_types()[name]
        optional = types.NoneType in typing.get_args(kind) or typing.get_origin(kind) is tuple
        values[name] = None if optional and value in ("null", ["null"]) else value
        where[name] = f"--{name}"
    try:
        return Config(**values)
    except ConfigError as error:
        place = where.get(error.field, error.field)
        raise ValueError(f"{place}: {error.reason}") from None
