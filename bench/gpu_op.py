"""The `op` part of `bench gpu`: a DPO step of the head, forward and backward, against all others.

Every time stands beside its error against float64 and as a multiple of the floor: the products that
nobody can avoid (3 full, 2 with the head frozen, 1 without gradient) at the rate measured here, or
the bytes of the weight and its gradient at the bandwidth measured here, whichever takes longer.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench import attention_cases, head_norms, head_ops, measure, norm_cases
from bench.gpu import Session
from bench.head_ops import HeadOp, Problem
from bench.measure import Quantiles

CONTENDERS = (
    "ours",
    "trl",
    "quack_inplace",
    "liger_dpo",
    "liger_cute",
    "eager",
    "compile",
    "ours_cache0",
    "quack",
    "cce",
    "cce_exact",
    "liger_ce",
    "linear_ce",
    "linear_ce_chunked",
)
MODES = ("full", "frozen", "nograd")
PRODUCTS = {"full": 3, "frozen": 2, "nograd": 1}
# What a bfloat16 op may be off and still be timed: rounded logits cost others a percent or so.
WITHIN = {"hidden": 0.05, "weight": 0.05, "rows": 0.05}
SLOW = 3.0  # times as slow as ours in its first timed call: two more turns are enough


@dataclass(frozen=True)
class Case:
    """A shape; R rows in pairs of two completions of equal length."""

    rows: int
    dim: int
    vocab: int
    softcap: float | None = None

    @property
    def name(self) -> str:
        """As it is called in records."""
        cap = "" if self.softcap is None else f" softcap {self.softcap:g}"
        return f"R={self.rows} D={self.dim} V={self.vocab}{cap}"


SHAPES = (
    (4096, 128256, None),
    (896, 151936, None),
    (2048, 128256, None),
    (3584, 256000, 30.0),
    (4096, 32000, None),
)
HEADLINE = Case(8192, 4096, 128256)
LENGTH = 512  # rows of a completion


def cases(dry: bool) -> list[tuple[Case, str]]:
    """(shape, mode), the most important first."""
    if dry:
        small = [Case(64, 16, 300), Case(32, 8, 200, 5.0)]
        return [(case, mode) for case in small for mode in MODES]
    order = [(Case(rows, *shape), mode) for rows in (8192, 1024, 32768) for shape in SHAPES
             for mode in MODES]  # fmt: skip
    full = [pair for pair in order if pair[1] == "full"]
    head = [pair for pair in order if pair[0] == HEADLINE]
    return list(dict.fromkeys([*head, *full, *order]))


def run(session: Session) -> dict[str, dict[str, float] | None]:
    """Measure every case there is time for; the values that targets are stated for."""
    ceilings = measure_ceilings(session)
    names = CONTENDERS if session.only is None else ("ours", *session.only)
    ops, missing = head_ops.load(list(dict.fromkeys(names)))
    session.missing |= missing
    session.notes["ceilings"] = ceilings
    print(f"copy {ceilings['copy_gb_s']:.0f} GB/s, products {ceilings['tflop_s']:.1f} TFLOP/s")
    lines: list[dict[str, Any]] = []
    norms: dict[str, dict[str, float] | None] = {}
    attention: dict[str, dict[str, float] | None] = {}
    for i, (case, mode) in enumerate(cases(session.dry)):
        if i == len(MODES):  # after the headline's modes
            norms = _norm_values(session)
            with released(session.device):
                attention = attention_cases.run(session, seconds_of)
        label = f"{case.name} {mode}"
        if not session.has_time(label):
            continue
        with released(session.device):
            line = measure_case(session, ops, case, mode, ceilings)
        session.write(line)
        lines.append(line)
        print(table_of(line))
    session.notes["cases"] = {f"{line['case']} {line['mode']}": line["ops"] for line in lines}
    return headline_values(lines) | norms | attention


def _norm_values(session: Session) -> dict[str, dict[str, float] | None]:
    """What norms cost: those of the head, and those of a layer of Llama-3-8B."""
    values: dict[str, dict[str, float] | None] = {}
    for part in (head_norms.run_on, norm_cases.run):
        with released(session.device):
            values |= part(session, seconds_of)
    return values


def measure_ceilings(session: Session) -> dict[str, float]:
    """Bandwidth of a device-to-device copy, bytes read plus written, and rate of a product."""
    cuda = session.device.type == "cuda"
    size, edge = (2**31, 8192) if cuda else (2**22, 128)
    dtype = torch.bfloat16 if cuda else torch.float32
    source = torch.randn(size // 4, device=session.device)
    target = torch.empty_like(source)
    copy = median(seconds_of(lambda: target.copy_(source), session.device) for _ in range(12))
    a, b = (torch.randn(edge, edge, device=session.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    for _ in range(3):
        torch.mm(a, b, out=out)
    product = median(seconds_of(lambda: torch.mm(a, b, out=out), session.device) for _ in range(20))
    return {"copy_gb_s": 2 * size / copy / 1e9, "tflop_s": 2 * edge**3 / product / 1e12}


def floor_of(case: Case, mode: str, ceilings: Mapping[str, float]) -> float:
    """Seconds that the unavoidable takes."""
    flops = PRODUCTS[mode] * 2.0 * case.rows * case.dim * case.vocab
    weights = 2.0 * case.dim * case.vocab * (2 if mode == "full" else 1)
    states = 2.0 * case.rows * case.dim * (1 if mode == "nograd" else 2)
    moved = (weights + states) / (ceilings["copy_gb_s"] * 1e9)
    return max(flops / (ceilings["tflop_s"] * 1e12), moved)


def measure_case(
    session: Session,
    ops: Sequence[HeadOp],
    case: Case,
    mode: str,
    ceilings: Mapping[str, float],
) -> dict[str, Any]:
    """One line: of every contender errors, seconds, peak memory, or why there are none."""
    dtype = torch.bfloat16 if session.device.type == "cuda" else torch.float32
    pairs = max(1, case.rows // (2 * LENGTH)) if not session.dry else 4
    problem = head_ops.make_problem(
        case.rows, case.dim, case.vocab, pairs, dtype=dtype, device=session.device,
        softcap=case.softcap,
    )  # fmt: skip
    other = head_ops.make_problem(
        case.rows, case.dim, case.vocab, pairs, dtype=dtype, device=session.device,
        softcap=case.softcap, seed=1, weight=problem.weight,
    )  # fmt: skip
    truth = head_ops.truth_of(problem, mode)
    found: dict[str, dict[str, Any]] = {op.name: {"label": op.label} for op in ops}
    ready = [op for op in ops if _ready(session, op, problem, truth, mode, found[op.name])]
    del truth
    times = timed(session, ready, (problem, other), mode)
    floor = floor_of(case, mode, ceilings)
    for name, seconds in times.items():
        found[name]["seconds"] = asdict(Quantiles.of(seconds))
        found[name]["over_floor"] = found[name]["seconds"]["q50"] / floor
    line = {"case": case.name, "mode": mode, "pairs": pairs, "floor_ms": 1e3 * floor, "ops": found}
    if "ours" not in times:
        session.failed.append(f"{case.name} {mode}: {found['ours'].get('why', 'not timed')}")
    return {**line, "elapsed": round(session.elapsed(), 1)}


def _ready(
    session: Session,
    op: HeadOp,
    problem: Problem,
    truth: head_ops.Truth,
    mode: str,
    facts: dict[str, Any],
) -> bool:
    """Whether a contender is right here; notes its errors and peak memory, or why not."""
    if mode == "nograd" and op.rows is None:
        facts["why"] = "has no pass without gradient"
        return False
    try:
        began = time.perf_counter()
        facts["errors"] = head_ops.errors_of(op, problem, truth, mode)
        facts["first_call_s"] = round(time.perf_counter() - began, 2)
        reason = head_ops.wrong(facts["errors"], WITHIN)
        if reason is None:
            facts["peak_bytes"] = peak_of(session.device, op, problem, mode)
    except head_ops.NotHere as error:
        reason = str(error)
    except Exception as error:  # out of memory, a kernel that does not compile here, ...
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
    release(session.device)
    if reason is not None:
        facts["why"] = reason
    return reason is None


def timed(
    session: Session, ops: Sequence[HeadOp], problems: Sequence[Problem], mode: str
) -> dict[str, list[float]]:
    """name -> seconds of each turn; contenders in turn, problems in rotation."""
    seconds: dict[str, list[float]] = {op.name: [] for op in ops}
    warm_up = 2
    for repeat, op in measure.interleaved(list(ops), session.repeats + warm_up):
        own, ours = seconds[op.name], seconds.get("ours", [])
        late = session.elapsed() > session.budget + 20
        if repeat > warm_up + 2 and (late or (own and ours and own[0] > SLOW * ours[0])):
            continue
        problem = problems[repeat % len(problems)]
        took = seconds_of(call_of(op, problem, mode), session.device)
        if repeat >= warm_up:
            own.append(took)
    return seconds


def call_of(op: HeadOp, problem: Problem, mode: str) -> Callable[[], Tensor | None]:
    """Forward and backward with gradients that nobody adds up."""
    hidden, weight = problem.leaves(mode)

    def call() -> Tensor | None:
        hidden.grad = weight.grad = None
        with torch.set_grad_enabled(mode != "nograd"):
            loss = head_ops.step(op, problem, hidden, weight)
        if mode == "nograd":
            return loss
        loss.backward()
        return None

    return call


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """By the device's own clock where it has one."""
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def peak_of(device: torch.device, op: HeadOp, problem: Problem, mode: str) -> int | None:
    """Bytes allocated at most beyond the inputs, gradients returned included; None on the CPU."""
    if device.type != "cuda":
        call_of(op, problem, mode)()
        return None
    release(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call_of(op, problem, mode)()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def release(device: torch.device) -> None:
    """Give back what nobody holds, where that is scarce."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


@contextlib.contextmanager
def released(device: torch.device) -> Iterator[None]:
    """Inside, a case; its tensors are gone and its memory given back afterwards."""
    try:
        yield
    finally:
        release(device)


def headline_values(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float] | None]:
    """What targets are stated for, of the headline shape: times, memory, ratios to others."""
    by_mode = {line["mode"]: line for line in lines if line["case"] == HEADLINE.name}

    def seconds(mode: str, name: str) -> float | None:
        facts = by_mode.get(mode, {}).get("ops", {}).get(name, {})
        return facts["seconds"]["q50"] if "seconds" in facts else None

    values: dict[str, dict[str, float] | None] = {}

    def put(name: str, value: float | None) -> None:
        values[name] = None if value is None else {"value": value}

    for mode in MODES:
        own = seconds(mode, "ours")
        put(f"{mode}_ms", None if own is None else 1e3 * own)
        put(f"{mode}_over_floor", by_mode[mode]["ops"]["ours"]["over_floor"] if own else None)
        facts = by_mode.get(mode, {}).get("ops", {}).get("ours", {})
        peak = facts.get("peak_bytes")
        put(f"{mode}_gb", None if peak is None else peak / 1e9)
        for name in ("trl", "liger_dpo", "quack_inplace", "liger_cute"):
            other = seconds(mode, name)
            put(f"{mode}_vs_{name}", other / own if own and other else None)
    return values


def table_of(line: Mapping[str, Any]) -> str:
    """A case for people."""
    lines = [f"{line['case']} {line['mode']}, floor {line['floor_ms']:.2f} ms"]
    for name, facts in line["ops"].items():
        if "seconds" not in facts:
            lines.append(f"  {name:18} {facts.get('why', 'not timed')}")
            continue
        spread, errors = facts["seconds"], facts["errors"]
        peak = facts.get("peak_bytes")
        memory = f"{peak / 1e9:6.2f} GB" if peak is not None else ""
        shown = "  ".join(f"{k} {v:.1e}" for k, v in errors.items())
        lines.append(
            f"  {name:18}{1e3 * spread['q50']:9.2f} ms ({1e3 * spread['q20']:.2f} to "
            f"{1e3 * spread['q80']:.2f}) {facts['over_floor']:6.2f}x {memory}  {shown}"
        )
    return "\n".join(lines)
