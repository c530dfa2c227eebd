from __future__ import annotations

import ast
import functools
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastpref.data.badrows import BadRow, Unusable
from fastpref.data.formats import Pair, read_pairs
from fastpref.data.shapes import KNOWN_SHAPES, SHAPES, conversation, shape_of

Row = dict[str, Any]


def system(text: str) -> Row:
    return {"role": "system", "content": text}


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> Row:
    return {"role": "assistant", "content": text, **more}


ASK, GOOD, POOR = user("Two and two?"), assistant("Four."), assistant("Five.")


def read(tmp_path: Path, *rows: Row) -> tuple[list[Pair], list[BadRow]]:
    file = tmp_path / "x.jsonl"
    filler = {"prompt": [user("filler")], "chosen": [GOOD], "rejected": [POOR]}
    last = {**rows[-1], "prompt": "filler"} if "completion" in rows[-1] else filler
    file.write_text("\n".join(json.dumps(row) for row in (*rows, last)))
    pairs, bad = read_pairs([str(file)], on_bad_rows="drop")
    return [p for p in pairs if p.line <= len(rows)], [b for b in bad if b.line <= len(rows)]


def one(tmp_path: Path, row: Row) -> Pair:
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps(row))
    (pair,), _ = read_pairs([str(file)])
    return pair


def sides(pair: Pair) -> tuple[Any, Any, Any]:
    return pair.prompt, pair.chosen, pair.rejected


# ------------------------------------------------------------------------ conversations


def test_every_way_to_write_a_conversation_is_the_same_pair(tmp_path: Path) -> None:
    full = {"chosen": [ASK, GOOD], "rejected": [ASK, POOR]}
    sharegpt = {"from": "human", "value": "Two and two?"}
    rows = [
        {"prompt": [ASK], "chosen": [GOOD], "rejected": [POOR]},
        {"prompt": [ASK], **full},  # the prompt stands in the completions too
        {"prompt": "Two and two?", **full, "score_chosen": 9.5},  # UltraFeedback
        {"prompt": "Two and two?", "chosen": [GOOD], "rejected": [POOR]},
        {"prompt": [ASK], "chosen": "Four.", "rejected": "Five."},
        {"prompt": [ASK], "chosen": GOOD, "rejected": POOR},
        {"prompt": json.dumps([ASK]), "chosen": json.dumps([GOOD]), "rejected": json.dumps([POOR])},
        full,
        {"messages": [ASK], "chosen": GOOD, "rejected": POOR},
        {"conversations": [sharegpt], "chosen": {"from": "gpt", "value": "Four."},
         "rejected": {"from": "gpt", "value": "Five."}},
        {"question": "Two and two?", "chosen": "Four.", "rejected": "Five.", "system": ""},
        {"instruction": "Two and two?", "input": "", "chosen": "Four.", "rejected": "Five."},
        {"input": "Two and two?", "chosen_response": "Four.", "rejected_response": "Five."},
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Two and "},
                                                 {"type": "text", "text": "two?"}]}],
         "chosen": [GOOD], "rejected": [{**POOR, "tool_calls": None, "name": None}]},
    ]  # fmt: skip
    pairs = [one(tmp_path, row) for row in rows]
    for row, pair in zip(rows, pairs, strict=True):
        assert sides(pair) == ((ASK,), (GOOD,), (POOR,)), row
        assert pair.pair_id == pairs[0].pair_id, row


def test_completions_of_several_turns_and_system_messages(tmp_path: Path) -> None:
    call = assistant("", tool_calls=[{"function": {"name": "add", "arguments": "{}"}}])
    tool = {"role": "tool", "content": "4", "name": "add"}
    start = (system("Be brief."), user("Hi"), assistant("Hello"), ASK)
    full = {"chosen": [*start, call, tool, GOOD], "rejected": [*start, POOR]}
    for row in (
        full,
        {"prompt": "Two and two?", **full},
        {"prompt": "Hi", **full, "system": "Be brief."},
        {"prompt": list(start), "chosen": [call, tool, GOOD], "rejected": [POOR]},
        {"prompt": list(start[:2]), **full},  # part of the common start
    ):
        assert sides(one(tmp_path, row)) == (start, (call, tool, GOOD), (POOR,)), row
    asked = one(tmp_path, {"question": "Two and two?", "input": "ignored", "system": "Be brief.",
                           "chosen": "Four.", "rejected": "Five."})  # fmt: skip
    assert asked.prompt == (system("Be brief."), ASK)
    told = {"instruction": "Add", "input": "2 2", "chosen": "Four.", "rejected": "Five."}
    assert one(tmp_path, told).prompt == (user("Add\n2 2"),)


def test_conversations_that_part_in_the_users_turn_are_cut_before_the_assistants(
    tmp_path: Path,
) -> None:
    chosen = [user("Hi"), assistant("Hello"), user("Why?"), assistant("So.")]
    rejected = [user("Hi"), assistant("Hello"), user("When?"), assistant("Now.")]
    pair = one(tmp_path, {"chosen": chosen, "rejected": rejected})
    assert sides(pair) == ((user("Hi"),), tuple(chosen[1:]), tuple(rejected[1:]))
    # One conversation is the start of the other: its last turn stays in the completions.
    pair = one(tmp_path, {"chosen": chosen, "rejected": chosen[:2]})
    assert sides(pair) == ((user("Hi"),), tuple(chosen[1:]), (assistant("Hello"),))


def message(row: Row, **change: Any) -> Row:
    return {"prompt": [{**ASK, **change}], "chosen": [GOOD], "rejected": [POOR], **row}


IMAGE = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
BAD = {
    "unknown role": (message({}, role="usr"), "'prompt': a message's role is none of", "'usr' in "),
    "no role": (message({}, role=None), "role is none of", "None in message 1"),
    "ShareGPT role": (message({"prompt": [{"from": "function_call"}]}), "role is none", "'functi"),
    "no content": (message({}, content=None), "a message has no content", "as message 1"),
    "empty": (message({}, content=" \n"), "'prompt': a message is empty", "as message 1"),
    "empty answer": (message({"chosen": [assistant("")]}), "'chosen': a message is empty", "''"),
    "empty text": (message({"chosen": "", "rejected": "x"}), "'chosen': a message is empty", ""),
    "number as content": (message({}, content=7), "content is neither text nor", "int 7"),
    "image": (message({}, content=IMAGE), "an image, video or sound", "'image' in message 1"),
    "image_url": (message({}, content=[{"type": "image_url"}]), "an image, video or", "image_url"),
    "images": (message({}, images=["a.png"]), "an image, video or sound", "'images'"),
    "part": (message({}, content=["text"]), "a part of a message's content", "'text' in message"),
    "no message": (message({"chosen": ["Four."]}), "not of messages", "'Four.' as item 1"),
    "no messages": (message({"chosen": []}), "list without messages", "[]"),
    "calls": (message({"chosen": [assistant("x", tool_calls=7)]}), "tool_calls is not a list", "7"),
    "kinds differ": (message({"chosen": "Four."}), "not of one kind", "text and a list of"),
    "surrogate": (message({}, content="\ud800"), "half a surrogate pair", "ud800"),
    "nan": (message({}, weight=float("nan")), "what JSON cannot", "Out of range"),
    "same": (message({"rejected": [GOOD]}), "chosen and rejected are the same", "Four."),
    "prompt ends with the assistant": (
        message({"prompt": [ASK, assistant("Well,")]}),
        "the prompt ends with an assistant's message",
        "user-assistant",
    ),
    "ends with the user": (
        message({"chosen": [GOOD, user("Thanks")]}),
        "the chosen completion does not end with an assistant's",
        "assistant-user",
    ),
    "begins with a tool": (
        message({"chosen": [{"role": "tool", "content": "4"}, GOOD]}),
        "no common start before an assistant's turn",
        "chosen tool-assistant, rejected assistant",
    ),
    "another prompt": (
        {"prompt": [user("Three?")], "chosen": [ASK, GOOD], "rejected": [ASK, POOR]},
        "neither with the prompt's messages",
        "prompt user, chosen user-assistant",
    ),
    "another prompt's text": (
        {"prompt": "Three?", "chosen": [ASK, GOOD], "rejected": [ASK, POOR]},
        "no user's message that both conversations begin with has the text",
        "'Three?'",
    ),
    "nothing in common": (
        {"prompt": "Hi", "chosen": [user("Hi"), GOOD], "rejected": [user("Ho"), POOR]},
        "no common start before an assistant's turn",
        "chosen user-assistant",
    ),
    "system column": (
        message({"system": "Be brief."}),
        "column 'system' is not the conversation's first message",
        "'Be brief.'",
    ),
    "tools": (message({"tools": "add"}), "'tools' is not a list of objects", "'add'"),
    "tools of text": (
        {"prompt": "p", "chosen": " a", "rejected": " b", "tools": [{"name": "add"}]},
        "'tools' and 'chat_template_kwargs' are for conversations",
        "add",
    ),
    "kwargs": (message({"chat_template_kwargs": [1]}), "is not an object", "[1]"),
    "images column": (message({"images": ["a.png"]}), "column 'images' is not empty", "a.png"),
    "half text": (
        {"prompt": "p", "chosen": "a", "rejected": [POOR]}, "not of one kind", "text and a list"
    ),
    "deep": (message({"tools": [json.loads("[" * 900 + "]" * 900)]}), "", ""),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_bad_conversations(tmp_path: Path, kind: str) -> None:
    row, reason, value = BAD[kind]
    pairs, bad = read(tmp_path, row)
    assert not pairs
    (only,) = bad
    assert only.line == 1 and reason in only.reason and value in only.value


# ------------------------------------------------------------------------ implicit prompts


@functools.cache
def trl_extract_prompt() -> Any:
    """`extract_prompt` of the installed trl, without the ten seconds that importing trl takes."""
    spec = importlib.util.find_spec("trl")
    if spec is None or spec.origin is None:
        pytest.skip("trl is not installed")
    source = Path(spec.origin).with_name("data_utils.py").read_text(encoding="utf-8")
    (function,) = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == "extract_prompt"
    ]
    names: dict[str, Any] = {"Sequence": Sequence}
    exec(compile(ast.Module([function], []), "trl", "exec"), names)
    return names["extract_prompt"]


@settings(max_examples=200, deadline=None)
@given(st.text("ab ", max_size=8), st.text("ab ", max_size=8), st.text("ab ", max_size=8))
def test_texts_without_a_prompt_are_cut_as_by_trl(start: str, one: str, other: str) -> None:
    row = {"chosen": start + one, "rejected": start + other}
    shape = shape_of(row, [(1, row)])
    assert shape is not None and shape.name == "implicit prompt"
    assume(row["chosen"] != row["rejected"] and min(map(len, row.values())) > 0)
    wanted = trl_extract_prompt()(row)
    try:
        got = dict(zip(("prompt", "chosen", "rejected"), shape.parse(row, shape.columns),
                       strict=True))  # fmt: skip
    except Unusable as why:
        # TRL would train on an empty prompt, or, of texts that differ at once, cut off the end.
        assert "no common start" in why.reason
        assert wanted["prompt"] == "" or row["chosen"][0] != row["rejected"][0]
    else:
        assert got == wanted


TURN = st.tuples(st.sampled_from(["user", "assistant", "tool"]), st.sampled_from("ab"))


@settings(max_examples=200, deadline=None)
@given(st.lists(TURN, max_size=4), st.lists(TURN, max_size=3), st.lists(TURN, max_size=3))
def test_conversations_without_a_prompt_are_cut_as_by_trl_if_the_assistant_speaks(
    start: list[Any], one: list[Any], other: list[Any]
) -> None:
    chosen, rejected = (
        [{"role": role, "content": text} for role, text in [*start, *turns]]
        for turns in (one, other)
    )
    assume(chosen and rejected and chosen != rejected)
    row = {"chosen": chosen, "rejected": rejected}
    wanted = trl_extract_prompt()(row)
    shape = shape_of(row, [(1, row)])
    assert shape is not None
    try:
        prompt, *answers = shape.parse(row, shape.columns)
    except Unusable as why:
        assert "no common start before" in why.reason
        openings = [turns[0]["role"] for turns in (wanted["chosen"], wanted["rejected"])]
        assert not wanted["prompt"] or openings != ["assistant", "assistant"]
        return
    assert [*prompt, *answers[0]] == chosen and [*prompt, *answers[1]] == rejected
    assert {turns[0]["role"] for turns in answers} == {"assistant"}  # type: ignore[index]
    assert len(prompt) <= len(wanted["prompt"])
    if wanted["chosen"][0]["role"] == wanted["rejected"][0]["role"] == "assistant":
        assert list(prompt) == wanted["prompt"]


def test_texts_whose_prompt_is_anyones_guess_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(
        json.dumps({"query": "Two and two?", "chosen": "It is 4", "rejected": "It is 5"})
    )
    with pytest.raises(ValueError, match="'query' may be one: rename it 'prompt'"):
        read_pairs([str(file)])
    file.write_text(json.dumps({"question": "Two and two?", "history": [["a", "b"]],
                                "chosen": "4", "rejected": "5"}))  # fmt: skip
    with pytest.raises(ValueError, match="'history' would be lost"):
        read_pairs([str(file)])


# ------------------------------------------------------------------------ KTO's rows


def rated(prompt: Any, completion: Any, label: Any, **more: Any) -> Row:
    return {"prompt": prompt, "completion": completion, "label": label, **more}


def test_rated_rows_are_paired_in_order_and_leftovers_counted(tmp_path: Path) -> None:
    rows = [
        rated("p", " bad 1", False, id="b1", ref_logps=-9.0),
        rated("p", " good 1", True, id="g1", ref_logps=-1.0),
        rated("q", " good q", True, id="gq"),
        rated("p", " good 2", 1, id="g2"),
        rated("p", " good 3", "true", id="g3"),
        rated("p", " bad 2", 0, id="b2"),
        rated([ASK], [GOOD], True, tools=[{"name": "f"}]),
        rated([ASK], [POOR], False),  # other tools: no partner
        rated("p", "", False),
        rated("p", " x", "perhaps"),
        rated("p", " x", 2),
        rated(None, " x", True),
    ]
    file = tmp_path / "x.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    pairs, bad = read_pairs([str(file)], on_bad_rows="drop")
    assert [(p.chosen, p.rejected, p.line, p.id, p.label) for p in pairs] == [
        (" good 1", " bad 1", 2, "g1", ""),
        (" good 2", " bad 2", 4, "g2", ""),
    ]
    assert (pairs[0].ref_chosen, pairs[0].ref_rejected) == (-1.0, -9.0)
    left = "no row of the other label is left to pair it with"
    assert [(row.line, row.reason) for row in bad] == [
        (3, left),
        (5, left),
        (7, left),
        (8, left),
        (9, "the completion is empty"),
        (10, "column 'label' is neither true nor false"),
        (11, "column 'label' is neither true nor false"),
        (12, "column 'prompt' is null"),
    ]
    assert bad[1].value == "of this prompt 3 rows with label true, 2 with false"
    with pytest.raises(ValueError, match="8 of 12 rows are bad"):
        read_pairs([str(file)])


@pytest.mark.parametrize(("yes", "no"), [(1.0, 0.0), ("1.0", "0.0"), ("True", "False")])
def test_labels_as_pandas_writes_them(tmp_path: Path, yes: Any, no: Any) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text("\n".join(map(json.dumps, [rated("p", " a", no), rated("p", " b", yes)])))
    ((pair,), _) = read_pairs([str(file)])
    assert (pair.chosen, pair.rejected) == (" b", " a")


def test_a_bad_pair_of_rated_rows_counts_both(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    rows = [rated("p", " a", True), rated("p", " a", False)]
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match="no row can be used: 2 of 2") as caught:
        read_pairs([str(file)], on_bad_rows="drop")
    assert ":1: chosen and rejected are the same" in str(caught.value)
    assert ":2: the row that it is paired with is bad (got line 1)" in str(caught.value)


def test_rated_rows_of_two_behaviors_are_no_pair(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    rows = [rated("p", " a", True, kind="one"), rated("p", " b", False, kind="two"),
            rated("p", " c", False, kind="one")]  # fmt: skip
    file.write_text("\n".join(map(json.dumps, rows)))
    pairs, bad = read_pairs([str(file)], behavior_column="kind", on_bad_rows="drop")
    assert [(p.chosen, p.rejected, p.behavior) for p in pairs] == [(" a", " c", "one")]
    assert [row.line for row in bad] == [2]


# ------------------------------------------------------------------------ ids


def test_pair_ids_of_conversations(tmp_path: Path) -> None:
    row = {"prompt": [ASK], "chosen": [GOOD], "rejected": [POOR]}
    plain = one(tmp_path, row)
    turned = one(tmp_path, {**row, "chosen": [dict(reversed(GOOD.items()))]})
    assert turned.pair_id == plain.pair_id  # the order of names in an object says nothing
    changed = [
        one(tmp_path, {**row, **more}).pair_id
        for more in (
            {"tools": [{"name": "f"}]},
            {"chat_template_kwargs": {"enable_thinking": False}},
            {"prompt": [system("Be brief."), ASK]},
            {"chosen": [{**GOOD, "name": "Ann"}]},
            {"rejected": [GOOD], "chosen": [POOR]},
        )
    ]
    assert len({plain.pair_id, *changed}) == 6
    assert plain.pair_id == 472338077886184255  # pinned: records and caches are keyed by it


def test_flipping_a_conversation_keeps_its_id(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps({"chosen": [ASK, GOOD], "rejected": [ASK, POOR]}))
    (straight,), _ = read_pairs([str(file)])
    (flipped,), _ = read_pairs([str(file)], flip_behaviors=["x"])
    assert sides(flipped) == ((ASK,), (POOR,), (GOOD,))
    assert flipped.pair_id == straight.pair_id and flipped.flipped


def test_shapes_have_names_and_the_specific_ones_come_first() -> None:
    for i, shape in enumerate(SHAPES):
        for later in SHAPES[i + 1 :]:
            assert not set(shape.columns) < set(later.columns), (shape, later)
    assert conversation((ASK,), "a", "b")[1] == (assistant("a"),)


def test_the_message_of_known_shapes_names_every_column() -> None:
    for shape in SHAPES:
        for column in shape.columns:
            assert column.removesuffix("_response") in KNOWN_SHAPES, column
