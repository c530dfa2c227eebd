"""The `correctness` part of `bench gpu`: the kernels on the device against float64, bits, capture.

A check gives numbers and their bounds; what is above its bound, NaN included, or raises, has
failed. Without a GPU (`--dry_run`) the same checks run small, through the torch backend.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from fastpref_kernels import (
    LinearLogprob,
    linear_dpo,
    linear_logprob,
    pair_loss,
    reference,
    sequence_logprob,
)
from torch import Tensor

from bench import attention_checks, head_norm_checks, head_ops, norm_checks, step_checks
from bench.capture import captured, waiting_is_an_error
from bench.gpu import Session
from bench.gpu_op import released

Found = Mapping[str, tuple[float, float]]  # what -> (measured, bound)
Check = Callable[[Session], Found]
STATS = ("entropy", "sum_sq_prob", "log_sum_sq_prob", "top1", "mean_logit")
# Rounding of a gradient to its dtype, relative, and room for the rounding of E beside it.
GRADIENT = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 3e-5}


def run(session: Session) -> dict[str, dict[str, float] | None]:
    """Every check there is time for; returns how many held and failed."""
    held = 0
    every = (
        checks(),
        head_norm_checks.checks(),
        norm_checks.checks(),
        step_checks.checks(),
        attention_checks.checks(session),
    )
    for name, check in itertools.chain(*every):
        if not session.has_time(name):
            continue
        line: dict[str, Any] = {"check": name}
        try:
            with released(session.device):
                found = check(session)
            line["values"] = {what: {"value": v, "bound": b} for what, (v, b) in found.items()}
            bad = [f"{what} {v:.3e} > {b:.1e}" for what, (v, b) in found.items() if not v <= b]
        except Exception as error:  # the next check may hold all the same
            bad = [f"{type(error).__name__}: {str(error)[:300]}"]
        line |= {"ok": not bad, "bad": bad, "elapsed": round(session.elapsed(), 1)}
        session.write(line)
        session.failed += [f"{name}: {text}" for text in bad]
        held += not bad
        print(f"{'ok    ' if not bad else 'FAILED'} {name}  {'; '.join(bad)}")
    return {"checks_held": {"value": held}, "checks_failed": {"value": len(session.failed)}}


def checks() -> Iterator[tuple[str, Check]]:
    """(name, check), the most important first."""
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for mode, cache in (("full", -1), ("frozen", -1), ("full", 0), ("full", 3)):
            name = f"against float64, {str(dtype)[6:]}, {mode}, cache {cache}"
            yield name, functools.partial(_against_float64, dtype=dtype, mode=mode, cache=cache)
    yield "same bits twice, second backward included", _same_bits
    yield "captured in a CUDA graph", _cuda_graph
    yield "no wait for the device", _no_wait
    for group in (2, 3):
        yield (
            f"pair_loss, every loss, groups of {group}",
            functools.partial(_pair_loss, group=group),
        )
    yield "confident rows keep their digits", _confident_rows
    yield "logits of standard deviation 150", _wide_logits
    for dtype in (torch.bfloat16, torch.float32):
        yield f"transforms, ragged, {str(dtype)[6:]}", functools.partial(_transforms, dtype=dtype)
    yield "statistics", _statistics
    yield "a policy that is its own reference", _own_reference
    yield "torch backend on the device", _torch_backend
    yield "torch.compile, full graph", _compiled
    yield "real size: 128256 entries", _real_size


def _problem(session: Session, dtype: torch.dtype, **sizes: int) -> head_ops.Problem:
    shape = {"rows": 192, "dim": 96, "vocab": 5003, "pairs": 4} | sizes
    if session.dry:
        shape["vocab"] = min(shape["vocab"], 700)
    rows, dim, vocab, pairs = (shape[name] for name in ("rows", "dim", "vocab", "pairs"))
    return head_ops.make_problem(rows, dim, vocab, pairs, dtype=dtype, device=session.device)


def _op(**options: Any) -> head_ops.HeadOp:
    def rows(hidden: Tensor, weight: Tensor, target: Tensor, softcap: float | None) -> Tensor:
        return linear_logprob(hidden, weight, target, softcap=softcap, **options).logp

    return head_ops.HeadOp("ours", "ours", rows)


def _bounded(errors: Mapping[str, float], gradient: float, rows: float = 3e-5) -> Found:
    bounds = {"hidden": gradient, "weight": gradient, "rows": rows, "loss": 1e-4}
    return {name: (value, bounds[name]) for name, value in errors.items()}


def _against_float64(session: Session, dtype: torch.dtype, mode: str, cache: int) -> Found:
    problem = _problem(session, dtype)
    truth = head_ops.truth_of(problem, mode)
    return _bounded(head_ops.errors_of(_op(cache=cache), problem, truth, mode), GRADIENT[dtype])


def _dpo(problem: head_ops.Problem, leaves: tuple[Tensor, Tensor], **options: Any) -> Any:
    segments = 2 * problem.pairs
    index = torch.arange(len(problem.target), device=problem.target.device, dtype=torch.int32)
    segment_id = index // (len(index) // segments)
    return linear_dpo(
        *leaves, problem.target, segment_id, beta=0.05, num_segments=segments, **options
    )


def _gradients(problem: head_ops.Problem, **options: Any) -> list[Tensor]:
    leaves = problem.leaves("full")
    out = _dpo(problem, leaves, **options)
    return [out.loss.detach(), *torch.autograd.grad(out.loss.mean(), leaves)]


def _unequal(first: list[Tensor], second: list[Tensor]) -> float:
    return float(sum(not torch.equal(a, b) for a, b in zip(first, second, strict=True)))


def _same_bits(session: Session) -> Found:
    problem = _problem(session, torch.bfloat16, rows=1024, pairs=8)
    # Many rows add into the same rows of dW.
    problem = dataclasses.replace(problem, target=problem.target % 7)
    found: dict[str, tuple[float, float]] = {}
    for cache in (-1, 0, 2):
        first, second = (_gradients(problem, cache=cache) for _ in range(2))
        found[f"cache {cache}"] = (_unequal(first, second), 0.0)
    leaves = problem.leaves("full")
    loss = _dpo(problem, leaves).loss.mean()
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves)
    return {**found, "second backward": (_unequal(list(once), list(again)), 0.0)}


def _cuda_graph(session: Session) -> Found:
    problem = _problem(session, torch.bfloat16, rows=1024, pairs=8)
    expected = _gradients(problem)
    if session.device.type != "cuda":
        return {"tensors that differ": (_unequal(_gradients(problem), expected), 0.0)}
    leaves = problem.leaves("full")

    def call() -> list[Tensor]:
        out = _dpo(problem, leaves)
        return [out.loss, *torch.autograd.grad(out.loss.mean(), leaves)]

    return {"tensors that differ": (_unequal(captured(call), expected), 0.0)}


def _no_wait(session: Session) -> Found:
    """Forward and backward with every implicit synchronisation made an error."""
    problem = _problem(session, torch.bfloat16)
    _gradients(problem)
    with waiting_is_an_error(session.device):
        for cache in (-1, 0):
            _gradients(problem, cache=cache)
    return {}


def _pair_loss(session: Session, group: int) -> Found:
    """Empty segments, and one longer than what a program sums at a time."""
    found: dict[str, tuple[float, float]] = {}
    for loss_type, rows in itertools.product(
        ("sigmoid", "robust", "hinge", "ipo", "sigmoid_norm"), (300, 40_000)
    ):
        smooth = 0.1 if loss_type in ("sigmoid", "robust", "sigmoid_norm") else 0.0
        generator = torch.Generator().manual_seed(rows)
        pairs = 9
        ids = torch.randint(0, group * pairs, (rows,), generator=generator).sort().values
        ids[ids == 4] = 3
        logp = -torch.rand(rows, generator=generator)
        results = []
        for function, dtype in ((pair_loss, torch.float32), (reference.pair_loss, torch.float64)):
            leaf = logp.to(session.device, dtype).requires_grad_()
            out = function(
                leaf,
                ids.to(session.device),
                beta=0.1,
                loss_type=loss_type,
                label_smoothing=smooth,
                group_size=group,
                num_segments=group * pairs,
            )
            (grad,) = torch.autograd.grad(out.loss.sum(), leaf)
            results.append([out.loss.detach(), out.margin, out.reward_chosen, grad])
        # Sums of some thousand nats, rounded to float32.
        bound = 1e-5 * (50.0 if loss_type == "ipo" else 1.0) * max(1.0, rows / 2000)
        gap = max(float((a.double() - b).abs().max()) for a, b in zip(*results, strict=True))
        found[f"{loss_type}, {rows} rows"] = (gap, bound)
    return found


def _confident(session: Session, dtype: torch.dtype, gap: float) -> head_ops.Problem:
    problem = _problem(session, dtype, rows=64)
    lead = problem.weight[problem.target].float()
    hidden = 0.2 * problem.hidden.float() + gap * lead / lead.square().sum(1, keepdim=True)
    return dataclasses.replace(problem, hidden=hidden.to(dtype))


def _confident_rows(session: Session) -> Found:
    """Error of dH row by row, relative to the row's own gradient, 1 - p down to 1e-6."""
    found = {}
    for dtype, gap in itertools.product((torch.bfloat16, torch.float32), (8.0, 14.0)):
        problem = _confident(session, dtype, gap)
        hidden, weight = problem.leaves("frozen")
        (ours,) = torch.autograd.grad(
            linear_logprob(hidden, weight, problem.target).logp.sum(), hidden
        )
        wide = problem.hidden.double().requires_grad_()
        out = reference.linear_logprob(wide, problem.weight.double(), problem.target)
        (true,) = torch.autograd.grad(out.logp.sum(), wide)
        worst = ((ours.double() - true).norm(dim=1) / true.norm(dim=1)).max()
        bound = 8e-3 if dtype == torch.bfloat16 else 1e-4
        found[f"{str(dtype)[6:]}, gap {gap:g}"] = (float(worst), bound)
    return found


def _wide_logits(session: Session) -> Found:
    found = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        problem = _problem(session, dtype)
        problem = dataclasses.replace(problem, hidden=problem.hidden * 45)
        for cache in (-1, 0):
            leaves = problem.leaves("full")
            logp = linear_logprob(*leaves, problem.target, cache=cache).logp
            grads = torch.autograd.grad(logp.sum(), leaves)
            odd = sum(int((~x.isfinite()).sum()) for x in (logp.detach(), *grads))
            found[f"{str(dtype)[6:]}, cache {cache}: not finite"] = (float(odd), 0.0)
    return found


def _transforms(session: Session, dtype: torch.dtype) -> Found:
    """Bias, softcap, scale, temperature together; no size a multiple of anything."""
    problem = _problem(session, dtype, rows=161, dim=83, vocab=4999, pairs=1)
    generator = torch.Generator(session.device).manual_seed(3)
    bias = torch.randn(len(problem.weight), generator=generator, device=session.device).to(dtype)
    options: dict[str, Any] = {"softcap": 6.0, "logit_scale": -1.3, "temperature": 1.7}
    results = []
    for function, to in ((linear_logprob, dtype), (reference.linear_logprob, torch.float64)):
        leaves = [x.to(to).requires_grad_() for x in (problem.hidden, problem.weight, bias)]
        out: LinearLogprob = function(leaves[0], leaves[1], problem.target, bias=leaves[2],
                                      **options)  # fmt: skip
        grads = torch.autograd.grad(out.logp.sum(), leaves)
        results.append([out.logp.detach(), *grads])
    names = ("logp", "hidden", "weight", "bias")
    return {
        name: (
            float((ours.double() - true).norm() / true.norm()),
            1e-5 if name == "logp" else 2 * GRADIENT[dtype],
        )
        for name, ours, true in zip(names, *results, strict=True)
    }


def _statistics(session: Session) -> Found:
    problem = _problem(session, torch.bfloat16)
    results = [
        function(
            problem.hidden.to(to), problem.weight.to(to), problem.target, stats=(*STATS, "argmax")
        )
        for function, to in (
            (linear_logprob, torch.bfloat16),
            (reference.linear_logprob, torch.float64),
        )
    ]
    found = {}
    for name in (*STATS, "argmax"):
        ours, true = (getattr(out, name).double() for out in results)
        found[name] = (float((ours - true).norm() / true.norm().clamp(min=1)), 1e-4)
    return found


def _own_reference(session: Session) -> Found:
    problem = _problem(session, torch.bfloat16)
    segment_id = (torch.arange(192, device=session.device) // (192 // (2 * problem.pairs))).int()
    call = (problem.hidden, problem.weight, problem.target, segment_id)
    ref = sequence_logprob(*call, num_segments=2 * problem.pairs)
    out = linear_dpo(*call, *ref, beta=0.1)
    gap = (out.loss - torch.tensor(2.0).log().item()).abs().max()
    return {"margin": (float(out.margin.abs().max()), 0.0), "loss - ln 2": (float(gap), 1e-7)}


def _torch_backend(session: Session) -> Found:
    problem = _problem(session, torch.bfloat16)
    truth = head_ops.truth_of(problem, "full")
    errors = head_ops.errors_of(_op(backend="torch"), problem, truth, "full")
    return _bounded(errors, GRADIENT[torch.bfloat16])


def _compiled(session: Session) -> Found:
    problem = _problem(session, torch.bfloat16)
    leaves = problem.leaves("full")

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = _dpo(problem, (hidden, weight)).loss
        return out

    compiled = torch.compile(loss, fullgraph=True)(*leaves)
    plain = _gradients(problem)
    grads = torch.autograd.grad(compiled.mean(), leaves)
    gaps = [
        float((a.double() - b.double()).norm() / b.double().norm())
        for a, b in zip((compiled.detach(), *grads), plain, strict=True)
    ]
    return {"relative": (max(gaps), 1e-5)}


def _real_size(session: Session) -> Found:
    problem = _problem(session, torch.bfloat16, rows=2048, dim=1024, vocab=128256, pairs=8)
    truth = head_ops.truth_of(problem, "full")
    found = _bounded(head_ops.errors_of(_op(), problem, truth, "full"), GRADIENT[torch.bfloat16])
    free = head_ops.errors_of(_op(cache=0), problem, truth, "full")
    return {**found, **{f"{k}, cache 0": v for k, v in _bounded(free, 5e-3).items()}}
