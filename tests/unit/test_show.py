from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastpref.commands import inspect
from fastpref.data.formats import read_pairs
from fastpref.data.show import WIDTH, pair_lines


def turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def conversation() -> dict[str, Any]:
    asked = [turn("user" if n % 2 == 0 else "assistant", f"turn {n}") for n in range(11)]
    call = {"type": "function", "function": {"name": "look_up", "arguments": {"q": "x"}}}
    return {
        "prompt": asked,
        "chosen": [
            turn("assistant", "I look.\nWait.", tool_calls=[call]),
            turn("tool", "word " * 400, name="look_up"),
            turn("assistant", "It is so."),
        ],
        "rejected": [turn("assistant", "No idea.")],
        "tools": [{"type": "function", "function": {"name": f"tool_{n}"}} for n in range(40)],
        "chat_template_kwargs": {"enable_thinking": False},
    }


def test_a_long_conversation_is_shown_without_its_middle(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps(conversation()))
    (pair,), _ = read_pairs([str(file)])
    place, *lines = pair_lines(pair)
    assert place == f"{file}:1" and max(map(len, lines)) <= WIDTH
    text = "\n".join(lines)
    for part in (
        "  tools: tool_0, tool_1,",
        '  chat_template_kwargs: {"enable_thinking": false}',
        "    user: turn 2\n    ... 5 more messages ...\n    user: turn 8\n",
        "    assistant: I look.\\nWait. [calls look_up]",
        "word  [with",
        "  rejected:\n    assistant: No idea.",
    ):
        assert part in text, part
    assert len(text) < 1600


def test_inspect_shows_rows_of_conversations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [conversation(), conversation(), {**conversation(), "rejected": [turn("x", "y")]}]
    swapped = {**conversation(), "chosen": rows[0]["rejected"], "rejected": rows[0]["chosen"]}
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [*rows, swapped])))
    twice = {"prompt": "Ask", "chosen": "Ask Yes", "rejected": "Ask No"}
    (tmp_path / "b.json").write_text(json.dumps([twice]))
    pairs, bad = read_pairs([str(tmp_path)], on_bad_rows="drop")
    inspect._show_rows(pairs, bad)
    inspect._show_read(pairs, 5)
    text = capsys.readouterr().out
    for line in (
        "2  files",
        "4  pairs",
        "3  of them conversations",
        "3  of them with tools",
        "1  bad rows found",
        "1  duplicates:",
        "1  contradictions:",
        "2  pairs with the prompt of an earlier pair",
        "1  pairs whose completions both repeat the prompt",
        "Pairs as read (the first of 2 of 2 sources)",
        f"{tmp_path}/a.jsonl:1\n  behavior a\n",
        f'{tmp_path}/b.json:1\n  behavior b\n  prompt: "Ask"\n  chosen: "Ask Yes"\n',
    ):
        assert line in text, line
