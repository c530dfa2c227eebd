"""Conversations: lists of messages, checked and brought to one form.

A message is an object with ``role`` and ``content`` and whatever else the chat template reads
(``tool_calls``, ``name``, ...). Nulls inside it count as absent, because Arrow fills every message
of a column with the names that any other message has.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from fastpref.data.badrows import Unusable, Words, nearest, shown
from fastpref.data.table import MEDIA

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}
MAY_BE_EMPTY = ("system", "developer", "tool")
PYTHON_TEXT = re.compile(r"\s*\[\s*\{\s*'(role|content|from|value)'")  # pandas' to_csv writes it
ENCODER = json.JSONEncoder(
    sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":")
)


def read_messages(value: Sequence[Any], column: str) -> tuple[Message, ...]:
    """The messages of a list, each with its content as one string.

    ShareGPT's ``from`` and ``value`` become ``role`` and ``content``; text parts are joined.
    Raises Unusable for anything that is no message, for unknown roles, media and empty turns.
    """
    if not value:
        raise Unusable(f"column {column!r} is a list without messages", list(value))
    return tuple(_message(item, column, number) for number, item in enumerate(value, 1))


def messages_in_text(text: str, column: str) -> list[Any] | None:
    """The list of messages that a text is the JSON of, as in a CSV cell; None for other text."""
    if not text.lstrip().startswith("["):
        return None
    if PYTHON_TEXT.match(text):
        raise Unusable(
            f"column {column!r} is a list of messages as Python prints it; write it as JSON "
            "(json.dumps), or save the data as JSONL or Parquet",
            text,
        )
    if '"role"' not in text and '"from"' not in text:
        return None
    items = from_json(text)
    messages = isinstance(items, list) and all(
        isinstance(item, dict) and ("role" in item or "from" in item) for item in items
    )
    return items if messages else None


def canonical(value: str | tuple[Message, ...] | None) -> str:
    """A text that is the same for equal values: a string itself, messages as sorted JSON.

    Raises Unusable for what JSON or UTF-8 cannot hold.
    """
    if isinstance(value, str):
        return value
    return canonical_json(value, "a conversation")


def canonical_json(value: Any, what: str) -> str:
    """JSON with sorted names and without spaces. Raises Unusable as `canonical` does."""
    try:
        text = ENCODER.encode(value)
        text.encode()
    except UnicodeEncodeError as error:
        half = Words(f"{text[error.start]!r} in {shown(text[max(0, error.start - 20) :])}")
        raise Unusable(f"{what} holds half a surrogate pair", half) from None
    except (TypeError, ValueError, RecursionError) as error:  # dates, NaN, lists without end
        raise Unusable(f"{what} holds what JSON cannot", Words(f"{error}")) from None
    return text


def from_json(value: Any) -> Any:
    """What a text is the JSON of, if it is; Arrow columns of mixed types hold objects so."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            pass
    return value


def without_nulls(value: Any) -> Any:
    """``value`` without the names whose value is null, at any depth; Unusable if too deep."""
    try:
        return _stripped(value)
    except RecursionError:
        raise Unusable("a value has too many levels", Words(type(value).__name__)) from None


def _stripped(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _stripped(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_stripped(item) for item in value]
    return value


def _message(item: Any, column: str, number: int) -> Message:
    item = from_json(item)
    if not isinstance(item, dict):
        raise Unusable(
            f"column {column!r} is a list, but not of messages (objects with role and content)",
            Words(f"{shown(item)} as item {number}"),
        )
    message = without_nulls(item)
    if "role" not in message and "from" in message:
        given = message.pop("from")
        message = {"role": SHAREGPT_ROLES.get(given, given) if isinstance(given, str) else given,
                   "content": message.pop("value", None), **message}  # fmt: skip
    role = message.get("role")
    if role not in ROLES:
        near = nearest(role, ROLES) if isinstance(role, str) else ""
        raise Unusable(
            f"column {column!r}: a message's role is none of {', '.join(ROLES)}",
            Words(f"{shown(role)} in message {number}{near and ';' + near}"),
        )
    if not message.keys().isdisjoint(MEDIA):
        media = [name for name in MEDIA if message.get(name)]
        if media:
            raise _no_media(column, media[0], number)
    calls = _tool_calls(message, column, number)
    content = _content(message.get("content"), column, number)
    if content is None and not calls:
        raise Unusable(f"column {column!r}: a message has no content", Words(_where(item, number)))
    if not (content or "").strip() and not calls and role not in MAY_BE_EMPTY:
        raise Unusable(f"column {column!r}: a message is empty", Words(_where(item, number)))
    return {**message, "role": role, "content": content or ""}


def _content(value: Any, column: str, number: int) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise Unusable(
            f"column {column!r}: a message's content is neither text nor a list of parts",
            Words(f"{type(value).__name__} {shown(value)} in message {number}"),
        )
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(kind, str) and kind.split("_")[-1] in ("image", "video", "audio", "url"):
            raise _no_media(column, kind, number)
        else:
            raise Unusable(
                f"column {column!r}: a part of a message's content is not of type text",
                Words(f"{shown(part)} in message {number}"),
            )
    return "".join(texts)


def _tool_calls(message: Message, column: str, number: int) -> bool:
    """Whether the message has tool calls; calls that are the JSON of objects become objects."""
    calls = message.pop("tool_calls", None)
    if calls is None:
        return False
    items = from_json(calls)
    items = [from_json(item) for item in items] if isinstance(items, list) else [None]
    if not all(isinstance(item, dict) for item in items):
        raise Unusable(
            f"column {column!r}: a message's tool_calls is not a list of objects",
            Words(f"{shown(calls)} in message {number}"),
        )
    if items:
        message["tool_calls"] = items
    return bool(items)


def _no_media(column: str, what: str, number: int) -> Unusable:
    return Unusable(
        f"column {column!r}: a message holds an image, video or sound; fastpref reads text only",
        Words(f"{what!r} in message {number}"),
    )


def _where(item: Any, number: int) -> str:
    return f"{shown(item)} as message {number}"
