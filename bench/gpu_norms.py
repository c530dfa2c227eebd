"""What norms of the head's gradients cost on a GPU: part of `python -m bench gpu --part op`.

Forward and backward of `linear_logprob` with norms over the same without, interleaved in one run,
at the headline shape with sequences of 512 rows: each for itself, and as pairs (groups of two).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from fastpref_kernels import linear_logprob, reference
from torch import Tensor

from bench import measure
from bench.gpu import Session
from bench.measure import Quantiles
from bench.norm_cases import Clock

# Rows, hidden, vocabulary, rows of a sequence.
SIZES, DRY_SIZES = (8192, 4096, 128256, 512), (64, 16, 300, 8)
# name -> norms, group_size
CONTENDERS: dict[str, tuple[str | None, int]] = {
    "plain": (None, 1),
    "exact": ("exact", 1),
    "exact_pairs": ("exact", 2),
    "sketch": ("sketch", 1),
    "sketch_pairs": ("sketch", 2),
}
WITHIN = 2e-2  # of a norm of bfloat16 operands, before anything is timed


def run(session: Session, seconds_of: Clock) -> dict[str, dict[str, float] | None]:
    """Time with norms over time without, less 1, by name; None where there was no time left."""
    values: dict[str, dict[str, float] | None] = {
        f"head_{name}_extra": None for name in CONTENDERS if name != "plain"
    }
    label = "norms of the head"
    if not session.has_time(label):
        return values
    case = _Case(session.device, DRY_SIZES if session.dry else SIZES)
    error = case.error()
    if not error <= WITHIN:
        session.failed.append(f"{label}: a norm is off by {error:.1e}; not timed")
        return values
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    warm_up = 2
    for repeat, name in measure.interleaved(list(CONTENDERS), session.repeats + warm_up):
        took = seconds_of(case.step(*CONTENDERS[name]), session.device)
        if repeat >= warm_up:
            seconds[name].append(took)
    shown = {name: asdict(Quantiles.of(own)) for name, own in seconds.items()}
    session.write({"case": label, "error": error, "seconds": shown})
    print(f"{label}, {case.name}; norms to {error:.0e}")
    for name, own in seconds.items():
        extra = Quantiles.of([a / b - 1 for a, b in zip(own, seconds["plain"], strict=True)])
        print(f"  {name:14}{1e3 * shown[name]['q50']:9.2f} ms {100 * extra.q50:+7.2f} %")
        if name != "plain":
            values[f"head_{name}_extra"] = {
                "value": extra.q50,
                "q20": extra.q20,
                "q80": extra.q80,
            }
    return values


class _Case:
    """The tensors of one shape."""

    def __init__(self, device: torch.device, sizes: tuple[int, int, int, int]) -> None:
        rows, dim, vocab, self.length = sizes
        self.name = f"R={rows} D={dim} V={vocab}, sequences of {self.length} rows"
        self.segments = rows // self.length
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        g = torch.Generator(device).manual_seed(0)

        def normal(size: int, scale: float) -> Tensor:
            return (torch.randn(size, dim, generator=g, device=device) * scale).to(dtype)

        # Logits of standard deviation 2, whatever D is.
        self.hidden = normal(rows, 1.0).requires_grad_()
        self.weight = normal(vocab, 2.0 / dim**0.5).requires_grad_()
        self.target = torch.randint(0, vocab, (rows,), generator=g, device=device)
        ids = torch.arange(self.segments, dtype=torch.int32, device=device)
        self.segment_id = ids.repeat_interleave(self.length)

    def step(self, norms: str | None, group_size: int) -> Callable[[], None]:
        """Forward and backward of hidden and weight."""
        same: dict[str, Any] = {"num_segments": self.segments, "group_size": group_size}

        def call() -> None:
            self.hidden.grad = self.weight.grad = None
            inputs = (self.hidden, self.weight, self.target, self.segment_id)
            linear_logprob(*inputs, norms=norms, **same).logp.sum().backward()

        return call

    def error(self) -> float:
        """Relative error of the first sequence's norm, against its gradient in float32."""
        few = slice(0, self.length)
        inputs = (self.hidden[few].detach(), self.weight.detach(), self.target[few])
        ids = self.segment_id[few]
        ours = linear_logprob(*inputs, ids, num_segments=1, norms="exact").gram
        wide = (inputs[0].float(), inputs[1].float(), inputs[2])
        truth = reference.linear_logprob(*wide, ids, num_segments=1, norms="exact").gram
        assert ours is not None and truth is not None
        return float((ours / truth - 1).abs().sqrt().max())
