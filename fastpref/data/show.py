"""Pairs as text for people: conversations by their turns, long ones without their middle."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence

from fastpref.data.formats import Message, Pair
from fastpref.data.shapes import Side

WIDTH = 100
TEXT_LIMIT = 270  # characters shown of a text; longer ones lose their middle
TURNS_SHOWN = 6  # of a prompt or completion; longer conversations lose their middle


def pair_lines(pair: Pair) -> Iterator[str]:
    """The pair as it was read: its place, prompt, chosen and rejected."""
    yield f"{pair.source}:{pair.line}"
    marks = (("behavior", pair.behavior), ("label", pair.label), ("id", pair.id))
    said = [f"{name} {value}" for name, value in marks if value] + ["flipped"] * pair.flipped
    yield from _wrapped(", ".join(said), 2)
    if pair.tools:
        yield from _wrapped(f"tools: {', '.join(map(_tool_name, pair.tools))}", 2)
    if pair.template_kwargs:
        yield from _wrapped(f"chat_template_kwargs: {json.dumps(pair.template_kwargs)}", 2)
    for name, side in (
        ("prompt", pair.prompt),
        ("chosen", pair.chosen),
        ("rejected", pair.rejected),
    ):
        yield from _side_lines(name, side)


def escaped(text: str) -> str:
    """``text`` on one line."""
    return text.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")


def middle_cut(text: str, limit: int) -> str:
    """At most ``limit`` characters of ``text``: its start and its end."""
    if len(text) <= limit:
        return text
    head = (limit - 3) // 2
    return f"{text[:head]}...{text[len(text) - (limit - 3 - head) :]}"


def pieces(text: str) -> list[str]:
    """Words, each with the space after it, for `filled`."""
    return re.findall(r"\S+\s*|\s+", text)


def filled(words: Iterable[str], indent: int) -> Iterator[str]:
    """Lines of at most WIDTH characters; only a word longer than a line is broken."""
    room = WIDTH - indent
    line = ""
    for word in words:
        if line and len(line) + len(word.rstrip()) > room:
            yield " " * indent + line
            line = ""
        line += word
        while len(line.rstrip()) > room:
            yield " " * indent + line[:room]
            line = line[room:]
    yield " " * indent + (line or "(nothing)")


def _side_lines(name: str, side: Side) -> Iterator[str]:
    if isinstance(side, str):  # in quotes: a space at its start matters
        cut = middle_cut(json.dumps(side, ensure_ascii=False), TEXT_LIMIT)
        yield from _wrapped(f"{name}: {cut}", 2)
        return
    yield f"  {name}:"
    for turn in _ends(side):
        if isinstance(turn, int):
            yield f"    ... {turn} more messages ..."
        else:
            yield from _wrapped(f"{turn['role']}: {_said(turn)}", 4)


def _ends(turns: Sequence[Message]) -> Iterator[Message | int]:
    """The first and the last turns, and between them how many are left out."""
    left_out = len(turns) - TURNS_SHOWN
    if left_out <= 0:
        yield from turns
        return
    yield from turns[: TURNS_SHOWN // 2]
    yield left_out
    yield from turns[-(TURNS_SHOWN // 2) :]


def _said(turn: Message) -> str:
    calls = [f"[calls {_tool_name(call)}]" for call in turn.get("tool_calls", ())]
    more = sorted(turn.keys() - {"role", "content", "tool_calls"})
    also = [f"[with {', '.join(more)}]"] if more else []
    text = middle_cut(escaped(turn["content"]), TEXT_LIMIT)
    return " ".join(filter(None, [text, *calls, *also]))


def _tool_name(tool: Message) -> str:
    function = tool.get("function", tool)
    return str(function.get("name", "?")) if isinstance(function, dict) else "?"


def _wrapped(text: str, indent: int) -> Iterator[str]:
    return (line.rstrip() for line in filled(pieces(text), indent))
