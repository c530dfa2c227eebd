"""The setting: only logit differences matter, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref.theory.pairs import (
    FrozenPairs,
    HeadRows,
    answer_rows,
    behavior_means,
    behavior_sums,
    flipped,
    frozen_pairs,
    head_change,
    kernel,
    margins,
    output_gap,
    with_features,
)
from tests.theory.simulate import (
    NO,
    VOCABULARY,
    YES,
    gaussian_pairs,
    gradient,
    log_softmax,
    loss_of,
    mixed_pairs,
    random_head,
    true_margins,
)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_simulations_gradient_is_that_of_its_loss(smoothing: float) -> None:
    pairs, beta, step = mixed_pairs(0, 12), 0.7, 1e-5
    head, reference = random_head(1, 6), random_head(2, 6)
    slope = np.zeros(head.shape)
    for place in np.ndindex(head.shape):
        for sign in (1, -1):
            moved = head.copy()
            moved[place] += sign * step
            loss = loss_of(true_margins(pairs, moved, reference), beta, smoothing).mean()
            slope[place] += sign * loss / (2 * step)
    ours = gradient(pairs, np.arange(12), head, reference, beta, smoothing)
    np.testing.assert_allclose(ours, slope, rtol=0, atol=1e-10)
    assert np.abs(ours).max() > 1e-2


def test_the_normaliser_cancels_from_values_and_gradients() -> None:
    """(E2): the full softmax over V, and logit differences of two rows, are the same model."""
    pairs = mixed_pairs(3)
    head, reference = 4 * random_head(4, 6), random_head(5, 6)
    rows = np.arange(len(pairs.features))
    logp = log_softmax(pairs.features @ head.T)
    gap = logp[rows, pairs.chosen] - logp[rows, pairs.rejected]
    np.testing.assert_allclose(output_gap(pairs, head), gap, atol=1e-13)

    change = HeadRows(np.arange(VOCABULARY), head - reference)
    np.testing.assert_allclose(
        margins(pairs, change), true_margins(pairs, head, reference), atol=1e-13
    )
    # Rows of tokens that answer nothing do not learn, though every softmax has them in its sum,
    # and what one answer's row gains the other's loses.
    asked = gaussian_pairs(0)
    step = gradient(asked, np.arange(60), 4 * random_head(6, 8), random_head(7, 8), 0.5)
    others = np.setdiff1d(np.arange(VOCABULARY), [YES, NO])
    assert np.abs(step[others]).max() < 1e-15
    np.testing.assert_allclose(step[YES], -step[NO], atol=1e-15)
    assert np.abs(step[YES]).max() > 1e-3


def test_kernel_is_the_inner_product_of_margin_gradients() -> None:
    pairs, others = mixed_pairs(0, 25), mixed_pairs(1, 17)

    def gradients(p: FrozenPairs) -> np.ndarray:
        eye = np.eye(VOCABULARY)
        answer = eye[p.chosen] - eye[p.rejected]
        return np.einsum("pv,pd->pvd", answer, p.features).reshape(len(p.chosen), -1)

    own = gradients(pairs)
    np.testing.assert_allclose(kernel(pairs), own @ own.T, atol=1e-13)
    np.testing.assert_allclose(kernel(pairs, others), own @ gradients(others).T, atol=1e-13)

    alpha = np.random.default_rng(2).normal(size=25)
    change = head_change(pairs, alpha)
    assert list(change.tokens) == sorted({*pairs.chosen, *pairs.rejected})
    full = np.zeros((VOCABULARY, 6))
    full[change.tokens] = change.rows
    np.testing.assert_allclose(full.ravel(), alpha @ own, atol=1e-13)
    np.testing.assert_allclose(margins(pairs, change), kernel(pairs) @ alpha, atol=1e-12)
    np.testing.assert_allclose(margins(others, change), kernel(others, pairs) @ alpha, atol=1e-12)
    assert change.norm**2 == pytest.approx(alpha @ kernel(pairs) @ alpha, abs=1e-12)
    direction = answer_rows(pairs, change)
    np.testing.assert_allclose(
        (direction * pairs.features).sum(axis=1), margins(pairs, change), atol=1e-13
    )


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 12), st.integers(1, 7), st.integers(2, 5), st.integers(1, 4), st.integers(0, 9)
)
def test_shapes_and_sums(size: int, width: int, tokens: int, behaviors: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    behavior = np.concatenate([np.arange(min(behaviors, size)), rng.integers(behaviors, size=size)])
    behavior = np.unique(behavior[:size], return_inverse=True)[1]
    names = [f"b{k}" for k in range(behavior.max() + 1)]
    chosen = rng.integers(tokens, size=size)
    rejected = (chosen + rng.integers(1, tokens, size=size)) % tokens
    count = rng.integers(1, 4, size=size)
    pairs = frozen_pairs(rng.normal(size=(size, width)), chosen, rejected, behavior, names, count)
    assert pairs.fraction.sum() == pytest.approx(1)
    alpha = rng.normal(size=size)
    sums = behavior_sums(pairs, alpha)
    assert sums.shape == (len(names), len(pairs.tokens), width)
    np.testing.assert_allclose(sums.sum(axis=0), head_change(pairs, alpha).rows, atol=1e-12)
    np.testing.assert_allclose(
        margins(pairs, head_change(pairs, alpha)), kernel(pairs) @ alpha, atol=1e-11
    )
    values = rng.normal(size=(3, size))
    means = behavior_means(pairs, values)
    assert means.shape == (3, len(names))
    for k in range(len(names)):
        own = behavior == k
        np.testing.assert_allclose(
            means[:, k], np.average(values[:, own], axis=1, weights=count[own]), atol=1e-12
        )
    # A row of count n is n rows of count 1.
    long = frozen_pairs(
        *(np.repeat(a, count, axis=0) for a in (pairs.features, chosen, rejected, behavior)), names
    )
    np.testing.assert_allclose(long.fraction, pairs.fraction)
    np.testing.assert_allclose(
        head_change(long, long.weight).rows, head_change(pairs, pairs.weight).rows, atol=1e-12
    )


def test_flipped_pairs_and_another_models_features() -> None:
    pairs = mixed_pairs(0)
    back = flipped(pairs)
    head = random_head(0, 6)
    np.testing.assert_array_equal(output_gap(back, head), -output_gap(pairs, head))
    other = with_features(pairs, 2 * pairs.features)
    np.testing.assert_allclose(output_gap(other, head), 2 * output_gap(pairs, head))
    with pytest.raises(ValueError, match="hold inf"):
        with_features(pairs, np.full((40, 6), np.inf))


def make(**changed: Any) -> FrozenPairs:
    values: dict[str, Any] = {
        "features": np.ones((3, 2)),
        "chosen": [5, 2, 5],
        "rejected": [2, 5, 2],
        "behavior": [0, 1, 1],
        "behaviors": ["calm", "bold"],
    }
    return frozen_pairs(**(values | changed))


def test_bad_pairs_are_refused_by_name() -> None:
    assert make().behaviors == ("calm", "bold")
    nan = np.ones((3, 2))
    nan[2, 1] = np.nan
    with pytest.raises(ValueError, match=r"pair 2 \(behavior 'bold'\) hold nan; 1 of 3 .*float32"):
        make(features=nan)
    with pytest.raises(ValueError, match=r"pair 1 \(behavior 'bold'\).*same token 5 \(1 such"):
        make(chosen=[5, 5, 5], rejected=[2, 5, 2])
    with pytest.raises(ValueError, match="'bold' has no pair"):
        make(behavior=[0, 0, 0])
    with pytest.raises(ValueError, match="index 2 of row 1"):
        make(behavior=[0, 2, 1])
    with pytest.raises(ValueError, match=r"rejected\[1\] is -1"):
        make(rejected=[2, -1, 2])
    with pytest.raises(ValueError, match=r"chosen: expected \(3,\) integers.*float64"):
        make(chosen=[5.0, 2.0, 5.0])
    with pytest.raises(ValueError, match=r"rejected: expected \(3,\)"):
        make(rejected=[2, 5])
    with pytest.raises(ValueError, match=r"expected \(P, D\) with P, D > 0, got shape \(0, 2\)"):
        make(features=np.ones((0, 2)))
    with pytest.raises(ValueError, match=r"got shape \(3,\)"):
        make(features=np.ones(3))
    with pytest.raises(ValueError, match="count"):
        make(count=[1, 0, 2])


def test_a_head_that_does_not_fit_is_refused() -> None:
    pairs = make()
    with pytest.raises(ValueError, match=r"expected \(V, 2\) for these features, got \(9, 3\)"):
        output_gap(pairs, np.ones((9, 3)))
    with pytest.raises(ValueError, match="answer token 5, but the head has 5 rows"):
        output_gap(pairs, np.ones((5, 2)))
    with pytest.raises(ValueError, match="not finite"):
        output_gap(pairs, np.full((6, 2), np.nan))
    with pytest.raises(ValueError, match="width 3, the features of the pairs 2"):
        margins(pairs, HeadRows(np.array([2, 5]), np.ones((2, 3))))
