"""What `optim_args` and `lr_scheduler_kwargs` may hold: optimizers' and schedules' own options.

The names are torch's and transformers'; a name that is not here would be passed over in silence by
transformers' Trainer and is refused instead.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from fastpref.config_values import RANGES, ConfigError, Options


@dataclass(frozen=True)
class Option:
    """A value that an optimizer or schedule takes: its type, and its range or choices."""

    kind: type  # bool, int, float or str
    within: str = ""  # a key of RANGES
    choices: tuple[str, ...] = ()
    needed: bool = False


_FRACTION = Option(float, "fraction")
_CYCLES = Option(float, "positive")  # waves after the warm-up; 0.5 falls once
_MIN_LR = {"min_lr": Option(float, "at least 0"), "min_lr_rate": Option(float, "ratio")}

OPTIM_ARGS: dict[str, dict[str, Option]] = {
    "adamw_torch": {},
    "adamw_8bit": {},
    "paged_adamw_8bit": {},
    "sgd": {
        "momentum": _FRACTION,
        "dampening": Option(float, "ratio"),
        "nesterov": Option(bool),
    },
    "rmsprop": {
        "alpha": _FRACTION,
        "eps": Option(float, "positive"),
        "momentum": _FRACTION,
        "centered": Option(bool),
    },
    "adafactor": {
        "beta1": _FRACTION,
        "clip_threshold": Option(float, "positive"),
        "decay_rate": Option(float, "negative"),
    },
}
LR_SCHEDULER_KWARGS: dict[str, dict[str, Option]] = {
    "linear": {},
    "cosine": {"num_cycles": _CYCLES},
    "cosine_with_restarts": {"num_cycles": Option(int, "at least 1")},
    "polynomial": {"lr_end": Option(float, "at least 0"), "power": Option(float, "positive")},
    "constant": {},
    "constant_with_warmup": {},
    "inverse_sqrt": {"timescale": Option(int, "at least 1")},
    "cosine_with_min_lr": {"num_cycles": _CYCLES, **_MIN_LR},
    "cosine_warmup_with_min_lr": {
        "num_cycles": _CYCLES,
        **_MIN_LR,
        "warmup_lr_rate": Option(float, "ratio"),
    },
    "warmup_stable_decay": {
        "num_decay_steps": Option(int, "at least 1", needed=True),
        "num_stable_steps": Option(int, "at least 0"),
        "warmup_type": Option(str, choices=("linear", "cosine", "1-sqrt")),
        "decay_type": Option(str, choices=("linear", "cosine", "1-sqrt")),
        "min_lr_ratio": Option(float, "ratio"),
        "num_cycles": _CYCLES,
    },
}


def check_options(field: str, owner: str, given: Options, known: dict[str, Option]) -> None:
    """Raise ConfigError where ``given``, the value of ``field``, does not suit ``owner``."""
    for name, value in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            has = f"it has {', '.join(known)}" if known else "it has none"
            if "adamw" in owner:
                has += (
                    "; adam_beta1, adam_beta2, adam_epsilon and weight_decay stand for themselves"
                )
            raise ConfigError(field, f"{owner} has no option {name!r}; {hint}{has}")
        _check(field, name, value, known[name])
    for name, option in known.items():
        if option.needed and name not in dict(given):
            raise ConfigError(field, f"{owner} needs {name}, for example {name}=100")


def _check(field: str, name: str, value: bool | int | float | str, option: Option) -> None:
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    kinds = (int, float) if option.kind is float else (option.kind,)
    if isinstance(value, bool) != (option.kind is bool) or not isinstance(value, kinds):
        raise ConfigError(field, f"{name}: expected {words[option.kind]}, got {value!r}")
    if option.choices and value not in option.choices:
        raise ConfigError(field, f"{name}: expected {' or '.join(option.choices)}, got {value!r}")
    if option.within:
        text, holds = RANGES[option.within]
        if not holds(value):
            raise ConfigError(field, f"{name}: expected {text}, got {value!r}")
