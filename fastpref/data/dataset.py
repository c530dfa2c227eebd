"""Everything a run knows of its data: training pairs, held-out pairs, and where each came from."""

from __future__ import annotations

import datetime
import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastpref.config import Config
from fastpref.config_rules import eval_set
from fastpref.data.badrows import BadRow
from fastpref.data.chat import read_template
from fastpref.data.formats import Pair, read_pairs
from fastpref.data.pack import Packer, fed_tokens, pack_pairs, scored_rows
from fastpref.data.split import same_texts, split_pairs
from fastpref.data.tokencache import cache_folder
from fastpref.data.tokenize import Tokenized, TokenPair, tokenize_pairs

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
    eval_sets: dict[int, str] = field(default_factory=dict)  # `TokenPair.origin` -> its name
    # What a pair takes of max_tokens_per_microbatch, and how pairs become a micro-batch.
    sizes: Callable[[Sequence[TokenPair]], np.ndarray] = fed_tokens
    pack: Packer = pack_pairs

    def held_out_sets(self) -> dict[str, list[TokenPair]]:
        """The held-out pairs by the name of their set; "" for those without one."""
        found: dict[str, list[TokenPair]] = defaultdict(list)
        for pair in self.held_out:
            found[self.eval_sets.get(pair.origin, "")].append(pair)
        return dict(sorted(found.items()))


def load_dataset(config: Config, tokenizer: Any, progress: bool = False) -> Dataset:
    """Read, split and tokenise ``config.dataset_name`` (and ``eval_dataset_name``).

    Where `chat_template` is configured, it becomes the tokenizer's own, so that it is saved with
    the trained model. Raises ValueError for bad rows unless ``on_bad_rows`` is "drop", for an
    unknown behavior in ``flip_behaviors``, for held-out pairs that also stand in the training
    data, and for reference log-probs in the data where the run needs a model for them.
    """
    if not config.dataset_name:
        raise ValueError("dataset_name is empty. Set it to files or folders of preference pairs.")
    if config.chat_template:
        tokenizer.chat_template = read_template(config.chat_template)
    # One reading of both, so that ids are unique over them and a flipped behavior may stand in one.
    eval_sets = [eval_set(entry) for entry in config.eval_dataset_name]
    pairs, dropped = read_pairs(
        config.dataset_name,
        eval_dataset_name=[path for _, path in eval_sets],
        dataset_split=config.dataset_split,
        eval_dataset_split=config.eval_dataset_split,
        dataset_config_name=config.dataset_config_name,
        behavior_column=config.behavior_column,
        flip_behaviors=config.flip_behaviors,
        on_bad_rows=config.on_bad_rows,
    )
    log.info("%d pairs read", len(pairs))
    _check_given(pairs, config)
    if eval_sets:
        held_out = {i for i, p in enumerate(pairs) if p.origin >= len(config.dataset_name)}
        _demand_apart(pairs, held_out)
    else:
        held_out = set(split_pairs(pairs, config.eval_fraction, config.seed)[1])

    tokenized = tokenize_pairs(
        pairs,
        tokenizer,
        max_length=config.max_length,
        append_eos=config.append_eos,
        truncation_mode=config.truncation_mode,
        on_bad_rows=config.on_bad_rows,
        day=_day(config.template_date),
        num_proc=config.dataset_num_proc,
        cache_dir=cache_folder(config.token_cache_dir),
        progress=progress,
    )
    dropped = dropped + tokenized.bad
    sides: tuple[list[TokenPair], list[TokenPair]] = ([], [])
    for token_pair, source in zip(tokenized.pairs, tokenized.sources, strict=True):
        sides[source in held_out].append(token_pair)
    if not sides[0]:
        raise ValueError(f"{', '.join(config.dataset_name)}: no training pair is left.")
    _report(sides, tokenized, dropped, config.max_length)
    return Dataset(
        *sides,
        tokenized.behaviors,
        [_index_row(pairs[s], "eval" if s in held_out else "train") for s in tokenized.sources],
        dropped,
        {n: name for n, (name, _) in enumerate(eval_sets, len(config.dataset_name)) if name},
        scored_rows if config.trainable == "head" else fed_tokens,
    )


def _day(template_date: str | None) -> datetime.date:
    return datetime.date.fromisoformat(template_date) if template_date else datetime.date.today()


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


def _demand_apart(pairs: Sequence[Pair], held_out: set[int]) -> None:
    """A held-out pair that is trained on would measure memory."""
    for members in same_texts(pairs):
        trained = [pairs[i] for i in members if i not in held_out]
        kept = [pairs[i] for i in members if i in held_out]
        if trained and kept:
            raise ValueError(
                f"{kept[0].source}:{kept[0].line}: this held-out pair is also training pair "
                f"{trained[0].source}:{trained[0].line}. Take it out of one of them."
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
    tokenized: Tokenized,
    dropped: Sequence[BadRow],
    max_length: int,
) -> None:
    train, held_out = map(len, sides)
    count = len(tokenized.behaviors)
    log.info("%d training and %d held-out pairs, %d behaviors", train, held_out, count)
    for line in truncation_lines(tokenized.truncated, max_length):
        log.warning("%s", line)
    if tokenized.retokenized:
        log.warning(
            "%s with a prompt that does not stand whole before its completions: its last tokens "
            "merge with theirs, or the chat template renders it differently by itself. That end of "
            "it counts as the completions', as in TRL",
            _pairs(tokenized.retokenized),
        )
    given = sum(bool(p.truncated) and p.ref_chosen is not None for side in sides for p in side)
    if given:
        log.warning(
            "%s that max_length cuts bring reference log-probs, which must be of the cut texts",
            _pairs(given),
        )
    if dropped:
        reasons = Counter(row.reason for row in dropped).most_common()
        counts = ", ".join(f"{count} x {reason}" for reason, count in reasons)
        log.warning("%d bad rows dropped: %s", len(dropped), counts)
        for row in dropped[:LISTED_BAD_ROWS]:
            log.warning("  %s:%d: %s (%s)", row.source, row.line, row.reason, row.value)
        if len(dropped) > LISTED_BAD_ROWS:
            more = len(dropped) - LISTED_BAD_ROWS
            log.warning("  ... and %d more; fastpref inspect --list_bad lists all", more)


def truncation_lines(truncated: Counter[str], max_length: int) -> list[str]:
    """What `max_length` took from how many pairs, a sentence for each kind."""
    what = {
        "prompt": "the start of the prompt",
        "chosen": "the end of the chosen completion",
        "rejected": "the end of the rejected completion",
    }
    return [
        f"{_pairs(truncated[kind])} lost {part} to max_length ({max_length} tokens)"
        for kind, part in what.items()
        if truncated[kind]
    ]


def _pairs(count: int) -> str:
    return "1 pair" if count == 1 else f"{count:,} pairs"
