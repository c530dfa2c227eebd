"""Training and evaluation sets of pairs, chosen by hash."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence

from fastpref.data.formats import Pair


def split_pairs(
    pairs: Sequence[Pair], eval_fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Indices into ``pairs`` of the training and of the evaluation set, both ascending.

    Each stratum (the pairs of one behavior with one label), n pairs, is ordered by a hash of
    (seed, pair_id) and gives its first floor(eval_fraction n + 1/2) pairs to the evaluation set, at
    most n - 1. So every behavior keeps a pair to train on, a stratum too small for its fraction
    gives none, and which side a pair is on depends neither on the order of the files nor on other
    strata.

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
    train = [index for index in range(len(pairs)) if index not in evaluation]
    return train, sorted(held_out)


def _order(seed: int, pair_id: int) -> bytes:
    return hashlib.sha256(f"{seed}:{pair_id}".encode()).digest()
