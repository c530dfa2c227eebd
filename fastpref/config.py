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
import math
import os
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

import yaml

from fastpref.config_names import ELSEWHERE, ELSEWHERE_PREFIXES, LATER

GROUPS = ("model", "data", "run", "loss", "optimizer", "batch", "intervals", "dynamics")

RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "positive": ("more than 0", lambda v: v > 0),
    "at least 1": ("1 or more", lambda v: v >= 1),
    "at least 0": ("0 or more", lambda v: v >= 0),
    "fraction": ("0 <= value < 1", lambda v: 0 <= v < 1),
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


def _field(
    default: Any, group: str, text: str, choices: tuple[str, ...] = (), within: str = ""
) -> Any:
    metadata = {"group": group, "help": text, "choices": choices, "within": within}
    return field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Everything that decides a training run. `docs/config.md` is made from these lines."""

    model_name_or_path: str = _field(
        "fastpref-tiny",
        "model",
        "Folder or Hub name of a causal LM; fastpref-tiny is a 5M Llama built once and cached.",
    )
    dtype: str = _field(
        "auto",
        "model",
        "Of the products; weights stay float32 (or float64). auto: bfloat16 on CUDA, else float32.",
        ("auto", "float32", "bfloat16", "float64"),
    )
    attn_implementation: str = _field(
        "auto", "model", "Attention backend by name; auto: the fastest one that fits the device."
    )
    device: str = _field("auto", "model", "auto (CUDA if there is one), cpu, cuda or cuda:N.")
    trainable: str = _field("all", "model", "Which weights learn.", ("all",))

    dataset_name: tuple[str, ...] = _field(
        (), "data", "Preference pairs: files, folders or glob patterns, one or several."
    )
    eval_dataset_name: tuple[str, ...] = _field(
        (), "data", "Held-out pairs; empty: eval_fraction of dataset_name is held out."
    )
    behavior_column: str | None = _field(
        None, "data", "Column that names a pair's behavior; null: the file's name."
    )
    flip_behaviors: tuple[str, ...] = _field(
        (), "data", "Behaviors whose chosen and rejected completions change places."
    )
    on_bad_rows: str = _field(
        "error",
        "data",
        "error: stop before training; drop: count and list them, go on.",
        ("error", "drop"),
    )
    max_length: int = _field(
        1024, "data", "Tokens of a prompt with one completion; longer ones lose their end.",
        within="length",
    )  # fmt: skip
    append_eos: str = _field(
        "auto",
        "data",
        "End completions with the EOS token; auto: string data yes, conversations no.",
        ("auto", "true", "false"),
    )
    eval_fraction: float = _field(
        0.1,
        "data",
        "Held out per behavior, stratified by label, when eval_dataset_name is empty.",
        within="fraction",
    )
    eval_sample_size: int = _field(
        64, "data", "Pairs per behavior and split that an evaluation looks at.",
        within="at least 1",
    )  # fmt: skip

    output_dir: str = _field("runs/fastpref", "run", "Folder of the run.")
    overwrite_output_dir: bool = _field(
        False, "run", "Start anew in a folder that already holds a run, removing that run."
    )
    resume_from_checkpoint: str = _field(
        "auto", "run", "auto: newest complete checkpoint of output_dir, if any; none; or a folder."
    )
    seed: int = _field(0, "run", "Of the order, the split, dropout and sketches.", within="seed")

    loss_type: str = _field("sigmoid", "loss", "A name of the loss table: sigmoid, ipo.")
    beta: float = _field(0.1, "loss", "Strength of the pull to the reference.", within="positive")
    label_smoothing: float = _field(
        0.0, "loss", "Probability that a label is wrong (conservative DPO).", within="smoothing"
    )

    optim: str = _field("adamw_torch", "optimizer", "Optimizer.", ("adamw_torch", "sgd"))
    learning_rate: float = _field(1e-6, "optimizer", "Highest learning rate.", within="at least 0")
    weight_decay: float = _field(
        0.0, "optimizer", "Not applied to biases and norm weights.", within="at least 0"
    )
    adam_beta1: float = _field(0.9, "optimizer", "AdamW's first decay rate.", within="fraction")
    adam_beta2: float = _field(0.999, "optimizer", "AdamW's second decay rate.", within="fraction")
    adam_epsilon: float = _field(1e-8, "optimizer", "AdamW's epsilon.", within="positive")
    max_grad_norm: float = _field(
        1.0, "optimizer", "Clip the global gradient norm to this; 0: never.", within="at least 0"
    )
    lr_scheduler_type: str = _field(
        "linear",
        "optimizer",
        "Shape of the learning rate after the warm-up.",
        ("linear", "cosine", "constant"),
    )
    warmup_ratio: float = _field(
        0.1, "optimizer", "Part of all steps in which the rate rises from 0.", within="ratio"
    )

    num_train_epochs: float = _field(
        1.0, "batch", "Passes over the training pairs; may be fractional.", within="positive"
    )
    max_steps: int = _field(
        -1, "batch", "Optimizer steps, in place of num_train_epochs; -1: unset.", within="steps"
    )
    train_batch_size: int = _field(
        32, "batch", "Pairs per optimizer step, over all ranks together.", within="at least 1"
    )
    max_tokens_per_microbatch: int = _field(
        16384, "batch", "Packed tokens per forward: the memory dial; results do not depend on it.",
        within="at least 1",
    )  # fmt: skip
    stratify: bool = _field(
        False, "batch", "Every step draws from all behaviors and labels in their proportion."
    )
    shuffle: bool = _field(True, "batch", "A new order every epoch, decided by the seed alone.")

    logging_steps: int = _field(
        10, "intervals", "Steps between two lines of metrics.jsonl.", within="at least 1"
    )
    eval_steps: int = _field(
        50,
        "intervals",
        "Steps between two evaluations, step 0 and the last included; 0: none.",
        within="at least 0",
    )
    save_steps: int = _field(
        100,
        "intervals",
        "Steps between two checkpoints; the records' parts end at the same steps.",
        within="at least 1",
    )
    save_total_limit: int | None = _field(
        None, "intervals", "Checkpoints to keep, the newest ones; null: all.", within="at least 1"
    )

    record: bool = _field(True, "dynamics", "Write records/: every pair, every step, as Parquet.")
    track: str = _field(
        "head",
        "dynamics",
        "Gradient norms per pair, in the records if there are any; head: of the head, exact.",
        ("none", "head"),
    )
    track_every: int = _field(
        1, "dynamics", "Steps between two tracked steps.", within="at least 1"
    )
    sketch_dim: int = _field(16, "dynamics", "Width of a gradient sketch.", within="at least 1")
    ref_cache_dir: str | None = _field(
        None, "dynamics", "Reference log-probs; null: the user's cache folder."
    )
    ref_check_pairs: int = _field(
        8,
        "dynamics",
        "Cached reference log-probs that are computed again at the start and compared.",
        within="at least 0",
    )
    on_nonfinite: str = _field("stop", "dynamics", "At a loss that is not finite.", ("stop",))

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            value = _parse(spec.name, getattr(self, spec.name))
            object.__setattr__(self, spec.name, value)
            _check_value(spec, value)
        _check_combinations(self)

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
            value = list(value) if isinstance(value, tuple) else value
            lines.append(yaml.safe_dump({spec.name: value}, allow_unicode=True, width=10**6))
        return "".join(lines)


def field_names() -> tuple[str, ...]:
    """Names of all fields of `Config`, in order."""
    return tuple(spec.name for spec in dataclasses.fields(Config))


@functools.cache
def field_types() -> dict[str, Any]:
    """Name -> resolved type: str, int, float, bool, `int | None`, `str | None`, tuple of str."""
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
    unsets an optional field. Raises ValueError naming file, line, key, what was expected and what
    came.
    """
    values: dict[str, Any] = {}
    where: dict[str, str] = {}
    if path is not None:
        for name, line, value in _read_yaml(Path(path)):
            if name not in field_names():
                raise ValueError(f"{path}:{line}: {name}: {explain_unknown(name)}")
            if name in values:
                raise ValueError(f"{path}:{line}: {name} stands twice, first at {where[name]}")
            values[name], where[name] = value, f"{path}:{line}: {name}"
    for name, value in (overrides or {}).items():
        if name not in field_names():
            raise ValueError(f"--{name}: {explain_unknown(name)}")
        optional = types.NoneType in typing.get_args(field_types()[name])
        values[name] = None if optional and value == "null" else value
        where[name] = f"--{name}"
    try:
        return Config(**values)
    except ConfigError as error:
        place = where.get(error.field, error.field)
        raise ValueError(f"{place}: {error.reason}") from None


def _read_yaml(path: Path) -> list[tuple[str, int, Any]]:
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


def _parse(name: str, value: Any) -> Any:
    """`value`, typed or as text, as the type of field `name`."""
    kind = field_types()[name]
    if types.NoneType in typing.get_args(kind):
        if value is None:
            return None
        kind = next(arg for arg in typing.get_args(kind) if arg is not types.NoneType)
    if kind == tuple[str, ...]:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_parse_str(name, item) for item in items)
    parser: Callable[[str, Any], Any] = {
        bool: _parse_bool, int: _parse_int, float: _parse_float, str: _parse_str
    }[kind]  # fmt: skip
    return parser(name, value)


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
    if isinstance(value, bool) and name == "append_eos":
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


def _check_value(spec: dataclasses.Field[Any], value: Any) -> None:
    choices, within = spec.metadata["choices"], spec.metadata["within"]
    if choices and value not in choices:
        later = LATER.get((spec.name, value), "")
        raise ConfigError(spec.name, f"expected {' or '.join(choices)}, got {value!r}{later}")
    if within and value is not None:
        text, holds = RANGES[within]
        if not holds(value):
            raise ConfigError(spec.name, f"expected {text}, got {value!r}")


def _check_combinations(config: Config) -> None:
    device = config.device
    if device not in ("auto", "cpu", "cuda"):
        if not (device.startswith("cuda:") and device[5:].isdecimal()):
            raise ConfigError("device", f"expected auto, cpu, cuda or cuda:N, got {device!r}")
    both = sorted(set(config.dataset_name) & set(config.eval_dataset_name))
    if both:
        raise ConfigError(
            "eval_dataset_name",
            f"{both[0]!r} is in dataset_name too, so it would not be held out; leave "
            "eval_dataset_name empty and set eval_fraction, or name other files",
        )
    resume = config.resume_from_checkpoint
    if config.overwrite_output_dir and resume not in ("auto", "none"):
        if Path(os.path.abspath(resume)).is_relative_to(os.path.abspath(config.output_dir)):
            raise ConfigError(
                "overwrite_output_dir",
                f"true would remove the checkpoint {resume!r} that resume_from_checkpoint names; "
                "set overwrite_output_dir: false or another output_dir",
            )
