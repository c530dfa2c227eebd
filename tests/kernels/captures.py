"""What a model's layers see in a forward and backward, by hooks: for tests of norms and sketches.

Shapes: T rows over all calls, d inputs, p outputs, H heads. Norms compute in float64 here
(transformers' own do it in float32, which would hide 1e-12).
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from fastpref_kernels import (
    bias_norms,
    column_sketch,
    embedding_norms,
    embedding_sketch,
    layernorm_norms,
    linear_norms,
    linear_sketch,
    rmsnorm_norms,
)
from torch import Tensor, nn

Function = Callable[..., Tensor]


@dataclass
class Capture:
    """Inputs and output gradients of one module, call after call."""

    module: nn.Module
    name: str
    inputs: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)

    @property
    def x(self) -> Tensor:
        """(T, d), (T, H, d) or, of an embedding, (T,)."""
        return torch.cat(self.inputs)

    @property
    def dy(self) -> Tensor:
        """(T, p) or (T, H, p)."""
        return torch.cat(self.grads)


def capture(model: nn.Module) -> list[Capture]:
    """Watch every module that has parameters of its own; norms are put into float64."""
    found = []
    for name, module in model.named_modules():
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(_clean_norm, module)  # type: ignore[method-assign]
        one = Capture(module, name)
        module.register_forward_hook(_watch(one))
        found.append(one)
    return found


def epsilon(module: Any) -> float:
    """The number that a norm adds to the variance, whatever the attribute is called."""
    return float(getattr(module, "variance_epsilon", getattr(module, "eps", 0.0)))


def _clean_norm(self: Any, x: Tensor) -> Tensor:
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon(self))
    return y * (1.0 + self.weight if "Gemma" in type(self).__name__ else self.weight)


def _watch(one: Capture) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # (1, n, ...) -> (n, ...): one sequence, or one packed row. Gemma's norms of heads see
        # (1, H, n, d), Qwen's (1, n, H, d).
        heads_first = output.dim() == 4 and "Gemma" in type(module).__name__

        def rows(x: Tensor) -> Tensor:
            return x[0].transpose(0, 1) if heads_first else x[0]

        one.inputs.append(rows(inputs[0].detach()))
        output.register_hook(lambda grad: one.grads.append(rows(grad)))

    return hook


def parameter_norms(one: Capture, segment_id: Tensor, **options: Any) -> dict[str, Tensor]:
    """name of the parameter -> what `fastpref_kernels` says of its gradient in every segment."""
    module, kind, prefix = one.module, type(one.module).__name__, f"{one.name}."
    x, dy = one.x, one.dy
    if isinstance(module, nn.Embedding):
        scale = float(getattr(module, "embed_scale", 1.0))
        options |= {"scale": scale, "padding_idx": module.padding_idx}
        return {f"{prefix}weight": embedding_norms(x.flatten(), dy, segment_id, **options)}
    if isinstance(module, nn.LayerNorm):
        both = layernorm_norms(x, dy, segment_id, eps=module.eps, **options)
        return {f"{prefix}weight": both.weight, f"{prefix}bias": both.bias}
    if kind.endswith("RMSNorm"):
        norms = rmsnorm_norms(x, dy, segment_id, eps=epsilon(module), **options)
        return {f"{prefix}weight": norms}
    assert isinstance(module, nn.Linear) or kind == "Conv1D", kind
    found = {f"{prefix}weight": linear_norms(x, dy, segment_id, **options)}
    if module.bias is not None:
        found[f"{prefix}bias"] = bias_norms(dy, segment_id, **options)
    return found


def parameter_sketches(
    one: Capture, key: Callable[[str], str], segment_id: Tensor, k: int, **options: Any
) -> dict[str, Tensor]:
    """name of the parameter -> (S, k, k) sketches under `key(name)`."""
    module, kind = one.module, type(one.module).__name__
    x, dy = one.x, one.dy
    weight, bias = f"{one.name}.weight", f"{one.name}.bias"
    if isinstance(module, nn.Embedding):
        scale = float(getattr(module, "embed_scale", 1.0))
        options |= {"scale": scale, "padding_idx": module.padding_idx, "key": key(weight)}
        return {weight: embedding_sketch(x.flatten(), dy, segment_id, k, **options)}
    found = {}
    if isinstance(module, nn.LayerNorm) or kind.endswith("RMSNorm"):
        centred = isinstance(module, nn.LayerNorm)
        found[weight] = column_sketch(
            dy, segment_id, k, key=key(weight), x=x, eps=epsilon(module), centred=centred, **options
        )
    else:
        found[weight] = linear_sketch(x, dy, segment_id, k, key=key(weight), **options)
    if getattr(module, "bias", None) is not None:
        found[bias] = column_sketch(dy, segment_id, k, key=key(bias), **options)
    return found
