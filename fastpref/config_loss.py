"""What must hold between the loss fields of a configuration: which loss reads which option.

TRL reads an option where the loss has it and passes over it in silence where it has not. Here an
option that no loss of the run reads is an error, because whoever set it expects it to count.
"""

from __future__ import annotations

import difflib
from typing import Any

from fastpref.config_values import ConfigError
from fastpref.loss_table import ALIASES, ANSWERS, TABLE, Facts

# option -> (its default, the losses that read it)
READ_BY: dict[str, tuple[float | None, tuple[str, ...]]] = {
    "discopop_tau": (0.05, ("discopop",)),
    "simpo_gamma": (0.5, ("simpo",)),
    "cpo_alpha": (None, ("cpo",)),
    "rpo_alpha": (None, ("rpo",)),
}
INSTEAD = {
    "cpo_alpha": "; for SimPO with a likelihood term, as TRL's CPOTrainer has it, set loss_type: "
    "[simpo, sft] and loss_weights: [1.0, <cpo_alpha>]",
    "rpo_alpha": "; for what TRL had under this name until 0.24 set loss_type: [sigmoid, sft] and "
    "loss_weights: [1.0, <rpo_alpha>]",
}


def resolve_losses(names: tuple[str, ...], label_smoothing: float) -> tuple[str, ...]:
    """The losses' own names for aliases; ConfigError for a name that is none, with the nearest."""
    for name in names:
        if name not in TABLE and name not in ALIASES:
            raise ConfigError("loss_type", f"{name!r} is no loss; {_unknown(name)}")
    if "cdpo" in names and not label_smoothing:
        raise ConfigError(
            "loss_type", "cdpo is sigmoid with label_smoothing; set label_smoothing above 0"
        )
    return tuple(ALIASES.get(name, name) for name in names)


def _unknown(name: str) -> str:
    key = name.lower().replace("-", "_")
    if key in ANSWERS:
        return ANSWERS[key]
    if "," in name:
        return "name several as a list, without commas on the command line"
    near = difflib.get_close_matches(key, [*TABLE, *ALIASES], n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{hint}There are: {', '.join(TABLE)}"


def check_losses(config: Any) -> None:
    """Raise ConfigError where the loss fields of ``config``, a `Config`, contradict."""
    names = config.loss_type
    _check_list(names, config.loss_weights)
    losses = {name: TABLE[name] for name in names}
    _check_smoothing(losses, config.label_smoothing)
    _check_divergence(losses, config)
    _check_token_weights(losses, config)
    for option, (default, readers) in READ_BY.items():
        value = getattr(config, option)
        if value != default and not set(readers) & set(names):
            raise ConfigError(
                option,
                f"{value!r} is read by {' or '.join(readers)} alone, and loss_type is "
                f"{', '.join(names)}; remove it{INSTEAD.get(option, '')}",
            )
    _check_sync(losses, config)
    _check_balance(losses, config)


def _check_list(names: tuple[str, ...], weights: tuple[float, ...]) -> None:
    if not names:
        raise ConfigError("loss_type", f"expected one or several of {', '.join(TABLE)}; got none")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError("loss_type", f"{twice[0]} stands twice; give it once, weights added up")
    if weights and len(weights) != len(names):
        raise ConfigError(
            "loss_weights",
            f"{len(weights)} weights for {len(names)} losses ({', '.join(names)}); give one for "
            "each, in the order of loss_type",
        )
    if weights and (min(weights) < 0 or not any(weights)):
        raise ConfigError(
            "loss_weights", f"expected 0 or more, not all of them 0, got {list(weights)}"
        )


def _check_smoothing(losses: dict[str, Facts], smoothing: float) -> None:
    if "exo_pair" in losses and not smoothing:
        raise ConfigError(
            "label_smoothing",
            "exo_pair is not defined for 0; set label_smoothing: 0.001, as its paper does",
        )
    if smoothing and not any(facts.smoothing for facts in losses.values()):
        having = ", ".join(name for name, facts in TABLE.items() if facts.smoothing)
        raise ConfigError(
            "label_smoothing",
            f"{smoothing!r} is not defined for loss_type {', '.join(losses)}, only for {having}; "
            "set it to 0",
        )


def _check_divergence(losses: dict[str, Facts], config: Any) -> None:
    kind, coef = config.f_divergence_type, config.f_alpha_divergence_coef
    if coef != 0.5 and kind != "alpha_divergence":
        raise ConfigError(
            "f_alpha_divergence_coef",
            f"{coef!r} is read with f_divergence_type alpha_divergence alone, got {kind}; remove "
            "it, or set f_divergence_type",
        )
    if kind == "reverse_kl":
        return
    without = [name for name, facts in losses.items() if not facts.f_divergence]
    if without or not any(facts.needs_reference for facts in losses.values()):
        having = ", ".join(n for n, f in TABLE.items() if f.f_divergence and f.needs_reference)
        raise ConfigError(
            "f_divergence_type",
            f"{kind} is not defined for loss_type {', '.join(without or losses)}, only for "
            f"{having} (sft may stand beside them); set it to reverse_kl",
        )


def _check_token_weights(losses: dict[str, Facts], config: Any) -> None:
    alpha = config.ld_alpha
    odd = [n for n, f in losses.items() if not f.needs_reference and n != "sft"]
    if alpha is not None and (odd or set(losses) == {"sft"}):
        raise ConfigError(
            "ld_alpha",
            f"{alpha!r} weighs tokens in log-ratios, and loss_type {', '.join(odd or losses)} has "
            "none; remove it",
        )
    odd = [name for name, facts in losses.items() if not facts.weighting]
    if config.use_weighting and odd:
        raise ConfigError(
            "use_weighting",
            f"true weighs single pairs, but the value of {', '.join(odd)} is not one of a pair "
            "alone, or has a likelihood term that is not to be weighed; remove one of the two",
        )


def _check_sync(losses: dict[str, Facts], config: Any) -> None:
    if not config.sync_ref_model:
        for option, default in (("ref_model_mixup_alpha", 0.6), ("ref_model_sync_steps", 512)):
            value = getattr(config, option)
            if value != default:
                raise ConfigError(
                    option, f"{value!r} is read with sync_ref_model: true alone; set it, too"
                )
        return
    if not any(facts.needs_reference for facts in losses.values()):
        raise ConfigError(
            "sync_ref_model", f"loss_type {', '.join(losses)} has no reference; remove it"
        )
    if config.trainable == "lora":
        raise ConfigError(
            "sync_ref_model",
            "needs trainable: all or head, got lora: the reference is then not a model of its own "
            "that could follow the policy; remove it",
        )


BALANCE_DEFAULTS = {
    "target_share": (),
    "balance_every": 10,
    "balance_limit": 4.0,
    "balance_gain": 0.5,
}


def _check_balance(losses: dict[str, Facts], config: Any) -> None:
    if config.balance == "none":
        for option, default in BALANCE_DEFAULTS.items():
            value = getattr(config, option)
            if value != default:
                shown = dict(value) if option == "target_share" else value
                raise ConfigError(
                    option, f"{shown!r} is read with balance: margins or rates alone; set it, too"
                )
        return
    for name, share in config.target_share:
        if isinstance(share, bool | str) or not 0 < share <= 1:
            raise ConfigError(
                "target_share", f"{name}: expected a share, 0 < value <= 1, got {share!r}"
            )
    odd = [name for name, facts in losses.items() if facts.batch_coupled == "order"]
    if odd:
        raise ConfigError(
            "balance",
            f"{config.balance} weighs the losses of single pairs, and the value of {odd[0]} is one "
            "of sorted pairs of several behaviors; remove one of the two",
        )
    if config.balance == "margins" and not any(facts.needs_reference for facts in losses.values()):
        raise ConfigError(
            "balance",
            f"margins have grown from 0 where there is a reference, and loss_type "
            f"{', '.join(losses)} has none; set balance: rates, or a loss with a reference",
        )
    if config.sync_ref_model:
        raise ConfigError(
            "balance",
            "margins are to show what training has reached, and sync_ref_model moves what they "
            "are measured from; remove one of the two",
        )
    if config.balance == "rates":
        _check_rates(config)


def _check_rates(config: Any) -> None:
    """What `balance: rates` reads is measured at every update of the weights, or refused."""
    if config.track not in ("sketch", "exact") or not config.record:
        raise ConfigError(
            "balance",
            f"rates needs update rates, which are measured with record: true and track: sketch or "
            f"exact; got record: {str(config.record).lower()}, track: {config.track}",
        )
    if not config.rate_every or config.balance_every % config.rate_every:
        raise ConfigError(
            "balance_every",
            f"with balance: rates every update needs rates of its step, so a multiple of "
            f"rate_every, {config.rate_every or '0 (never)'}; got {config.balance_every}",
        )
