"""Cases for the head ops, and the rule by which a result is compared with float64 and plain torch.

Shapes: R rows, D hidden, V vocab, S segments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from fastpref_kernels import _launch, _prepare, row_sums
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Where the Triton backend is tested: on a GPU, or interpreted (tests/conftest.py).
TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Orders of rounding that an fp32 sum of this kind may lose where plain torch happens to lose none.
FEW = 8.0


def set_width(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """Tiles of `width` entries in the torch backend, of 10 or more summed by parts."""
    monkeypatch.setattr(_launch, "tile_width", lambda dim, vocab, dtype: min(width, vocab))
    monkeypatch.setattr(_prepare, "_remembered", _prepare._prepare)
    monkeypatch.setattr(row_sums, "FEW", 10)


class Onlooker(TorchDispatchMode):
    """Names the ops that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Case:
    hidden: Tensor  # (R, D)
    weight: Tensor  # (V, D)
    target: Tensor  # (R,)
    segment_id: Tensor | None  # (R,)
    num_segments: int
    grad: Tensor  # (S,) gradient that arrives at logp
    bias: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)
    train: tuple[str, ...] = ("hidden", "weight", "bias")

    def to(self, dtype: torch.dtype) -> Case:
        """The same values at another dtype: exact when widening."""
        wide = torch.promote_types(dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(
            self,
            hidden=self.hidden.to(dtype),
            weight=self.weight.to(dtype),
            grad=self.grad.to(wide),
            bias=bias,
        )

    def on(self, device: torch.device | str) -> Case:
        """The same tensors on another device."""
        names = ("hidden", "weight", "target", "segment_id", "grad", "bias")
        return replace(
            self, **{n: t.to(device) for n in names if (t := getattr(self, n)) is not None}
        )


def make_case(
    rows: int,
    dim: int,
    vocab: int,
    *,
    dtype: torch.dtype = torch.float64,
    segments: int | None = None,
    spread: float = 2.0,
    gap: float = 0.0,
    bias: bool = False,
    seed: int = 0,
    **options: Any,
) -> Case:
    """Random case with logits of standard deviation `spread`, the target's raised by `gap`.

    `segments` None: one per row; else random lengths, some of them 0.
    """
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab, dim, generator=g, dtype=torch.float64)
    target = torch.randint(0, vocab, (rows,), generator=g)
    hidden = torch.randn(rows, dim, generator=g, dtype=torch.float64) * (spread / dim**0.5)
    if gap:
        lead = weight[target]
        hidden += gap * lead / lead.square().sum(1, keepdim=True)
    segment_id = None
    if segments is not None:
        segment_id = torch.randint(0, max(segments, 1), (rows,), generator=g).sort().values.int()
    count = rows if segments is None else segments
    grad = torch.randn(count, generator=g, dtype=torch.float64)
    values = torch.randn(vocab, generator=g, dtype=torch.float64) if bias else None
    case = Case(hidden, weight, target, segment_id, count, grad, values, options)
    # Rounded once, so that every dtype of one case holds the same numbers.
    return case.to(torch.bfloat16 if dtype == torch.bfloat16 else dtype)


def run(function: Callable[..., Any], case: Case, **more: Any) -> dict[str, Tensor]:
    """logp and the gradients of what `case.train` names, with `case.grad` arriving at logp."""
    leaves = {
        name: tensor.detach().clone().requires_grad_(name in case.train)
        for name in ("hidden", "weight", "bias")
        if (tensor := getattr(case, name)) is not None
    }
    out = function(
        leaves["hidden"],
        leaves["weight"],
        case.target,
        case.segment_id,
        num_segments=case.num_segments,
        bias=leaves.get("bias"),
        **case.options,
        **more,
    )
    result = {"logp": out.logp.detach()}
    trained = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    grads = torch.autograd.grad(out.logp, list(trained.values()), case.grad.to(out.logp.dtype))
    result.update(zip(trained, grads, strict=True))
    return result


def assert_no_worse(
    ours: dict[str, Tensor],
    naive: dict[str, Tensor],
    truth: dict[str, Tensor],
    dtype: torch.dtype,
    *,
    scale: float = 1.0,
    floor: float = 0.0,
) -> None:
    """Error at most 2 max(plain torch's, FEW eps scale): overall, and per row of hidden's gradient.

    eps of the dtype a result is returned in. `scale`: size of the numbers that were subtracted to
    form a result of size 1; logits of size z move 1 - p by eps z, relatively. `floor`: absolute
    error of the truth itself, where float64 has no digits left either (1 - p below 1e-16).
    """
    assert ours.keys() == truth.keys() == naive.keys()
    for name, true in truth.items():
        assert ours[name].dtype == (naive[name].dtype if name != "logp" else ours[name].dtype)
        eps = torch.finfo(ours[name].dtype).eps
        _check(name, ours[name], naive[name], true, eps * scale, floor, rows=False)
        if name == "hidden":
            _check(name, ours[name], naive[name], true, eps * scale, floor, rows=True)


def _check(
    name: str,
    ours: Tensor,
    naive: Tensor,
    truth: Tensor,
    unit: float,
    floor: float,
    *,
    rows: bool,
) -> None:
    def size(x: Tensor) -> Tensor:
        return x.double().norm(dim=-1) if rows else x.double().norm().unsqueeze(0)

    error, plain = size(ours.double() - truth), size(naive.double() - truth)
    # Per row the bound may not lean on plain torch: on confident rows its gradient has no digits.
    bound = FEW * unit * size(truth) + torch.finfo(torch.float32).tiny + floor
    if not rows:
        bound = torch.maximum(bound, plain)
    bad = ~(error <= 2 * bound)
    if bad.any():
        i = int((error / bound).nan_to_num(torch.inf).argmax())
        raise AssertionError(
            f"{name}{f' row {i}' if rows else ''}: error {float(error[i]):.3e}, plain torch's "
            f"{float(plain[i]):.3e}, bound {2 * float(bound[i]):.3e}, "
            f"size {float(size(truth)[i]):.3e}"
        )


def call(function: Callable[..., Any], case: Case, group_size: int = 1, **more: Any) -> Any:
    """`function`, ours or the oracle, on the case's own tensors; ``more`` over its options."""
    return function(
        case.hidden,
        case.weight,
        case.target,
        case.segment_id,
        num_segments=case.num_segments,
        group_size=group_size,
        bias=case.bias,
        **case.options | more,
    )
