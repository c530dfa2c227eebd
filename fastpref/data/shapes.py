"""The shapes of rows: which columns make one, and how they become prompt, chosen and rejected.

Whatever could be read in two ways is refused, with a message that says how to make it plain.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from fastpref.data.badrows import Unusable, Words, listed, shown
from fastpref.data.messages import Message, canonical, from_json, messages_in_text, read_messages
from fastpref.data.table import MEDIA

Side = str | tuple[Message, ...]  # a text, or the messages of a conversation
Sides = tuple[Side, Side, Side]  # prompt, chosen, rejected
Row = dict[str, Any]

ASSISTANT = "\n\nAssistant:"  # opens an assistant's turn in HH-RLHF dialogues
# Columns that may hold the prompt of chosen and rejected, but how is anyone's guess.
PROMPT_LIKE = ("query", "context", "history", "problem")


@dataclass(frozen=True, slots=True)
class Shape:
    """A kind of row: the columns it needs, and how a row becomes prompt, chosen and rejected."""

    name: str
    columns: tuple[str, ...]
    parse: Callable[[Row, tuple[str, ...]], Sides]  # the row and `columns`
    answer_is_label: bool = False  # a preferred answer Yes or No is the row's label
    also: tuple[str, ...] = ()  # columns that `parse` reads where they are


# ------------------------------------------------------------------------------ single columns


def present(row: Row, column: str) -> Any:
    """The value of a column that must be there."""
    if column not in row:
        raise Unusable(f"column {column!r} is missing", Words(f"columns {listed(row)}"))
    if row[column] is None:
        raise Unusable(f"column {column!r} is null", Words("null"))
    return row[column]


def text(row: Row, column: str) -> str:
    """The value of a column that must hold a string."""
    value = present(row, column)
    if not isinstance(value, str):
        kind = type(value).__name__
        raise Unusable(f"column {column!r} is not a string", Words(f"{kind} {shown(value)}"))
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = Words(f"{value[error.start]!r} at character {error.start}")
        raise Unusable(f"column {column!r} holds half a surrogate pair", half) from None
    return value


def side(row: Row, column: str) -> Side:
    """The value of a column that holds a string, a list of messages (or its JSON), or one."""
    value = present(row, column)
    if isinstance(value, str):
        items = messages_in_text(value, column)
        return text(row, column) if items is None else read_messages(items, column)
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list):
        return read_messages(value, column)
    raise Unusable(
        f"column {column!r} is not a string or a list of messages",
        Words(f"{type(value).__name__} {shown(value)}"),
    )


def refuse_media(row: Row) -> None:
    """Raise Unusable where a row has images, videos or sound."""
    for column in MEDIA:
        if from_json(row.get(column)):  # a CSV cell may say []
            raise Unusable(
                f"column {column!r} is not empty; fastpref reads text only: remove it where "
                "the text does without",
                Words("a value of its own" if row[column] is True else shown(row[column])),
            )


def _completions(row: Row, chosen: str, rejected: str) -> tuple[Side, Side]:
    sides = side(row, chosen), side(row, rejected)
    if isinstance(sides[0], str) != isinstance(sides[1], str):
        kinds = ["text" if isinstance(value, str) else "a list of messages" for value in sides]
        raise Unusable(
            f"{chosen!r} and {rejected!r} are not of one kind", Words(" and ".join(kinds))
        )
    return sides


# ------------------------------------------------------------------------------ conversations


def conversation(prompt: Side, chosen: Side, rejected: Side) -> Sides:
    """A prompt beside completions, at least one of them messages, as one conversation.

    A prompt that is a string is a user's message, completions that are strings are an assistant's.
    Completions that do not begin with the assistant are whole conversations: their common start
    is the prompt, and the prompt's column must be part of it.
    """
    if isinstance(chosen, str) and isinstance(rejected, str):
        chosen = _said("assistant", chosen, "chosen")
        rejected = _said("assistant", rejected, "rejected")
    assert not isinstance(chosen, str) and not isinstance(rejected, str)
    if chosen[0]["role"] == rejected[0]["role"] == "assistant":
        asked = _said("user", prompt, "prompt") if isinstance(prompt, str) else prompt
        return asked, chosen, rejected
    whole = _common_turns(chosen, rejected)
    if isinstance(prompt, str):
        said = [turn["content"].strip() for turn in whole[0] if turn["role"] == "user"]
        if prompt.strip() not in said:
            raise Unusable(
                "no user's message that both conversations begin with has the text of the prompt's "
                "column; correct it, or remove the column",
                prompt,
            )
    elif canonical(whole[0][: len(prompt)]) != canonical(prompt):
        raise Unusable(
            "the completions do not begin with the assistant's turn, but neither with the prompt's "
            "messages",
            Words(f"prompt {_roles(prompt)}, chosen {_roles(chosen)}, rejected {_roles(rejected)}"),
        )
    return whole


def _said(role: str, content: str, column: str) -> tuple[Message, ...]:
    return read_messages([{"role": role, "content": content}], column)


def _common_turns(
    chosen: tuple[Message, ...], rejected: tuple[Message, ...]
) -> tuple[tuple[Message, ...], tuple[Message, ...], tuple[Message, ...]]:
    """Whole conversations: the prompt is their common start, up to the assistant's turn.

    As `trl.extract_prompt` cuts, except where the conversations part in a turn that is not the
    assistant's: then before the assistant's last turn that they share, as in HH dialogues.
    """
    cut = _first_difference(chosen, rejected)
    while cut and not chosen[cut]["role"] == rejected[cut]["role"] == "assistant":
        cut -= 1
    if not cut:
        raise Unusable(
            "the conversations have no common start before an assistant's turn",
            Words(f"chosen {_roles(chosen)}, rejected {_roles(rejected)}"),
        )
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _first_difference(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    """Where two sequences first differ; where one begins with the other, that one's last place."""
    shorter = min(len(chosen), len(rejected))
    for i in range(shorter):
        if chosen[i] != rejected[i]:
            return i
    return shorter - 1


def check_conversation(prompt: Side, chosen: Side, rejected: Side, system: Any) -> None:
    """Raise Unusable where turns are not in an order that can be trained on."""
    if isinstance(prompt, str) or isinstance(chosen, str) or isinstance(rejected, str):
        return
    if prompt[-1]["role"] == "assistant":
        raise Unusable(
            "the prompt ends with an assistant's message; begin chosen and rejected with it",
            Words(_roles(prompt)),
        )
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if turns[0]["role"] != "assistant":
            raise Unusable(f"the {name} completion does not begin with an assistant's message",
                           Words(_roles(turns)))  # fmt: skip
        if turns[-1]["role"] != "assistant":
            raise Unusable(f"the {name} completion does not end with an assistant's message",
                           Words(_roles(turns)))  # fmt: skip
    first = prompt[0]["content"].strip() if prompt[0]["role"] == "system" else None
    if system and first != (system.strip() if isinstance(system, str) else system):
        raise Unusable(
            "column 'system' is not the conversation's first message; make it that, or remove it",
            system,
        )


def _roles(turns: Sequence[Message]) -> str:
    roles = [str(turn["role"]) for turn in turns]
    return "-".join(roles if len(roles) <= 6 else [*roles[:3], "...", *roles[-2:]])


# ------------------------------------------------------------------------------ ways to parse


def _preference(row: Row, columns: tuple[str, ...]) -> Sides:
    prompt = side(row, columns[0])
    chosen, rejected = _completions(row, *columns[1:])
    if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        return prompt, chosen, rejected
    return conversation(prompt, chosen, rejected)


def _messages(row: Row, columns: tuple[str, ...]) -> Sides:
    prompt = side(row, columns[0])
    if isinstance(prompt, str):
        raise Unusable(f"column {columns[0]!r} is not a list of messages", prompt)
    return conversation(prompt, *_completions(row, *columns[1:]))


def _question(row: Row, columns: tuple[str, ...]) -> Sides:
    """Instruction data: a user's question, answers of the assistant, a system message if given."""
    question = text(row, columns[0])
    more = row.get("input")
    if columns[0] == "instruction" and more:
        question = f"{question}\n{text(row, 'input')}"
    if from_json(row.get("history")):
        raise Unusable("column 'history' would be lost; make the prompt a list of messages",
                       row["history"])  # fmt: skip
    chosen, rejected = _completions(row, *columns[1:])
    asked = _said("user", question, columns[0])
    if isinstance(chosen, str):
        if row.get("system"):
            asked = (*_said("system", text(row, "system"), "system"), *asked)
        return conversation(asked, chosen, rejected)
    return conversation(question, chosen, rejected)


def _persona(row: Row, columns: tuple[str, ...]) -> Sides:
    question, chosen, rejected = (text(row, column) for column in columns)
    return question, chosen, rejected


def _implicit(row: Row, columns: tuple[str, ...]) -> Sides:
    """Whole conversations, or texts by `trl.extract_prompt`'s rule (trl 1.16, data_utils.py)."""
    chosen, rejected = _completions(row, *columns)
    if not isinstance(chosen, str) and not isinstance(rejected, str):
        return _common_turns(chosen, rejected)
    assert isinstance(chosen, str) and isinstance(rejected, str)
    guess = [name for name in PROMPT_LIKE if row.get(name)]
    if guess:
        raise Unusable(
            f"there is no column 'prompt', but {guess[0]!r} may be one: rename it 'prompt' (texts "
            "are joined as they are; for a chat make it a list of messages), or remove it",
            row[guess[0]],
        )
    if not chosen or not rejected:
        return "", chosen, rejected  # refused as empty
    cut = len(os.path.commonprefix([chosen, rejected]))
    if cut == min(len(chosen), len(rejected)):
        cut -= 1  # neither completion may be empty
    elif cut and chosen[cut - 1] == " ":
        cut -= 1  # a space belongs to the word after it
    if cut <= 0 and chosen != rejected:
        raise Unusable(
            "chosen and rejected have no common start to be the prompt, and there is no column "
            "'prompt' (it may be an empty text)",
            chosen,
        )
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _hh_dialogues(row: Row, columns: tuple[str, ...]) -> Sides:
    """The prompt ends with the last opening of an assistant's turn that both dialogues share."""
    chosen, rejected = (text(row, column) for column in columns)
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


# ------------------------------------------------------------------------------ the shapes

PREFERENCE = Shape("preference", ("prompt", "chosen", "rejected"), _preference)
HH = Shape("HH dialogues", ("chosen", "rejected"), _hh_dialogues)
KTO = Shape("KTO", ("prompt", "completion", "label"), _preference)  # paired first, see pairing.py
ANSWERS = (("chosen", "rejected"), ("chosen_response", "rejected_response"))

# More specific shapes come first: a file has the first shape whose columns one of its rows has.
SHAPES = (
    PREFERENCE,
    Shape("preference", ("prompt", "chosen_response", "rejected_response"), _preference),
    Shape(
        "persona",
        ("question", "answer_matching_behavior", "answer_not_matching_behavior"),
        _persona,
        answer_is_label=True,
    ),
    *(
        Shape("conversation", (messages, "chosen", "rejected"), _messages)
        for messages in ("messages", "conversations")
    ),
    *(
        Shape("instruction", (question, *answers), _question, also=("input", "history"))
        for question in ("question", "instruction", "input")
        for answers in ANSWERS
    ),
    KTO,
    Shape("implicit prompt", ("chosen", "rejected"), _implicit, also=PROMPT_LIKE),
)

KNOWN_SHAPES = (
    "prompt, chosen, rejected; question, answer_matching_behavior, answer_not_matching_behavior; "
    "messages or conversations, chosen, rejected; question, instruction or input, chosen, "
    "rejected; prompt, completion, label; chosen, rejected"
)


def shape_of(names: Collection[str], rows: Sequence[tuple[int, Row]]) -> Shape | None:
    """The shape of a file with the columns ``names``, of which ``rows`` have each its own."""
    for shape in SHAPES:
        needed = set(shape.columns)
        if needed <= set(names) and any(row.keys() >= needed for _, row in rows):
            if shape.parse is _implicit and _has_openings(rows):
                return HH
            return shape
    return None


def _has_openings(rows: Sequence[tuple[int, Row]]) -> bool:
    """Whether a row's texts have openings of turns as in HH-RLHF: then all are such dialogues."""
    values = (row.get(column) for _, row in rows for column in HH.columns)
    return any(isinstance(value, str) and ASSISTANT in value for value in values)
