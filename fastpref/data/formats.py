"""Rows of known shapes -> `Pair`s; whatever is wrong with a row is found here, not in training.

A file's shape is told from its columns: one `Shape` of `SHAPES` for each kind that is known.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastpref.data.files import (
    DATA_FILE,
    BadRow,
    Unusable,
    Words,
    check_bad_rows,
    find_files,
    nearest,
    read_rows,
    shown,
)

__all__ = ["SHAPES", "BadRow", "Pair", "Shape", "digest63", "read_pairs"]

ASSISTANT = "\n\nAssistant:"  # opens an assistant's turn in HH-RLHF dialogues

LARGEST_FLOAT32 = 3.4e38  # log-probs beyond it would become infinite on the way


@dataclass(frozen=True, slots=True)
class Pair:
    """One preference example as text, with where it came from."""

    prompt: str
    chosen: str
    rejected: str
    id: str  # the user's id, "" if the row had none
    behavior: str  # a column's value, or the file's name without .jsonl[.gz|.zst]
    label: str  # the preferred answer ("Yes"/"No") of persona rows, else column `label`, else ""
    flipped: bool  # chosen and rejected were exchanged by flip_behaviors
    source: str  # the file, as the user named it
    line: int  # 1-based
    pair_id: int  # int64 >= 0, see `digest63`; the same whether flipped or not
    ref_chosen: float | None = None  # reference log-prob in nats, from column ref_chosen_logps
    ref_rejected: float | None = None


@dataclass(frozen=True, slots=True)
class Shape:
    """A kind of row: the text columns it needs, and how they become prompt, chosen, rejected."""

    name: str
    columns: tuple[str, ...]
    parse: Callable[..., tuple[str, str, str]]  # the columns' texts in their order
    answer_is_label: bool = False  # a preferred answer Yes or No is the row's label


def read_pairs(
    dataset_name: Sequence[str],
    *,
    behavior_column: str | None = None,
    flip_behaviors: Sequence[str] = (),
    on_bad_rows: str = "error",
) -> tuple[list[Pair], list[BadRow]]:
    """Read every pair of the named files, folders and glob patterns, in the order given.

    A folder stands for its own ``*.jsonl[.gz|.zst]`` files, sorted by name. The behavior of a pair
    is ``behavior_column``'s value, or its file's name. The pairs of ``flip_behaviors`` get chosen
    and rejected (and their reference log-probs) exchanged; their `Pair.pair_id` stays.

    Returns the pairs and, with ``on_bad_rows="drop"``, the rows left out. Raises ValueError with
    file, line and value for bad rows (``"error"``), or when every row is bad; and, whatever
    ``on_bad_rows`` says, for files that are missing, empty, damaged or of no known shape, for
    unknown names in ``flip_behaviors``, and for two rows with one pair_id.
    """
    if on_bad_rows not in ("error", "drop"):
        raise ValueError(f"on_bad_rows is 'error' or 'drop', got {on_bad_rows!r}")
    pairs: list[Pair] = []
    bad: list[BadRow] = []
    seen = _Seen()
    for source in find_files(dataset_name):
        rows, unusable = read_rows(source)
        if rows:
            shape = _shape_of(source, rows, behavior_column)
            for line, row in rows:
                try:
                    pairs.append(_pair(row, shape, source, line, behavior_column, seen))
                except Unusable as why:
                    unusable.append(BadRow(source, line, why.reason, why.value))
        bad += sorted(unusable, key=lambda row: row.line)
    check_bad_rows(bad, len(pairs) + len(bad), on_bad_rows)
    return _flip(pairs, flip_behaviors), bad


def digest63(*parts: str | int) -> int:
    """63 bits of the SHA-256 of ``parts`` (their JSON list), as a non-negative int64."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _preference(prompt: str, chosen: str, rejected: str) -> tuple[str, str, str]:
    return prompt, chosen, rejected


def _hh_dialogues(chosen: str, rejected: str) -> tuple[str, str, str]:
    """The prompt ends with the last opening of an assistant's turn that both dialogues share."""
    end = chosen.rfind(ASSISTANT)
    while end >= 0:
        cut = end + len(ASSISTANT)
        if rejected.startswith(chosen[:cut]):
            return chosen[:cut], chosen[cut:], rejected[cut:]
        end = chosen.rfind(ASSISTANT, 0, cut - 1)
    raise Unusable(
        f"the dialogues have no common start that ends in {ASSISTANT!r}, and there is no column "
        "'prompt'",
        chosen,
    )


# More specific shapes come first: a file has the first shape whose columns one of its rows has.
SHAPES = (
    Shape("preference", ("prompt", "chosen", "rejected"), _preference),
    Shape(
        "persona",
        ("question", "answer_matching_behavior", "answer_not_matching_behavior"),
        _preference,
        answer_is_label=True,
    ),
    Shape("HH dialogues", ("chosen", "rejected"), _hh_dialogues),
)


def _shape_of(
    source: str, rows: Sequence[tuple[int, dict[str, Any]]], behavior_column: str | None
) -> Shape:
    # All rows are asked, so that a column missing in the first row does not change the shape.
    names = {column for _, row in rows for column in row}
    line, first = rows[0]
    for shape in SHAPES:
        if any(row.keys() >= set(shape.columns) for _, row in rows):
            if behavior_column is not None and behavior_column not in names:
                raise ValueError(
                    f"file {source} has no column {behavior_column!r} (behavior_column); line "
                    f"{line} has {listed(first)}.{nearest(behavior_column, sorted(names))}"
                )
            return shape
    known = "; ".join(f"{shape.name}: {', '.join(shape.columns)}" for shape in SHAPES)
    raise ValueError(
        f"file {source} line {line} has columns {listed(first)}; no row has a known shape. "
        f"Known shapes are {known}."
    )


def listed(row: dict[str, Any]) -> str:
    """The names of a row's columns, for messages."""
    return ", ".join(shown(name) for name in row) or "(none)"


class _Seen:
    """What must not come twice: ids and pair_ids, and how often each content has come."""

    def __init__(self) -> None:
        self.ids: dict[str, str] = {}
        self.pair_ids: dict[int, str] = {}
        self.contents: Counter[tuple[str, str, str, str]] = Counter()

    def pair_id(self, user_id: str, content: tuple[str, str, str, str], where: str) -> int:
        if user_id in self.ids:
            raise Unusable(
                "the id was given before (ids are unique over all files)",
                Words(f"{shown(user_id)}, first at {self.ids[user_id]}"),
            )
        self.contents[content] += 1
        pair_id = digest63(user_id) if user_id else digest63(*content, self.contents[content])
        if pair_id in self.pair_ids:
            raise ValueError(
                f"{where} and {self.pair_ids[pair_id]} are different rows with the same pair_id "
                f"{pair_id} (63 bits of a SHA-256). Give one of them another id."
            )
        self.pair_ids[pair_id] = where
        if user_id:
            self.ids[user_id] = where
        return pair_id


def _pair(
    row: dict[str, Any],
    shape: Shape,
    source: str,
    line: int,
    behavior_column: str | None,
    seen: _Seen,
) -> Pair:
    prompt, chosen, rejected = shape.parse(*(_text(row, column) for column in shape.columns))
    for name, completion in (("chosen", chosen), ("rejected", rejected)):
        if not completion.strip():
            raise Unusable(f"the {name} completion is empty", completion)
    if chosen == rejected:
        raise Unusable("chosen and rejected are the same", chosen)
    if behavior_column is None:
        behavior = DATA_FILE.sub("", Path(source).name)
    else:
        behavior = _name(row, behavior_column)
        if not behavior:
            raise Unusable(f"column {behavior_column!r} gives no behavior", row[behavior_column])
    user_id = _name(row, "id") if row.get("id") is not None else ""
    label = _name(row, "label") if row.get("label") is not None else ""
    if shape.answer_is_label:
        label = _answer(chosen) or label
    ref_chosen, ref_rejected = _number(row, "ref_chosen_logps"), _number(row, "ref_rejected_logps")
    if (ref_chosen is None) != (ref_rejected is None):
        raise Unusable(
            "only one of ref_chosen_logps, ref_rejected_logps is given", (ref_chosen, ref_rejected)
        )
    content = (behavior, prompt, chosen, rejected)
    return Pair(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        id=user_id,
        behavior=behavior,
        label=label,
        flipped=False,
        source=source,
        line=line,
        pair_id=seen.pair_id(user_id, content, f"{source}:{line}"),
        ref_chosen=ref_chosen,
        ref_rejected=ref_rejected,
    )


def _present(row: dict[str, Any], column: str) -> Any:
    if column not in row:
        raise Unusable(f"column {column!r} is missing", Words(f"columns {listed(row)}"))
    if row[column] is None:
        raise Unusable(f"column {column!r} is null", Words("null"))
    return row[column]


def _text(row: dict[str, Any], column: str) -> str:
    value = _present(row, column)
    if not isinstance(value, str):
        kind = type(value).__name__
        raise Unusable(f"column {column!r} is not a string", Words(f"{kind} {shown(value)}"))
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = Words(f"{value[error.start]!r} at character {error.start}")
        raise Unusable(f"column {column!r} holds half a surrogate pair", half) from None
    return value


def _name(row: dict[str, Any], column: str) -> str:
    """A string column, in which whole numbers and booleans stand for their text."""
    value = _present(row, column)
    return str(value) if isinstance(value, int) else _text(row, column)


def _number(row: dict[str, Any], column: str) -> float | None:
    value = row.get(column)
    if value is None:
        return None
    number = not isinstance(value, bool) and isinstance(value, (int, float))
    if not number or not abs(value) < LARGEST_FLOAT32:  # nan compares as false
        raise Unusable(f"column {column!r} is not a finite number that float32 holds", value)
    return float(value)


def _answer(completion: str) -> str:
    answer = completion.strip()
    return answer if answer in ("Yes", "No") else ""


def _flip(pairs: list[Pair], flip_behaviors: Sequence[str]) -> list[Pair]:
    known = sorted({pair.behavior for pair in pairs})
    for name in flip_behaviors:
        if name not in known:
            raise ValueError(
                f"flip_behaviors: no behavior is called {name!r}.{nearest(name, known)} "
                f"There are {len(known)}: {shown(', '.join(known), 300)}"
            )
    return [_flipped(pair) if pair.behavior in flip_behaviors else pair for pair in pairs]


def _flipped(pair: Pair) -> Pair:
    answer_is_label = pair.label != "" and pair.label == _answer(pair.chosen)
    return replace(
        pair,
        chosen=pair.rejected,
        rejected=pair.chosen,
        label=(_answer(pair.rejected) or pair.label) if answer_is_label else pair.label,
        flipped=True,
        ref_chosen=pair.ref_rejected,
        ref_rejected=pair.ref_chosen,
    )
