"""Angles of decision boundaries, flips and forgetting, against plain definitions."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fastpref.data.tokenize import TokenPair
from fastpref.drift import Boundaries, angle, answer_tokens
from fastpref.dynamics.changes import Standing, change_rows, recorded_standings
from fastpref.dynamics.recorder import Recorder


def pair(behavior: int, chosen: list[int], rejected: list[int], prompt: int = 3) -> TokenPair:
    tokens = [np.array(t, np.int32) for t in ([9] * prompt, chosen, rejected)]
    return TokenPair(0, behavior, "", *tokens, truncated=())


def test_answer_tokens_are_the_two_that_all_pairs_part_in() -> None:
    pairs = [
        *(pair(0, [5, 1], [7, 1]), pair(0, [7, 2], [5])),
        *(pair(1, [4, 5], [4, 7]), pair(1, [4, 4, 7], [4, 4, 5])),  # after a common start
        *(pair(2, [5], [7]), pair(2, [5], [8]), pair(2, [5], [7])),  # a third answer
        pair(3, [5, 6], [5]),  # one completion is the start of the other
        pair(4, [5], [7], prompt=0),  # no state that predicts the answer
    ]
    assert answer_tokens(pairs) == {0: (5, 7), 1: (5, 7)}


@pytest.mark.parametrize("turned", [0.0, 1e-9, 1e-4, 0.7, math.pi / 2, math.pi])
def test_angles(turned: float) -> None:
    a = torch.tensor([3.0, 0.0, 0.0], dtype=torch.float64)
    b = 0.2 * torch.tensor([math.cos(turned), math.sin(turned), 0.0], dtype=torch.float64)
    assert angle(a, b) == pytest.approx(turned, rel=1e-6, abs=1e-15)
    assert angle(a, 0 * b) is None


def test_boundaries_turn_with_the_head() -> None:
    weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    model: Any = SimpleNamespace(head=SimpleNamespace(weight=weight))
    boundaries = Boundaries.of(model, [pair(0, [5], [7]), pair(2, [1], [2]), pair(2, [3], [2])])
    assert boundaries.rotation(model) == {0: 0.0}
    weight[7] += torch.randn(6, generator=torch.Generator().manual_seed(1))
    now, then = (weight[5] - weight[7]).double(), boundaries.start[0]
    expected = math.acos(float(now @ then / (now.norm() * then.norm())))
    assert boundaries.rotation(model)[0] == pytest.approx(expected, rel=1e-6)
    assert Boundaries().rotation(model) == {}


def columns(rng: np.random.Generator, ids: np.ndarray) -> dict[str, np.ndarray]:
    names = ("margin", "logp_chosen", "logp_rejected")
    return {"pair_id": ids, **{n: rng.normal(size=len(ids)).astype(np.float32) for n in names}}


def test_changes_are_counted_by_behavior() -> None:
    rng = np.random.default_rng(4)
    ids, behavior = np.arange(40), np.repeat([0, 3], 20)
    then, now = columns(rng, ids), columns(rng, ids)
    then["margin"][:4] = now["margin"][2:6] = 0.0
    found = change_rows(Standing.of(then), Standing.of(now), behavior)
    for k in (0, 3):
        own = np.flatnonzero(behavior == k)
        better = [c["logp_chosen"] > c["logp_rejected"] for c in (then, now)]
        assert found[k]["flips"] == sum(better[0][i] != better[1][i] for i in own)
        lost = sum(then["margin"][i] > 0 and not now["margin"][i] > 0 for i in own)
        assert found[k]["forgotten"] == lost > 0
    unknown = {"flips": None, "forgotten": None}
    assert change_rows(None, Standing.of(now), behavior) == {0: unknown, 3: unknown}
    other = Standing.of(columns(rng, ids[::-1]))
    assert change_rows(other, Standing.of(now), behavior) == {0: unknown, 3: unknown}


def test_standings_come_back_from_the_records(tmp_path: Path) -> None:
    """Of each split's last evaluation up to the step, in whatever part it lies."""
    rng = np.random.default_rng(5)
    recorder = Recorder(tmp_path, 0, ["a"], 4)
    written: dict[tuple[str, int], dict[str, np.ndarray]] = {}
    for step in range(11):
        for split, every in (("train_sample", 2), ("eval", 5)):
            if step % every == 0:
                own = written[split, step] = columns(rng, np.arange(7) + every)
                recorder.pairs(step, split, behavior=np.zeros(7, np.int64), **own)
        recorder.flush(step)
    recorder.close(10)
    for step, last in ((10, (10, 10)), (9, (8, 5)), (4, (4, 0)), (1, (0, 0))):
        found = recorded_standings(tmp_path, ["train_sample", "eval"], step)
        for (split, standing), at in zip(sorted(found.items(), reverse=True), last, strict=True):
            expected = Standing.of(written[split, at])
            np.testing.assert_array_equal(standing.pair_id, expected.pair_id)
            np.testing.assert_array_equal(standing.learned, expected.learned)
            np.testing.assert_array_equal(standing.preferred, expected.preferred)
    assert recorded_standings(tmp_path, ["rate_sample"], 10) == {}
