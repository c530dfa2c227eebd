"""Layers that taps know: what they are found by, and what of a pair's gradient follows from each.

A layer is known by its forward, not by its name: a linear layer and an embedding by the function
itself, a norm by what it does to a few numbers. Whatever else has a trained weight is refused.
Shapes: T tokens of a packed batch, d inputs, p outputs, D features, H heads.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

if TYPE_CHECKING:
    from fastpref.dynamics.taps import Tap, Taps


@dataclass(frozen=True)
class Linear:
    """y = x W^T + b; a Conv1D of GPT-2 stores W^T."""

    transposed: bool


@dataclass(frozen=True)
class Embedding:
    """Row id of the weight, times `scale` (Gemma: the root of D)."""

    scale: float
    padding_idx: int | None


@dataclass(frozen=True)
class Norm:
    """Derivative in the weight: x rsqrt(mean x^2 + eps), `centred`: the same of x - mean x."""

    eps: float
    centred: bool


Kind = Linear | Embedding | Norm


def kind_of(module: nn.Module) -> Kind | None:
    """What ``module`` computes with its own parameters; None where nothing here says it."""
    if linear := _linear(module):
        return linear
    with torch.no_grad():
        if isinstance(module, nn.Embedding):
            return _embedding(module)
        if isinstance(getattr(module, "weight", None), Tensor):
            return _norm(module)
    return None


def _linear(module: nn.Module) -> Linear | None:
    forward = type(module).forward
    if forward is nn.Linear.forward:
        return Linear(transposed=False)
    if type(module).__name__ == "Conv1D":
        from transformers.pytorch_utils import Conv1D

        if forward is Conv1D.forward:
            return Linear(transposed=True)
    return None


def _embedding(module: nn.Embedding) -> Embedding | None:
    if module.max_norm is not None or module.scale_grad_by_freq:
        return None
    # Rows that are all alike take no memory; that the right one is read, a first batch will show.
    ids = torch.arange(min(3, module.num_embeddings), device=module.weight.device)
    row = torch.linspace(1.0, 2.0, module.embedding_dim, dtype=torch.float64).to(module.weight)
    try:
        ones, other = (
            functional_call(module, {"weight": x.expand(module.weight.shape)}, (ids,))
            for x in (torch.ones_like(row), row)
        )
    except (TypeError, RuntimeError, AttributeError, IndexError):  # OPT's wants two dimensions
        return None
    if not isinstance(ones, Tensor) or ones.shape != (len(ids), len(row)):
        return None
    scale = float(ones[0, 0])
    close = torch.finfo(row.dtype).eps
    known = bool((ones == scale).all()) and torch.allclose(other, row * scale, rtol=4 * close)
    return Embedding(scale, module.padding_idx) if known else None


def _norm(module: nn.Module) -> Norm | None:
    """By its derivative in the weight, at numbers of size 1 and of the size of eps."""
    own = dict(module.named_parameters(recurse=False))
    weight = own.get("weight")
    if weight is None or weight.dim() != 1 or set(own) - {"weight", "bias"}:
        return None
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    eps = torch.finfo(weight.dtype).eps if eps is None else float(eps)
    x = torch.arange(3 * len(weight), device=weight.device, dtype=torch.float64)
    x = (x * 1.7).sin().view(1, 3, -1) + 0.3
    # Not in bfloat16, whose rounding would hide the difference.
    wide = torch.promote_types(weight.dtype, torch.float32)
    for centred in (False, True):
        at = [(x * size).to(wide) for size in (1.0, eps**0.5)]
        if all(_is_norm(module, own, rows, eps, centred) for rows in at):
            return Norm(eps, centred)
    return None


def _is_norm(
    module: nn.Module, own: dict[str, nn.Parameter], x: Tensor, eps: float, centred: bool
) -> bool:
    try:
        zero, one, two = (_at_weight(module, own, x, value) for value in (0.0, 1.0, 2.0))
    except (TypeError, RuntimeError, AttributeError, ValueError):
        return False
    if not isinstance(zero, Tensor) or zero.shape != x.shape:
        return False
    deviation = x - x.mean(-1, keepdim=True) if centred else x
    expected = deviation * torch.rsqrt(deviation.square().mean(-1, keepdim=True) + eps)
    close: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-3}
    return torch.allclose(one - zero, expected, **close) and torch.allclose(
        two - zero, 2.0 * expected, **close
    )


def _at_weight(module: nn.Module, own: dict[str, nn.Parameter], x: Tensor, value: float) -> Tensor:
    """A norm's output of x where its weight is `value` everywhere, and its bias 0."""
    given = {
        name: torch.full_like(p, value if name == "weight" else 0.0, dtype=x.dtype)
        for name, p in own.items()
    }
    found: Tensor = functional_call(module, given, (x,))
    return found


def own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """(name of the layer, layer, name of the parameter in it, parameter), of all layers."""
    for name, layer in module.named_modules():
        for own, parameter in layer.named_parameters(recurse=False):
            yield name, layer, own, parameter


# The hooks through which goes what autograd saves, as under activation checkpointing, or None.
_saved_elsewhere = torch._C._autograd._top_saved_tensors_default_hooks


SECOND = "taps see one backward of what they watch, while they watch it; this is another one"


class Input:
    """What layers are given, the same tensor q, k and v, or gate and up, and what the backward has
    brought of their outputs. It is the hook on the first one's, whose gradient comes last."""

    __slots__ = ("brought", "owner", "taps", "x")

    def __init__(self, owner: Taps) -> None:
        self.owner = owner
        owner.inputs.append(self)
        self.x: Tensor | None = None  # where autograd brings it with the gradients: not yet
        self.taps: list[Tap] = []
        self.brought: list[list[Tensor]] = []  # for every tap its output's gradient: none, then one

    def __call__(self, dy: Tensor) -> None:
        if not self.brought:
            raise RuntimeError(SECOND)
        self.brought[0].append(dy)
        for own in self.brought:
            if not own:  # it comes later, or not at all: the end of `Taps.watching` will show
                return
        self.add()

    def takes(self, tap: Tap) -> bool:
        """Whether a layer that is given the same tensor belongs here: not where this one has been
        summed, or stems from other taps, or where the layer has seen it and is computed again."""
        return bool(self.brought) and self.owner is tap.taps and tap not in self.taps

    def watch(self, tap: Tap, y: Tensor, x: Tensor) -> Tensor:
        """y, the output of a layer for x, whose gradient will be seen when the backward comes."""
        brought: list[Tensor] = []
        hook = brought.append if self.taps else self
        self.taps.append(tap)
        self.brought.append(brought)
        if _saved_elsewhere(False) is not None:
            return Kept.apply(y, x.detach(), self, hook)
        # At a fraction of the cost of a Function: the graph of a small model is a few hundred nodes
        # long. For a weight's gradient autograd keeps the same tensor.
        if tap.weight is not None:
            self.x = x
        node = y.grad_fn
        if node is None or y._backward_hooks is not None:
            y.register_hook(hook)
        else:
            # The same without the handle by which it could be removed: what that does besides takes
            # two thirds of its time. Others' handles count from 0.
            y._backward_hooks = OrderedDict({-1: hook})
            node._register_hook_dict(y)
        return y

    def add(self) -> None:
        """What has been brought, of each tap that stands here, to the sums."""
        x, taps, parts = self.x, self.taps, self.owner.parts
        gradients = [own.pop() for own in self.brought]  # out of lists that hang on the graph
        if any(self.brought):
            raise RuntimeError(SECOND)
        self.x, self.brought = None, []
        layers = taps[0].layers
        if layers is None or layers.taps != taps:
            layers = taps[0].layers = self.owner.layers_of(taps)
        assert parts is not None
        layers.add(parts, x, gradients)


class Kept(torch.autograd.Function):
    """The identity on a layer's output. It keeps the layer's input and tells the taps of it and of
    the gradient that comes back; it hands that on as it is.

    What it keeps goes through autograd's saved tensors, so that activation checkpointing drops it
    and computes it again; the forward has no effects and may run twice.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, shared: Input, brought: Callable[[Tensor], None]
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.shared, ctx.brought = shared, brought
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        (ctx.shared.x,) = ctx.saved_tensors
        ctx.brought(dy)
        return dy, None, None, None


def as_autocast(x: Tensor) -> Tensor:
    """x in the dtype in which autocast would multiply it: the layer then keeps the same tensor."""
    kind = "cpu" if x.is_cpu else x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64 or not x.is_floating_point():
        return x
    return x.to(torch.get_autocast_dtype(kind))


class TokenRows:
    """(1, ..., T, ..., D) -> (T, ..., D), tokens first.

    A norm of heads sees (1, T, H, D) or, after a transpose, (1, H, T, D). Where H = T the shape
    does not tell which; what the layer saw before does, and else the strides: heads lie within
    tokens, as they come out of one row's product.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.dim: int | None = None  # of the tokens among (1, A, B, D)

    def __call__(self, x: Tensor, *tokens: int) -> Tensor:
        """x (T, D), (1, T, D), (1, T, H, D) or (1, H, T, D), for one T of ``tokens``: all of the
        batch, and those that a narrowed block reads where the layer may see them alone. One head
        is none: (T, D)."""
        if x.dim() >= 3 and x.shape[0] == 1:
            x = x[0]
            if x.dim() == 2 and x.shape[0] in tokens:
                return x
        if x.dim() == 3:
            dim = self._dim(x, tokens)
            x = x.transpose(0, 1) if dim == 1 else x
            x = x.squeeze(1)  # latent attention's linear layers see (1, 1, T, D)
        if x.dim() > 3 or x.shape[0] not in tokens:
            raise ValueError(
                f"{self.name}: sees {tuple(x.shape)} where the batch has {tokens[0]} tokens, one "
                "row each: layers that are given some of the tokens, as experts are, have no taps. "
                "Set track: head."
            )
        return x

    def _dim(self, x: Tensor, tokens: Sequence[int]) -> int:
        fits = [dim for dim in (0, 1) if x.shape[dim] in tokens]
        if len(fits) == 1:
            self.dim = fits[0]
        elif fits and self.dim is None:
            return 0 if x.stride(0) >= x.stride(1) else 1
        return self.dim or 0
