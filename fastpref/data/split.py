"""Training and evaluation sets of pairs, chosen by hash."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from fastpref.data.formats import Pair
from fastpref.data.messages import canonical


def split_pairs(
    pairs: Sequence[Pair], eval_fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Indices into ``pairs`` of the training and of the evaluation set, both ascending.

    Each stratum (the pairs of one behavior with one label), n pairs, is ordered by a hash of
    (seed, pair_id) and gives its first floor(eval_fraction n + 1/2) pairs to the evaluation set, at
    most n - 1. So every behavior keeps a pair to train on, a stratum too small for its fraction
    gives none, and which side a pair is on depends neither on the order of the files nor on other
    strata.

    Then pairs of the same texts (`same_texts`) that ended on both sides come together, on the side
    of the one with the smallest pair_id, so that nothing is held out that is also trained on; or on
    the training side where a stratum would have nothing left to train on. No other pair moves.

    Raises ValueError if ``eval_fraction`` is outside [0, 1).
    """
    if not 0.0 <= eval_fraction < 1.0:
        raise ValueError(f"eval_fraction is at least 0 and below 1, got {eval_fraction}")
    strata: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, pair in enumerate(pairs):
        strata[pair.behavior, pair.label].append(index)
    held_out: list[int] = []
    for members in strata.values():
        members.sort(key=lambda index: _order(seed, pairs[index].pair_id))
        wanted = math.floor(eval_fraction * len(members) + 0.5)
        held_out += members[: min(wanted, len(members) - 1)]
    evaluation = set(held_out)
    if evaluation:
        _unite_twins(pairs, strata, evaluation)
    train = [index for index in range(len(pairs)) if index not in evaluation]
    return train, sorted(evaluation)


def same_texts(pairs: Sequence[Pair]) -> list[list[int]]:
    """Groups of two or more indices of pairs with one prompt and the same two completions,
    whichever of them is chosen; behaviors, labels and ids may differ."""
    groups: dict[tuple[str, frozenset[str]], list[int]] = defaultdict(list)
    for index, pair in enumerate(pairs):
        completions = frozenset((canonical(pair.chosen), canonical(pair.rejected)))
        groups[canonical(pair.prompt), completions].append(index)
    return [members for members in groups.values() if len(members) > 1]


def _unite_twins(
    pairs: Sequence[Pair], strata: Mapping[tuple[str, str], list[int]], evaluation: set[int]
) -> None:
    """Change ``evaluation`` so that it holds all or none of every group of `same_texts`."""
    stratum = {index: name for name, members in strata.items() for index in members}
    left = Counter(name for index, name in stratum.items() if index not in evaluation)
    parted = [
        (min(members, key=lambda index: pairs[index].pair_id), members)
        for members in same_texts(pairs)
        if 0 < len(evaluation.intersection(members)) < len(members)
    ]
    for first, members in sorted(parted, key=lambda group: pairs[group[0]].pair_id):
        leaving = Counter(stratum[index] for index in members if index not in evaluation)
        if first in evaluation and all(left[name] > n for name, n in leaving.items()):
            evaluation.update(members)
            left.subtract(leaving)
        else:
            left.update(stratum[index] for index in members if index in evaluation)
            evaluation.difference_update(members)


def _order(seed: int, pair_id: int) -> bytes:
    return hashlib.sha256(f"{seed}:{pair_id}".encode()).digest()
