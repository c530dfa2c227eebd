"""The dual recursion and flow against heads that are trained on the full softmax."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from fastpref.theory.dual import (
    Batch,
    check_beta,
    dpo_loss,
    dpo_weight,
    dual_recursion,
    gradient_flow,
)
from fastpref.theory.integrate import integrate
from fastpref.theory.pairs import FrozenPairs, HeadRows, frozen_pairs, head_change, kernel
from tests.theory.simulate import (
    VOCABULARY,
    gaussian_pairs,
    loss_of,
    mixed_pairs,
    random_head,
    train,
    true_margins,
)


def random_batches(seed: int, pairs: FrozenPairs, steps: int) -> list[np.ndarray | None]:
    rng = np.random.default_rng(seed)
    return [rng.choice(len(pairs.chosen), size=rng.integers(1, 16)) for _ in range(steps)]


@pytest.mark.parametrize(
    ("pairs", "smoothing", "clip"),
    [
        (gaussian_pairs(0, (40, 30, 30)), 0.0, None),
        (gaussian_pairs(1, (50,), plus=0.7), 0.1, None),
        (mixed_pairs(2), 0.0, None),
        (mixed_pairs(3), 0.2, 0.3),
    ],
    ids=["three behaviors", "unbalanced, smoothed", "any tokens", "any tokens, clipped"],
)
def test_recursion_is_sgd_on_the_full_softmax(
    pairs: FrozenPairs, smoothing: float, clip: float | None
) -> None:
    steps, beta = 60, 0.8
    batches: list[np.ndarray | None] = [*random_batches(0, pairs, steps - 5), *[None] * 5]
    rates = list(np.linspace(0.8, 0.01, steps))
    head = random_head(1, pairs.features.shape[1])
    run = train(pairs, batches, rates, beta, head, smoothing=smoothing, max_grad_norm=clip)
    theory = dual_recursion(
        pairs, batches, rates, beta, label_smoothing=smoothing, max_grad_norm=clip
    )
    assert run.head_norm[-1] > 0.5, "nothing moved: the comparison would say nothing"
    np.testing.assert_allclose(theory.margin, run.margin, rtol=0, atol=1e-10)
    np.testing.assert_allclose(theory.head_norm, run.head_norm, rtol=0, atol=1e-10)
    assert theory.step is not None and list(theory.step) == list(range(steps + 1))
    if clip is None:
        np.testing.assert_allclose(theory.time, np.concatenate([[0], np.cumsum(rates)]))
    else:
        assert theory.time[-1] < sum(rates)
    moved = np.zeros((VOCABULARY, pairs.features.shape[1]))
    final = head_change(pairs, theory.alpha[-1])
    moved[final.tokens] = final.rows
    np.testing.assert_allclose(moved, run.heads[-1] - head, rtol=0, atol=1e-10)


def test_recursion_is_the_one_written_in_kernels() -> None:
    pairs, beta = mixed_pairs(4), 0.6
    matrix, batches = kernel(pairs), random_batches(1, pairs, 30)
    alpha = np.zeros(len(pairs.chosen))
    for batch in batches:
        assert batch is not None
        taught = beta / (1 + np.exp(beta * (matrix @ alpha)[batch]))
        np.add.at(alpha, batch, 0.5 * taught / len(batch))
    theory = dual_recursion(pairs, batches, 0.5, beta)
    np.testing.assert_allclose(theory.alpha[-1], alpha, atol=1e-12)
    np.testing.assert_allclose(theory.margin[-1], matrix @ alpha, atol=1e-12)
    assert theory.head_norm[-1] == pytest.approx(np.sqrt(alpha @ matrix @ alpha), abs=1e-12)


def test_probes_are_followed_and_a_start_apart_from_the_reference_counts() -> None:
    pairs, probes, beta = mixed_pairs(5), mixed_pairs(6, 15), 0.9
    head, reference = random_head(2, 6), random_head(3, 6)
    batches = random_batches(2, pairs, 25)
    run = train(pairs, batches, 0.4, beta, head, reference)
    start = HeadRows(np.arange(VOCABULARY), head - reference)
    theory = dual_recursion(pairs, batches, 0.4, beta, start=start, probes=probes)
    np.testing.assert_allclose(theory.margin, run.margin, atol=1e-10)
    np.testing.assert_allclose(theory.head_norm, run.head_norm, atol=1e-10)
    held_out = [true_margins(probes, h, reference) for h in run.heads]
    assert theory.probe_margin is not None
    np.testing.assert_allclose(theory.probe_margin, held_out, atol=1e-10)
    assert np.abs(theory.probe_margin[-1] - theory.probe_margin[0]).max() > 0.1


def test_probes_with_tokens_that_were_never_trained() -> None:
    pairs = gaussian_pairs(0)
    other = frozen_pairs(pairs.features[:2], [3, 5], [8, 3])  # the trained ones are 2 and 5
    theory = dual_recursion(pairs, [None] * 3, 1.0, 0.5, probes=other)
    assert theory.probe_margin is not None
    assert (theory.probe_margin[:, 0] == 0).all()
    assert theory.probe_margin[-1, 1] != 0


def test_records_are_those_of_the_steps_asked_for() -> None:
    pairs = mixed_pairs(7)
    batches = random_batches(3, pairs, 11)
    every = dual_recursion(pairs, batches, 0.3, 0.5)
    some = dual_recursion(pairs, batches, 0.3, 0.5, record_every=4)
    assert some.step is not None and list(some.step) == [0, 4, 8, 11]
    np.testing.assert_array_equal(some.margin, every.margin[[0, 4, 8, 11]])
    none = dual_recursion(pairs, [], 0.3, 0.5)
    assert none.margin.shape == (1, 40) and none.head_norm[0] == 0


def test_a_row_of_count_n_teaches_like_n_pairs() -> None:
    few = mixed_pairs(8, 12)
    count = np.arange(1, 13)
    weighted = frozen_pairs(few.features, few.chosen, few.rejected, count=count)
    many = frozen_pairs(
        *(np.repeat(a, count, axis=0) for a in (few.features, few.chosen, few.rejected))
    )
    batch = np.array([0, 3, 4])
    in_many = np.concatenate([np.flatnonzero(np.repeat(np.arange(12), count) == i) for i in batch])
    one = dual_recursion(weighted, [None, batch, None], 0.7, 0.5)
    other = dual_recursion(many, [None, in_many, None], 0.7, 0.5)
    np.testing.assert_allclose(one.head_norm, other.head_norm, atol=1e-12)
    np.testing.assert_allclose(np.repeat(one.margin, count, axis=1), other.margin, atol=1e-12)


@pytest.mark.parametrize(
    "pairs", [gaussian_pairs(2, (30, 20)), mixed_pairs(9)], ids=["yes/no", "any"]
)
def test_flow_is_the_limit_of_small_steps(pairs: FrozenPairs) -> None:
    beta, end, smoothing = 0.5, 30.0, 0.05
    head = random_head(4, pairs.features.shape[1])
    coarse, fine = (
        train(pairs, [None] * n, end / n, beta, head, smoothing=smoothing).margin[:: n // 10]
        for n in (400, 800)
    )
    flow = gradient_flow(pairs, np.linspace(0, end, 11), beta, label_smoothing=smoothing)
    first_order = np.abs(fine - flow.margin).max()
    # Richardson: the error of Euler's steps is linear in their width, this one's is quadratic.
    assert np.abs(2 * fine - coarse - flow.margin).max() < first_order / 50
    assert 1e-5 < first_order < 0.05
    assert flow.step is None and flow.head_norm[-1] > 0.3


def test_flow_holds_its_tolerance_and_finds_the_same_from_another_side() -> None:
    pairs, beta = mixed_pairs(10), 0.7
    times = [0.0, 0.3, 5.0, 40.0]
    rough, exact = (gradient_flow(pairs, times, beta, tolerance=tol) for tol in (1e-5, 1e-12))
    matrix = kernel(pairs)
    state = np.zeros(len(pairs.chosen))  # margins, by many classical Runge-Kutta steps
    for _ in range(1000):
        h = 0.04
        k1 = matrix @ dpo_weight(state, beta) / len(state)
        k2 = matrix @ dpo_weight(state + h / 2 * k1, beta) / len(state)
        k3 = matrix @ dpo_weight(state + h / 2 * k2, beta) / len(state)
        k4 = matrix @ dpo_weight(state + h * k3, beta) / len(state)
        state = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    np.testing.assert_allclose(exact.margin[-1], state, atol=1e-9)
    assert 1e-10 < np.abs(rough.head_norm - exact.head_norm).max() < 1e-3
    start = HeadRows(np.arange(VOCABULARY), random_head(5, 6))
    probed = gradient_flow(pairs, times, beta, probes=pairs, start=start)
    assert probed.probe_margin is not None
    np.testing.assert_allclose(probed.probe_margin, probed.margin, atol=1e-12)


def test_flow_where_pulls_cancel_stays_where_it_is() -> None:
    rng = np.random.default_rng(12)
    half = 1e3 + rng.normal(size=(50, 4))
    features = np.concatenate([half, half[rng.permutation(50)]])
    pairs = frozen_pairs(features, np.repeat([1, 2], 50), np.repeat([2, 1], 50))
    assert head_change(pairs, pairs.weight).norm > 0, "rounding, which no step width can resolve"
    still = gradient_flow(pairs, [0.0, 1e-6, 1e-5], 1.0)
    assert still.head_norm.max() < 1e-15


def test_loss_and_weight() -> None:
    margin = np.linspace(-30, 30, 13)
    for smoothing in (0.0, 0.3):
        np.testing.assert_allclose(
            dpo_loss(margin, 0.4, smoothing), loss_of(margin, 0.4, smoothing), rtol=1e-10
        )
        step = 1e-6
        slope = dpo_loss(margin + step, 0.4, smoothing) - dpo_loss(margin - step, 0.4, smoothing)
        np.testing.assert_allclose(
            dpo_weight(margin, 0.4, smoothing), -slope / (2 * step), atol=1e-8
        )
    with np.errstate(all="raise", under="ignore"):
        assert dpo_weight(np.array([-1e4, 1e4]), 1.0).tolist() == [1.0, 0.0]
        assert dpo_loss(np.array([-1e4, 1e4]), 1.0).tolist() == [1e4, 0.0]


def test_bad_runs_are_refused() -> None:
    pairs = mixed_pairs(11, 6)

    def run(batches: Sequence[Batch], rate: float | list[float] = 0.1, beta: float = 0.1) -> None:
        dual_recursion(pairs, batches, rate, beta)

    with pytest.raises(ValueError, match="batch 2 holds index .*6; 6 pairs"):
        run([np.array([0]), np.array([6])])
    with pytest.raises(ValueError, match="batch 1 holds index -1"):
        run([np.array([-1])])
    with pytest.raises(ValueError, match=r"batch 1: expected \(n,\) indices"):
        run([np.array([], int)])
    with pytest.raises(ValueError, match=r"batch 1: expected \(n,\) indices of pairs, got bool"):
        run([np.ones(6, bool)])
    with pytest.raises(ValueError, match=r"\(3,\) rates for 2 batches"):
        run([None, None], [0.1] * 3)
    with pytest.raises(ValueError, match="learning_rate: expected finite"):
        run([None], float("nan"))
    with pytest.raises(ValueError, match="beta is -0.1"):
        run([None], beta=-0.1)
    with pytest.raises(ValueError, match="record_every is 0"):
        dual_recursion(pairs, [None], 0.1, 0.1, record_every=0)
    with pytest.raises(ValueError, match="beta is nan"):
        check_beta(float("nan"))
    with pytest.raises(ValueError, match="times"):
        gradient_flow(pairs, [1.0, 0.5], 0.1)


def relative(tolerance: float):  # type: ignore[no-untyped-def]
    return lambda e, y: float(np.linalg.norm(e) / (tolerance * np.linalg.norm(y)))


def test_integrator_on_equations_with_known_answers() -> None:
    times = np.array([0.0, 0.5, 0.5, 3.0, 7.0])
    turn = np.array([[0.0, 1.0], [-1.0, 0.0]])
    circle = integrate(lambda y: turn @ y, np.array([1.0, 0.0]), times, relative(1e-11))
    np.testing.assert_allclose(circle, np.stack([np.cos(times), -np.sin(times)], 1), atol=1e-9)
    # Nonlinear, and fast at first: dy/dt = -y^3 from 100.
    # The first step tried leaves the range of numbers and must be taken back.
    with np.errstate(all="ignore"):
        decay = integrate(lambda y: -(y**3), np.array([100.0]), times, relative(1e-10))
    np.testing.assert_allclose(decay[:, 0], 1 / np.sqrt(2 * times + 1e-4), rtol=1e-8)


def test_integrator_is_of_fifth_order() -> None:
    errors, calls = [], []
    for tolerance in (1e-4, 1e-9):
        count = [0]

        def slope(y: np.ndarray, count: list[int] = count) -> np.ndarray:
            count[0] += 1
            return np.array([y[1], -y[0]])

        end = integrate(slope, np.array([1.0, 0.0]), [60.0], relative(tolerance))[0]
        errors.append(np.linalg.norm(end - [np.cos(60.0), -np.sin(60.0)]))
        calls.append(count[0])
    # Error per unit of time ~ calls^-5; a wrong coefficient makes it 1 or 2.
    order = np.log(errors[0] / errors[1]) / np.log(calls[1] / calls[0])
    assert 4.5 < order < 6.5, (errors, calls)


def test_integrator_refuses_times_it_cannot_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastpref.theory.integrate.MAX_STEPS", 30)
    with pytest.raises(ValueError, match="30 steps reached t = .* of 9: too stiff"):
        integrate(lambda y: -1e4 * y, np.ones(1), [1.0, 9.0], relative(1e-6))
    with pytest.raises(ValueError, match="none below 0"):
        integrate(lambda y: y, np.ones(1), [-1.0, 1.0], relative(1e-6))
    with pytest.raises(ValueError, match="finite"):
        integrate(lambda y: y, np.ones(1), [np.inf], relative(1e-6))
