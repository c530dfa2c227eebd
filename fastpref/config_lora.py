"""What must hold between the LoRA fields of a configuration, and how their texts are read."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from fastpref.config_values import ConfigError
from fastpref.loss_table import TABLE

# What a run may decide about an adapter that it did not make.
OF_ANY_ADAPTER = {
    *("adapter_name_or_path", "adapter_reference", "lora_dropout", "save_merged"),
    *("load_in_4bit", "bnb_4bit_quant_type", "use_bnb_nested_quant"),
}


def is_pattern(name: str) -> bool:
    """Whether ``name``, of a module, is a regular expression rather than a name or its end."""
    return not re.fullmatch(r"[\w.-]+", name)


def read_pattern(field: str, entry: str) -> tuple[str, int]:
    """`name=number` of lora_rank_pattern, lora_alpha_pattern; ConfigError where it is none."""
    name, _, number = entry.rpartition("=")
    if not (name and number.isdecimal() and int(number) >= 1):
        raise ConfigError(field, f"expected name=number, number 1 or more, got {entry!r}")
    _demand_pattern(field, name)
    return name, int(number)


def _demand_pattern(field: str, text: str) -> None:
    try:
        re.compile(text)
    except re.error as error:
        raise ConfigError(field, f"{text!r} is not a regular expression: {error}") from None


def check_lora(config: Any) -> None:
    """Raise ConfigError where the LoRA fields of ``config``, a `Config`, contradict."""
    default = {
        s.name: s.default for s in dataclasses.fields(config) if s.metadata["group"] == "lora"
    }
    given = [name for name in default if getattr(config, name) != default[name]]
    if config.trainable != "lora":
        if given:
            raise ConfigError(
                given[0],
                f"an option of LoRA, but trainable is {config.trainable!r}; set trainable: lora, "
                "or remove it",
            )
        return
    sorting = [name for name in config.loss_type if TABLE[name].batch_coupled == "order"]
    if config.lora_dropout and sorting:
        raise ConfigError(
            "lora_dropout",
            f"{sorting[0]} sorts a step's pairs before it learns from them, under other masks than "
            "it then learns under; set lora_dropout: 0",
        )
    own = [name for name in given if name not in OF_ANY_ADAPTER]
    if config.adapter_name_or_path and own:
        raise ConfigError(
            own[0],
            f"the adapter that adapter_name_or_path names ({config.adapter_name_or_path}) brings "
            "its own; remove it, or leave adapter_name_or_path out for a fresh adapter",
        )
    _check_targets(config)
    _check_quantised(config)
    ranks = [config.lora_r, *(r for _, r in _patterns(config, "lora_rank_pattern"))]
    _patterns(config, "lora_alpha_pattern")
    odd = [r for r in ranks if r % 2]
    if config.init_lora_weights == "orthogonal" and odd:
        raise ConfigError("init_lora_weights", f"orthogonal needs even ranks, got {odd[0]}")
    if config.lora_bias and (config.use_dora or config.init_lora_weights != "true"):
        raise ConfigError("lora_bias", "not with use_dora, and with init_lora_weights: true only")
    if config.use_dora and config.init_lora_weights == "mica":
        raise ConfigError("init_lora_weights", "mica and use_dora exclude each other")


def _check_quantised(config: Any) -> None:
    if not config.load_in_4bit:
        for field, default in (("bnb_4bit_quant_type", "nf4"), ("use_bnb_nested_quant", False)):
            if getattr(config, field) != default:
                raise ConfigError(field, "an option of load_in_4bit; set that too, or remove it")
        return
    if config.dtype == "float64":
        raise ConfigError("load_in_4bit", "has no products in float64; set dtype: auto or bfloat16")
    for field, why in (
        ("save_merged", "an adapter cannot be added into weights of 4 bits; merge it into the "
         "model that was quantised, after the run"),
        ("lora_target_parameters", "parameters have no adapter over weights of 4 bits"),
    ):  # fmt: skip
        if getattr(config, field):
            raise ConfigError(field, f"not with load_in_4bit: {why}; remove one of the two")
    if config.init_lora_weights == "mica":
        raise ConfigError("init_lora_weights", "mica reads weights that load_in_4bit rounds away")


def _patterns(config: Any, field: str) -> list[tuple[str, int]]:
    return [read_pattern(field, entry) for entry in getattr(config, field)]


def _check_targets(config: Any) -> None:
    for field in ("lora_target_modules", "lora_exclude_modules"):
        names = getattr(config, field)
        patterns = [name for name in names if is_pattern(name)]
        if len(names) > 1 and (patterns or "all-linear" in names):
            raise ConfigError(
                field,
                f"{(patterns or ['all-linear'])[0]!r} cannot stand beside other names; give names "
                "or ends of names, or one regular expression, or all-linear",
            )
        for pattern in patterns:
            _demand_pattern(field, pattern)
    for field in ("lora_target_parameters", "lora_modules_to_save", "lora_layers_pattern"):
        for name in filter(is_pattern, getattr(config, field)):
            raise ConfigError(field, f"expected a name or the end of one, got {name!r}")
    if config.lora_layers_pattern and not config.lora_layers_to_transform:
        raise ConfigError(
            "lora_layers_pattern", "has a meaning with lora_layers_to_transform only; set that too"
        )
    if config.lora_layers_to_transform:
        least = min(config.lora_layers_to_transform)
        if least < 0:
            raise ConfigError("lora_layers_to_transform", f"layers count from 0, got {least}")
        if any(is_pattern(name) for name in config.lora_target_modules):
            raise ConfigError(
                "lora_layers_to_transform",
                "not with a regular expression as lora_target_modules; name the layers in that",
            )
    if config.lora_target_parameters:
        for field in ("lora_dropout", "use_dora", "lora_bias"):
            if getattr(config, field):
                raise ConfigError(field, "peft has no such adapter of lora_target_parameters")
