"""Rows of text -> token ids: one function for the run's own process and for its workers.

A row is the JSON text of [prompt, completion, completion, tools, chat_template_kwargs], the two
completions in the order of their texts. So it depends neither on which of them is chosen nor on
the pair's id, behavior, file or line, and neither do its ids, nor the cache that keeps them.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from fastpref.data.badrows import Unusable, Words
from fastpref.data.chat import Chat
from fastpref.data.encode import CannotEncode, Encoder, Halves
from fastpref.data.formats import Pair

DIGEST_BYTES = 16
CHUNK = 256  # rows per call; more would keep Python's garbage collector busy


@dataclass(frozen=True)
class Ids:
    """Token ids of N rows, one after the other; a row that failed has none."""

    values: np.ndarray  # (sum of lengths,) int32: of each row the prompt and both completions
    lengths: np.ndarray  # (N, 3) int64
    alone: np.ndarray  # (N,) int64: tokens of the prompt when nothing follows it
    faults: dict[int, tuple[str, str]]  # row -> reason, value

    def ends(self) -> np.ndarray:
        """(N,) where in `values` each row ends."""
        return np.cumsum(self.lengths.sum(axis=1))

    def row(self, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Prompt and completions of row ``n``."""
        prompt, first, second = self.lengths[n].tolist()
        at = int(self.lengths[:n].sum())
        both = self.values[at + prompt : at + prompt + first + second]
        return self.values[at : at + prompt], both[:first], both[first:]

    @staticmethod
    def join(parts: Sequence[Ids]) -> Ids:
        """The rows of all ``parts``, in their order."""
        starts = np.cumsum([0, *(len(part.alone) for part in parts)]).tolist()
        return Ids(
            np.concatenate([np.empty(0, np.int32), *(part.values for part in parts)]),
            np.concatenate([np.empty((0, 3), np.int64), *(part.lengths for part in parts)]),
            np.concatenate([np.empty(0, np.int64), *(part.alone for part in parts)]),
            {
                start + row: fault
                for start, part in zip(starts[:-1], parts, strict=True)
                for row, fault in part.faults.items()
            },
        )


class Coder:
    """All that decides token ids besides the rows: tokenizer, chat template, EOS rule, date.

    Args:
        tokenizer: a Hugging Face one.
        append_eos: "auto" ends string completions with EOS (TRL's rule), "true" all, "false" none.
        day: the date that chat templates get which ask for today's.
        strings, conversations: which kinds of rows will come; what only the other kind needs is
            neither demanded nor part of `digest`.
        backend: see `Encoder`.

    Raises ValueError for a tokenizer without EOS or chat template where one is needed.
    """

    def __init__(
        self,
        tokenizer: Any,
        append_eos: str,
        day: datetime.date,
        *,
        strings: bool = True,
        conversations: bool = False,
        backend: Any = None,
    ) -> None:
        if append_eos not in ("auto", "true", "false"):
            raise ValueError(f"append_eos is 'auto', 'true' or 'false', got {append_eos!r}")
        self.append_eos, self.day = append_eos, day
        self.eos = ""
        if append_eos == "true" or (append_eos == "auto" and strings):
            self.eos = _eos_of(tokenizer, append_eos)
        self.strings, self.conversations = strings, conversations
        self.chat = Chat(tokenizer, day) if conversations else None
        self.encoder = Encoder(tokenizer, backend)

    @property
    def portable(self) -> bool:
        """Whether another process can be told to do the same."""
        return self.encoder.backend is not None and not (self.chat and self.chat.own_way)

    def digest(self) -> str:
        """Hex digest of what decides the ids of a row, and of nothing else."""
        state: dict[str, Any] = {"tokenizer": self.encoder.digest()}
        if self.strings:
            state["eos"] = self.eos
        if self.chat:
            state |= {"chat": self.chat.state(), "eos_chat": self._eos_of_conversations()}
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()

    def ids(self, rows: Sequence[str]) -> Ids:
        """Ids of ``rows``; what is wrong with a row is told in `Ids.faults`."""
        return Ids.join([self._chunk(rows[at : at + CHUNK]) for at in range(0, len(rows), CHUNK)])

    def _chunk(self, rows: Sequence[str]) -> Ids:
        places, triples, special, faults = [], [], [], {}
        for place, row in enumerate(rows):
            try:
                triple, plain = self._texts(*json.loads(row))
            except Unusable as why:
                faults[place] = (why.reason, str(why.value))
                continue
            places.append(place)
            triples.append(triple)
            special.append(plain)
        try:
            found = self.encoder.triples(triples, special)
        except CannotEncode as error:
            if len(rows) > 1:  # find out which
                return Ids.join([self._chunk([row]) for row in rows])
            faults[0] = ("the tokenizer fails on the text", str(error))
            places, found = [], []
        return _assemble(len(rows), places, found, faults)

    def _texts(
        self, prompt: Any, first: Any, second: Any, tools: Any, variables: Any
    ) -> tuple[tuple[str, str, str], bool]:
        """The three texts of a row, and whether the tokenizer adds its special tokens to them."""
        if plain := isinstance(prompt, str):
            eos, texts = self.eos, [prompt, prompt + first, prompt + second]
        else:
            assert self.chat
            eos = self._eos_of_conversations()
            texts = self.chat.texts(prompt, (first, second), tools, variables)
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                half = Words(f"{text[error.start]!r} at character {error.start}")
                raise Unusable("the text holds half a surrogate pair", half) from None
        whole = [text if text.endswith(eos) else text + eos for text in texts[1:]]
        return (texts[0], *whole), plain

    def _eos_of_conversations(self) -> str:
        return self.eos if self.append_eos == "true" else ""


def row_of(pair: Pair) -> tuple[str, bool]:
    """The row of ``pair``, and whether its first completion is the rejected one."""
    chosen, rejected = _json(pair.chosen), _json(pair.rejected)
    first, second = sorted((chosen, rejected))
    if isinstance(pair.prompt, str):
        rest = "null,null"
    else:
        rest = f"{_json(pair.tools)},{_json(pair.template_kwargs)}"
    return f"[{_json(pair.prompt)},{first},{second},{rest}]", first != chosen


def row_digest(row: str) -> bytes:
    """16 bytes that name a row."""
    return hashlib.sha256(row.encode()).digest()[:DIGEST_BYTES]


class Rows(Sequence[str]):
    """The rows of ``pairs``, made when they are asked for: all of them are as large as the data."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> list[str]: ...
    def __getitem__(self, at: int | slice) -> str | list[str]:
        if isinstance(at, slice):
            return [row_of(pair)[0] for pair in self.pairs[at]]
        return row_of(self.pairs[at])[0]


def _json(value: Any) -> str:
    return json.dumps(value, default=_placeholder, separators=(",", ":"))


def _placeholder(value: Any) -> Any:
    """What transformers shows a template in place of a value that JSON has not."""
    return value.item() if isinstance(value, np.generic) else f"<{type(value).__name__}>"


def _eos_of(tokenizer: Any, append_eos: str) -> str:
    if not tokenizer.eos_token:
        raise ValueError(
            f"append_eos is {append_eos!r}, but the tokenizer has no eos_token. Set one on the "
            "tokenizer, or append_eos to false."
        )
    return str(tokenizer.eos_token)


def _assemble(
    count: int, places: Sequence[int], found: Iterable[Halves], faults: dict[int, tuple[str, str]]
) -> Ids:
    """The prompt is what all three texts start with; the completions are what is left."""
    lengths = np.zeros((count, 3), np.int64)
    alone = np.zeros(count, np.int64)
    values: list[int] = []
    for place, (head, prompt, first, second) in zip(places, found, strict=True):
        own = min(_common(prompt, first), _common(prompt, second))
        values += head
        values += prompt[:own]
        values += first[own:]
        values += second[own:]
        lengths[place] = len(head) + own, len(first) - own, len(second) - own
        alone[place] = len(head) + len(prompt)
    return Ids(np.array(values, np.int32), lengths, alone, faults)


def _common(prompt: list[int], whole: list[int]) -> int:
    """Length of the common start; most often all of ``prompt``."""
    if whole[: len(prompt)] == prompt:
        return len(prompt)
    return next(n for n, token in enumerate(prompt) if n >= len(whole) or token != whole[n])
