"""Everything a run knows of its data: training pairs, held-out pairs, and where each came from."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastpref.config import Config
from fastpref.data.badrows import BadRow
from fastpref.data.formats import Pair, read_pairs
from fastpref.data.messages import canonical
from fastpref.data.split import split_pairs
from fastpref.data.tokenize import TokenPair, tokenize_pairs

log = logging.getLogger(__name__)

LISTED_BAD_ROWS = 1000


@dataclass(frozen=True)
class Dataset:
    """Tokenised pairs of a run; `behavior` of a pair indexes `behaviors`."""

    train: list[TokenPair]
    held_out: list[TokenPair]
    behaviors: list[str]
    index: list[dict[str, object]]  # rows of the `index` records table
    dropped: list[BadRow]
    truncated: int


def load_dataset(config: Config, tokenizer: Any) -> Dataset:
    """Read, split and tokenise ``config.dataset_name`` (and ``eval_dataset_name``).

    Raises ValueError for bad rows unless ``on_bad_rows`` is "drop", for an unknown behavior in
    ``flip_behaviors``, for held-out pairs that also stand in the training data, and for reference
    log-probs in the data where the run needs a model for them.
    """
    if not config.dataset_name:
        raise ValueError("dataset_name is empty. Set it to files or folders of preference pairs.")
    # One reading of both, so that ids are unique over them and a flipped behavior may stand in one.
    pairs, dropped = read_pairs(
        config.dataset_name,
        eval_dataset_name=config.eval_dataset_name,
        dataset_split=config.dataset_split,
        eval_dataset_split=config.eval_dataset_split,
        dataset_config_name=config.dataset_config_name,
        behavior_column=config.behavior_column,
        flip_behaviors=config.flip_behaviors,
        on_bad_rows=config.on_bad_rows,
    )
    log.info("%d pairs read", len(pairs))
    _check_given(pairs, config)
    if config.eval_dataset_name:
        named = len(config.dataset_name)
        held_out = {i for i, pair in enumerate(pairs) if pair.origin >= named}
        _demand_apart(pairs, held_out)
    else:
        held_out = set(split_pairs(pairs, config.eval_fraction, config.seed)[1])
        twins = len(_trained_too(pairs, held_out))
        if twins:
            log.warning("%d held-out pairs have the same texts as a training pair", twins)

    tokenized = tokenize_pairs(
        pairs,
        tokenizer,
        max_length=config.max_length,
        append_eos=config.append_eos,
        on_bad_rows=config.on_bad_rows,
    )
    dropped = dropped + tokenized.bad
    sides: tuple[list[TokenPair], list[TokenPair]] = ([], [])
    for token_pair, source in zip(tokenized.pairs, tokenized.sources, strict=True):
        sides[source in held_out].append(token_pair)
    if not sides[0]:
        raise ValueError(f"{', '.join(config.dataset_name)}: no training pair is left.")
    _report(sides, tokenized.behaviors, dropped, tokenized.truncated, config.max_length)
    index = [_index_row(pairs[s], "eval" if s in held_out else "train") for s in tokenized.sources]
    return Dataset(*sides, tokenized.behaviors, index, dropped, tokenized.truncated)


def sample_pairs(pairs: Sequence[TokenPair], per_behavior: int, seed: int) -> list[TokenPair]:
    """At most ``per_behavior`` pairs of each behavior, labels in their proportion.

    Chosen by a hash of (seed, pair_id), so that the sample stays the same whatever the order.
    """
    strata: dict[tuple[int, str], list[TokenPair]] = defaultdict(list)
    for pair in pairs:
        strata[pair.behavior, pair.label].append(pair)
    placed: dict[int, list[tuple[float, int, TokenPair]]] = defaultdict(list)
    for (behavior, _), members in strata.items():
        members.sort(key=lambda p: hashlib.sha256(f"sample {seed} {p.pair_id}".encode()).digest())
        for j, pair in enumerate(members):
            placed[behavior].append(((j + 0.5) / len(members), pair.pair_id, pair))
    return [
        pair for behavior in sorted(placed) for *_, pair in sorted(placed[behavior])[:per_behavior]
    ]


def _trained_too(pairs: Sequence[Pair], held_out: set[int]) -> list[tuple[Pair, Pair]]:
    """(held-out pair, training pair) of the same texts, whichever is chosen."""
    texts = [
        (canonical(pair.prompt), frozenset((canonical(pair.chosen), canonical(pair.rejected))))
        for pair in pairs
    ]
    train = {text: i for i, text in enumerate(texts) if i not in held_out}
    return [(pairs[i], pairs[train[texts[i]]]) for i in sorted(held_out) if texts[i] in train]


def _demand_apart(pairs: Sequence[Pair], held_out: set[int]) -> None:
    """A held-out pair that is trained on would measure memory."""
    for pair, twin in _trained_too(pairs, held_out)[:1]:
        raise ValueError(
            f"{pair.source}:{pair.line}: this held-out pair is also training pair "
            f"{twin.source}:{twin.line}. Take it out of one of them."
        )


def _check_given(pairs: Sequence[Pair], config: Config) -> None:
    """Reference log-probs of the data cannot be weighed by token, and do not move."""
    if config.ld_alpha is not None:
        why = "ld_alpha weighs tokens, which sums do not have any more"
    elif config.sync_ref_model:
        why = "sync_ref_model moves the reference, which must be a model"
    else:
        return
    for pair in pairs:
        if pair.ref_chosen is not None:
            raise ValueError(
                f"{pair.source}:{pair.line}: the row brings reference log-probs (ref_chosen_logps, "
                f"ref_rejected_logps; KTO's ref_logps), but {why}. Remove the columns, or the "
                "option."
            )


def _index_row(pair: Pair, split: str) -> dict[str, object]:
    return {
        "pair_id": pair.pair_id,
        "id": pair.id,
        "file": pair.source,
        "line": pair.line,
        "behavior": pair.behavior,
        "label": pair.label,
        "flipped": pair.flipped,
        "split": split,
    }


def _report(
    sides: tuple[list[TokenPair], list[TokenPair]],
    behaviors: Sequence[str],
    dropped: Sequence[BadRow],
    truncated: int,
    max_length: int,
) -> None:
    train, held_out = map(len, sides)
    log.info("%d training and %d held-out pairs, %d behaviors", train, held_out, len(behaviors))
    if truncated:
        log.warning("%d pairs lost their end at max_length=%d tokens", truncated, max_length)
    if dropped:
        reasons = Counter(row.reason for row in dropped).most_common()
        counts = ", ".join(f"{count} x {reason}" for reason, count in reasons)
        log.warning("%d bad rows dropped: %s", len(dropped), counts)
        for row in dropped[:LISTED_BAD_ROWS]:
            log.warning("  %s:%d: %s (%s)", row.source, row.line, row.reason, row.value)
        if len(dropped) > LISTED_BAD_ROWS:
            more = len(dropped) - LISTED_BAD_ROWS
            log.warning("  ... and %d more; fastpref inspect --list_bad lists all", more)
