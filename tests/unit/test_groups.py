"""Aggregation to behaviors, against plain Python loops."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest

from fastpref.dynamics.groups import (
    behavior_rows,
    feature_rows,
    time_to_threshold,
    update_rate,
)

NAMES = ["agreeable", "bold", "calm", "dry"]


@pytest.fixture
def pairs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    count = 57
    columns = {
        name: rng.normal(size=count).astype(np.float32)
        for name in ("margin", "loss", "weight", "logp_chosen", "logp_rejected", "ref_logp_chosen")
    }
    columns["head_gnorm_m"] = rng.gamma(2.0, size=count).astype(np.float32)
    columns["margin"][:5] = 0.0
    # Behavior 2 is absent, 3 has one pair.
    columns["behavior"] = rng.integers(0, 2, count)
    columns["behavior"][11] = 3
    return columns


def test_rows_are_those_of_a_plain_loop(pairs: dict[str, np.ndarray]) -> None:
    behavior = pairs.pop("behavior")
    rows = behavior_rows(NAMES, behavior, **pairs)
    assert [row["behavior"] for row in rows] == ["agreeable", "bold", "dry"]
    for row in rows:
        mine = [i for i in range(behavior.size) if NAMES[behavior[i]] == row["behavior"]]
        values = {name: [float(column[i]) for i in mine] for name, column in pairs.items()}
        assert row["n"] == len(mine)
        assert row["fraction"] == pytest.approx(len(mine) / behavior.size, rel=1e-15)
        for name in ("margin", "loss", "weight", "logp_chosen", "logp_rejected", "head_gnorm_m"):
            assert row[name] == pytest.approx(math.fsum(values[name]) / len(mine), rel=1e-12)
        assert row["margin_std"] == pytest.approx(statistics.pstdev(values["margin"]), abs=1e-12)
        assert row["reward_accuracy"] == sum(m > 0 for m in values["margin"]) / len(mine)
        pairs_of = list(zip(values["logp_chosen"], values["logp_rejected"], strict=True))
        assert row["output_accuracy"] == sum(c > r for c, r in pairs_of) / len(mine)
        references = list(zip(values["logp_chosen"], values["ref_logp_chosen"], strict=True))
        assert row["displaced_frac"] == sum(c < r for c, r in references) / len(mine)
        squares = [g * g for g in values["head_gnorm_m"]]
        assert row["head_gnorm_m_sq"] == pytest.approx(math.fsum(squares) / len(mine), rel=1e-12)


def test_a_zero_margin_counts_as_wrong() -> None:
    (row,) = behavior_rows(["a"], np.zeros(4, np.int64), margin=np.array([0.0, 0.0, 1.0, -1.0]))
    assert row["reward_accuracy"] == 0.25


def test_absent_columns_stay_absent() -> None:
    (row,) = behavior_rows(["a"], np.zeros(2, np.int64), margin=np.ones(2))
    assert set(row) == {"behavior", "n", "fraction", "margin", "margin_std", "reward_accuracy"}
    assert behavior_rows(["a"], np.zeros(0, np.int64), margin=np.zeros(0)) == []


def test_bad_shapes_and_indices() -> None:
    with pytest.raises(ValueError, match=r"margin has shape \(3,\), behavior \(2,\)"):
        behavior_rows(["a"], np.zeros(2, np.int64), margin=np.zeros(3))
    with pytest.raises(ValueError, match="0 to 1, there are 1"):
        behavior_rows(["a"], np.array([0, 1]), margin=np.zeros(2))


def test_update_rate_is_the_chord() -> None:
    step = np.array([0, 10, 50])
    assert update_rate(step, np.array([1.0, 9.0, 3.0])) == pytest.approx(2.0 / 50)
    assert update_rate(step, np.array([np.nan, 1.0, 3.0])) == pytest.approx(2.0 / 40)
    assert update_rate(step, np.array([np.nan, 1.0, np.nan])) is None
    assert update_rate(step[:1], np.array([1.0])) is None


def test_time_to_threshold() -> None:
    step = np.array([0, 5, 10, 15])
    values = np.array([0.0, 1.0, np.nan, 1.5])
    assert time_to_threshold(step, values, 1.0) == 15  # above, not at
    assert time_to_threshold(step, values, 0.5) == 5
    assert time_to_threshold(step, values, -1.0) == 0
    assert time_to_threshold(step, values, 2.0) is None
    assert time_to_threshold(step[:0], values[:0], 0.0) is None


def test_feature_rows_say_how_far_apart_the_answers_lie() -> None:
    rng = np.random.default_rng(1)
    features = rng.normal(size=(24, 5))
    behavior = np.repeat([0, 2], 12)
    chosen = np.where(np.arange(24) % 3 == 0, 7, 4)
    rejected = 11 - chosen
    rows = feature_rows(behavior, features, chosen, rejected)
    assert list(rows) == [0, 2]
    for k, row in rows.items():
        own = behavior == k
        small, large = (features[own & (chosen == token)] for token in (4, 7))
        d = small.mean(axis=0) - large.mean(axis=0)
        assert row["delta"] == pytest.approx(np.linalg.norm(d), rel=1e-12)
        middle = (small.mean(axis=0) + large.mean(axis=0)) / 2
        assert row["mu_dot_d"] == pytest.approx(middle @ d, rel=1e-12)
        spreads = [np.linalg.eigvalsh(np.cov(side.T, bias=True)) for side in (small, large)]
        assert row["lambda_max"] == pytest.approx(max(s[-1] for s in spreads), rel=1e-10)
        assert row["trace"] == pytest.approx(max(s.sum() for s in spreads), rel=1e-10)


@pytest.mark.parametrize(
    ("chosen", "rejected", "value"),
    [
        ([7, 7, 7], [4, 4, 4], 1.0),  # one class is empty
        ([7, 4, 5], [4, 7, 4], 1.0),  # more than two answers
        ([7, -1, 7], [-1, 7, -1], 1.0),  # one answer is the start of the other
        ([7, 4, 7], [4, -1, 4], 1.0),  # the same of one pair alone
        ([-1, 7, 7], [-1, 4, 4], 1.0),
        ([7, 4, 7], [-1, -1, -1], 1.0),
        ([7, 4, 7], [4, 7, 4], np.nan),
    ],
    ids=[
        *("one class", "three answers", "no first token", "one without a rejected one"),
        *("one without any", "no rejected ones", "not finite"),
    ],
)
def test_feature_rows_leave_undefined_what_is(
    chosen: list[int], rejected: list[int], value: float
) -> None:
    features = np.full((3, 2), value)
    (row,) = feature_rows(np.zeros(3, int), features, np.array(chosen), np.array(rejected)).values()
    assert row == dict.fromkeys(("delta", "lambda_max", "trace", "mu_dot_d"))
