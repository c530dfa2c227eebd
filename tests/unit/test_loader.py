"""The plan of a run is a function of (seed, epoch, rank) and loses no pair."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref.config import Config
from fastpref.data.loader import Loader, _spread
from fastpref.data.tokenize import TokenPair
from fastpref.prepare import total_steps


def made(count: int, labels: int = 2) -> list[TokenPair]:
    rng = np.random.default_rng(0)
    found = []
    for n in range(count):
        prompt = rng.integers(0, 9, rng.integers(1, 20)).astype(np.int32)
        ids = (prompt, np.array([1], np.int32), np.array([2, 3], np.int32))
        found.append(TokenPair(n, n % 3, str(n // 3 % labels), *ids, truncated=False))
    return found


def loader(pairs: list[TokenPair], **options: object) -> Loader:
    given = {"seed": 1, "batch_size": 8, "max_tokens": 64, **options}
    return Loader(pairs, **given)  # type: ignore[arg-type]


def test_an_epoch_holds_every_pair_once() -> None:
    plans = list(loader(made(45)).plan(1, 12))
    first = np.concatenate([own for plan in plans[:6] for own in plan.micro_batches])
    second = np.concatenate([own for plan in plans[6:] for own in plan.micro_batches])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(45))
    assert first.tolist() != second.tolist()
    assert [plan.num_pairs for plan in plans[:6]] == [8, 8, 8, 8, 8, 5]
    assert (plans[5].epoch, plans[11].epoch) == (1.0, 2.0)


def test_a_run_that_begins_in_the_middle_has_the_same_plan() -> None:
    straight = list(loader(made(45)).plan(1, 14))
    resumed = list(loader(made(45)).plan(9, 14))
    for a, b in zip(straight[8:], resumed, strict=True):
        assert (a.step, a.epoch, a.num_tokens) == (b.step, b.epoch, b.num_tokens)
        assert [x.tolist() for x in a.micro_batches] == [x.tolist() for x in b.micro_batches]


def test_ranks_share_a_step_evenly_and_budgets_do_not_move_pairs_between_steps() -> None:
    pairs = made(64)
    whole = list(loader(pairs).plan(1, 8))
    halves = [list(loader(pairs, rank=r, world=2).plan(1, 8)) for r in (0, 1)]
    for plan, *shares in zip(whole, *halves, strict=True):
        own = [np.concatenate(share.micro_batches) for share in shares]
        assert sorted(np.concatenate(own)) == sorted(np.concatenate(plan.micro_batches))
        assert [len(x) for x in own] == [4, 4]
        assert all(share.num_pairs == plan.num_pairs == 8 for share in shares)


def test_seed_changes_the_order_and_no_shuffle_keeps_the_files() -> None:
    assert loader(made(45)).order(0).tolist() != loader(made(45), seed=2).order(0).tolist()
    assert loader(made(45), shuffle=False).order(3).tolist() == list(range(45))


def test_stratified_steps_hold_each_behavior_and_label_in_proportion() -> None:
    pairs = made(240)
    for shuffle in (True, False):
        stratified = loader(pairs, batch_size=24, stratify=True, shuffle=shuffle)
        for plan in stratified.plan(1, 10):
            own = np.concatenate(plan.micro_batches)
            counts = Counter((pairs[i].behavior, pairs[i].label) for i in own)
            assert len(counts) == 6
            assert all(3 <= n <= 5 for n in counts.values()), counts
    free = loader(pairs, batch_size=24)
    spread = [
        Counter((pairs[i].behavior, pairs[i].label) for i in np.concatenate(plan.micro_batches))
        for plan in free.plan(1, 10)
    ]
    assert any(n < 3 or n > 5 for counts in spread for n in counts.values())


def test_stratified_order_is_the_plain_rule_and_linear_in_the_number_of_strata() -> None:
    """The j-th of the n pairs of a stratum stands at (j + u)/n, one u per stratum, in their order.

    Labels may differ in every row: one search per stratum took 20 s for 100,000 of them.
    """
    rng = np.random.default_rng(3)
    for pairs, strata in ((1, 1), (50, 4), (300, 90), (60, 60)):
        order, stratum = rng.permutation(pairs), rng.integers(0, strata, pairs)
        own, place = np.random.default_rng(7), np.empty(pairs)
        for name in sorted(set(stratum.tolist())):
            mine = np.flatnonzero(stratum[order] == name)
            place[mine] = (np.arange(len(mine)) + own.random()) / len(mine)
        expected = order[np.argsort(place, kind="stable")]
        assert _spread(order, stratum, np.random.default_rng(7)).tolist() == expected.tolist()
    many = np.arange(100_000)
    began = time.process_time()
    _spread(many, many, rng)
    assert time.process_time() - began < 3.0


def test_a_pair_that_can_never_fit_is_refused_before_the_first_step() -> None:
    with pytest.raises(ValueError, match="max_tokens_per_microbatch is 10"):
        loader(made(45), max_tokens=10)
    with pytest.raises(ValueError, match="no training pairs"):
        loader([])


@pytest.mark.parametrize("epochs", [0.1, 0.5, 1.0, 1.5, 2.0, 2.01])
def test_fractional_epochs_are_whole_steps(epochs: float) -> None:
    """45 pairs in steps of 8: 6 steps an epoch, the last one of 5 pairs."""
    own = loader(made(45))
    total = total_steps(Config(num_train_epochs=epochs), own.steps_per_epoch)
    assert own.steps_per_epoch == 6 and total == math.ceil(epochs * 6)  # as transformers' Trainer
    plans = list(own.plan(1, total))
    assert plans[-1].epoch >= epochs > (plans[-2].epoch if total > 1 else 0.0)
    seen = Counter(int(i) for plan in plans for own in plan.micro_batches for i in own)
    assert max(seen.values()) == math.ceil(epochs)
    assert min(seen.get(i, 0) for i in range(45)) == math.floor(total / 6)
    assert total_steps(Config(num_train_epochs=epochs, max_steps=4), 6) == 4


# ------------------------------------------------------------------------------------- weights


def mixed(*counts: int) -> list[TokenPair]:
    """``counts[k]`` pairs of source k."""
    pairs = made(sum(counts))
    origins = np.repeat(np.arange(len(counts)), counts).tolist()
    return [dataclasses.replace(p, origin=k) for p, k in zip(pairs, origins, strict=True)]


def taken(weighted: Loader, epoch: int) -> Counter[int]:
    """How often each pair is in an epoch, from its steps' micro-batches."""
    first = epoch * weighted.steps_per_epoch + 1
    plans = weighted.plan(first, first + weighted.steps_per_epoch - 1)
    return Counter(int(i) for plan in plans for own in plan.micro_batches for i in own)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.floats(0.05, 3.2)), min_size=1, max_size=4),
    st.integers(1, 7),
    st.integers(0, 5),
    st.booleans(),
    st.booleans(),
)
def test_weights_are_times_per_epoch(
    sources: list[tuple[int, float]], batch: int, seed: int, shuffle: bool, stratify: bool
) -> None:
    pairs = mixed(*(count for count, _ in sources))
    options = {"batch_size": batch, "seed": seed, "shuffle": shuffle, "stratify": stratify}
    weights = [max(weight, 1 / count) for count, weight in sources]
    weighted = loader(pairs, weights=weights, **options)
    per_source = [
        int(w) * n + int((w - int(w)) * n + 0.5) for (n, _), w in zip(sources, weights, strict=True)
    ]
    assert weighted.num_pairs == sum(per_source)
    assert weighted.steps_per_epoch == -(-sum(per_source) // batch)
    total: Counter[int] = Counter()
    for epoch in range(5):
        once = taken(weighted, epoch)
        total += once
        for k, weight in enumerate(weights):
            mine = [once[i] for i, pair in enumerate(pairs) if pair.origin == k]
            assert sum(mine) == per_source[k]  # in every epoch the same number
            assert set(mine) <= {int(weight), int(weight) + 1}
    for k in range(len(sources)):  # over epochs no pair is left behind
        mine = [total[i] for i, pair in enumerate(pairs) if pair.origin == k]
        assert max(mine) - min(mine) <= 1


def test_two_epochs_at_one_half_take_every_pair_once() -> None:
    pairs = mixed(40, 10)
    weighted = loader(pairs, weights=(0.5, 2))
    halves = [set(taken(weighted, epoch)) & set(range(40)) for epoch in range(3)]
    assert [len(half) for half in halves] == [20, 20, 20]
    assert halves[0] | halves[1] == set(range(40)) and halves[2] == halves[0]
    other = set(taken(loader(pairs, weights=(0.5, 2), seed=2), 0)) & set(range(40))
    assert other != halves[0]
    assert all(taken(weighted, 0)[i] == 2 for i in range(40, 50))


def test_the_choice_depends_on_ids_not_on_places() -> None:
    pairs = mixed(40)
    turned = pairs[::-1]
    first = {pairs[i].pair_id for i in taken(loader(pairs, weights=[0.3]), 1)}
    assert first == {turned[i].pair_id for i in taken(loader(turned, weights=[0.3]), 1)}


def test_weights_of_one_change_nothing() -> None:
    pairs = mixed(30, 15)
    for options in ({}, {"shuffle": False}, {"stratify": True}):
        plain, weighted = loader(pairs, **options), loader(pairs, weights=(1, 1.0), **options)
        for epoch in range(3):
            assert plain.order(epoch).tolist() == weighted.order(epoch).tolist()
    order = loader(mixed(3, 2), weights=(2, 1), shuffle=False).order(0)
    assert order.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]  # the files' order, then the second time


def test_weighted_runs_resume_and_share_steps_exactly() -> None:
    pairs = mixed(37, 20)
    options = {"weights": (0.4, 1.7), "stratify": True}
    straight = list(loader(pairs, **options).plan(1, 25))
    resumed = list(loader(pairs, **options).plan(12, 25))
    halves = [list(loader(pairs, rank=r, world=2, **options).plan(12, 25)) for r in (0, 1)]
    for plan, again, *shares in zip(straight[11:], resumed, *halves, strict=True):
        assert (plan.step, plan.epoch, plan.num_tokens) == (
            again.step,
            again.epoch,
            again.num_tokens,
        )
        assert [x.tolist() for x in plan.micro_batches] == [x.tolist() for x in again.micro_batches]
        whole = np.concatenate(plan.micro_batches)
        own = [pairs for share in shares for pairs in share.micro_batches]
        assert sorted(np.concatenate(own)) == sorted(whole)
        assert len(whole) == plan.num_pairs


def test_weighted_strata_stay_spread() -> None:
    pairs = mixed(120, 120)
    for plan in loader(pairs, batch_size=24, stratify=True, weights=(0.5, 2)).plan(1, 12):
        own = np.concatenate(plan.micro_batches)
        counts = Counter((pairs[i].behavior, pairs[i].label) for i in own)
        assert len(counts) == 6 and max(counts.values()) - min(counts.values()) <= 2


def test_a_weight_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="0.01 of the 10 training pairs of entry 2 is not one"):
        loader(mixed(5, 10), weights=(1, 0.01))
    assert loader(mixed(5), weights=(1, 0.01)).num_pairs == 5  # none of that entry is left anyhow
