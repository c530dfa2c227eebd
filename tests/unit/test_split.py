from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref.data.formats import Pair, read_pairs
from fastpref.data.split import split_pairs


def pair(pair_id: int, behavior: str = "kind", label: str = "", text: str = "") -> Pair:
    prompt = text or f"p{pair_id}"
    return Pair(prompt, "c", "r", "", behavior, label, False, "f", 1, pair_id)


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


TWINS = st.lists(
    st.builds(
        pair,
        st.integers(0, 2**63 - 1),
        st.sampled_from("abc"),
        st.sampled_from(["", "Y"]),
        st.sampled_from(["", "", "one", "two", "three"]),
    ),
    max_size=40,
    unique_by=lambda p: p.pair_id,
)


def apart(pairs: list[Pair]) -> list[Pair]:
    """The same pairs, none with the texts of another."""
    return [replace(p, prompt=str(p.pair_id)) for p in pairs]


@settings(max_examples=200, deadline=None)
@given(TWINS, st.floats(0, 0.99), st.integers(0, 5), st.data())
def test_equal_texts_stay_together_and_move_nobody_else(
    pairs: list[Pair], fraction: float, seed: int, data: st.DataObject
) -> None:
    for n in data.draw(st.lists(st.integers(0, max(len(pairs) - 1, 0)), max_size=len(pairs))):
        pairs[n] = replace(pairs[n], chosen=pairs[n].rejected, rejected=pairs[n].chosen)
    train, held = split_pairs(pairs, fraction, seed)
    assert sorted(train + held) == list(range(len(pairs)))
    sides = {n: n in set(held) for n in range(len(pairs))}
    before = set(split_pairs(apart(pairs), fraction, seed)[1])
    groups: dict[str, list[int]] = {}
    for n, p in enumerate(pairs):
        groups.setdefault(str(p.prompt), []).append(n)
    for members in groups.values():
        assert len({sides[n] for n in members}) == 1
        if len({n in before for n in members}) == 1:  # nothing to unite
            assert sides[members[0]] == (members[0] in before)
    for stratum in {(p.behavior, p.label) for p in pairs}:
        assert any((pairs[n].behavior, pairs[n].label) == stratum for n in train)
    mixed = data.draw(st.permutations(pairs))
    assert {mixed[n].pair_id for n in split_pairs(mixed, fraction, seed)[1]} == {
        pairs[n].pair_id for n in held
    }


def test_twins_never_take_the_last_training_pair_of_a_stratum() -> None:
    """Two pairs, each with a twin that is held out elsewhere: one may follow, not both."""
    pairs = [pair(n, "many", text=f"text {n}") for n in range(100)]
    first, second = split_pairs(pairs, 0.1, 0)[1][:2]
    few = [pair(1000 + n, "few", text=f"text {n}") for n in (first, second)]
    train, held = split_pairs(pairs + few, 0.1, 0)
    assert {first, 100} <= set(held) and {second, 101} <= set(train)


def test_a_data_set_written_twice_still_holds_its_fraction_out() -> None:
    pairs = [pair(n, text=f"text {n % 500}") for n in range(1000)]
    held = split_pairs(pairs, 0.1, 0)[1]
    assert 70 < len(held) < 130
    assert sorted({n % 500 for n in held} | {n % 500 + 500 for n in held}) == held


def test_persona_is_balanced_within_each_behavior(persona_dir: Path) -> None:
    pairs, _ = read_pairs([str(persona_dir)])
    before = set(split_pairs(apart(pairs), 0.1, 0)[1])
    moved = before.symmetric_difference(split_pairs(pairs, 0.1, 0)[1])
    assert len(moved) == 2  # of 24,000; they are twins of others in the same file
    pairs = apart(pairs)
    train, held = split_pairs(pairs, 0.1, 0)
    rows = Counter((p.behavior, p.label) for p in pairs)
    for part, share in ((train, 0.9), (held, 0.1)):
        counts = Counter((pairs[i].behavior, pairs[i].label) for i in part)
        assert set(counts) == set(rows)
        assert all(abs(counts[key] - share * rows[key]) <= 0.5 for key in rows)
        assert all(counts[b, "Yes"] == counts[b, "No"] for b, _ in rows)

    pairs, _ = read_pairs([str(persona_dir)])
    flipped, _ = read_pairs([str(persona_dir)], flip_behaviors=[pairs[0].behavior])
    assert split_pairs(flipped, 0.1, 0) == split_pairs(pairs, 0.1, 0)
