"""Optimizers and clipping, numerically those of transformers' Trainer."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastpref.config import Config

# transformers.Trainer.get_decay_parameter_names (5.23) leaves these and all LayerNorms undecayed.
_UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)", re.IGNORECASE)

EIGHT_BIT = ("adamw_8bit", "paged_adamw_8bit")  # of bitsandbytes

Groups = list[dict[str, Any]]


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]], config: Config
) -> torch.optim.Optimizer:
    """The optimizer ``config.optim`` over the parameters that require gradients, in two groups:
    decayed, and biases and norm weights.

    A LayerNorm cannot be told from a name alone (GPT-2 calls it `ln_1`), so one-dimensional weights
    are never decayed. Raises ValueError when nothing is to be trained.
    """
    decayed: list[tuple[str, nn.Parameter]] = []
    undecayed: list[tuple[str, nn.Parameter]] = []
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            plain = parameter.ndim < 2 or _UNDECAYED.search(name)
            (undecayed if plain else decayed).append((name, parameter))
    # Named, so that a checkpoint can tell whether its moments belong to these parameters.
    groups: Groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("build_optimizer: no parameter requires a gradient; nothing would learn")
    return OPTIMIZERS[config.optim](groups, config)


# Fused kernels, where torch has them, on every device: one pass over the memory, on the CPU too.


def _adamw(groups: Groups, config: Config) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )


def _sgd(groups: Groups, config: Config) -> torch.optim.Optimizer:
    args: dict[str, Any] = dict(config.optim_args)
    return torch.optim.SGD(groups, lr=config.learning_rate, fused=True, **args)


def _rmsprop(groups: Groups, config: Config) -> torch.optim.Optimizer:
    # torch chooses foreach on CUDA and a plain loop on the CPU, the faster one on either.
    args: dict[str, Any] = dict(config.optim_args)
    return torch.optim.RMSprop(groups, lr=config.learning_rate, **args)


def _adafactor(groups: Groups, config: Config) -> torch.optim.Optimizer:
    """transformers' class, which its Trainer means by this name, not torch.optim.Adafactor: theirs
    takes the learning rate as it is, torch's scales it by the weights."""
    from transformers import Adafactor

    args: dict[str, Any] = dict(config.optim_args)
    optimizer: torch.optim.Optimizer = Adafactor(
        groups, lr=config.learning_rate, scale_parameter=False, relative_step=False, **args
    )
    return optimizer


def _adamw_8bit(groups: Groups, config: Config, paged: bool = False) -> torch.optim.Optimizer:
    """bitsandbytes' block-wise 8-bit moments (Dettmers et al. 2022, arXiv 2110.02861); weights of
    less than 4096 numbers keep moments of 32 bits. Paged: CUDA moves them to the host and back."""
    bitsandbytes = import_bitsandbytes(f"optim: {config.optim}")
    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(
        groups,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        is_paged=paged,
    )
    return optimizer


def demand_optimizer(config: Config) -> None:
    """ValueError that names the remedy where `optim` needs what is not here."""
    if config.optim == "paged_adamw_8bit" and not torch.cuda.is_available():
        raise ValueError("optim: paged_adamw_8bit needs CUDA. Set optim: adamw_8bit.")
    if config.optim in ("adamw_8bit", "paged_adamw_8bit"):
        import_bitsandbytes(f"optim: {config.optim}")


def import_bitsandbytes(asked: str, extra: str = "8bit") -> Any:
    """The package; ValueError that names what ``asked`` for it and the remedy, an ``extra`` of
    fastpref, where it is not."""
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise ValueError(
            f'{asked} needs bitsandbytes ({error}): pip install "fastpref[{extra}]"'
        ) from None


OPTIMIZERS: dict[str, Callable[[Groups, Config], torch.optim.Optimizer]] = {
    "adamw_torch": _adamw,
    "adamw_8bit": _adamw_8bit,
    "paged_adamw_8bit": functools.partial(_adamw_8bit, paged=True),
    "sgd": _sgd,
    "rmsprop": _rmsprop,
    "adafactor": _adafactor,
}


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> tuple[Tensor, Tensor]:
    """Scale all gradients in place so that their joint L2 norm is at most `max_norm`.

    Returns (norm before, factor applied), both 0-d on the parameters' device, without waiting for
    the device: factor = min(1, max_norm / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_.
    `max_norm` 0 scales nothing. A non-finite norm makes a non-finite factor and gradients: test the
    norm before the optimizer's step.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        raise ValueError("clip_gradients: no parameter has a gradient; call it after backward")
    norm = (
        torch.linalg.vector_norm(gradients[0])
        if len(gradients) == 1
        else torch.nn.utils.get_total_norm(gradients)
    )
    if max_norm == 0:
        return norm, torch.ones_like(norm)
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    # Reading it is free on the CPU, a pass over memory is not.
    if factor.device.type != "cpu" or factor != 1:
        torch._foreach_mul_(gradients, factor)
    return norm, factor
