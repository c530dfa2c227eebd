from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref.data.formats import Pair, read_pairs
from fastpref.data.split import split_pairs


def pair(pair_id: int, behavior: str = "kind", label: str = "") -> Pair:
    return Pair("p", "c", "r", "", behavior, label, False, "f", 1, pair_id)


PAIRS = st.lists(
    st.builds(pair, st.integers(0, 2**63 - 1), st.sampled_from("ab"), st.sampled_from(["", "Y"])),
    max_size=60,
    unique_by=lambda p: p.pair_id,
)


@settings(max_examples=100, deadline=None)
@given(PAIRS, st.floats(0, 0.99), st.integers(0, 5), st.randoms(use_true_random=False))
def test_parts_sizes_and_independence_of_order_and_of_other_behaviors(
    pairs: list[Pair], fraction: float, seed: int, shuffler: object
) -> None:
    train, held = split_pairs(pairs, fraction, seed)
    assert sorted(train + held) == list(range(len(pairs)))
    assert (train, held) == (sorted(train), sorted(held))
    for stratum, n in Counter((p.behavior, p.label) for p in pairs).items():
        got = sum((pairs[i].behavior, pairs[i].label) == stratum for i in held)
        assert got == min(int(fraction * n + 0.5), n - 1)

    out = {pairs[i].pair_id for i in held}
    mixed = list(pairs)
    shuffler.shuffle(mixed)  # type: ignore[attr-defined]
    assert {mixed[i].pair_id for i in split_pairs(mixed, fraction, seed)[1]} == out
    alone = [p for p in pairs if p.behavior == "a"]
    assert {alone[i].pair_id for i in split_pairs(alone, fraction, seed)[1]} == out & {
        p.pair_id for p in alone
    }


def test_seed_changes_the_choice_and_small_strata_keep_a_training_pair() -> None:
    pairs = [pair(n) for n in range(100)]
    first, other = (set(split_pairs(pairs, 0.1, seed)[1]) for seed in (0, 1))
    assert len(first) == len(other) == 10
    assert first != other
    assert split_pairs(pairs[:1], 0.9, 0) == ([0], [])
    assert [len(part) for part in split_pairs(pairs[:2], 0.9, 0)] == [1, 1]
    assert split_pairs(pairs, 0.0, 0)[1] == []
    assert split_pairs([], 0.5, 0) == ([], [])


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_fraction_out_of_range(fraction: float) -> None:
    with pytest.raises(ValueError, match="eval_fraction"):
        split_pairs([pair(1)], fraction, 0)


def test_persona_is_balanced_within_each_behavior(persona_dir: Path) -> None:
    pairs, _ = read_pairs([str(persona_dir)])
    train, held = split_pairs(pairs, 0.1, 0)
    rows = Counter((p.behavior, p.label) for p in pairs)
    for part, share in ((train, 0.9), (held, 0.1)):
        counts = Counter((pairs[i].behavior, pairs[i].label) for i in part)
        assert set(counts) == set(rows)
        assert all(abs(counts[key] - share * rows[key]) <= 0.5 for key in rows)
        assert all(counts[b, "Yes"] == counts[b, "No"] for b, _ in rows)

    flipped, _ = read_pairs([str(persona_dir)], flip_behaviors=[pairs[0].behavior])
    assert split_pairs(flipped, 0.1, 0) == (train, held)
