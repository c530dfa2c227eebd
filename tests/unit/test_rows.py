"""Rows laid out once against `pack_pairs`: the same rows, each with its own state."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref.batch import PairBatch
from fastpref.data.pack import pack_pairs, pair_rows, parts, scored_rows
from fastpref.data.rows import RowIndex
from fastpref.data.tokenize import TokenPair

SAME = (
    *("target", "segment_id", "prefix_len", "chosen_len", "rejected_len", "lengths"),
    *("chosen_scored", "rejected_scored", "pair_id", "behavior", "ref_chosen", "ref_rejected"),
)


@st.composite
def pairs(draw: st.DrawFn) -> list[TokenPair]:
    found = []
    for n in range(draw(st.integers(1, 6))):
        prompt = draw(st.lists(st.integers(0, 4), min_size=n % 2, max_size=5))
        least = 1 if prompt else 2
        chosen = draw(st.lists(st.integers(0, 2), min_size=least, max_size=5))
        rejected = draw(
            st.lists(st.integers(0, 2), min_size=least, max_size=5).filter(
                lambda y, c=chosen: y != c
            )
        )
        ids = [np.array(x, np.int32) for x in (prompt, chosen, rejected)]
        references = (-1.0 / (n + 1), None) if n % 3 else (None, None)
        found.append(TokenPair(17 * n + 3, n % 2, "", *ids, False, *references))
    return found


def tables(given_pairs: list[TokenPair], index: RowIndex) -> tuple[np.ndarray, np.ndarray]:
    """A state for every fed token, (pair_id, place in the pair); of them those the index keeps."""
    fed = [[(p.pair_id, t) for t in range(parts(p).fed)] for p in given_pairs]
    kept = [own[index.first[i] :] for i, own in enumerate(fed)]
    return tuple(np.array([s for own in x for s in own], np.float64) for x in (fed, kept))  # type: ignore[return-value]


@settings(deadline=None)
@given(pairs(), st.data())
def test_a_batch_is_that_of_pack_pairs(given_pairs: list[TokenPair], data: st.DataObject) -> None:
    index = RowIndex(given_pairs)
    _, kept = tables(given_pairs, index)
    assert index.num_states == len(kept)
    chosen = data.draw(st.lists(st.sampled_from(given_pairs), min_size=1, unique_by=id))
    packed, ours = pack_pairs(chosen), index.pack(chosen, kept)
    ours.check(vocab_size=5)
    for name in SAME:
        one, other = getattr(packed, name), getattr(ours, name)
        if isinstance(one, torch.Tensor):
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
        else:
            assert one == other
    states, _ = tables(chosen, RowIndex(chosen))
    assert ours.hidden is not None and ours.num_tokens == 0
    assert torch.equal(ours.hidden[ours.rows], torch.from_numpy(states)[packed.rows])
    # Every state is scored, and none is there twice.
    assert sorted(set(ours.rows.tolist())) == list(range(len(ours.hidden)))
    assert len({tuple(s) for s in ours.hidden.tolist()}) == len(ours.hidden)


@settings(deadline=None)
@given(pairs(), st.data())
def test_flipped_pairs_find_the_states_of_the_data(
    given_pairs: list[TokenPair], data: st.DataObject
) -> None:
    index = RowIndex(given_pairs)
    _, kept = tables(given_pairs, index)
    flips = data.draw(st.lists(st.booleans(), min_size=len(given_pairs), max_size=len(given_pairs)))
    run = [
        replace(p, chosen=p.rejected, rejected=p.chosen, flipped=True) if flip else p
        for p, flip in zip(given_pairs, flips, strict=True)
    ]
    packed, ours, plain = pack_pairs(run), index.pack(run, kept), index.pack(given_pairs, kept)
    ours.check(vocab_size=5)
    for name in ("target", "segment_id", "chosen_len", "rejected_scored"):
        assert torch.equal(getattr(packed, name), getattr(ours, name))
    for n, flip in enumerate(flips):
        for part, other in ((0, 0), (1, 2), (2, 1)):
            mine = ours.hidden[ours.rows[ours.segment_id == 3 * n + part]]
            same = 3 * n + (other if flip else part)
            assert torch.equal(mine, plain.hidden[plain.rows[plain.segment_id == same]])


@settings(deadline=None)
@given(pairs())
def test_scored_rows_count_the_rows(given_pairs: list[TokenPair]) -> None:
    for pair, count in zip(given_pairs, scored_rows(given_pairs).tolist(), strict=True):
        rows = len(pair_rows(pair, parts(pair)).at)
        assert rows == count if len(pair.prompt) else count - 2 <= rows < count


def test_one_token_answers_share_one_state() -> None:
    ids = [np.array(x, np.int32) for x in ([1, 2, 3], [4], [5])]
    index = RowIndex([TokenPair(9, 0, "", *ids, truncated=False)])
    assert index.num_states == 1 and index.rows.tolist() == [2]


def test_check_finds_states_that_are_not_the_batch_s() -> None:
    ids = [np.array(x, np.int32) for x in ([1, 2, 3], [4, 6], [5])]
    pair = TokenPair(9, 0, "", *ids, truncated=False)
    batch = RowIndex([pair]).pack([pair], np.zeros((2, 4)))
    batch.check()
    assert batch.hidden is not None
    for changes in ({"hidden": batch.hidden[:1]}, {"tokens": torch.tensor([1, 2])}):
        with pytest.raises(ValueError, match="PairBatch"):
            PairBatch(**{**vars(batch), **changes}).check()
