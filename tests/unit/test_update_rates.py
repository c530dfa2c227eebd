"""Rates from sketches, against full gradients of a small float64 network."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fastpref_kernels import sketch_cosine, sketch_dot

from fastpref.dynamics import rates

K, PAIRS, SKETCH, SEEDS = 3, 8, 16, 600
BEHAVIOR = np.repeat(np.arange(K), PAIRS)
STEP = np.array([0, 1, 1, 2, 0, 1])  # behaviors of a step's pairs; none of them in the sample


@pytest.fixture(scope="module")
def network() -> dict[str, np.ndarray]:
    """Gradients of margins in three weights, as (P, rows, columns) each: two layers and a head."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(14, 10), (9, 14), (5, 9)]
    weights = [
        torch.randn(s, generator=generator, dtype=torch.float64) / s[1] ** 0.5 for s in shapes
    ]
    for weight in weights:
        weight.requires_grad_()
    centre = torch.randn(K, 10, generator=generator, dtype=torch.float64)
    which = torch.tensor(np.concatenate([BEHAVIOR, STEP]))
    noise = torch.randn(len(which), 10, generator=generator, dtype=torch.float64)
    x = centre[which] + noise
    grads = []
    for row in x:
        logp = torch.log_softmax(
            weights[2] @ torch.tanh(weights[1] @ torch.tanh(weights[0] @ row)), dim=0
        )
        grads.append(torch.autograd.grad(logp[0] - logp[1], weights))
    return {str(i): torch.stack([g[i] for g in grads]).numpy() for i in range(3)}


def sketched(network: dict[str, np.ndarray], seed: int, k: int = SKETCH) -> np.ndarray:
    """(G, P, k, k) by signs drawn here, one pair of projections per weight."""
    rng = np.random.default_rng(seed)
    found = []
    for grad in network.values():
        left, right = (rng.choice([-1.0, 1.0], (n, k)) / k**0.5 for n in grad.shape[1:])
        found.append(np.einsum("pij,ia,jb->pab", grad, left, right))
    return np.stack(found)


def groups(values: np.ndarray, axis: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """M_k of the sample and G_l of the step, weights of the pairs between 0.3 and 0.8."""
    sample, step = np.split(values, [K * PAIRS], axis=axis)
    means = np.stack(
        [sample.take(np.flatnonzero(k == BEHAVIOR), axis).mean(axis) for k in range(K)], axis
    )
    weight = np.linspace(0.3, 0.8, len(STEP)).reshape((-1,) + (1,) * (values.ndim - axis - 1))
    parts = step * weight / len(STEP)
    return means, np.stack(
        [parts.take(np.flatnonzero(k == STEP), axis).sum(axis) for k in range(K)], axis
    )


def flat(network: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([g.reshape(len(g), -1) for g in network.values()], axis=1)


def exact(network: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every quantity from the whole gradients, by its definition."""
    full = flat(network)
    means, parts = groups(full)
    whole = parts.sum(axis=0)
    own = full[: K * PAIRS].reshape(K, PAIRS, -1)
    squares = (own**2).sum(axis=2).mean(axis=1)
    trace = own.var(axis=1, ddof=1).sum(axis=1)
    true = (means**2).sum(axis=1) - trace / PAIRS
    lengths = np.linalg.norm(means, axis=1)[:, None] * np.linalg.norm(parts, axis=1)
    return {
        "gamma": means @ parts.T,
        "cosine": means @ parts.T / lengths,
        "share": parts @ whole / (whole @ whole),
        "sgd": means @ (0.01 * whole),
        "length": np.linalg.norm(means, axis=1),
        "coherence": true / squares,
        "noise": trace / true,
    }


def estimated(
    network: dict[str, np.ndarray], seed: int, known: bool = False
) -> dict[str, rates.Estimate]:
    sketch = sketched(network, seed)
    means, parts = groups(sketch, axis=1)
    own = sketch[:, : K * PAIRS].reshape(3, K, PAIRS, SKETCH, SKETCH)
    squares = rates.products(own, own).mean(axis=1)
    if known:
        full = flat(network)[: K * PAIRS].reshape(K, PAIRS, -1)
        squares = rates.known((full**2).sum(axis=2).mean(axis=1), SKETCH)
    mean = rates.products(means, means)
    true = mean - rates.excess(mean, squares, np.full(K, PAIRS))
    return {
        "gamma": rates.interactions(means, parts),
        "cosine": rates.cosines(means, parts),
        "share": rates.shares(parts),
        "sgd": rates.first_order(means, 0.01 * parts.sum(axis=1)),
        "length": rates.length_of(mean),
        "coherence": rates.coherence(true, squares),
        "noise": rates.noise_scale(true, squares),
    }


@pytest.mark.parametrize("known", [False, True], ids=["norms by sketch", "norms known"])
def test_estimates_are_right_on_average_and_their_errors_cover(
    network: dict[str, np.ndarray], known: bool
) -> None:
    """Over many projections of one set of gradients: unbiased (ratios to O(1/k)), and the truth
    within two standard errors as often as such errors promise."""
    truth = exact(network)
    found = [estimated(network, seed, known) for seed in range(SEEDS)]
    for name, value in truth.items():
        values = np.stack([f[name].value for f in found])
        errors = np.stack([f[name].error for f in found])
        spread = values.std(axis=0)
        linear = name in ("gamma", "sgd")
        slack = 4 / SEEDS**0.5 if linear else 0.5
        assert (np.abs(np.mean(values, axis=0) - value) < slack * spread).all(), name
        if name == "noise":  # its denominator comes near 0: no error of first order holds
            continue
        assert (np.abs(np.median(errors, axis=0) / spread - 1) < 0.35).all(), name
        covered = (np.abs(values - value) <= 2 * errors).mean(axis=0)
        # t of few degrees of freedom and products of signs have long tails: not 0.954.
        assert (covered > 0.86).all() and covered.mean() > 0.88, (name, covered)


def test_more_columns_come_nearer(network: dict[str, np.ndarray]) -> None:
    """The error falls as 1/sqrt(k) to 1/k, so the estimate is the truth in the limit."""
    truth = exact(network)["gamma"]
    wrong = []
    for k in (4, 64):
        found = [rates.interactions(*groups(sketched(network, s, k), axis=1)) for s in range(60)]
        wrong.append(np.std(np.stack([f.value for f in found]) - truth))
    assert 4 / 1.2 < wrong[0] / wrong[1] < 16


def test_shares_sum_to_one(network: dict[str, np.ndarray]) -> None:
    for seed in range(20):
        assert estimated(network, seed)["share"].value.sum() == pytest.approx(1, abs=1e-14)
    parts = groups(sketched(network, 0), axis=1)[1]
    parts[:, 1] = 0
    share = rates.shares(parts)
    assert share.value[1] == 0 == share.error[1]


def test_errors_are_those_of_the_kernels(network: dict[str, np.ndarray]) -> None:
    """One layer group: the same number and the same standard error as `sketch_dot` and its kin."""
    sketch = sketched(network, 5)[:1]
    means, parts = groups(sketch, axis=1)
    a, b = (torch.from_numpy(x[0]) for x in (means, parts))
    ours = [rates.interactions(means, parts), rates.cosines(means, parts)]
    theirs = [sketch_dot(a[:, None], b[None]), sketch_cosine(a[:, None], b[None])]
    for own, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(own.value, other.value.numpy(), rtol=1e-12)
        np.testing.assert_allclose(own.error, other.error.numpy(), rtol=1e-9)


def test_groups_have_independent_noise() -> None:
    """Adding sketches adds noise of what the groups have not in common; adding layouts does not."""
    rng = np.random.default_rng(1)
    network = {str(g): rng.normal(size=(2, 12, 12)) for g in range(4)}
    truth = flat(network)[0] @ flat(network)[1]
    apart, together = [], []
    for seed in range(400):
        a, b = sketched(network, seed).swapaxes(0, 1)
        apart.append(rates.mean_of(rates.products(a, b)).value - truth)
        together.append(rates.mean_of(rates.products(a.sum(0)[None], b.sum(0)[None])).value - truth)
    assert np.std(apart) < 0.8 * np.std(together)


@pytest.mark.parametrize("true", [0.0, 2.0])
def test_coherence_of_few_pairs_is_not_too_large(true: float) -> None:
    """Without the correction n pairs with nothing in common would show 1/n."""
    rng = np.random.default_rng(0)
    n, size, trials = 5, 30, 4000
    g = rng.normal(size=(trials, n, size))
    g[:, :, 0] += true
    mean = rates.known((g.mean(axis=1) ** 2).sum(axis=1), 2)
    squares = rates.known((g**2).sum(axis=2).mean(axis=1), 2)
    count = np.full(trials, n)
    expected = true**2 / (size + true**2)
    known = mean - rates.excess(mean, squares, count)
    corrected = rates.coherence(known, squares).value
    assert corrected.mean() == pytest.approx(expected, abs=0.004)
    plain = rates.ratio_of(mean, squares).value
    assert plain.mean() == pytest.approx(expected + (1 - expected) / n, abs=0.004)
    # B = tr / |E g|^2, means over trials of both: the ratio of averages is free of bias.
    assert (squares - known).mean() == pytest.approx(size, rel=0.01)
    assert known.mean() == pytest.approx(true**2, abs=0.1)


def test_strata_leave_no_chance_between_them() -> None:
    """Two answers that pull apart, drawn half and half: 0 on average, where taking the pairs for
    independent draws would call them opposed (-1/(n - 1))."""
    rng = np.random.default_rng(2)
    n, size, trials, apart = 6, 20, 3000, 5.0
    g = rng.normal(size=(trials, 2, n // 2, size))
    g[:, 0, :, 0] += apart
    g[:, 1, :, 0] -= apart
    sides = g.reshape(2 * trials, n // 2, size)
    of, count = np.repeat(np.arange(trials), 2), np.full(2 * trials, n // 2)

    def layouts(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean, squares = (x.mean(axis=1) ** 2).sum(axis=1), (x**2).sum(axis=2).mean(axis=1)
        return rates.known(mean, 2), rates.known(squares, 2)

    whole = layouts(g.reshape(trials, n, size))
    true = whole[0] - rates.excess_of_strata(*layouts(sides), count, of, trials)
    assert rates.coherence(true, whole[1]).value.mean() == pytest.approx(0, abs=0.004)
    drawn = whole[0] - rates.excess(*whole, np.full(trials, n))
    assert rates.coherence(drawn, whole[1]).value.mean() < -0.1
    one = rates.excess_of_strata(*layouts(sides[:, :1]), np.ones(2 * trials), of, trials)
    assert np.isnan(one).all()


def test_one_pair_tells_no_spread() -> None:
    square = rates.known(np.array([4.0]), 3)
    assert np.isnan(rates.excess(square, square, np.array([1]))).all()
    assert np.isnan(rates.mean_of(np.ones((2, 1, 1))).error).all()  # k = 1
    assert rates.mean_of(rates.known(3.0, 4)) == (3.0, 0.0)


def test_mean_change() -> None:
    behavior = np.array([0, 2, 2, 2])
    before = np.array([1.0, 0.0, 0.0, 0.0])
    after = np.array([0.5, 1.0, 2.0, 6.0])
    found = rates.mean_change(before, after, behavior, 3)
    np.testing.assert_allclose(found.value, [-0.5, np.nan, 3.0])
    np.testing.assert_allclose(found.error, [np.nan, np.nan, np.std([1, 2, 6], ddof=1) / 3**0.5])


def test_sketches_that_do_not_compare_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 4, 4\) and \(3, 4, 4\)"):
        rates.products(np.zeros((2, 4, 4)), np.zeros((3, 4, 4)))
    with pytest.raises(ValueError, match="one k"):
        rates.products(np.zeros((2, 4, 4)), np.zeros((2, 8, 8)))
