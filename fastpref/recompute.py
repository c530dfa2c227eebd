"""Activation checkpointing: what the backward computes again instead of keeping it.

    none       every layer keeps what its backward reads
    selective  a layer keeps the results of its matrix products and of attention and recomputes the
               rest (norms, activations, rotations, casts): a few per cent of the arithmetic
    full       a layer keeps its input alone and runs a second time in the backward: a third more
               arithmetic

Without dropout the recomputed values have the bits of the first ones, and so have the gradients.
Non-reentrant (torch.utils.checkpoint), so that frozen weights, several backwards (of `selective`
torch allows one) and layers around layers go on working. A layer is wrapped by its own `forward`,
whatever its training flag says: the model stays in evaluation mode, because that is what keeps its
dropout off.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from fastpref import attention, attention_torch

MODES = ("none", "selective", "full")

_aten = torch.ops.aten
# What is dear to compute and cheap to keep: a product's result is D wide, its arithmetic D deep.
KEPT_OPS = frozenset(
    {
        _aten.mm.default,
        _aten.addmm.default,
        _aten.bmm.default,
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
        _aten._scaled_dot_product_attention_math.default,
        attention_torch.OP,
    }
)
# Of flash-attn's own libraries, whose names differ from version to version.
KEPT_LIBRARIES = ("flash_attn", "flash_attn_2", "flash_attn_3")


def checkpoint_layers(module: nn.Module, mode: str) -> int:
    """Wrap the decoder layers of a causal LM, in place, as ``mode`` (one of MODES) says.

    Returns how many layers there are. Raises ValueError where the model has no layers that
    transformers can checkpoint.
    """
    if mode not in MODES:
        raise ValueError(f"gradient_checkpointing={mode!r} is not one of {', '.join(MODES)}.")
    if mode == "none":
        return 0
    layers = decoder_layers(module)
    if not layers:
        raise ValueError(
            f"gradient_checkpointing={mode}: {type(module).__name__} has no layers that "
            "transformers knows how to checkpoint. Set gradient_checkpointing: none and "
            "max_tokens_per_microbatch lower."
        )
    for layer in layers:
        layer.forward = recomputed(layer.forward, mode)
    return len(layers)


def decoder_layers(module: nn.Module) -> list[nn.Module]:
    """The layers of a transformers model that its own gradient checkpointing would wrap."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [m for m in module.modules() if isinstance(m, GradientCheckpointingLayer)]


def last_layer(module: nn.Module) -> tuple[nn.Module, int] | None:
    """The last decoder layer of a causal LM and the width of its states; None where transformers
    names none as such."""
    decoder = getattr(module, "get_decoder", lambda: module)()
    layers = decoder_layers(decoder)
    if not layers:
        return None
    text = module.config.get_text_config(decoder=True)  # type: ignore[union-attr,operator]
    return layers[-1], int(text.hidden_size)


def recomputed(forward: Callable[..., Any], mode: str) -> Callable[..., Any]:
    """``forward`` of a layer with its checkpointing; both stand in its attribute `recomputed`."""
    context: dict[str, Any] = {}
    if mode == "selective":
        context["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)

    @functools.wraps(forward)
    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # The layout may have come by the surroundings, which are gone when the backward runs.
        run = attention.bound(lambda *own, **named: forward(*map(_anew, own), **named))
        return checkpoint(run, *args, use_reentrant=False, **context, **kwargs)

    checkpointed.recomputed = forward, mode  # type: ignore[attr-defined]
    return checkpointed


def _anew(x: Any) -> Any:
    """A tensor as an object of its own: what taps note on a layer's input in the first run, the
    second must not find, or it would skip a product that `selective` counts."""
    return x.view_as(x) if isinstance(x, Tensor) else x


def _policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = op in KEPT_OPS or op.namespace in KEPT_LIBRARIES
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
