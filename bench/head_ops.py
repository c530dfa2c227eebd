"""Ways from hidden states to the log-probs of targets: ours and everybody else's, behind one call.

A contender gives log-probs per row, ``rows(hidden, weight, target, softcap) -> (R,) float32``, or,
where it has nothing but a whole loss, ``loss(hidden, weight, target, pairs) -> ()``. Each is loaded
from its own package; what is missing is said, never replaced. Shapes: R rows, D hidden, V vocab.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Rows = Callable[[Tensor, Tensor, Tensor, float | None], Tensor]
Loss = Callable[[Tensor, Tensor, Tensor, int], Tensor]


class NotHere(Exception):
    """A contender's package is missing, or too old to have what is measured; says which."""


@dataclass(frozen=True)
class HeadOp:
    """A contender."""

    name: str
    label: str
    rows: Rows | None = None
    loss: Loss | None = None  # of the plain DPO loss at `BETA`, without reference, mean over pairs


BETA = 0.02  # sums of random log-probs differ by some tens of nats: slopes neither 0 nor 1


def eager_rows(hidden: Tensor, weight: Tensor, target: Tensor, softcap: float | None) -> Tensor:
    """What every trainer began with: logits in the dtype of the weights, reduced in float32."""
    logits = (hidden @ weight.t()).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.log_softmax(logits, -1).gather(1, target.unsqueeze(1)).squeeze(1)


def _ours(cache: int) -> HeadOp:
    from fastpref_kernels import linear_dpo, linear_logprob

    def rows(hidden: Tensor, weight: Tensor, target: Tensor, softcap: float | None) -> Tensor:
        return linear_logprob(hidden, weight, target, softcap=softcap, cache=cache).logp

    def loss(hidden: Tensor, weight: Tensor, target: Tensor, pairs: int) -> Tensor:
        segment_id = _equal_segments(target, 2 * pairs)
        out = linear_dpo(
            hidden, weight, target, segment_id, beta=BETA, num_segments=2 * pairs, cache=cache
        )
        return out.loss.mean()

    kept = "all of E kept" if cache < 0 else "no E kept"
    return HeadOp("ours" if cache < 0 else "ours_cache0", f"fastpref_kernels, {kept}", rows, loss)


def _eager() -> HeadOp:
    return HeadOp("eager", "log_softmax and gather", eager_rows)


def _compiled() -> HeadOp:
    # Each shape and kind of leaves is a graph; beyond the limit torch would run it as it is.
    torch._dynamo.config.recompile_limit = 64
    compiled = torch.compile(eager_rows, dynamic=False)
    return HeadOp("compile", "torch.compile of it", compiled)


def _linear_ce(chunked: bool) -> HeadOp:
    function = getattr(F, "linear_cross_entropy", None)
    if function is None:
        raise NotHere(f"torch {torch.__version__} has no F.linear_cross_entropy (2.13 has)")
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None

    def rows(hidden: Tensor, weight: Tensor, target: Tensor, softcap: float | None) -> Tensor:
        _no_softcap(softcap)
        return -function(hidden, weight, target, reduction="none", options=options).float()

    if chunked:
        return HeadOp("linear_ce_chunked", "F.linear_cross_entropy, its options", rows)
    return HeadOp("linear_ce", "F.linear_cross_entropy", rows)


def _trl() -> HeadOp:
    try:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction as op
    except ImportError as error:
        raise NotHere(f"trl with ChunkedLogProbFunction (1.16 has it): {error}") from error

    def rows(hidden: Tensor, weight: Tensor, target: Tensor, softcap: float | None) -> Tensor:
        found: Tensor = op.apply(hidden, weight, None, target, 1.0, 32768, softcap, 1.0, ())[0]
        return found

    return HeadOp("trl", "TRL ChunkedLogProbFunction", rows)


def _quack(inplace: bool) -> HeadOp:
    try:
        from quack.linear_cross_entropy import linear_cross_entropy_func as function
    except ImportError as error:
        raise NotHere(f"quack-kernels: {error}") from error

    def rows(hidden: Tensor, weight: Tensor, target: Tensor, softcap: float | None) -> Tensor:
        _no_softcap(softcap)
        # In place the logits' gradient takes the logits' memory, which only a backward may do.
        own = inplace and torch.is_grad_enabled()
        found = function(hidden, weight, None, target, reduction="none", inplace_backward=own)
        return -found.float()

    name = "quack_inplace" if inplace else "quack"
    return HeadOp(name, "quack linear + cross_entropy" + (", in place" if inplace else ""), rows)


def _liger_ce() -> HeadOp:
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError as error:
        raise NotHere(f"liger-kernel: {error}") from error

    def rows(hidden: Tensor, weight: Tensor, target: Tensor, softcap: float | None) -> Tensor:
        op = LigerFusedLinearCrossEntropyLoss(
            reduction="none", softcap=softcap, accum_dtype=torch.float32
        )
        return -op(weight, hidden, target).float()

    return HeadOp("liger_ce", "Liger fused linear CE, Triton", rows)


def _liger_cute() -> HeadOp:
    try:
        from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
            LigerFusedLinearScaledCrossEntropyFunction as op,
        )
    except ImportError as error:
        raise NotHere(f"liger-kernel with its CuTe ops (0.8): {error}") from error

    def rows(hidden: Tensor, weight: Tensor, target: Tensor, softcap: float | None) -> Tensor:
        _no_softcap(softcap)
        found = op.apply(hidden, weight, target)
        return -(found[0] if isinstance(found, tuple) else found).float()

    return HeadOp("liger_cute", "Liger scaled CE, CuTe", rows)


def _liger_dpo() -> HeadOp:
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss
    except ImportError as error:
        raise NotHere(f"liger-kernel: {error}") from error

    def loss(hidden: Tensor, weight: Tensor, target: Tensor, pairs: int) -> Tensor:
        # All chosen sequences first, then all rejected ones; no reference: it takes no log-probs.
        op = LigerFusedLinearDPOLoss(
            beta=BETA, use_ref_model=False, average_log_prob=False, compiled=hidden.is_cuda
        )
        stacked = hidden.view(pairs, 2, -1, hidden.shape[1]).transpose(0, 1).flatten(0, 1)
        labels = target.view(pairs, 2, -1).transpose(0, 1).flatten(0, 1)
        found: Tensor = op(weight, stacked, labels)[0]
        return found

    return HeadOp("liger_dpo", "Liger fused linear DPO", loss=loss)


def _cce(exact: bool) -> HeadOp:
    try:
        from cut_cross_entropy import linear_cross_entropy as function
    except ImportError as error:
        raise NotHere(f"cut-cross-entropy: {error}") from error

    def rows(hidden: Tensor, weight: Tensor, target: Tensor, softcap: float | None) -> Tensor:
        own = {"filter_eps": None} if exact else {}
        found = function(hidden, weight, target, reduction="none", softcap=softcap, **own)
        return -found.float()

    name = "cce_exact" if exact else "cce"
    return HeadOp(name, "CCE" + (", no filter" if exact else ""), rows)


MAKERS: Mapping[str, Callable[[], HeadOp]] = {
    "ours": functools.partial(_ours, -1),
    "ours_cache0": functools.partial(_ours, 0),
    "eager": _eager,
    "compile": _compiled,
    "linear_ce": functools.partial(_linear_ce, False),
    "linear_ce_chunked": functools.partial(_linear_ce, True),
    "trl": _trl,
    "quack_inplace": functools.partial(_quack, True),
    "quack": functools.partial(_quack, False),
    "liger_dpo": _liger_dpo,
    "liger_cute": _liger_cute,
    "liger_ce": _liger_ce,
    "cce": functools.partial(_cce, False),
    "cce_exact": functools.partial(_cce, True),
}


def load(names: Sequence[str]) -> tuple[list[HeadOp], dict[str, str]]:
    """The contenders that are here, and why the others are not."""
    found, missing = [], {}
    for name in names:
        try:
            found.append(MAKERS[name]())
        except NotHere as reason:
            missing[name] = str(reason)
        except Exception as reason:  # a package that breaks while it is imported
            missing[name] = f"{type(reason).__name__}: {reason}"
    return found, missing


@dataclass(frozen=True)
class Problem:
    """One problem: `pairs` pairs of two sequences of equal length, one row after the other."""

    hidden: Tensor  # (R, D)
    weight: Tensor  # (V, D)
    target: Tensor  # (R,)
    pairs: int
    softcap: float | None = None

    def leaves(self, mode: str) -> tuple[Tensor, Tensor]:
        """hidden and weight with the gradients that `mode` wants: full, frozen, nograd."""
        hidden = self.hidden.detach().requires_grad_(mode != "nograd")
        return hidden, self.weight.detach().requires_grad_(mode == "full")


def make_problem(
    rows: int,
    dim: int,
    vocab: int,
    pairs: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    softcap: float | None = None,
    nats: float = 2.0,
    weight: Tensor | None = None,
) -> Problem:
    """Random states and weights with a softmax of about `nats` of entropy, targets drawn from it.

    Gaussian logits of standard deviation s over V entries have entropy log V - s^2 / 2. Flat logits
    would flatter ops that leave out small gradients, and draw less power.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)

    spread = (2 * max(torch.tensor(float(vocab)).log().item() - nats, 0.5)) ** 0.5
    if weight is None:
        weight = draw(vocab, dim).div_(dim**0.5).to(dtype)
    hidden = draw(rows, dim).mul_(spread).to(dtype)
    target = torch.empty(rows, dtype=torch.int64, device=device)
    for lo in range(0, rows, 512):
        logits = (hidden[lo : lo + 512] @ weight.t()).float()
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        prob = torch.softmax(logits, -1)
        target[lo : lo + 512] = torch.multinomial(prob, 1, generator=generator).squeeze(1)
    return Problem(hidden, weight, target, pairs, softcap)


def _equal_segments(target: Tensor, segments: int) -> Tensor:
    index = torch.arange(target.shape[0], device=target.device, dtype=torch.int32)
    return index // (target.shape[0] // segments)


def dpo_loss(rows: Tensor, pairs: int) -> Tensor:
    """The plain DPO loss in torch, as whoever has an op per row puts it together; no reference."""
    chosen, rejected = rows.view(pairs, 2, -1).sum(2).unbind(1)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def step(op: HeadOp, problem: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
    """The loss of `problem`, from the contender's own loss or from its rows."""
    if op.loss is not None and (problem.softcap is None or op.rows is None):
        _no_softcap(problem.softcap)
        return op.loss(hidden, weight, problem.target, problem.pairs)
    assert op.rows is not None
    return dpo_loss(op.rows(hidden, weight, problem.target, problem.softcap), problem.pairs)


def _no_softcap(softcap: float | None) -> None:
    if softcap is not None:
        raise NotHere("has no softcap")


@dataclass(frozen=True)
class Truth:
    """The same in float64, row block by row block."""

    rows: Tensor  # (R,)
    loss: Tensor  # ()
    grads: Mapping[str, Tensor]  # hidden, weight: float32 copies of float64 sums


@torch.no_grad()
def truth_of(problem: Problem, mode: str = "full", block: int = 1024) -> Truth:
    """Loss and gradients by the definition, in float64."""
    hidden, weight = problem.hidden.double(), problem.weight.double()

    def logits_of(lo: int) -> tuple[Tensor, Tensor | None]:
        z = hidden[lo : lo + block] @ weight.t()
        if problem.softcap is None:
            return z, None
        bent = torch.tanh(z / problem.softcap)
        return problem.softcap * bent, 1 - bent * bent

    parts = []
    for lo in range(0, len(hidden), block):
        logp = torch.log_softmax(logits_of(lo)[0], -1)
        parts.append(logp.gather(1, problem.target[lo : lo + block, None]).squeeze(1))
    with torch.enable_grad():
        rows = torch.cat(parts).requires_grad_()
        loss = dpo_loss(rows, problem.pairs)
        (slope,) = torch.autograd.grad(loss, rows)
    grads: dict[str, Tensor] = {}
    if mode != "nograd":
        grads["hidden"] = torch.empty_like(hidden)
        if mode == "full":
            grads["weight"] = torch.zeros_like(weight)
        for lo in range(0, len(hidden), block):
            z, bend = logits_of(lo)
            own = torch.softmax(z, -1).neg_()
            own[torch.arange(len(own)), problem.target[lo : lo + block]] += 1
            own *= slope[lo : lo + block, None]
            if bend is not None:
                own *= bend
            grads["hidden"][lo : lo + block] = own @ weight
            if mode == "full":
                grads["weight"] += own.t() @ hidden[lo : lo + block]
    return Truth(rows.detach(), loss.detach(), {k: v.float() for k, v in grads.items()})


def errors_of(op: HeadOp, problem: Problem, truth: Truth, mode: str) -> dict[str, float]:
    """Relative errors of the gradients, absolute ones of the loss and of the rows (RMS, nats)."""
    hidden, weight = problem.leaves(mode)
    found: dict[str, float] = {}
    with torch.set_grad_enabled(mode != "nograd"):
        loss = step(op, problem, hidden, weight)
    found["loss"] = float((loss.detach().double() - truth.loss).abs())
    if op.rows is not None:
        with torch.no_grad():
            rows = op.rows(hidden.detach(), weight.detach(), problem.target, problem.softcap)
        found["rows"] = float((rows.double() - truth.rows).square().mean().sqrt())
    if mode == "nograd":
        return found
    loss.backward()
    for name, leaf in (("hidden", hidden), ("weight", weight)):
        if name in truth.grads:
            if leaf.grad is None:
                found[name] = float("inf")
                continue
            gap = (leaf.grad.float() - truth.grads[name]).norm()
            found[name] = float(gap / truth.grads[name].norm())
    return found


def wrong(errors: Mapping[str, float], within: Mapping[str, float]) -> str | None:
    """The first error above its bound, NaN included; None where all hold."""
    for name, bound in within.items():
        if name in errors and not errors[name] <= bound:
            return f"{name} is off by {errors[name]:.2e}, more than {bound:.0e}"
    return None


def facts(op: HeadOp) -> dict[str, Any]:
    """What a record says of a contender."""
    return {"label": op.label}
