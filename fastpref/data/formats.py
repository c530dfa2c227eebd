"""Sources of any format -> `Pair`s; whatever is wrong with a row is found here, not in training.

`fastpref.data.files` finds the sources that names stand for, `readers` reads their rows, `shapes`
tells prompt, chosen and rejected, `pairing` pairs rows of one completion each.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastpref.data.badrows import (
    BadRow,
    Unusable,
    Words,
    check_bad_rows,
    listed,
    nearest,
    shown,
)
from fastpref.data.files import Source, find_sources
from fastpref.data.messages import Message, canonical, canonical_json, from_json, without_nulls
from fastpref.data.pairing import pair_rows
from fastpref.data.readers import read_source
from fastpref.data.shapes import (
    KNOWN_SHAPES,
    KTO,
    PREFERENCE,
    SHAPES,
    Row,
    Shape,
    Side,
    check_conversation,
    present,
    refuse_media,
    shape_of,
    text,
)
from fastpref.data.table import MEDIA, NUMBERS, Table

__all__ = ["BadRow", "Message", "Pair", "digest63", "read_pairs"]

log = logging.getLogger(__name__)

# What any row may have besides its shape's columns.
OPTIONAL = ("id", "label", "tools", "chat_template_kwargs", "system")
LARGEST_FLOAT32 = 3.4e38  # log-probs beyond it would become infinite on the way
LARGEST_LOGP = 0.1  # 0, but for the rounding of many sure tokens


@dataclass(frozen=True, slots=True)
class Pair:
    """One preference example as text or as a conversation, with where it came from.

    Prompt and completions are either all strings, joined as they are, or all tuples of messages.
    """

    prompt: Side  # messages: up to and including the last one before the completions
    chosen: Side  # messages: those after the prompt; the first and the last are the assistant's
    rejected: Side
    id: str  # the user's id, "" if the row had none
    behavior: str  # a column's value, or the source's name without folder and ending
    label: str  # the preferred answer ("Yes"/"No") of persona rows, else column `label`, else ""
    flipped: bool  # chosen and rejected were exchanged by flip_behaviors
    source: str  # file or data set, as the user named it; a split in brackets
    line: int  # 1-based; the row's number in formats without lines
    pair_id: int  # int64 >= 0, see `digest63`; the same whether flipped or not
    ref_chosen: float | None = None  # reference log-prob in nats, from column ref_chosen_logps
    ref_rejected: float | None = None
    tools: tuple[dict[str, Any], ...] | None = None  # schemas of functions, for the chat template
    template_kwargs: dict[str, Any] | None = None  # further variables of the chat template
    origin: int = 0  # index of the name in dataset_name and, after them, eval_dataset_name


def read_pairs(
    dataset_name: Sequence[str],
    *,
    eval_dataset_name: Sequence[str] = (),
    dataset_split: str = "train",
    eval_dataset_split: str = "test",
    dataset_config_name: str | None = None,
    behavior_column: str | None = None,
    flip_behaviors: Sequence[str] = (),
    on_bad_rows: str = "error",
) -> tuple[list[Pair], list[BadRow]]:
    """Read every pair of the named files, folders, patterns and Hub data sets, in the order given.

    docs/data.md says which names, formats and shapes of rows there are. ``dataset_split`` and
    ``eval_dataset_split`` count where a source has splits. The behavior of a pair is
    ``behavior_column``'s value, or its source's name. The pairs of ``flip_behaviors`` get chosen
    and rejected (and their reference log-probs) exchanged; their `Pair.pair_id` stays.

    Returns the pairs and, with ``on_bad_rows="drop"``, the rows left out. Raises ValueError with
    file, line and value for bad rows (``"error"``), or when every row is bad; and, whatever
    ``on_bad_rows`` says, for sources that are missing, empty, damaged or of no known shape, for
    unknown names in ``flip_behaviors``, and for two rows with one pair_id.
    """
    if on_bad_rows not in ("error", "drop"):
        raise ValueError(f"on_bad_rows is 'error' or 'drop', got {on_bad_rows!r}")
    sources = find_sources(
        dataset_name,
        eval_dataset_name,
        dataset_split=dataset_split,
        eval_dataset_split=eval_dataset_split,
        dataset_config_name=dataset_config_name,
    )
    pairs: list[Pair] = []
    bad: list[BadRow] = []
    total = 0
    kinds: Counter[tuple[str, str]] = Counter()
    seen = _Seen()
    columns = _columns(behavior_column)
    for source in sources:
        table = read_source(source, columns)
        total += len(table.rows) + len(table.bad)
        if table.rows:
            shape = _shape_of(source, table, behavior_column)
            kinds[shape.name, _unread(table, shape, behavior_column)] += 1
            pairs += _pairs_of(source, table, shape, behavior_column, seen)
        bad += sorted(table.bad, key=lambda row: row.line)
    for (shape_name, unread), count in kinds.items():
        sources_read = f"{count} source{'s' * (count > 1)}"
        log.info("%s: %s; columns not read: %s", shape_name, sources_read, unread)
    check_bad_rows(bad, total, on_bad_rows)
    return _flip(pairs, flip_behaviors), bad


def digest63(*parts: str | int) -> int:
    """63 bits of the SHA-256 of ``parts`` (their JSON list), as a non-negative int64."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _columns(behavior_column: str | None) -> frozenset[str]:
    """All columns that rows are read for; others need not become Python objects."""
    of_shapes = [name for shape in SHAPES for name in (*shape.columns, *shape.also)]
    behavior = [behavior_column] if behavior_column else []
    return frozenset([*of_shapes, *OPTIONAL, *NUMBERS, *MEDIA, *behavior])


def _shape_of(source: Source, table: Table, behavior_column: str | None) -> Shape:
    # All rows are asked, so that a column missing in the first row does not change the shape.
    shape = shape_of(table.names, table.rows)
    if shape is None:
        # Of a row only the columns that a shape might need are read, so not the row's are named.
        raise ValueError(
            f"{source.name} has columns {listed(table.names)}; no row has a known shape. "
            f"Known shapes are {KNOWN_SHAPES} (docs/data.md)."
        )
    if behavior_column is not None and behavior_column not in table.names:
        raise ValueError(
            f"{source.name} has no column {behavior_column!r} (behavior_column); it has "
            f"{listed(table.names)}.{nearest(behavior_column, sorted(table.names))}"
        )
    return shape


def _unread(table: Table, shape: Shape, behavior_column: str | None) -> str:
    read = {*shape.columns, *shape.also, *OPTIONAL, *NUMBERS, *MEDIA, behavior_column}
    return ", ".join(name for name in table.names if name not in read) or "none"


def _pairs_of(
    source: Source, table: Table, shape: Shape, behavior_column: str | None, seen: _Seen
) -> Iterator[Pair]:
    """The pairs of one source. Bad rows are added to ``table.bad``, rows read are removed."""
    partner: dict[int, int] = {}
    if shape is KTO:
        shared = ["tools", "chat_template_kwargs"]
        shared += [] if behavior_column is None else [behavior_column]
        table.rows, partner, left = pair_rows(table.rows, source.name, shared)
        table.bad += left
        shape = PREFERENCE
    table.rows.reverse()
    while table.rows:  # a row is let go before the next one's pair is made
        line, row = table.rows.pop()
        try:
            yield _pair(row, shape, source, line, behavior_column, seen)
        except Unusable as why:
            table.bad.append(why.at(source.name, line))
            if line in partner:
                other = Unusable("the row that it is paired with is bad", Words(f"line {line}"))
                table.bad.append(other.at(source.name, partner[line]))


class _Seen:
    """What must not come twice: ids and pair_ids, and how often each content has come."""

    def __init__(self) -> None:
        self.ids: dict[str, str] = {}
        self.pair_ids: dict[int, str] = {}
        self.contents: Counter[int] = Counter()

    def pair_id(self, user_id: str, content: tuple[str, ...], where: str) -> int:
        if user_id in self.ids:
            raise Unusable(
                "the id was given before (ids are unique over all files)",
                Words(f"{shown(user_id)}, first at {self.ids[user_id]}"),
            )
        if user_id:
            pair_id = digest63(user_id)
        else:
            key = digest63(*content)
            self.contents[key] += 1
            pair_id = digest63(*content, self.contents[key])
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
    row: Row, shape: Shape, source: Source, line: int, behavior_column: str | None, seen: _Seen
) -> Pair:
    refuse_media(row)
    prompt, chosen, rejected = shape.parse(row, shape.columns)
    check_conversation(prompt, chosen, rejected, row.get("system"))
    texts = (canonical(prompt), canonical(chosen), canonical(rejected))
    for name, completion in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(completion, str) and not completion.strip():
            raise Unusable(f"the {name} completion is empty", completion)
    if texts[1] == texts[2]:
        raise Unusable("chosen and rejected are the same", chosen)
    behavior = source.behavior
    if behavior_column is not None:
        behavior = _name(row, behavior_column)
        if not behavior:
            raise Unusable(f"column {behavior_column!r} gives no behavior", row[behavior_column])
    label = _name(row, "label") if row.get("label") is not None else ""
    if shape.answer_is_label:
        label = _answer(chosen) or label
    ref_chosen, ref_rejected = (
        _logp(row, column) for column in ("ref_chosen_logps", "ref_rejected_logps")
    )
    if (ref_chosen is None) != (ref_rejected is None):
        raise Unusable(
            "only one of ref_chosen_logps, ref_rejected_logps is given", (ref_chosen, ref_rejected)
        )
    tools, template_kwargs = None, None
    content: tuple[str, ...] = (behavior, *texts)
    if not isinstance(prompt, str):
        tools = tools_of(row)
        template_kwargs = template_kwargs_of(row)
        asked = canonical_json([tools, template_kwargs], "a tool or template option")
        content = ("conversation", *content, asked)  # never that of a text pair
    elif _given(row, "tools") or _given(row, "chat_template_kwargs"):  # a CSV cell may say []
        raise Unusable(
            "columns 'tools' and 'chat_template_kwargs' are for conversations; make prompt, chosen "
            "and rejected lists of messages, or remove them",
            row.get("tools") or row.get("chat_template_kwargs"),
        )
    user_id = _name(row, "id") if row.get("id") is not None else ""
    return Pair(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        id=user_id,
        behavior=behavior,
        label=label,
        flipped=False,
        source=source.name,
        line=line,
        pair_id=seen.pair_id(user_id, content, f"{source.name}:{line}"),
        ref_chosen=ref_chosen,
        ref_rejected=ref_rejected,
        tools=tools,
        template_kwargs=template_kwargs,
        origin=source.origin,
    )


def tools_of(row: Row) -> tuple[dict[str, Any], ...] | None:
    """The schemas of column ``tools``: a list of objects, of their JSON, or the JSON of one."""
    value = _given(row, "tools")
    if not value and not isinstance(value, list):
        return None  # an empty list is not the same: templates tell it from none
    tools: list[Any] = [from_json(t) for t in value] if isinstance(value, list) else [None]
    if not all(isinstance(tool, dict) for tool in tools):
        raise Unusable("column 'tools' is not a list of objects (or its JSON)", row["tools"])
    return tuple(tools)


def template_kwargs_of(row: Row) -> dict[str, Any] | None:
    """The further variables of the chat template: an object, or its JSON."""
    value = _given(row, "chat_template_kwargs")
    if not value:
        return None
    if not isinstance(value, dict):
        raise Unusable("column 'chat_template_kwargs' is not an object (or its JSON)", value)
    return value


def _given(row: Row, column: str) -> Any:
    """A column's value without the nulls that Arrow fills in; of JSON text what it says."""
    value = row.get(column)
    return from_json(value) if isinstance(value, str) else without_nulls(value)


def _name(row: Row, column: str) -> str:
    """A string column, in which whole numbers and booleans stand for their text."""
    value = present(row, column)
    return str(value) if isinstance(value, int) else text(row, column)


def _logp(row: Row, column: str) -> float | None:
    value = row.get(column)
    if value is None:
        return None
    number = not isinstance(value, bool) and isinstance(value, (int, float))
    if not number or not abs(value) < LARGEST_FLOAT32:  # nan compares as false
        raise Unusable(f"column {column!r} is not a finite number that float32 holds", value)
    if value > LARGEST_LOGP:
        raise Unusable(
            f"column {column!r} is above 0, so no log-prob (give log-likelihoods in nats, not "
            "their negatives, nor probabilities)",
            value,
        )
    return float(value)


def _answer(completion: Side) -> str:
    answer = completion.strip() if isinstance(completion, str) else ""
    return answer if answer in ("Yes", "No") else ""


def _flip(pairs: list[Pair], flip_behaviors: Sequence[str]) -> list[Pair]:
    if list(flip_behaviors) == ["all"]:
        return [_flipped(pair) for pair in pairs]
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
