"""Losses against the papers' formulas in plain Python, and against autograd where they are flat."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastpref.loss_functions import score
from fastpref.losses import (
    LOSSES,
    LossOptions,
    PairLogp,
    concatenate_pairs,
    dpo_loss,
    get_loss,
    pair_losses,
    pair_norms,
    rewards,
    sequence_sums,
    wpo_weight,
)

Values = tuple[float, float, float, float, int, int]  # logp c, r; reference c, r; lengths c, r
STEP: list[Values] = [
    (-3.0, -4.0, -3.5, -3.0, 2, 5),
    (-60.0, -2.0, -1.0, -30.0, 1, 1),
    (-5.0, -5.5, -6.0, -5.5, 3, 4),
    (-9.0, -7.5, -8.0, -9.5, 6, 2),
]


def case(*rows: Values) -> PairLogp:
    logp = [torch.tensor(v, dtype=torch.float64) for v in zip(*(r[:4] for r in rows), strict=True)]
    return PairLogp(*logp, *(torch.tensor(v) for v in zip(*(r[4:] for r in rows), strict=True)))


def sig(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def logistic(z: float, eps: float = 0.0) -> float:
    return (1 - eps) * math.log1p(math.exp(-z)) + eps * math.log1p(math.exp(z))


def plain(name: str, rows: list[Values], o: LossOptions) -> list[float]:
    """The loss of every pair, in Python's own floats."""
    b, eps = o.beta, o.label_smoothing
    n = sum(r[4] for r in rows) / len(rows)
    rc, rr = [r[0] - r[2] for r in rows], [r[1] - r[3] for r in rows]

    def per_pair(formula: Callable[..., float]) -> list[float]:
        return [formula(*r, c, j, b * (c - j)) for r, c, j in zip(rows, rc, rr, strict=True)]

    def robust(z: float) -> float:
        return ((1 - eps) * logistic(z) - eps * logistic(-z)) / (1 - 2 * eps)

    def exo(z: float) -> float:
        return sum(p * math.log(p / q) for p, q in ((sig(z), 1 - eps), (sig(-z), eps)))

    def disco(z: float) -> float:
        w = sig(z / o.discopop_tau)
        return logistic(z) * (1 - w) + math.exp(-z) * w

    def odds(p: float) -> float:
        return math.log(math.exp(p) / (1 - math.exp(p)))

    def by_rank(policy: list[float], reference: list[float]) -> list[float]:
        rank = {x: j for j, x in enumerate(sorted(policy))}
        return [logistic(b * (x - sorted(reference)[rank[x]]), eps) for x in policy]

    if name == "aot":
        return by_rank([r[0] - r[1] for r in rows], [r[2] - r[3] for r in rows])
    if name == "aot_unpaired":
        return by_rank(rc, rr)
    formulas: dict[str, Callable[..., float]] = {
        "sigmoid": lambda c, r, fc, fr, nc, nr, x, y, z: logistic(z, eps),
        "hinge": lambda c, r, fc, fr, nc, nr, x, y, z: max(0.0, 1 - z),
        "ipo": lambda c, r, fc, fr, nc, nr, x, y, z: (x / nc - y / nr - 1 / (2 * b)) ** 2,
        "exo_pair": lambda c, r, fc, fr, nc, nr, x, y, z: exo(z),
        "nca_pair": lambda c, r, fc, fr, nc, nr, x, y, z: (
            logistic(b * x) + logistic(-b * x) / 2 + logistic(-b * y) / 2
        ),
        "robust": lambda c, r, fc, fr, nc, nr, x, y, z: robust(z),
        "bco_pair": lambda c, r, fc, fr, nc, nr, x, y, z: logistic(b * x) + logistic(-b * y),
        "sppo_hard": lambda c, r, fc, fr, nc, nr, x, y, z: (
            (x - 1 / (2 * b)) ** 2 + (y + 1 / (2 * b)) ** 2
        ),
        "apo_zero": lambda c, r, fc, fr, nc, nr, x, y, z: 1 - sig(b * x) + sig(b * y),
        "apo_down": lambda c, r, fc, fr, nc, nr, x, y, z: sig(b * x) + 1 - sig(z),
        "discopop": lambda c, r, fc, fr, nc, nr, x, y, z: disco(z),
        "sft": lambda c, r, fc, fr, nc, nr, x, y, z: -c / n,
        "sigmoid_norm": lambda c, r, fc, fr, nc, nr, x, y, z: logistic(b * (x / nc - y / nr), eps),
        "simpo": lambda c, r, fc, fr, nc, nr, x, y, z: logistic(
            b * (c / nc - r / nr) - o.simpo_gamma, eps
        ),
        "orpo": lambda c, r, fc, fr, nc, nr, x, y, z: (
            -c / nc + b * logistic(odds(c / nc) - odds(r / nr))
        ),
        "cpo": lambda c, r, fc, fr, nc, nr, x, y, z: (
            logistic(b * (c - r), eps) - o.cpo_alpha * c / n
        ),
        "rpo": lambda c, r, fc, fr, nc, nr, x, y, z: logistic(z, eps) - o.rpo_alpha * c / nc,
    }
    return per_pair(formulas[name])


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("name", LOSSES)
def test_formula(name: str, smoothing: float) -> None:
    if smoothing and not LOSSES[name].smoothing or name == "exo_pair" and not smoothing:
        return
    options = LossOptions(
        beta=0.3, label_smoothing=smoothing, discopop_tau=2.0, simpo_gamma=0.7, cpo_alpha=0.4,
        rpo_alpha=0.6,
    )  # fmt: skip
    got = LOSSES[name].fn(case(*STEP), options)
    assert got.tolist() == pytest.approx(plain(name, STEP, options), rel=1e-12)
    if not LOSSES[name].batch_coupled:
        one = LOSSES[name].fn(case(STEP[2]), options)
        assert one.item() == pytest.approx(got[2].item(), rel=1e-14)


@pytest.mark.parametrize("name", LOSSES)
def test_the_defaults_of_options_are_those_of_the_configuration(name: str) -> None:
    from fastpref.config import Config
    from fastpref.slopes import loss_options

    smoothing = 0.01 if name == "exo_pair" else 0.0
    config = Config(loss_type=(name,), label_smoothing=smoothing)
    assert loss_options(config) == LossOptions(label_smoothing=smoothing)


def test_smoothing_moves_the_minimum_to_a_finite_margin() -> None:
    """At beta m = log((1 - eps)/eps) the smoothed loss is flat; without smoothing it never is."""
    eps, beta = 0.2, 0.5
    chosen = torch.tensor([math.log((1 - eps) / eps) / beta], dtype=torch.float64).requires_grad_()
    zero = torch.zeros(1, dtype=torch.float64)
    x = PairLogp(chosen, zero, zero, zero, torch.ones(1), torch.ones(1))
    fn = LOSSES["sigmoid"].fn
    for smoothing, flat in ((eps, True), (0.0, False)):
        options = LossOptions(beta=beta, label_smoothing=smoothing)
        (slope,) = torch.autograd.grad(fn(x, options).sum(), chosen)
        assert abs(slope.item()) < 1e-15 if flat else slope.item() < -0.05


def test_robust_has_no_bias_under_flipped_labels() -> None:
    """The mean over flips of probability eps is DPO's loss of the true label: that is its claim."""
    options = LossOptions(beta=0.3, label_smoothing=0.2)
    true, flipped = case(STEP[0]), case((-4.0, -3.0, -3.0, -3.5, 5, 2))
    fn = LOSSES["robust"].fn
    mean = 0.8 * fn(true, options) + 0.2 * fn(flipped, options)
    dpo = LOSSES["sigmoid"].fn(true, LossOptions(beta=0.3))
    torch.testing.assert_close(mean, dpo, rtol=1e-12, atol=0)


def test_discopop_does_not_overflow() -> None:
    """e^-z alone is infinite in float32 from z = -89 on, its weight 0."""
    x = case((-900.0, -2.0, -1.0, -30.0, 1, 1))
    low = dataclasses.replace(x, chosen=x.chosen.float(), rejected=x.rejected.float())
    got = LOSSES["discopop"].fn(low, LossOptions(beta=1.0)).item()
    assert got == pytest.approx(927.0, rel=1e-6)


def test_orpo_near_certainty() -> None:
    """A completion of probability 1 to the last bit of float32: the gradient stays finite."""
    chosen = torch.tensor([-1e-9], requires_grad=True)
    x = PairLogp(chosen, torch.tensor([-3.0]), None, None, torch.ones(1), torch.ones(1))
    loss = LOSSES["orpo"].fn(x, LossOptions())
    loss.sum().backward()
    assert chosen.grad is not None
    assert torch.isfinite(chosen.grad).all() and torch.isfinite(loss).all()


@pytest.mark.parametrize(
    ("kind", "coef", "derivative"),
    [
        ("reverse_kl", 0.5, lambda t: math.log(t)),
        ("forward_kl", 0.5, lambda t: 1 - 1 / t),
        ("js_divergence", 0.5, lambda t: math.log(2 * t / (t + 1))),
        ("alpha_divergence", 0.5, lambda t: (t**-0.5 - 1) / -0.5),
        ("alpha_divergence", 3.0, lambda t: (t**2 - 1) / 2),
        ("alpha_divergence", 1.0, lambda t: math.log(t)),
    ],
)
def test_scores_are_the_divergences_derivatives(
    kind: str, coef: float, derivative: Callable[[float], float]
) -> None:
    ratio = torch.tensor([-3.0, -0.1, 0.0, 2.5], dtype=torch.float64)
    options = LossOptions(f_divergence_type=kind, f_alpha_divergence_coef=coef)
    expected = [derivative(math.exp(r)) for r in ratio.tolist()]
    assert score(ratio, options).tolist() == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_alpha_divergence_does_not_overflow() -> None:
    options = LossOptions(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.5)
    ratio = torch.tensor([-1e4, 1e4])
    assert torch.isfinite(score(ratio, options)).all()


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "js_divergence"])
@pytest.mark.parametrize("name", LOSSES)
def test_value_where_policy_is_reference(name: str, kind: str) -> None:
    loss, smoothing = LOSSES[name], 0.01
    x = case((-3.0, -7.0, -3.0, -7.0, 2, 3), (-4.0, -2.0, -4.0, -2.0, 1, 5))
    got = loss.fn(x, LossOptions(beta=0.25, label_smoothing=smoothing, f_divergence_type=kind))
    if loss.at_equal:
        assert got.tolist() == pytest.approx([loss.at_equal(0.25, smoothing)] * 2, rel=1e-12)
    else:
        assert got[0].item() != pytest.approx(got[1].item(), rel=1e-3)


@pytest.mark.parametrize("name", LOSSES)
def test_margin_only_is_true(name: str) -> None:
    """A shared segment's gradient cancels exactly when the loss depends on the margin alone."""
    logp = torch.tensor(
        [-1.0, -2.0, -4.0, -1.5, -2.0, -0.5, -0.5, -1.0, -3.0], dtype=torch.float64
    ).requires_grad_()
    reference = torch.tensor([-3.0, -5.0, -1.0], dtype=torch.float64)
    lengths = torch.tensor([3, 4, 2]), torch.tensor([5, 2, 2])
    x = PairLogp(*sequence_sums(logp, 3), reference, reference.roll(1), *lengths)
    LOSSES[name].fn(x, LossOptions(beta=0.7, label_smoothing=0.01)).sum().backward()
    assert logp.grad is not None
    shared = logp.grad.view(3, 3)[:, 0].abs()
    assert bool((shared < 1e-15).all()) == LOSSES[name].margin_only


@pytest.mark.parametrize("name", LOSSES)
def test_needs_reference_and_batch_coupled_are_true(name: str) -> None:
    loss, options = LOSSES[name], LossOptions(beta=0.7, label_smoothing=0.01)
    x = case(*STEP)
    value = loss.fn(x, options)
    assert x.ref_chosen is not None
    other = dataclasses.replace(x, ref_chosen=x.ref_chosen - torch.arange(4.0))
    assert (not torch.equal(loss.fn(other, options), value)) == loss.needs_reference
    if not loss.needs_reference:
        free = dataclasses.replace(x, ref_chosen=None, ref_rejected=None)
        assert torch.equal(loss.fn(free, options), value)
    alone = torch.cat([loss.fn(case(row), options) for row in STEP])
    assert torch.allclose(alone, value, rtol=1e-12) != bool(loss.batch_coupled)


@pytest.mark.parametrize("name", ["sft", "cpo"])
def test_a_part_of_a_step_knows_the_steps_mean_length(name: str) -> None:
    options = LossOptions(beta=0.3)
    whole = LOSSES[name].fn(case(*STEP), options)
    part = dataclasses.replace(case(*STEP[:2]), step_len=torch.tensor(3.0, dtype=torch.float64))
    torch.testing.assert_close(LOSSES[name].fn(part, options), whole[:2], rtol=1e-14, atol=0)


def test_the_sorting_losses_do_not_depend_on_the_order_of_pairs() -> None:
    options, order = LossOptions(beta=0.3), torch.tensor([2, 0, 3, 1])
    for name in ("aot", "aot_unpaired"):
        value = LOSSES[name].fn(case(*STEP), options)
        moved = LOSSES[name].fn(case(*(STEP[i] for i in order.tolist())), options)
        assert torch.equal(moved, value[order])


def test_lists_add_up() -> None:
    x, options = case(*STEP), LossOptions(beta=0.3, label_smoothing=0.1)
    loss = get_loss(["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.5])
    parts = [LOSSES[n].fn(x, options) for n in ("sigmoid", "bco_pair", "sft")]
    expected = 0.8 * parts[0] + 0.2 * parts[1] + 1.5 * parts[2]
    torch.testing.assert_close(loss.fn(x, options), expected, rtol=1e-14, atol=0)
    assert (loss.needs_reference, loss.margin_only, loss.batch_coupled) == (True, False, "tokens")
    assert loss.smoothing and loss.at_equal is None
    both = get_loss(["sigmoid", "aot"], [1.0, 2.0])
    assert both.at_equal is not None
    assert (both.margin_only, both.batch_coupled) == (True, "order")
    assert both.at_equal(0.3, 0.0) == pytest.approx(3 * math.log(2))
    assert not get_loss("simpo").needs_reference and get_loss("dpo") is LOSSES["sigmoid"]
    assert get_loss("sigmoid", [0.5]).fn(x, options).tolist() == (0.5 * parts[0]).tolist()


def test_unknown_losses_are_refused() -> None:
    with pytest.raises(ValueError, match="sigmoyd.*sigmoid"):
        get_loss("sigmoyd")
    with pytest.raises(ValueError, match="2 losses and 1 loss_weights"):
        get_loss(["sigmoid", "sft"], [1.0])
    with pytest.raises(ValueError, match="0 losses"):
        get_loss([])


def test_shared_segment_counts_for_both_and_tails_by_their_weight() -> None:
    chosen, rejected = sequence_sums(torch.tensor([-1.0, -2.0, -4.0]), 1)
    assert (chosen.item(), rejected.item()) == (-3.0, -5.0)
    segments = torch.tensor([-1.0, -2.0, 0.0, -4.0, -8.0])
    chosen, rejected = sequence_sums(segments, 1, 0.25)
    assert (chosen.item(), rejected.item()) == (-3.0, -7.0)


def test_wpo_weight() -> None:
    """A policy that is uniform over v tokens has weight 1, whatever v."""
    length = torch.tensor([3, 5]), torch.tensor([2, 7])
    logp = [n * -math.log(10.0) for n in length]
    weight = wpo_weight((logp[0], logp[1]), (logp[0], logp[1]), length)
    torch.testing.assert_close(weight, torch.ones(2))
    more = wpo_weight((logp[0] + 3 * math.log(2.0), logp[1]), (logp[0], logp[1]), length)
    torch.testing.assert_close(more[0], torch.tensor(2.0))
    x = dataclasses.replace(case(*STEP[:2]), weighting=weight * 3)
    options = LossOptions()
    for name in ("hinge", "sigmoid"):
        expected = 3 * LOSSES[name].fn(x, options)
        torch.testing.assert_close(pair_losses(LOSSES[name], x, options), expected)


def test_rewards() -> None:
    x = case(*STEP)
    chosen, rejected = rewards(x, 0.5, per_token=False)
    assert chosen.tolist() == [0.5 * (r[0] - r[2]) for r in STEP]
    assert rejected.tolist() == [0.5 * (r[1] - r[3]) for r in STEP]
    free = dataclasses.replace(x, ref_chosen=None, ref_rejected=None)
    chosen, _ = rewards(free, 0.5, per_token=True)
    assert chosen.tolist() == pytest.approx([0.5 * r[0] / r[4] for r in STEP])


def test_pairs_put_together() -> None:
    whole, parts = case(*STEP), [case(*STEP[:1]), case(*STEP[1:])]
    for name, values in vars(concatenate_pairs(parts)).items():
        expected = getattr(whole, name)
        assert values is expected is None or torch.equal(values, expected), name


def test_norms_from_the_gram_matrix() -> None:
    torch.manual_seed(0)
    g = torch.randn(4, 3, 50, dtype=torch.float64)  # gradients of shared, chosen, rejected rows
    norms = pair_norms(g @ g.transpose(1, 2))
    chosen, rejected = g[:, 0] + g[:, 1], g[:, 0] + g[:, 2]
    torch.testing.assert_close(norms["gnorm_m"], (chosen - rejected).norm(dim=1))
    torch.testing.assert_close(norms["gnorm_chosen"], chosen.norm(dim=1))
    torch.testing.assert_close(norms["gnorm_rejected"], rejected.norm(dim=1))
    torch.testing.assert_close(norms["dot_chosen_rejected"], (chosen * rejected).sum(1))


def test_norms_with_tails_are_those_of_the_weighted_sums() -> None:
    torch.manual_seed(0)
    g = torch.randn(4, 5, 50, dtype=torch.float64)
    norms = pair_norms(g @ g.transpose(1, 2), 0.3)
    chosen = g[:, 0] + g[:, 1] + 0.3 * g[:, 2]
    rejected = g[:, 0] + g[:, 3] + 0.3 * g[:, 4]
    torch.testing.assert_close(norms["gnorm_m"], (chosen - rejected).norm(dim=1))
    torch.testing.assert_close(norms["gnorm_chosen"], chosen.norm(dim=1))
    torch.testing.assert_close(norms["gnorm_rejected"], rejected.norm(dim=1))
    torch.testing.assert_close(norms["dot_chosen_rejected"], (chosen * rejected).sum(1))


def test_the_functional_drop_in() -> None:
    """`dpo_loss` is the original code's `preference_loss`, written out here."""
    x = case(*STEP)
    assert x.ref_chosen is not None and x.ref_rejected is not None
    logps = (x.chosen, x.rejected, x.ref_chosen, x.ref_rejected)
    logits = (x.chosen - x.rejected) - (x.ref_chosen - x.ref_rejected)
    log_sigmoid = torch.nn.functional.logsigmoid
    losses, chosen, rejected = dpo_loss(*logps, beta=0.2, label_smoothing=0.1)
    expected = -0.9 * log_sigmoid(0.2 * logits) - 0.1 * log_sigmoid(-0.2 * logits)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(chosen, 0.2 * (x.chosen - x.ref_chosen))
    torch.testing.assert_close(rejected, 0.2 * (x.rejected - x.ref_rejected))
    losses, chosen, _ = dpo_loss(*logps, beta=0.2, reference_free=True)
    torch.testing.assert_close(losses, -log_sigmoid(0.2 * (x.chosen - x.rejected)))
    torch.testing.assert_close(chosen, 0.2 * (x.chosen - x.ref_chosen))
    losses, *_ = dpo_loss(*logps, beta=0.2, ipo=True)
    torch.testing.assert_close(losses, (logits - 2.5) ** 2)


def test_docs_agree_with_the_registry() -> None:
    script = Path(__file__).resolve().parents[2] / "docs" / "loss_table.py"
    spec = importlib.util.spec_from_file_location("loss_table_script", script)
    assert spec and spec.loader
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    page = made.PAGE.read_text(encoding="utf-8")
    assert made.BEGIN + made.tables() + made.END in page, (
        "docs/losses.md is out of date; run: python docs/loss_table.py"
    )
    for name, loss in LOSSES.items():
        assert "arXiv" in (loss.fn.__doc__ or "") or name == "sft", f"{name} cites no source"
