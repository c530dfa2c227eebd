"""Cost of every pair's norms and sketches beside the backward of the linear layers they belong to.

A layer is a Llama's: q, k, v of one input, o, gate and up of one input, down. Its backward is what
autograd does for the seven weights: the gradient of the input and of the weight, two products each
(attention, norms and activations left out, so that shares come out too large rather than too
small). Norms are `linear_norms` with one Gram matrix of a shared input, sketches `linear_sketch` of
each weight. Pairs have equal lengths. `run` is what `python -m bench gpu --part op` calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from fastpref_kernels import linear_norms, linear_sketch, reference
from torch import Tensor

from bench import measure
from bench.measure import Quantiles

WITHIN = 5e-3  # of a norm, before anything is timed
K = 32  # sketch size
Clock = Callable[[Callable[[], object], torch.device], float]


@dataclass(frozen=True)
class Layer:
    """Widths of a Llama's layer."""

    name: str
    hidden: int
    key_value: int
    inner: int

    @property
    def linears(self) -> list[tuple[int, tuple[int, ...]]]:
        """(inputs, outputs of the weights that share them)."""
        d, kv, inner = self.hidden, self.key_value, self.inner
        return [(d, (d, kv, kv)), (d, (d,)), (d, (inner, inner)), (inner, (d,))]


LLAMA_8B = Layer("Llama-3-8B", 4096, 1024, 14336)
QWEN_HALF = Layer("Qwen2.5-0.5B", 896, 128, 4864)
TINY = Layer("fastpref-tiny", 256, 128, 688)


@dataclass(frozen=True)
class Case:
    """T tokens in pairs of `length` tokens each."""

    layer: Layer
    tokens: int
    length: int

    @property
    def name(self) -> str:
        """As it is called in records."""
        return f"{self.layer.name} T={self.tokens} pairs of {self.length}"


GPU_CASES = [Case(LLAMA_8B, 8192, length) for length in (512, 128, 2048, 4096)]
DRY_CASES = [Case(TINY, 256, 64)]


class Session(Protocol):
    """What this module needs of `bench.gpu.Session`."""

    device: Any
    dry: bool
    repeats: int
    notes: dict[str, Any]
    failed: list[str]

    def has_time(self, case: str) -> bool:
        """Whether another case may begin."""
        ...

    def write(self, line: Mapping[str, Any]) -> None:
        """Put down a line."""
        ...


def run(session: Session, seconds_of: Clock) -> dict[str, dict[str, float] | None]:
    """Measure every case there is time for; shares of the backward by name."""
    values: dict[str, dict[str, float] | None] = {}
    lines = {}
    for case in DRY_CASES if session.dry else GPU_CASES:
        shares: dict[str, dict[str, float]] = {}
        if session.has_time(f"norms, {case.name}"):
            facts, shares = measure_case(case, session.device, session.repeats, seconds_of)
            lines[case.name] = facts
            session.write({"case": f"norms, {case.name}", **facts})
            print(table_of(case, facts))
        for what in ("norms", "sketch"):
            values[f"{what}_share_{case.length}"] = shares.get(what)
    session.notes["norms"] = lines
    return values


class Work:
    """The tensors of one case, and what is timed on them."""

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        g = torch.Generator(device).manual_seed(seed)

        def make(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, device=device).to(dtype)

        self.pairs = case.tokens // case.length
        self.counts = [case.length] * self.pairs
        self.segment_id = torch.arange(self.pairs, device=device, dtype=torch.int32)
        self.segment_id = self.segment_id.repeat_interleave(case.length)
        self.inputs, self.outputs, self.weights = [], [], []
        for d, widths in case.layer.linears:
            self.inputs.append(make(case.tokens, d))
            self.outputs.append([make(case.tokens, p) for p in widths])
            self.weights.append([make(p, d) for p in widths])

    def backward(self) -> None:
        """Gradients of inputs and of weights, of all seven."""
        for x, many, weights in zip(self.inputs, self.outputs, self.weights, strict=True):
            for dy, weight in zip(many, weights, strict=True):
                torch.mm(dy, weight)
                torch.mm(dy.t(), x)

    def norms(self) -> Tensor:
        """(P,) squared norms over the layer's seven weights."""
        same: dict[str, Any] = {"num_segments": self.pairs, "counts": self.counts}
        parts = [
            linear_norms(x, many, self.segment_id, **same)
            for x, many in zip(self.inputs, self.outputs, strict=True)
        ]
        return torch.stack(parts).sum(0)

    def sketch(self) -> Tensor:
        """(P, K, K) sketch over the layer's seven weights."""
        same: dict[str, Any] = {"num_segments": self.pairs, "counts": self.counts, "seed": 0}
        parts = [
            linear_sketch(x, dy, self.segment_id, K, key=f"{i}.{j}", **same)
            for i, (x, many) in enumerate(zip(self.inputs, self.outputs, strict=True))
            for j, dy in enumerate(many)
        ]
        return torch.stack(parts).sum(0)

    def error(self) -> float:
        """Largest relative error of a norm of the first pair or two, against explicit gradients."""
        pairs = min(2, self.pairs)
        rows = sum(self.counts[:pairs])
        truth = torch.zeros(pairs, dtype=torch.float64)
        for x, many in zip(self.inputs, self.outputs, strict=True):
            for dy in many:
                wide = (x[:rows].float(), dy[:rows].float(), self.segment_id[:rows])
                truth += reference.linear_norms(*wide, num_segments=pairs).double().cpu()
        ours = self.norms()[:pairs].double().cpu()
        return float(((ours.sqrt() - truth.sqrt()) / truth.sqrt()).abs().max())


def measure_case(
    case: Case, device: torch.device, repeats: int, seconds_of: Clock
) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """Facts of a case, and shares of the backward; ValueError where a norm is wrong."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    works = [Work(case, device, dtype, seed) for seed in (0, 1)]
    error = works[0].error()
    if not error <= WITHIN:
        raise ValueError(f"bench norms: {case.name}: a norm is off by {error:.1e}; not timed.")
    names = ("backward", "norms", "sketch")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    warm_up = 2
    for repeat, name in measure.interleaved(names, repeats + warm_up):
        took = seconds_of(getattr(works[repeat % 2], name), device)
        if repeat >= warm_up:
            seconds[name].append(took)
    facts = {
        "error": error,
        "seconds": {name: asdict(Quantiles.of(own)) for name, own in seconds.items()},
    }
    shares = {}
    for name in names[1:]:
        own = Quantiles.of([a / b for a, b in zip(seconds[name], seconds["backward"], strict=True)])
        shares[name] = {"value": own.q50, "q20": own.q20, "q80": own.q80}
    return {**facts, "shares": shares}, shares


def table_of(case: Case, facts: Mapping[str, Any]) -> str:
    """A case for people."""
    lines = [f"{case.name}, norms to {facts['error']:.0e}"]
    for name, spread in facts["seconds"].items():
        share = facts["shares"].get(name)
        shown = f"{100 * share['value']:6.1f} % of the backward" if share else ""
        lines.append(
            f"  {name:10}{1e3 * spread['q50']:9.2f} ms ({1e3 * spread['q20']:.2f} to "
            f"{1e3 * spread['q80']:.2f}) {shown}"
        )
    return "\n".join(lines)
