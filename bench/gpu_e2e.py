"""The `e2e` part of `bench gpu`: training steps of whole models, fastpref and TRL.

Each case has one model of random weights, and contenders in turn on the same pairs. What fits on
the GPU is in bench/e2e_cases.py, who trains in bench/e2e_contenders.py. Losses, log-probs and the
gradient's norm must agree in every turn to what bfloat16 allows, or there is no ratio; the first
turn is not timed. Then turns of two steps, of which the second is timed, on other pairs every time;
a ratio is formed within a turn, and the median counts. The reference pass is counted apart:
`..._with_reference` charges it to fastpref in full, as in the first run of one epoch.

MFU is that of the useful arithmetic (fastpref.flops) by the clock and the data sheet's peak, for
all contenders alike: what TRL pads or computes twice is not useful.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

import torch

from bench import measure
from bench.e2e_cases import DATA, DRY_DATA, Case, cases, make_module, make_pairs
from bench.e2e_contenders import COMPARED, Fastpref, Padded, Shared, Step, Trl, with_reference
from bench.gpu import Session
from bench.gpu_op import release
from bench.measure import Quantiles
from fastpref.data.pack import pack_pairs
from fastpref.flops import Shape
from fastpref.peaks import peak_tflops

BATCHES = 4  # different ones, in turn
WARM_UP = 1
# Relative; of the loss in nats, which is near 0.7. Sums of log-probs in bfloat16, over hundreds of
# tokens, differ by roundings of single tokens.
WITHIN = {"loss": 0.03, "logps/chosen": 5e-3, "logps/rejected": 5e-3, "grad_norm": 0.05}
MOST, FEW = 5, 3  # turns of a case that has targets, and of one that has none
RESERVE = 30.0  # seconds that a case is taken to need at least
HEADLINES = ("8b_full_512_256_tuned", "3b_full_512_256_default", "8b_lora_512_256_tuned")


def _chosen(only: Sequence[str] | None) -> list[Case]:
    """The cases that ``only`` names, or all, in their order; SystemExit where one is none."""
    known = {case.name: case for case in cases()}
    unknown = [name for name in only or () if name not in known]
    if unknown:
        raise SystemExit(
            f"bench gpu: --only: there is no case {', '.join(unknown)}. Cases: {', '.join(known)}"
        )
    return [case for name, case in known.items() if only is None or name in only]


@dataclass
class Facts:
    """Of a contender in a case."""

    seconds: list[float] = field(default_factory=list)
    peak: int = 0  # bytes held at most, model and optimizer among them
    notes: list[str] = field(default_factory=list)
    why: str | None = None  # not measured
    first: dict[str, float] | None = None


def run(session: Session) -> dict[str, dict[str, float] | None]:
    """Measure every case there is time for; the values that targets are stated for."""
    missing = lacking(session)
    chosen = _chosen(session.only)
    values: dict[str, dict[str, float] | None] = dict.fromkeys(NAMES)
    shown = {}
    for case in chosen:
        if session.elapsed() + RESERVE > session.budget and not session.dry:
            session.not_reached.append(case.name)
            continue
        if not session.has_time(case.name):
            continue
        if case.trainable == "lora" and "peft" in missing:
            session.not_reached.append(f"{case.name} (needs peft)")
            continue
        try:
            line = measure_case(session, case, "trl" not in missing)
        except Exception as error:  # one case must not take the others with it
            text = f"{case.name}: {type(error).__name__}: {error}"
            session.failed.append(text.splitlines()[0][:300])
            line = {"case": case.name, "why": traceback.format_exc(limit=-4)}
        release(session.device)
        session.write(line)
        print(table_of(line), flush=True)
        if "values" in line:
            shown[case.name] = line["contenders"]
            values |= target_values(case, line["values"])
    session.notes["cases"] = shown
    return values


NAMES = (
    "e2e_3b_512_256_vs_trl_default",
    "e2e_8b_full_512_256_vs_trl_tuned",
    "e2e_8b_lora_512_256_vs_trl_tuned",
    "e2e_8b_full_512_256_mfu",
    "e2e_8b_lora_512_256_mfu",
    "e2e_8b_full_512_256_sketch_share",
)


def target_values(
    case: Case, found: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, float] | None]:
    """Those of ``found`` that a target is stated for, under its name."""
    kind = "full" if case.trainable == "all" else case.trainable
    names = {
        ("8b", "tuned"): f"e2e_8b_{kind}_{case.data}",
        ("3b", "default"): f"e2e_3b_{case.data}",
    }
    stem = names.get((case.size, case.recipe))
    if stem is None or (case.size == "3b" and case.trainable != "all"):
        return {}
    named = {f"{stem}_{key}": dict(value) for key, value in found.items()}
    return {name: named[name] for name in NAMES if name in named}


def lacking(session: Session) -> set[str]:
    """Packages that are not here, noted with what that means."""
    why = {
        "trl": "its recipe in plain transformers stands in for it (padded_...), and targets "
        "against TRL are not judged: pip install 'fastpref[trl]'",
        "peft": "no LoRA: pip install 'fastpref[lora]'",
        "flash-attn": "TRL and fastpref have torch's attention: pip install 'fastpref[flash]'",
    }
    found = {name for name in why if measure.version_of(name) is None}
    session.missing |= {name: why[name] for name in sorted(found)}
    return found


def measure_case(session: Session, case: Case, trl: bool) -> dict[str, Any]:
    """One line: of every contender seconds, rates, memory; the ratios between them."""
    device, dry = session.device, session.dry
    data = (DRY_DATA if dry else DATA)[case.data]
    steps = make_pairs(case, BATCHES, dry)
    other = None
    if case.trainable == "all":  # the reference of LoRA is the model without its adapter
        other = make_module(case, device, seed=1, dry=dry).requires_grad_(False)
    shared = Shared(case, make_module(case, device, seed=0, dry=dry), device)
    steps, reference = with_reference(shared, other, steps)
    if case.recipe == "tuned":
        other = None  # what it knew is written down
        release(device)
    who: list[Any] = [Fastpref(shared, steps, "head")]
    who.append((Trl if trl else Padded)(shared, steps, data, other))
    if case.tracked:
        who.append(Fastpref(shared, steps, "sketch"))
    facts = {one.name: Facts() for one in who}
    turns(session, shared, who, facts)
    line: dict[str, Any] = {
        "case": case.name,
        "pairs": data.pairs,
        "attention": {"ours": shared.model.attention.name, who[1].name: who[1].attention},
        "why_not": dict(shared.not_attention),
        "reference_seconds": reference,
        "contenders": rates(shared, steps, facts, session.where["device"]),
        "values": values_of(facts, who[1].name, reference),
        "elapsed": round(session.elapsed(), 1),
    }
    mfu = line["contenders"]["ours"].get("mfu")
    if mfu is not None:
        line["values"]["mfu"] = {"value": mfu}
    return line


def turns(session: Session, shared: Shared, who: Sequence[Any], facts: Mapping[str, Facts]) -> None:
    """The steps of all, in turn, until there are enough or time is up; the first turn is a gate."""
    most = 2 if session.dry else MOST if shared.case.name in HEADLINES else FEW
    repeats = min(session.repeats, most)
    seen: dict[int, dict[str, Mapping[str, float]]] = {}
    for turn, one in measure.interleaved(list(who), repeats + WARM_UP):
        own = facts[one.name]
        late = session.elapsed() > session.budget
        if own.why or (late and len(own.seconds) >= 1):
            continue
        step = attempt(shared, one, turn, own)
        if step is None:
            continue
        own.first = own.first or step.metrics
        wrong = disagreement(seen.setdefault(turn, {}), one.name, step.metrics)
        if wrong:
            own.why = f"turn {turn}: {wrong}"
            session.failed.append(f"{shared.case.name}: {one.name}: {own.why}")
        elif turn >= WARM_UP:
            own.seconds.append(step.seconds)


def attempt(shared: Shared, one: Any, turn: int, own: Facts) -> Step | None:
    """A step; where memory is short, again with smaller micro-batches, three times at most."""
    for _ in range(4):
        shared.clear()
        release(shared.device)
        if shared.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            (step,) = one.run(turn, 1)
        except torch.OutOfMemoryError:
            pass  # its traceback holds the tensors of the step: what follows is outside of it
        else:
            if shared.device.type == "cuda":
                own.peak = max(own.peak, int(torch.cuda.max_memory_allocated()))
            found: Step = step
            return found
        shared.clear()
        release(shared.device)
        own.notes.append(f"out of memory, so {one.halve()}")
        own.seconds.clear()
    own.why = "out of memory"
    return None


def disagreement(
    seen: dict[str, Mapping[str, float]], name: str, metrics: Mapping[str, float]
) -> str | None:
    """What is apart from those who had the same turn; ``seen``: them, and then this one too."""
    reasons = [
        f"{found} in {other}" for other, own in seen.items() if (found := apart(own, metrics))
    ]
    seen[name] = metrics
    return reasons[0] if reasons else None


def apart(a: Mapping[str, float], b: Mapping[str, float]) -> str | None:
    """The first of the compared that differs too much; None: none."""
    for key in COMPARED:
        size = 1.0 if key == "loss" else max(abs(a[key]), abs(b[key]), 1e-6)
        if not abs(a[key] - b[key]) <= WITHIN[key] * size:
            return f"{key} is {b[key]:.6g}, apart from {a[key]:.6g}"
    return None


def rates(
    shared: Shared, steps: Sequence[Any], facts: Mapping[str, Facts], device: str
) -> dict[str, Any]:
    """Of every contender what it does in a second, by the useful tokens and operations."""
    shape = Shape.of(shared.module)
    batches = [pack_pairs(own) for own in steps]
    flops = fmean(shape.step(b.lengths, b.rows.numel(), b.unread) for b in batches)
    tokens, pairs = fmean(b.num_tokens for b in batches), len(steps[0])
    peak = peak_tflops(device, "bfloat16")
    found: dict[str, Any] = {}
    for name, own in facts.items():
        found[name] = {"notes": own.notes, "first": own.first}
        if own.why or not own.seconds:
            found[name]["why"] = own.why or "no time for a turn"
            continue
        spread = Quantiles.of(own.seconds)
        found[name] |= {
            "seconds": asdict(spread),
            "tokens_per_second": tokens / spread.q50,
            "pairs_per_second": pairs / spread.q50,
            "useful_tflop_s": flops / spread.q50 / 1e12,
            "peak_gb": own.peak / 1e9,
        }
        if peak:
            found[name]["mfu"] = flops / spread.q50 / 1e12 / peak
    return found


def values_of(
    facts: Mapping[str, Facts], other: str, reference: float
) -> dict[str, dict[str, float]]:
    """Ratios of a case, each within its turn."""
    own = facts["ours"].seconds
    found: dict[str, dict[str, float]] = {}

    def put(name: str, ratios: Sequence[float]) -> None:
        if ratios:
            spread = Quantiles.of(ratios)
            found[name] = {"value": spread.q50, "q20": spread.q20, "q80": spread.q80}

    if not facts["ours"].why and not facts[other].why:
        both = list(zip(facts[other].seconds, own, strict=False))
        put(f"vs_{other}", [a / b for a, b in both])
        put(f"vs_{other}_with_reference", [a / (b + reference) for a, b in both])
    sketch = facts.get("ours_sketch")
    if sketch and not sketch.why and not facts["ours"].why:
        put("sketch_share", [a / b - 1 for a, b in zip(sketch.seconds, own, strict=False)])
    return found


def table_of(line: Mapping[str, Any]) -> str:
    """A case for people."""
    if "contenders" not in line:
        return f"{line['case']}: {line['why']}"
    lines = [f"{line['case']}, {line['pairs']} pairs a step, at {line['elapsed']:.0f} s"]
    for name, own in line["contenders"].items():
        notes = "; ".join(own["notes"])
        if "seconds" not in own:
            lines.append(f"  {name:16} {own['why']} {notes}")
            continue
        mfu = f"{own['mfu']:7.1%} MFU" if "mfu" in own else ""
        lines.append(
            f"  {name:16}{1e3 * own['seconds']['q50']:9.1f} ms{own['pairs_per_second']:10.1f} "
            f"pairs/s{own['tokens_per_second']:11.0f} tokens/s{mfu}{own['peak_gb']:8.1f} GB {notes}"
        )
    for name, value in line["values"].items():
        spread = f" ({value['q20']:.3f} to {value['q80']:.3f})" if "q20" in value else ""
        lines.append(f"  {name:34}{value['value']:8.3f}{spread}")
    return "\n".join(lines)
