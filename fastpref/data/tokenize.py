"""`Pair`s -> token ids by the rules of TRL's DPOTrainer, so that numbers can be compared.

The rules (trl 1.16, trainer/dpo_trainer.py, `_prepare_dataset` and `DataCollatorForPreference`):
EOS is appended to string completions as text unless they end with it; prompt, prompt + chosen and
prompt + rejected are tokenised as whole texts (`chat` makes texts of conversations); the prompt is
the tokens that all three start with; ``max_length`` cuts the end of prompt + completion. Position 0
of a sequence is never scored.
"""

from __future__ import annotations

import datetime
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from fastpref import dist
from fastpref.data.badrows import BadRow, Unusable, Words, check_bad_rows
from fastpref.data.coder import CHUNK, Coder, Ids, Rows, row_digest, row_of
from fastpref.data.formats import Pair
from fastpref.data.tokencache import cached_ids
from fastpref.data.workers import Workers

log = logging.getLogger(__name__)

TRUNCATION_MODES = ("keep_start", "keep_completion")
WORTH_WORKERS = 15.0  # seconds of work left that are worth the start of processes, about 3 s
MOST_WORKERS = 32


@dataclass(frozen=True, slots=True)
class TokenPair:
    """One preference example as token ids; the completions hold their EOS, if one was added."""

    pair_id: int
    behavior: int  # index into `Tokenized.behaviors`
    label: str
    prompt: np.ndarray  # (prompt,) int32
    chosen: np.ndarray  # (completion,) int32
    rejected: np.ndarray  # (completion,) int32
    truncated: tuple[str, ...]  # which of "prompt", "chosen", "rejected" max_length cut
    ref_chosen: float | None = None
    ref_rejected: float | None = None
    flipped: bool = False  # chosen and rejected were exchanged by flip_behaviors
    origin: int = 0  # the entry of dataset_name, or after those of eval_dataset_name, it came from


@dataclass
class Tokenized:
    """What `tokenize_pairs` returns."""

    pairs: list[TokenPair]
    sources: list[int]  # of each token pair, the index of its pair in the input
    behaviors: list[str]  # sorted; of every input pair, the dropped ones included
    bad: list[BadRow]
    truncated: Counter[str]  # of each kind of `TokenPair.truncated`, the token pairs that have it
    retokenized: int  # token pairs whose prompt does not stand whole before its completions


def tokenize_pairs(
    pairs: Sequence[Pair],
    tokenizer: Any,
    *,
    max_length: int,
    append_eos: str = "auto",
    truncation_mode: str = "keep_start",
    on_bad_rows: str = "error",
    day: datetime.date | None = None,
    num_proc: int | None = 1,
    cache_dir: Path | None = None,
    progress: bool = False,
) -> Tokenized:
    """Tokenise ``pairs`` with a Hugging Face ``tokenizer``.

    Args:
        max_length: tokens of prompt + completion. "keep_start" (TRL's) cuts the end of what is
            longer. "keep_completion" first takes from the start of the prompt, for both sequences
            alike, what the longer completion needs; all but one token if need be, a BOS last. Then
            it cuts completions at their end.
        append_eos: "auto" ends string completions with the tokenizer's EOS text, if they do not end
            with it, and leaves conversations to their template (TRL's rule); "true" does so with
            both, "false" with neither.
        day: the date for chat templates that ask for today's; None: today.
        num_proc: processes; None: as many as are worth their start. Results are the same.
        cache_dir: folder that keeps token ids for other runs; None: they are not kept.

    A pair is a bad row when its chat template fails on it, when its prompt alone has ``max_length``
    tokens or more (keep_start), when a completion has no token to score, or when chosen and
    rejected are the same tokens, from the start or after truncation. Raises ValueError for bad rows
    unless ``on_bad_rows="drop"``, when all are bad, and for a tokenizer that lacks an EOS or a chat
    template where it is needed.
    """
    if max_length < 2:
        raise ValueError(f"max_length is at least 2 (a context and a completion), got {max_length}")
    if truncation_mode not in TRUNCATION_MODES:
        expected = " or ".join(TRUNCATION_MODES)
        raise ValueError(f"truncation_mode is {expected}, got {truncation_mode!r}")
    kinds = {isinstance(pair.prompt, str) for pair in pairs}
    coder = Coder(
        tokenizer,
        append_eos,
        day or datetime.date.today(),
        strings=True in kinds,
        conversations=False in kinds,
    )
    ids, rows, exchanged = _ids(pairs, coder, num_proc, cache_dir, progress)
    behaviors = sorted({pair.behavior for pair in pairs})
    number = {name: k for k, name in enumerate(behaviors)}
    done = Tokenized([], [], behaviors, [], Counter(), 0)
    limit = Limit(max_length, truncation_mode, getattr(tokenizer, "bos_token_id", None))
    ends, lengths, alone = ids.ends().tolist(), ids.lengths.tolist(), ids.alone.tolist()
    for source, (pair, row) in enumerate(zip(pairs, rows, strict=True)):
        prompt_len, first, second = lengths[row]
        own = ids.values[ends[row] - prompt_len - first - second : ends[row]]
        prompt, both = own[:prompt_len], own[prompt_len:]
        chosen, rejected = both[:first], both[first:]
        if exchanged[source]:
            chosen, rejected = rejected, chosen
        try:
            if row in ids.faults:
                raise Unusable(ids.faults[row][0], Words(ids.faults[row][1]))
            prompt, chosen, rejected, truncated = limit.fitted(prompt, chosen, rejected)
        except Unusable as why:
            done.bad.append(BadRow(pair.source, pair.line, why.reason, why.value))
            continue
        done.pairs.append(
            TokenPair(
                pair_id=pair.pair_id,
                behavior=number[pair.behavior],
                label=pair.label,
                prompt=prompt,
                chosen=chosen,
                rejected=rejected,
                truncated=truncated,
                ref_chosen=pair.ref_chosen,
                ref_rejected=pair.ref_rejected,
                flipped=pair.flipped,
                origin=pair.origin,
            )
        )
        done.sources.append(source)
        done.truncated.update(truncated)
        done.retokenized += prompt_len < alone[row]
    check_bad_rows(done.bad, len(pairs), on_bad_rows)
    return done


@dataclass(frozen=True)
class Limit:
    """What becomes of a pair that is longer than ``max_length`` tokens."""

    max_length: int
    mode: str  # of TRUNCATION_MODES
    bos: int | None  # a first token that stays when the prompt loses its start

    def fitted(
        self, prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[str, ...]]:
        """The three parts, and the names of those that were cut; Unusable for a bad row."""
        count = len(prompt)
        if self.mode == "keep_start" and count >= self.max_length:
            value = f"{count} tokens, max_length {self.max_length}"
            raise Unusable("the prompt fills max_length", Words(value))
        # TRL trains on pairs like the following ones in silence; they carry no signal.
        needed = 1 if count else 2  # nothing precedes position 0 that could predict it
        for name, ids in (("chosen", chosen), ("rejected", rejected)):
            if len(ids) < needed:
                value = f"{len(ids)} completion tokens after {count} prompt tokens"
                raise Unusable(f"the {name} completion has no token to score", Words(value))
        if np.array_equal(chosen, rejected):
            value = f"{len(chosen)} tokens"
            raise Unusable("chosen and rejected are the same tokens", Words(value))
        if count + max(len(chosen), len(rejected)) <= self.max_length:
            return prompt, chosen, rejected, ()
        if self.mode == "keep_completion":
            prompt = self._end_of(prompt, max(len(chosen), len(rejected)))
        room = self.max_length - len(prompt)
        if np.array_equal(chosen[:room], rejected[:room]):
            lengths = f"{count + len(chosen)} and {count + len(rejected)} tokens with the prompt"
            raise Unusable(
                "chosen and rejected are the same tokens once truncated",
                Words(f"{lengths}, max_length {self.max_length}"),
            )
        lost = {
            "prompt": count - len(prompt),
            "chosen": len(chosen) - room,
            "rejected": len(rejected) - room,
        }
        cut = tuple(name for name, tokens in lost.items() if tokens > 0)
        return prompt, chosen[:room], rejected[:room], cut

    def _end_of(self, prompt: np.ndarray, longest: int) -> np.ndarray:
        """What fits beside ``longest`` completion tokens; at least one token of ``prompt``."""
        kept = max(self.max_length - longest, 1)
        if len(prompt) <= kept:
            return prompt
        if prompt[0] == self.bos:
            return np.concatenate([prompt[:1], prompt[len(prompt) - kept + 1 :]])
        return prompt[len(prompt) - kept :]


def _ids(
    pairs: Sequence[Pair],
    coder: Coder,
    num_proc: int | None,
    cache_dir: Path | None,
    progress: bool,
) -> tuple[Ids, list[int], list[bool]]:
    """Ids, and of each pair its row in them and whether its rejected completion is the first."""
    place_of: dict[bytes, int] = {}
    firsts: list[Pair] = []  # of each row, the first pair that it stands for
    places, exchanged = [], []
    for pair in pairs:
        row, other_way = row_of(pair)
        place = place_of.setdefault(row_digest(row), len(firsts))
        if place == len(firsts):
            firsts.append(pair)
        places.append(place)
        exchanged.append(other_way)
    rows = Rows(firsts)

    def make() -> Ids:
        return make_ids(coder, rows, num_proc, progress)

    if cache_dir is None:
        return make(), places, exchanged
    digests = list(place_of)
    # One process of a machine does the work, the others find it done.
    if dist.local_rank() == 0:
        ids, at = cached_ids(cache_dir, coder, digests, rows, make)
    dist.barrier()
    if dist.local_rank() != 0:
        ids, at = cached_ids(cache_dir, coder, digests, rows, make)
    return ids, at[places].tolist(), exchanged


def make_ids(coder: Coder, rows: Sequence[str], num_proc: int | None, progress: bool) -> Ids:
    """Ids of ``rows``, tokenised by ``num_proc`` processes (None: chosen by the time it takes)."""
    if not coder.portable:
        if num_proc is not None and num_proc > 1:
            log.info("this tokenizer is not a fast one: dataset_num_proc has no effect")
        num_proc = 1
    parts: list[Ids] = []
    with tqdm(
        total=len(rows), desc="tokenising", unit="pair", delay=0.5, disable=not progress
    ) as bar:
        for part in _parts(coder, rows, num_proc):
            parts.append(part)
            bar.update(len(part.alone))
    return Ids.join(parts)


def _parts(coder: Coder, rows: Sequence[str], num_proc: int | None) -> Iterator[Ids]:
    starts = range(0, len(rows), CHUNK)
    began, done = time.perf_counter(), 0
    count = num_proc or 1
    while done < len(starts) and count == 1:
        yield coder.ids(rows[starts[done] : starts[done] + CHUNK])
        done += 1
        passed = time.perf_counter() - began
        if num_proc is None and passed > 1.0:  # the first rows are the slow ones
            left = passed / done * (len(starts) - done)
            if left > WORTH_WORKERS:
                count = min(_cpus(), MOST_WORKERS, int(left / WORTH_WORKERS * 4))
    if done < len(starts):
        count = min(count, len(starts) - done)
        log.info("tokenising in %d processes", count)
        with Workers(coder, count) as workers:
            yield from workers.map(rows[at : at + CHUNK] for at in starts[done:])


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
