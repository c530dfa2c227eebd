"""Packing against a plain reading of the layout: every scored token once, with its own context."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref.batch import PairBatch
from fastpref.data.pack import pack_pairs, parts, plan_microbatches
from fastpref.data.tokenize import TokenPair

tokens = st.lists(st.integers(0, 4), max_size=6)


def token_pair(prompt: list[int], chosen: list[int], rejected: list[int], n: int = 0) -> TokenPair:
    ids = [np.array(x, np.int32) for x in (prompt, chosen, rejected)]
    return TokenPair(n, n % 3, "", *ids, truncated=False)


@st.composite
def pairs(draw: st.DrawFn) -> list[TokenPair]:
    found = []
    for n in range(draw(st.integers(1, 5))):
        prompt = draw(st.lists(st.integers(0, 4), min_size=1, max_size=6))
        chosen = draw(st.lists(st.integers(0, 2), min_size=1, max_size=6))
        rejected = draw(
            st.lists(st.integers(0, 2), min_size=1, max_size=6).filter(lambda y, c=chosen: y != c)
        )
        found.append(token_pair(prompt, chosen, rejected, n))
    return found


def contexts(batch: PairBatch) -> list[list[tuple[tuple[int, ...], int]]]:
    """Per segment, (the tokens a row's position sees, its target), read off the layout alone."""
    found: list[list[tuple[tuple[int, ...], int]]] = [[] for _ in range(batch.num_segments)]
    starts = np.cumsum([0] + [sum(own) for own in batch.lengths])
    for row, target, segment in zip(
        batch.rows.tolist(), batch.target.tolist(), batch.segment_id.tolist(), strict=True
    ):
        p = int(batch.pair_of_token[row])
        prefix, chosen, _ = batch.lengths[p]
        start = int(starts[p])
        seen = list(range(start, row + 1))
        if row >= start + prefix + chosen:  # in the rejected rest: the chosen rest is not seen
            seen = [t for t in seen if not start + prefix <= t < start + prefix + chosen]
        positions = batch.positions[seen].tolist()
        assert positions == list(range(len(seen)))
        found[segment].append((tuple(batch.tokens[seen].tolist()), target))
    return found


@settings(deadline=None)
@given(pairs())
def test_every_completion_token_is_scored_in_its_own_context(given_pairs: list[TokenPair]) -> None:
    batch = pack_pairs(given_pairs)
    batch.check(vocab_size=5)
    found = contexts(batch)
    for p, pair in enumerate(given_pairs):
        for completion, own in ((pair.chosen, 3 * p + 1), (pair.rejected, 3 * p + 2)):
            whole = [*pair.prompt.tolist(), *completion.tolist()]
            n = len(pair.prompt)
            expected = {(tuple(whole[:t]), whole[t]) for t in range(n, len(whole))}
            got = found[3 * p] + found[own]
            assert sorted(got) == sorted(expected)
            assert len(got) == len(completion)
        assert len(found[3 * p]) == parts(pair).common


def test_last_tokens_are_not_fed_and_the_prefix_is_there_once() -> None:
    batch = pack_pairs([token_pair([7, 8, 9], [1, 2, 3], [1, 4])])
    assert batch.tokens.tolist() == [7, 8, 9, 1, 2]  # neither 3 nor 4; 1 is common to both
    assert batch.positions.tolist() == [0, 1, 2, 3, 4]
    assert batch.segment_id.tolist() == [0, 1, 1, 2]
    assert batch.rows.tolist() == [2, 3, 4, 3]
    assert batch.target.tolist() == [1, 2, 3, 4]
    assert batch.lengths == ((4, 1, 0),)
    assert (batch.chosen_scored.item(), batch.rejected_scored.item()) == (3, 2)


def test_position_zero_is_never_scored() -> None:
    """Not in the first pair, nor by the last token of the pair before."""
    batch = pack_pairs([token_pair([], [5, 6], [5, 7]), token_pair([], [8, 6], [8, 7], n=1)])
    batch.check()
    assert batch.target.tolist() == [6, 7, 6, 7]
    assert batch.chosen_scored.tolist() == batch.rejected_scored.tolist() == [1, 1]


def test_a_completion_that_starts_the_other() -> None:
    batch = pack_pairs([token_pair([9], [1, 2], [1, 2, 3])])
    assert batch.tokens.tolist() == [9, 1, 2]  # the chosen one's last token predicts a 3 here
    assert batch.segment_id.tolist() == [0, 0, 2]


def test_equal_completions_are_refused() -> None:
    with pytest.raises(ValueError, match="pair 4.*the same 2 tokens"):
        pack_pairs([token_pair([1], [2, 3], [2, 3], n=4)])


def test_check_finds_a_broken_batch() -> None:
    batch = pack_pairs([token_pair([1, 2], [3, 0], [4]), token_pair([1], [2], [3])])
    broken = {
        "segment_id": batch.segment_id.flip(0),
        "rows": batch.rows + 1,
        "chosen_scored": batch.chosen_scored + 1,
        "prefix_len": batch.prefix_len + 1,
    }
    for name, value in broken.items():
        with pytest.raises(ValueError, match="PairBatch"):
            PairBatch(**{**vars(batch), name: value}).check()
    with pytest.raises(ValueError, match="id 4; vocabulary has 4"):
        batch.check(vocab_size=4)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(50, 200))
def test_microbatches_keep_the_budget_and_lose_nothing(fed: list[int], budget: int) -> None:
    lengths = np.array(fed)
    plan = plan_microbatches(lengths, np.arange(len(fed)), budget)
    assert sorted(np.concatenate(plan).tolist()) == list(range(len(fed)))
    totals = [int(lengths[own].sum()) for own in plan]
    assert max(totals) <= budget
    # Filled greedily by length: no more micro-batches than that needs.
    greedy, total = 1, 0
    for n in sorted(fed):
        greedy, total = (greedy + 1, n) if total + n > budget else (greedy, total + n)
    assert len(plan) == greedy


def test_microbatches_are_even() -> None:
    plan = plan_microbatches(np.full(5, 10), np.arange(5), 40)
    assert sorted(len(own) for own in plan) == [2, 3]  # not 4 and 1


def test_microbatches_do_not_depend_on_the_order_given() -> None:
    fed = np.array([5, 3, 3, 9, 1])
    one = plan_microbatches(fed, np.array([0, 1, 2, 3, 4]), 10)
    other = plan_microbatches(fed, np.array([4, 2, 0, 3, 1]), 10)
    assert [own.tolist() for own in one] == [own.tolist() for own in other]


def test_a_pair_over_the_budget_is_refused_with_the_number_to_set() -> None:
    with pytest.raises(ValueError, match="at least 12"):
        plan_microbatches(np.array([3, 12]), np.array([0, 1]), 10)


def test_reference_values_travel_with_the_pair() -> None:
    pair = token_pair([1], [2], [3])
    known = TokenPair(1, 0, "", pair.prompt, pair.chosen, pair.rejected, False, -1.1, -2.5)
    batch = pack_pairs([pair, known])
    assert torch.isnan(batch.ref_chosen[0]) and batch.ref_chosen[1].item() == -1.1  # of float64
    assert batch.ref_rejected[1] == -2.5


@settings(deadline=None)
@given(pairs())
def test_first_own_rows_score_where_the_completions_part(given_pairs: list[TokenPair]) -> None:
    batch = pack_pairs(given_pairs)
    for laid in (batch, batch.with_tails()):
        rows = laid.first_own_rows().T.tolist()
        for pair, (chosen, rejected) in zip(given_pairs, rows, strict=True):
            at = parts(pair)
            common = at.prefix - at.prompt
            for row, completion in ((chosen, pair.chosen), (rejected, pair.rejected)):
                rest = completion[common:].tolist()
                assert (row >= 0) == bool(rest)
                if rest:
                    assert laid.target[row] == rest[0]
                    within = laid.pair_of_token[: laid.rows[row] + 1]
                    own = int((within == laid.pair_of_token[laid.rows[row]]).sum())
                    assert own == at.prefix  # the state is that of the prefix's last token
