"""`pair_loss`: values and gradients against float64, against fastpref's losses, at the extremes."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from fastpref_kernels import PairLoss, pair_loss, reference
from fastpref_kernels.pair_checks import LOSS_TYPES, SMOOTHED
from fastpref_kernels.pair_loss import _backward_op, _forward_op, make_plan
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastpref.losses import LOSSES, LossOptions, PairLogp

BACKENDS = ("torch", "triton")
FIELDS = [f.name for f in dataclasses.fields(PairLoss)]


@dataclass(frozen=True)
class Pairs:
    logp: Tensor  # (R,)
    segment_id: Tensor  # (R,)
    ref: tuple[Tensor, Tensor]  # (P,)
    grad: Tensor  # (P,) arriving at loss
    group: int

    @property
    def count(self) -> int:
        return self.grad.shape[0]

    def to(self, dtype: torch.dtype) -> Pairs:
        ref = (self.ref[0].to(dtype), self.ref[1].to(dtype))
        return Pairs(self.logp.to(dtype), self.segment_id, ref, self.grad.to(dtype), self.group)


def make_pairs(
    pairs: int, rows: int, group: int, *, seed: int = 0, spread: float = 1.0, ids: Any = torch.int32
) -> Pairs:
    """Random rows over random segments, some empty; float32 values."""
    g = torch.Generator().manual_seed(seed)
    rows = rows if pairs else 0
    segment_id = torch.randint(0, max(group * pairs, 1), (rows,), generator=g).sort().values
    logp = -torch.rand(rows, generator=g) * 4 * spread
    sums = torch.zeros(max(group * pairs, 1)).index_add(0, segment_id, logp)[: group * pairs]
    parts = sums.view(pairs, group)
    noise = torch.randn(2, pairs, generator=g) * 2 * spread
    chosen = parts[:, -2] + (parts[:, 0] if group == 3 else 0) + noise[0]
    rejected = parts[:, -1] + (parts[:, 0] if group == 3 else 0) + noise[1]
    grad = torch.randn(pairs, generator=g)
    return Pairs(logp, segment_id.to(ids), (chosen, rejected), grad, group)


def options_of(loss_type: str, smoothing: float = 0.125, beta: float = 0.25) -> dict[str, Any]:
    eps = smoothing if loss_type in SMOOTHED else 0.0
    return {"loss_type": loss_type, "label_smoothing": eps, "beta": beta}


def run(function: Any, case: Pairs, **options: Any) -> tuple[PairLoss, Tensor]:
    """The result, and the gradient of every row."""
    logp = case.logp.clone().requires_grad_()
    out = function(
        logp,
        case.segment_id,
        *case.ref,
        group_size=case.group,
        num_segments=case.group * case.count,
        **options,
    )
    (grad,) = torch.autograd.grad(out.loss, logp, case.grad)
    return out, grad


def close(ours: tuple[PairLoss, Tensor], truth: tuple[PairLoss, Tensor], bound: float) -> None:
    for name in FIELDS:
        a, b = getattr(ours[0], name).detach().double(), getattr(truth[0], name).detach().double()
        size = max(1.0, float(b.abs().max())) if b.numel() else 1.0
        torch.testing.assert_close(
            a, b, rtol=0, atol=bound * size, msg=lambda m, n=name: f"{n} {m}"
        )
    size = max(1.0, float(truth[1].abs().max())) if truth[1].numel() else 1.0
    torch.testing.assert_close(ours[1].double(), truth[1].double(), rtol=0, atol=bound * size)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("group", [2, 3])
def test_float64_equals_reference(loss_type: str, group: int) -> None:
    for pairs, rows in ((1, 1), (7, 60), (4, 5), (3, 0), (0, 0)):
        case = make_pairs(pairs, rows, group, seed=pairs).to(torch.float64)
        options = options_of(loss_type, smoothing=0.1, beta=0.3)
        close(run(pair_loss, case, **options), run(reference.pair_loss, case, **options), 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("group", [2, 3])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_float32_against_float64(loss_type: str, group: int, backend: str) -> None:
    """The last case has segments longer than what a program sums at a time."""
    for pairs, rows, ids in ((1, 1, torch.int32), (7, 60, torch.int64), (2, 3001, torch.int32)):
        case = make_pairs(pairs, rows, group, seed=rows, ids=ids)
        options = options_of(loss_type)
        truth = run(reference.pair_loss, case.to(torch.float64), **options)
        # Sums of up to 3000 nats are rounded to float32, once in each step towards the margin.
        size = 4 * torch.finfo(torch.float32).eps * max(1.0, rows / 4)
        ours = run(pair_loss, case, backend=backend, **options)
        close(ours, truth, 8 * size if loss_type == "ipo" else size)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("group", [2, 3])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_equal_to_the_losses_of_fastpref(loss_type: str, group: int, backend: str) -> None:
    """The torch backend bit for bit; slopes against autograd through them."""
    case = make_pairs(9, 200, group, seed=3)
    options = options_of(loss_type)
    ours, _ = run(pair_loss, case, backend=backend, **options)
    counts = torch.bincount(case.segment_id, minlength=group * 9).view(9, group)
    shared = counts[:, 0] if group == 3 else 0
    chosen, rejected = (
        x.detach().clone().requires_grad_() for x in (ours.logp_chosen, ours.logp_rejected)
    )
    lengths = ((shared + counts[:, -2]).clamp(min=1), (shared + counts[:, -1]).clamp(min=1))
    x = PairLogp(chosen, rejected, *case.ref, *lengths)
    loss = LOSSES[loss_type].fn(
        x, LossOptions(beta=options["beta"], label_smoothing=options["label_smoothing"])
    )
    slopes = torch.autograd.grad(loss.sum(), (chosen, rejected))
    tight = {"rtol": 0.0, "atol": 0.0} if backend == "torch" else {"rtol": 2e-6, "atol": 1e-6}
    torch.testing.assert_close(ours.loss, loss, **tight)
    torch.testing.assert_close(ours.margin, x.margin, rtol=0, atol=0)
    for own, slope in zip((ours.slope_chosen, ours.slope_rejected), slopes, strict=True):
        torch.testing.assert_close(own, slope, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(ours.reward_chosen, options["beta"] * x.chosen_ratio)
    assert torch.equal(ours.accuracy.bool(), ours.reward_chosen > ours.reward_rejected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hinge_of_an_impossible_completion(backend: str) -> None:
    """log pi = -inf of one completion: the limit. (Losses with smoothing have 0 * inf there, in
    TRL too.)"""
    logp = torch.tensor([-torch.inf, -1.0, -1.0, -torch.inf])
    out = pair_loss(logp, num_segments=4, backend=backend, **options_of("hinge"))
    assert out.margin.tolist() == [-math.inf, math.inf]
    assert out.loss.tolist() == [math.inf, 0.0] and out.accuracy.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss_type", ["sigmoid", "robust", "sigmoid_norm"])
def test_large_margins_neither_overflow_nor_lose_their_digits(loss_type: str, backend: str) -> None:
    """beta m from -10^5 to 10^5: relative to the loss's own size, 1e-44 included as 0."""
    margins = torch.tensor([0.0, 1e-4, 5.0, 20.0, 60.0, 85.0, 300.0, 1e5])
    margins = torch.cat((margins, -margins)) * 4
    logp = torch.stack((margins, torch.zeros_like(margins)), 1).flatten()
    ones = torch.ones(len(margins))
    for eps in (0.0, 0.125):
        results = []
        for function, dtype in ((pair_loss, torch.float32), (_exact_logistic, torch.float64)):
            leaf = logp.to(dtype).requires_grad_()
            more = {"backend": backend} if dtype == torch.float32 else {}
            out = function(
                leaf,
                beta=0.25,
                loss_type=loss_type,
                label_smoothing=eps,
                num_segments=len(logp),
                chosen_len=ones,
                rejected_len=ones,
                **more,
            )
            loss = out.loss if isinstance(out, PairLoss) else out
            results.append((loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]))
        for ours, truth in zip(*results, strict=True):
            assert ours.isfinite().all()
            torch.testing.assert_close(ours.double(), truth, rtol=1e-6, atol=1e-37)


def _exact_logistic(
    logp: Tensor, *, beta: float, loss_type: str, label_smoothing: float, **_: Any
) -> Tensor:
    z, eps = beta * (logp[::2] - logp[1::2]), label_smoothing
    right, wrong = torch.nn.functional.softplus(-z), torch.nn.functional.softplus(z)
    # softplus goes over to its asymptote at 20.
    right = torch.where(z > 20, torch.log1p(torch.exp(-z.clamp(min=20))), right)
    wrong = torch.where(z < -20, torch.log1p(torch.exp(z.clamp(max=-20))), wrong)
    if loss_type == "robust":
        return ((1 - eps) * right - eps * wrong) / (1 - 2 * eps)
    return (1 - eps) * right + eps * wrong


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("group", [2, 3])
def test_own_reference_gives_ln2_and_shared_rows_no_gradient(group: int, backend: str) -> None:
    case = make_pairs(6, 90, group)
    first = pair_loss(
        case.logp,
        case.segment_id,
        beta=0.1,
        group_size=group,
        num_segments=6 * group,
        backend=backend,
    )
    own = dataclasses.replace(case, ref=(first.logp_chosen, first.logp_rejected))
    out, grad = run(pair_loss, own, backend=backend, beta=0.1)
    assert not out.margin.any() and not out.accuracy.any()
    assert torch.equal(out.loss.detach(), torch.full((6,), math.log(2)))
    if group == 3:
        assert not grad[case.segment_id % 3 == 0].any()
    torch.testing.assert_close(out.slope_chosen, torch.full((6,), -0.05))


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_twice_and_whatever_stands_in_memory(backend: str) -> None:
    case = make_pairs(20, 2000, 3)
    torch.use_deterministic_algorithms(True)  # uninitialised memory holds NaN
    try:
        first, second = (run(pair_loss, case, backend=backend, beta=0.1) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    for name in FIELDS:
        assert torch.equal(getattr(first[0], name), getattr(second[0], name)), name
    assert torch.equal(first[1], second[1]) and first[1].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("group", [2, 3])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_rows_or_their_segments_give_the_same(loss_type: str, group: int, backend: str) -> None:
    case = make_pairs(8, 70, group)
    by_row, _ = run(pair_loss, case, backend=backend, **options_of(loss_type))
    segments = torch.zeros(8 * group, dtype=torch.float64)
    segments.index_add_(0, case.segment_id, case.logp.double())
    counts = torch.bincount(case.segment_id, minlength=group * 8).view(8, group)
    shared = counts[:, 0] if group == 3 else 0
    by_segment = pair_loss(
        segments.float(),
        None,
        *case.ref,
        group_size=group,
        chosen_len=shared + counts[:, -2],
        rejected_len=shared + counts[:, -1],
        backend=backend,
        **options_of(loss_type),
    )
    for name in FIELDS:
        torch.testing.assert_close(getattr(by_row, name), getattr(by_segment, name))


@pytest.mark.parametrize("group", [2, 3])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_gradcheck(loss_type: str, group: int) -> None:
    case = make_pairs(3, 12, group, seed=5).to(torch.float64)

    def loss(logp: Tensor) -> Tensor:
        return pair_loss(
            logp, case.segment_id, *case.ref, group_size=group, **options_of(loss_type)
        ).loss

    assert torch.autograd.gradcheck(loss, case.logp.requires_grad_())


@given(st.integers(0, 6), st.integers(0, 40), st.sampled_from([2, 3]), st.sampled_from(LOSS_TYPES))
@settings(max_examples=25, deadline=None)
def test_any_shape_is_the_same_in_both_backends(
    pairs: int, rows: int, group: int, loss_type: str
) -> None:
    case = make_pairs(pairs, rows, group, seed=rows)
    torch_result, triton_result = (
        run(pair_loss, case, backend=backend, **options_of(loss_type)) for backend in BACKENDS
    )
    close(triton_result, torch_result, 2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
@pytest.mark.parametrize("segments", [True, False])
def test_opcheck(loss_type: str, segments: bool, backend: str) -> None:
    case = make_pairs(4, 8, 2)
    ids = case.segment_id if segments else None
    lengths = (None, None) if segments else (torch.ones(4), torch.ones(4))
    what = [int(x) for x in make_plan(loss_type, 2, backend)]
    args = (case.logp.requires_grad_(), ids, *case.ref, *lengths, 4, [0.5, 0.0], what)
    torch.library.opcheck(_forward_op, args)
    table = _forward_op(*args)[1]
    torch.library.opcheck(_backward_op, (torch.randn(4), table, ids, args[0].detach(), what))


def test_ids_that_fall_or_are_of_no_pair_are_seen() -> None:
    """Values are checked on the CPU; what a GPU would do is shown by the kernel itself."""
    from fastpref_kernels.pair_kernels import forward

    out_of_range, falling = (
        ([0, 1, 2, 4], [-1, 0, 1, 3]),
        ([1, 0, 2, 3], [0, 3, 2, 3], [0, 1, 9, 3]),
    )
    for ids in out_of_range + falling:
        loss, _ = forward(
            torch.zeros(4),
            torch.tensor(ids),
            (None, None),
            (None, None),
            2,
            [0.1, 0.0],
            make_plan("sigmoid", 2, "triton"),
        )
        assert loss.isnan().all() if ids in out_of_range else loss.isnan().any(), ids


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"beta": 0.0}, "beta must be positive and finite, got 0.0"),
        ({"beta": -0.1}, "beta must be positive and finite, got -0.1"),
        ({"beta": float("nan")}, "got nan"),
        ({"loss_type": "sigmod"}, "Did you mean 'sigmoid'"),
        ({"label_smoothing": 0.5}, "below 0.5, got 0.5"),
        ({"label_smoothing": -0.1}, "got -0.1"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "not defined for hinge"),
        ({"group_size": 4}, "group_size must be 2 .* got 4"),
        ({"logp": torch.zeros(2, 2)}, r"expected logp \(R,\) .* got \(2, 2\)"),
        ({"logp": torch.zeros(4).bfloat16()}, "Half types cannot hold sums"),
        ({"logp": torch.zeros(4).int()}, "got .* torch.int32"),
        ({"segment_id": torch.zeros(3).int()}, r"expected segment_id \(4,\)"),
        ({"segment_id": torch.zeros(4)}, "torch.float32"),
        ({"segment_id": torch.tensor([0, 2, 1, 3])}, r"segment_id\[2\]=1 follows 2"),
        ({"segment_id": torch.tensor([0, 1, 2, 4])}, r"segment_id\[3\]=4 is outside 0..3"),
        ({"num_segments": 3}, "2 segments, but there are 3, odd"),
        ({"num_segments": -2}, "there are -2"),
        ({"group_size": 3, "num_segments": 4}, "there are 4, no multiple of group_size"),
        ({"segment_id": None, "logp": torch.zeros(5)}, "there are 5, odd"),
        ({"segment_id": None, "num_segments": 6}, "must be None or 4, got 6"),
        ({"ref_chosen": None, "ref_rejected": None}, "give num_segments"),
        ({"ref_rejected": None}, "give both ref_chosen and ref_rejected or neither"),
        ({"ref_chosen": torch.zeros(3)}, r"expected ref_chosen|expected ref_rejected \(3,\)"),
        ({"ref_rejected": torch.zeros(2).int()}, "of a floating dtype, got .* torch.int32"),
        ({"ref_chosen": torch.zeros(2, requires_grad=True)}, "ref_chosen requires grad"),
        ({"chosen_len": torch.ones(2)}, "give both chosen_len and rejected_len"),
        ({"ref_chosen": torch.zeros(2, device="meta")}, "logp is on cpu but ref_chosen on meta"),
        ({"segment_id": None, "loss_type": "ipo"}, "Give chosen_len and rejected_len"),
        ({"backend": "tritn"}, "pair_loss: backend must be one of"),
    ],
)
def test_errors_name_what_came(changes: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "logp": torch.zeros(4),
        "segment_id": torch.tensor([0, 1, 2, 3]),
        "ref_chosen": torch.zeros(2),
        "ref_rejected": torch.zeros(2),
        "beta": 0.1,
    }
    with pytest.raises(ValueError, match=message):
        pair_loss(**good | changes)


def test_no_second_derivative_in_silence() -> None:
    logp = torch.zeros(2, requires_grad=True)
    out = pair_loss(logp, beta=0.1)
    (grad,) = torch.autograd.grad(out.loss.sum(), logp, create_graph=True)
    with pytest.raises(RuntimeError, match="pair_loss has no second derivative"):
        grad.sum().backward()
    assert not out.slope_chosen.requires_grad and not out.logp_chosen.requires_grad
