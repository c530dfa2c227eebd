"""`Pair`s -> token ids by the rules of TRL's DPOTrainer, so that numbers can be compared.

The rules (trl 1.16, trainer/dpo_trainer.py, `_prepare_dataset` and `DataCollatorForPreference`):
EOS is appended to the completions as text unless they end with it; prompt, prompt + chosen and
prompt + rejected are tokenised as whole texts; the prompt is the tokens that all three start with;
``max_length`` cuts the end of prompt + completion. Position 0 of a sequence is never scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastpref.data.badrows import BadRow, check_bad_rows
from fastpref.data.formats import Pair
from fastpref.data.shapes import Side

CHUNK = 2048  # pairs per call of the tokenizer: bounds the memory of its Python lists


@dataclass(frozen=True, slots=True)
class TokenPair:
    """One preference example as token ids; the completions hold their EOS, if one was added."""

    pair_id: int
    behavior: int  # index into `Tokenized.behaviors`
    label: str
    prompt: np.ndarray  # (prompt,) int32
    chosen: np.ndarray  # (completion,) int32
    rejected: np.ndarray  # (completion,) int32
    truncated: bool  # max_length cut a completion
    ref_chosen: float | None = None
    ref_rejected: float | None = None


@dataclass
class Tokenized:
    """What `tokenize_pairs` returns."""

    pairs: list[TokenPair]
    sources: list[int]  # of each token pair, the index of its pair in the input
    behaviors: list[str]  # sorted; of every input pair, the dropped ones included
    bad: list[BadRow]
    truncated: int  # token pairs with a completion cut by max_length
    retokenized: int  # token pairs whose prompt's last tokens merged with a completion


def tokenize_pairs(
    pairs: Sequence[Pair],
    tokenizer: Any,
    *,
    max_length: int,
    append_eos: str = "auto",
    on_bad_rows: str = "error",
) -> Tokenized:
    """Tokenise ``pairs`` with a Hugging Face ``tokenizer`` (a fast one: whole lists at a time).

    ``max_length`` is in tokens and bounds prompt + completion. ``append_eos``: "auto" and "true"
    append the tokenizer's EOS text where a completion does not end with it ("auto" is TRL's rule,
    which for string data, all that is read so far, always appends), "false" appends nothing.

    A pair is a bad row when its prompt alone has ``max_length`` tokens or more, when a completion
    has no token to score, or when chosen and rejected are the same tokens, from the start or after
    truncation. Raises ValueError for bad rows unless ``on_bad_rows="drop"``, when all are bad, and
    when EOS is wanted from a tokenizer without one.
    """
    if max_length < 2:
        raise ValueError(f"max_length is at least 2 (a context and a completion), got {max_length}")
    for pair in pairs:
        assert isinstance(pair.prompt, str), "conversations have no tokens yet"
    eos = _eos_text(tokenizer, append_eos)
    behaviors = sorted({pair.behavior for pair in pairs})
    number = {name: k for k, name in enumerate(behaviors)}
    done = Tokenized([], [], behaviors, [], 0, 0)
    for start in range(0, len(pairs), CHUNK):
        chunk = pairs[start : start + CHUNK]
        prompts = _encode(tokenizer, [_text(pair.prompt) for pair in chunk])
        chosen = _encode(tokenizer, [_text(p.prompt) + _ended(_text(p.chosen), eos) for p in chunk])
        rejected = _encode(
            tokenizer, [_text(p.prompt) + _ended(_text(p.rejected), eos) for p in chunk]
        )
        for i, (pair, *ids) in enumerate(zip(chunk, prompts, chosen, rejected, strict=True)):
            prompt_len = min(_common(ids[0], ids[1]), _common(ids[0], ids[2]))
            fault = _fault(ids[1], ids[2], prompt_len, max_length)
            if fault:
                done.bad.append(BadRow(pair.source, pair.line, *fault))
                continue
            truncated = max(len(ids[1]), len(ids[2])) > max_length
            done.pairs.append(
                TokenPair(
                    pair_id=pair.pair_id,
                    behavior=number[pair.behavior],
                    label=pair.label,
                    prompt=np.array(ids[0][:prompt_len], np.int32),
                    chosen=np.array(ids[1][prompt_len:max_length], np.int32),
                    rejected=np.array(ids[2][prompt_len:max_length], np.int32),
                    truncated=truncated,
                    ref_chosen=pair.ref_chosen,
                    ref_rejected=pair.ref_rejected,
                )
            )
            done.sources.append(start + i)
            done.truncated += truncated
            done.retokenized += prompt_len < len(ids[0])
    check_bad_rows(done.bad, len(pairs), on_bad_rows)
    return done


def _fault(
    chosen: list[int], rejected: list[int], prompt_len: int, max_length: int
) -> tuple[str, str] | None:
    """Reason and value of a bad row, from prompt + completion ids; None for a good one."""
    if prompt_len >= max_length:
        return "the prompt fills max_length", f"{prompt_len} tokens, max_length {max_length}"
    # TRL trains on pairs like the following ones in silence; they carry no signal.
    first_scored = max(prompt_len, 1)  # nothing precedes position 0 that could predict it
    for name, ids in (("chosen", chosen), ("rejected", rejected)):
        if len(ids) <= first_scored:
            count = f"{len(ids) - prompt_len} completion tokens after {prompt_len} prompt tokens"
            return f"the {name} completion has no token to score", count
    if chosen == rejected:
        return "chosen and rejected are the same tokens", f"{len(chosen) - prompt_len} tokens"
    if chosen[:max_length] == rejected[:max_length]:
        return (
            "chosen and rejected are the same tokens once truncated",
            f"{len(chosen)} and {len(rejected)} tokens with the prompt, max_length {max_length}",
        )
    return None


def _eos_text(tokenizer: Any, append_eos: str) -> str:
    if append_eos not in ("auto", "true", "false"):
        raise ValueError(f"append_eos is 'auto', 'true' or 'false', got {append_eos!r}")
    if append_eos == "false":
        return ""
    if not tokenizer.eos_token:
        raise ValueError(
            f"append_eos is {append_eos!r}, but the tokenizer has no eos_token. Set one on the "
            "tokenizer, or append_eos to false."
        )
    return str(tokenizer.eos_token)


def _text(side: Side) -> str:
    assert isinstance(side, str), "conversations have no tokens yet"
    return side


def _ended(completion: str, eos: str) -> str:
    return completion if completion.endswith(eos) else completion + eos


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts)["input_ids"]
    return ids


def _common(prompt: list[int], whole: list[int]) -> int:
    """Length of the common start; most often all of ``prompt``."""
    if whole[: len(prompt)] == prompt:
        return len(prompt)
    return next(n for n, token in enumerate(prompt) if n >= len(whole) or token != whole[n])
