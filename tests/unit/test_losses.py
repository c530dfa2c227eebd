"""Losses against the papers' formulas in plain Python, and against autograd where they are flat."""

from __future__ import annotations

import math

import pytest
import torch

from fastpref.losses import LOSSES, PairLogp, get_loss, pair_logp, pair_norms


def case(
    chosen: float, rejected: float, ref_c: float, ref_r: float, n_c: int, n_r: int
) -> PairLogp:
    values = [torch.tensor([v], dtype=torch.float64) for v in (chosen, rejected, ref_c, ref_r)]
    return PairLogp(*values, torch.tensor([n_c]), torch.tensor([n_r]))


CASES = [
    (-3.0, -4.0, -3.5, -3.0, 2, 5),
    (-60.0, -2.0, -1.0, -30.0, 1, 1),
    (-5.0, -5.0, -5.0, -5.0, 3, 4),
]


@pytest.mark.parametrize("values", CASES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_sigmoid(values: tuple, smoothing: float) -> None:
    beta = 0.3
    margin = (values[0] - values[2]) - (values[1] - values[3])
    expected = (1 - smoothing) * math.log1p(math.exp(-beta * margin)) + smoothing * math.log1p(
        math.exp(beta * margin)
    )
    got = LOSSES["sigmoid"].fn(case(*values), beta, smoothing)
    assert got.item() == pytest.approx(expected, rel=1e-12)


def test_smoothing_moves_the_minimum_to_a_finite_margin() -> None:
    """At beta m = log((1 - eps)/eps) the smoothed loss is flat; without smoothing it never is."""
    eps, beta = 0.2, 0.5
    chosen = torch.tensor([math.log((1 - eps) / eps) / beta], dtype=torch.float64).requires_grad_()
    zero = torch.zeros(1, dtype=torch.float64)
    x = PairLogp(chosen, zero, zero, zero, torch.ones(1), torch.ones(1))
    (slope,) = torch.autograd.grad(LOSSES["sigmoid"].fn(x, beta, eps).sum(), chosen)
    assert abs(slope.item()) < 1e-15
    (slope,) = torch.autograd.grad(LOSSES["sigmoid"].fn(x, beta, 0.0).sum(), chosen)
    assert slope.item() < -0.05


@pytest.mark.parametrize("values", CASES)
def test_ipo(values: tuple) -> None:
    beta = 0.3
    margin = (values[0] - values[2]) / values[4] - (values[1] - values[3]) / values[5]
    got = LOSSES["ipo"].fn(case(*values), beta, 0.0)
    assert got.item() == pytest.approx((margin - 1 / (2 * beta)) ** 2, rel=1e-12)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_value_where_policy_is_reference(name: str) -> None:
    loss = LOSSES[name]
    x = case(-3.0, -7.0, -3.0, -7.0, 2, 3)
    assert loss.fn(x, 0.25, 0.0).item() == pytest.approx(loss.at_equal(0.25, 0.0), rel=1e-12)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_margin_only_is_true(name: str) -> None:
    """A shared segment's gradient cancels exactly when the loss depends on the margin alone."""
    logp = torch.tensor([-1.0, -2.0, -4.0], dtype=torch.float64).requires_grad_()
    zero = torch.zeros(1, dtype=torch.float64)
    x = pair_logp(logp, zero - 3, zero - 5, torch.tensor([3]), torch.tensor([4]))
    LOSSES[name].fn(x, 0.7, 0.0).sum().backward()
    assert logp.grad is not None
    assert (logp.grad[0].abs().item() < 1e-15) == LOSSES[name].margin_only


def test_shared_segment_counts_for_both() -> None:
    x = pair_logp(torch.tensor([-1.0, -2.0, -4.0]), *[torch.zeros(1)] * 4)
    assert (x.chosen.item(), x.rejected.item()) == (-3.0, -5.0)


def test_unknown_loss_and_undefined_smoothing_are_refused() -> None:
    with pytest.raises(ValueError, match="sigmoyd.*sigmoid"):
        get_loss("sigmoyd")
    with pytest.raises(ValueError, match="label_smoothing=0.1 is not defined.*sigmoid"):
        get_loss("ipo", 0.1)


def test_norms_from_the_gram_matrix() -> None:
    torch.manual_seed(0)
    g = torch.randn(4, 3, 50, dtype=torch.float64)  # gradients of shared, chosen, rejected rows
    norms = pair_norms(g @ g.transpose(1, 2))
    chosen, rejected = g[:, 0] + g[:, 1], g[:, 0] + g[:, 2]
    torch.testing.assert_close(norms["gnorm_m"], (chosen - rejected).norm(dim=1))
    torch.testing.assert_close(norms["gnorm_chosen"], chosen.norm(dim=1))
    torch.testing.assert_close(norms["gnorm_rejected"], rejected.norm(dim=1))
    torch.testing.assert_close(norms["dot_chosen_rejected"], (chosen * rejected).sum(1))
