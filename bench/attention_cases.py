"""One layer's attention over packed pairs, forward and backward: every backend that is there.

The heads are Llama-3-8B's. A contender takes packed queries, keys and values, gathers included, and
is timed only where its output and gradients agree with dense blocks in float32. Layouts are built
beforehand, as a batch's 32 layers share one. `run` is what `bench gpu --part op` calls, `checked`
what `--part correctness` measures with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from bench import measure
from bench.measure import Quantiles
from fastpref import attention_reference
from fastpref.attention_backends import KINDS, Backend, find_backend
from fastpref.attention_dense import build_dense
from fastpref.attention_layout import Terms, on_device, rectangle
from fastpref.attention_varlen import build_varlen

WITHIN = 2e-2  # relative error of output and gradients in bfloat16, before anything is timed
PLAIN = Terms()
Clock = Callable[[Callable[[], object], torch.device], float]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """Pairs of these fed lengths; heads of a Llama-3-8B unless said otherwise."""

    name: str
    lengths: tuple[tuple[int, ...], ...]
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128


class Session(Protocol):
    """What this module needs of `bench.gpu.Session`."""

    device: Any
    dry: bool
    repeats: int
    notes: dict[str, Any]
    failed: list[str]
    missing: dict[str, str]

    def has_time(self, case: str) -> bool:
        """Whether another case may begin."""
        ...

    def write(self, line: Mapping[str, Any]) -> None:
        """Put down a line."""
        ...


def cases(dry: bool) -> list[Case]:
    """The most important first; about 8192 tokens each."""
    if dry:
        return [
            Case("512/256", ((12, 6, 6), (12, 6, 6)), 4, 2, 16),
            Case("HH-like", ((9, 7, 4), (3, 2, 8), (11, 0, 1)), 4, 2, 16),
            Case("persona-like", ((9, 0, 0), (7, 0, 0)), 4, 2, 16),
        ]
    rng = np.random.default_rng(0)

    def drawn(median: float, spread: float, least: int) -> int:
        return max(least, int(median * np.exp(spread * rng.standard_normal())))

    hh: list[tuple[int, ...]] = []
    persona: list[tuple[int, ...]] = []
    while sum(map(sum, hh)) < 8192:
        hh.append((drawn(110, 0.7, 8), drawn(40, 0.8, 1), drawn(40, 0.8, 1)))
    while sum(map(sum, persona)) < 8192:  # answers of one token, which are not fed
        persona.append((drawn(45, 0.25, 20), 0, 0))
    return [
        Case("512/256", ((511, 256, 256),) * 8),
        Case("HH-like", tuple(hh)),
        Case("persona-like", tuple(persona)),
        Case("128/512", ((127, 512, 512),) * 7),
        Case("2048/1024", ((2047, 1024, 1024),) * 2),
    ]


def backends(session: Session, dtype: torch.dtype) -> list[tuple[str, Backend]]:
    """(contender, backend): those that are here, deterministic and not; notes the others.

    On the CPU the plain stand-in takes their place.
    """
    found = []
    for name in KINDS:
        for deterministic in (True, False):
            backend = find_backend(name, session.device, dtype, deterministic=deterministic)
            if isinstance(backend, str):
                session.missing[f"attention: {name}"] = backend
                continue
            found.append((name if deterministic else f"{name} not deterministic", backend))
    if session.device.type != "cuda":
        found.append(("stand-in", Backend("stand-in", attention_reference.varlen)))
    return found


def run(session: Session, seconds_of: Clock) -> dict[str, dict[str, float] | None]:
    """Measure every case there is time for; seconds of sdpa over those of each other one."""
    dtype = torch.bfloat16 if session.device.type == "cuda" else torch.float32
    values: dict[str, dict[str, float] | None] = {}
    lines = {}
    for case in cases(session.dry):
        if not session.has_time(f"attention, {case.name}"):
            continue
        facts = measure_case(session, case, dtype, seconds_of)
        lines[case.name] = facts
        session.write({"case": f"attention, {case.name}", "ops": facts})
        print(table_of(case, facts))
        for name, found in facts.items():
            if "seconds" in found and "seconds" in facts["sdpa"] and name != "sdpa":
                ratio = facts["sdpa"]["seconds"]["q50"] / found["seconds"]["q50"]
                key = f"attention_{case.name}_{name}_vs_sdpa".replace(" ", "_")
                values[key] = {"value": ratio}
    session.notes["attention"] = lines
    return values


def measure_case(
    session: Session, case: Case, dtype: torch.dtype, seconds_of: Clock
) -> dict[str, dict[str, Any]]:
    """Contender -> seconds and errors, or why there are none."""
    tensors = make_tensors(case, dtype, session.device)
    attends: dict[str, Attend] = {"sdpa": _dense(case, session.device)}
    for name, backend in backends(session, dtype):
        attends[name] = _varlen(case, session.device, backend)
    if session.device.type == "cuda":
        attends["flex"] = _flex(case, session.device)
    truth = results_of(_dense(case, session.device), [x.float() for x in tensors])
    found: dict[str, dict[str, Any]] = {name: {} for name in attends}
    ready = []
    for name, attend in attends.items():
        try:
            errors = errors_of(results_of(attend, tensors), truth)
            found[name]["errors"] = errors
            if not max(errors.values()) <= WITHIN:
                raise ValueError(f"wrong: {errors}")
            ready.append(name)
        except Exception as error:  # flex does not compile here, a kernel is not there, ...
            found[name]["why"] = f"{type(error).__name__}: {str(error)[:200]}"
            # Dense blocks and the run's own backends must be right wherever they are.
            if name != "flex":
                session.failed.append(f"attention, {case.name}, {name}: {found[name]['why']}")
    del truth
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    warm_up = 2
    other = make_tensors(case, dtype, session.device, seed=1)
    for repeat, name in measure.interleaved(ready, session.repeats + warm_up):
        given = (tensors, other)[repeat % 2]
        attend = attends[name]
        took = seconds_of(lambda: results_of(attend, given), session.device)  # noqa: B023
        if repeat >= warm_up:
            seconds[name].append(took)
    for name, own in seconds.items():
        found[name]["seconds"] = asdict(Quantiles.of(own))
    return found


def make_tensors(
    case: Case, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> list[Tensor]:
    """q, k, v and the gradient of the output, as a model hands them over, one sequence packed."""
    tokens = sum(map(sum, case.lengths))
    generator = torch.Generator(device).manual_seed(seed)
    return [
        torch.randn(tokens, heads, case.dim, generator=generator, device=device).to(dtype)
        for heads in (case.heads, case.kv_heads, case.kv_heads, case.heads)
    ]


def results_of(attend: Attend, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Output, and gradients of queries, keys and values."""
    *leaves, grad = tensors
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def errors_of(ours: Sequence[Tensor], truth: Sequence[Tensor]) -> dict[str, float]:
    """Relative errors by Frobenius norm."""
    return {
        name: float((a.to(b.dtype) - b).norm() / b.norm().clamp(min=1e-30))
        for name, a, b in zip(("out", "dq", "dk", "dv"), ours, truth, strict=True)
    }


def _dense(case: Case, device: torch.device, terms: Terms = PLAIN) -> Attend:
    layout = build_dense(case.lengths, device)
    return lambda q, k, v: layout.attend(q, k, v, terms)


def _varlen(case: Case, device: torch.device, backend: Backend, terms: Terms = PLAIN) -> Attend:
    layout = build_varlen(case.lengths, device, backend)
    return lambda q, k, v: layout.attend(q, k, v, terms)


def checked(
    case: Case,
    backend: Backend,
    device: torch.device,
    dtype: torch.dtype,
    terms: Terms,
) -> tuple[dict[str, float], dict[str, float], bool]:
    """Errors of a backend and of sdpa in ``dtype`` against float64; whether bits came twice."""
    tensors = make_tensors(case, dtype, device)
    truth = results_of(_dense(case, device, terms), [x.double() for x in tensors])
    attend = _varlen(case, device, backend, terms)
    first, second = (results_of(attend, tensors) for _ in range(2))
    dense = results_of(_dense(case, device, terms), tensors)
    same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    return errors_of(first, truth), errors_of(dense, truth), same


def _flex(case: Case, device: torch.device) -> Attend:
    """torch's flex_attention, compiled, over the packed tokens with a mask of blocks."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    parts = rectangle(case.lengths)
    pair_of, part_of = (
        np.repeat(index.ravel(), parts.ravel()) for index in np.indices(parts.shape)
    )
    pair, part = on_device([pair_of, part_of], device)
    tokens = len(pair)

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        related = (part[key] == 0) | (part[key] == part[query])
        return (pair[query] == pair[key]) & (query >= key) & related

    mask = create_block_mask(sees, None, None, tokens, tokens, device=str(device))
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out: Any = compiled(q, k, v, block_mask=mask, enable_gqa=True)
        first: Tensor = out[0]
        return first.transpose(0, 1)

    return attend


def table_of(case: Case, facts: Mapping[str, Mapping[str, Any]]) -> str:
    """A case for people."""
    lines = [f"attention, {case.name}, {sum(map(sum, case.lengths))} tokens"]
    for name, found in facts.items():
        if "seconds" not in found:
            lines.append(f"  {name:36}{found.get('why', 'not timed')}")
            continue
        spread = found["seconds"]
        shown = "  ".join(f"{k} {v:.1e}" for k, v in found["errors"].items())
        lines.append(
            f"  {name:36}{1e3 * spread['q50']:9.3f} ms ({1e3 * spread['q20']:.3f} to "
            f"{1e3 * spread['q80']:.3f})  {shown}"
        )
    return "\n".join(lines)
