"""Conversations: token ids against TRL's own, templates from every source, faults as bad rows."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastpref.data.chat import asks_for_date, dated, read_template
from fastpref.data.formats import Message, Pair
from fastpref.data.tokenize import tokenize_pairs

CHATML = """\
{%- if tools %}<|system|>You may call: {{ tools | tojson }}<|end|>
{% endif %}
{%- for m in messages %}<|{{ m.role }}|>
{%- if m.tool_calls %}{% for call in m.tool_calls %}[{{ call.function.name }} {{ call.function.arguments | tojson }}]{% endfor %}{% endif %}
{{- m.content | trim if m.content is defined }}<|end|>
{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{{ '' if thinking | default(true) else '[no thoughts]' }}{% endif %}"""  # noqa: E501
LLAMA = """\
{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}
{{- '<|head|>' + m['role'] + '<|/head|>\n\n' + m['content'] + '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}"""

TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds numbers",
            "parameters": {"type": "object", "properties": {"b": {"type": "integer"}, "a": {}}},
        },
    },
)


def says(*turns: tuple[str, str]) -> tuple[Message, ...]:
    return tuple({"role": role, "content": content} for role, content in turns)


def chat(
    prompt: tuple[Message, ...],
    chosen: tuple[Message, ...] | str,
    rejected: tuple[Message, ...] | str,
    number: int = 0,
    **more: Any,
) -> Pair:
    both = (says(("assistant", c)) if isinstance(c, str) else c for c in (chosen, rejected))
    place = ("", "b", "", False, "chats.jsonl", number + 1, number)
    return Pair(prompt, *both, *place, **more)  # type: ignore[arg-type]


CALL = {"type": "function", "function": {"name": "add", "arguments": {"b": 1, "a": 2}}}
ASKS = says(("user", "Two and two? "))
CHATS = [
    chat(ASKS, " Four.", "Five is it."),
    chat(says(("system", "Be kind."), ("user", "Hi")), "Hello <|end|> there", "What"),
    chat(says(("user", "I like"), ("assistant", "art"), ("user", "And?")), "the rain", "the reins"),
    chat(ASKS, "4", "5", tools=TOOLS),
    chat(ASKS, "4", "5", tools=()),
    chat(ASKS, "<think>\nhm\n</think>\n\n4", "5", template_kwargs={"thinking": False}),
    chat(ASKS, "4", "5", tools=TOOLS, template_kwargs={"enable_thinking": False}),
    # Several turns of completion, a tool's answer among them; a message without content.
    chat(
        ASKS,
        ({"role": "assistant", "content": None, "tool_calls": [CALL]}, *says(("tool", "4"))),
        says(("assistant", "x"), ("user", "no"), ("assistant", "y")),
        tools=TOOLS,
    ),
    chat(
        says(("user", "Go on"), ("assistant", "With a start")), "d e f", "d g"
    ),  # a prefilled turn
    chat(says(("user", "long " * 40)), "4 " * 30, "5 " * 40),
]


class Rows(list[dict[str, Any]]):
    """Of a data set, what TRL's preparation uses; messages keep the keys they have."""

    def map(self, function: Callable[..., Any], fn_kwargs: Any = None, **_: Any) -> Rows:
        given = fn_kwargs or {}
        return Rows([{**row, **function(dict(row), **given)} for row in self])

    def filter(self, keeps: Callable[[Any], bool], **_: Any) -> Rows:
        return Rows([row for row in self if keeps(row)])


def trl_ids(pair: Pair, tokenizer: Any, max_length: int = 10**6) -> tuple[list[int], ...] | None:
    """Prompt, chosen and rejected ids by TRL's trainer and collator; None where it drops them."""
    trl = pytest.importorskip("trl")
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    row = {
        "prompt": list(pair.prompt),
        "chosen": list(pair.chosen),
        "rejected": list(pair.rejected),
        "tools": None if pair.tools is None else list(pair.tools),
        "chat_template_kwargs": pair.template_kwargs or {},
    }
    args = SimpleNamespace(dataset_num_proc=None, max_length=max_length)
    args.truncation_mode = "keep_start"
    own = SimpleNamespace(_tokenizer=tokenizer)
    rows = trl.DPOTrainer._prepare_dataset(own, Rows([row]), tokenizer, args, "train")
    if not rows:
        return None
    batch = DataCollatorForPreference(0, max_length)(list(rows))
    own_ids = [batch["input_ids"][k][batch["completion_mask"][k] == 1].tolist() for k in range(2)]
    return rows[0]["prompt_ids"], *own_ids


def ours(
    pairs: Sequence[Pair], tokenizer: Any, max_length: int = 10**6, **more: Any
) -> dict[int, tuple[list[int], ...]]:
    got = tokenize_pairs(pairs, tokenizer, max_length=max_length, on_bad_rows="drop", **more)
    return {
        source: (t.prompt.tolist(), t.chosen.tolist(), t.rejected.tolist())
        for source, t in zip(got.sources, got.pairs, strict=True)
    }


@pytest.fixture
def tokenizer(tiny_tokenizer: Any) -> Any:
    """The tiny tokenizer, its own copy: tests give it templates."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer.backend_tokenizer,
        bos_token="<|pad|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
    )


@pytest.mark.parametrize("max_length", [10**6, 90])
@pytest.mark.parametrize("template", [CHATML, LLAMA], ids=["chatml", "llama"])
def test_equal_to_trl(tokenizer: Any, template: str, max_length: int) -> None:
    tokenizer.chat_template = template
    got = ours(CHATS, tokenizer, max_length)
    assert len(got) >= 5
    for n, pair in enumerate(CHATS):
        if n in got:
            assert got[n] == trl_ids(pair, tokenizer, max_length), n
        elif max_length == 10**6:  # a template that refuses is an error with TRL
            with pytest.raises(Exception, match="no system here|has no attribute 'content'"):
                trl_ids(pair, tokenizer, max_length)


TRL_TEMPLATES = ["gemma3", "gptoss", "llama3", "llama3_2", "phi3", "qwen2_5", "qwen3", "deepseekv3"]


@pytest.mark.parametrize("name", TRL_TEMPLATES)
def test_templates_in_use_equal_trl(tokenizer: Any, name: str) -> None:
    trl = pytest.importorskip("trl")
    file = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    tokenizer.chat_template = read_template(str(file))
    pairs = CHATS[:3] + CHATS[5:6] + CHATS[8:9]
    got = ours(pairs, tokenizer)
    assert len(got) >= 3
    for n, ids in got.items():
        assert ids == trl_ids(pairs[n], tokenizer)


def test_the_eos_is_the_templates_affair_unless_asked_for(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML
    auto, true, false = (
        ours(CHATS[:1], tokenizer, append_eos=rule)[0] for rule in ("auto", "true", "false")
    )
    assert auto == false
    assert true == (auto[0], [*auto[1], 0], [*auto[2], 0])  # behind the template's newline
    tokenizer.chat_template = LLAMA  # ends with it already
    assert ours(CHATS[:1], tokenizer, append_eos="true") == ours(CHATS[:1], tokenizer)


def test_a_prompt_that_is_rendered_differently_by_itself_is_counted(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML
    pair = chat(ASKS, "4", "5", template_kwargs={"thinking": False})
    got = tokenize_pairs([pair, CHATS[0]], tokenizer, max_length=999)
    assert got.retokenized == 1


def test_strings_and_conversations_in_one_run(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML
    text = Pair("I like", " art", " rain", "", "b", "", False, "f.jsonl", 9, 99)
    got = ours([CHATS[0], text, CHATS[3]], tokenizer)
    assert got[1][1] == tokenizer(" art<|end|>")["input_ids"]
    assert got[0] == ours([CHATS[0]], tokenizer)[0] and got[2] == ours([CHATS[3]], tokenizer)[0]


# ------------------------------------------------------------------------------- what goes wrong


def test_faults_of_the_template_are_bad_rows(tokenizer: Any) -> None:
    tokenizer.chat_template = LLAMA
    bad = {
        1: (chat(says(("system", "-"), ("user", "Hi")), "a", "b", 1), "TemplateError: no system"),
        2: (chat(({"role": "user"},), "a", "b", 2), "UndefinedError: 'dict object' has no"),
        3: (chat(says(("user", 7)), "a", "b", 3), "TypeError"),  # type: ignore[arg-type]
        4: (chat((), "a", "b", 4), "ValueError: Cannot apply chat template to an empty"),
        5: (chat(ASKS, "a", "b", 5, template_kwargs={"truncation": True}), "'truncation'"),
        6: (chat(ASKS, "a\ud800", "b", 6), "'\\ud800' at character"),
        7: (chat(ASKS, "a", "b", 7, tools=("not a tool",)), "ValueError: Tools should"),  # type: ignore[arg-type]
    }
    pairs = [CHATS[0], *(pair for pair, _ in bad.values())]
    got = tokenize_pairs(pairs, tokenizer, max_length=999, on_bad_rows="drop")
    assert got.sources == [0]
    assert [row.line for row in got.bad] == [n + 1 for n in bad]
    for row in got.bad:
        assert bad[row.line - 1][1] in row.value, row
    reasons = [row.reason for row in got.bad]
    assert reasons[0] == "the chat template fails on the prompt"
    assert reasons[4].startswith("chat_template_kwargs holds an argument of transformers")
    with pytest.raises(ValueError, match=r"chats.jsonl:2: the chat template fails .* no system"):
        tokenize_pairs(pairs, tokenizer, max_length=999)


def test_a_tokenizer_without_a_template(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="no chat template. Set chat_template to a Jinja file"):
        ours(CHATS[:1], tokenizer)
    text = Pair("I like", " art", " rain", "", "b", "", False, "f.jsonl", 9, 99)
    assert ours([text], tokenizer)  # which asks for none


def test_an_error_of_syntax_is_the_templates(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ bos_token }}\n{% for m in messages %}{{ m.content }}"
    with pytest.raises(ValueError, match="not valid Jinja: line 2: .*endfor.* set chat_template"):
        ours(CHATS[:1], tokenizer)


def test_several_templates(tokenizer: Any) -> None:
    tokenizer.chat_template = {"default": LLAMA, "tool_use": CHATML}
    pairs = [CHATS[0], CHATS[3]]
    got = ours(pairs, tokenizer)
    assert [got[n] for n in (0, 1)] == [trl_ids(pair, tokenizer) for pair in pairs]
    tokenizer.chat_template = LLAMA
    assert ours(pairs, tokenizer)[0] == got[0] and ours(pairs, tokenizer)[1] != got[1]
    none = dataclasses.replace(CHATS[0], tools=())  # an empty list of tools is no missing one
    tokenizer.chat_template = {"default": LLAMA, "tool_use": CHATML}
    assert ours([none], tokenizer)[none.pair_id] == trl_ids(none, tokenizer) != got[0]
    tokenizer.chat_template = {"rag": LLAMA}
    with pytest.raises(ValueError, match=r"none called 'default' \(rag\)"):
        ours(pairs, tokenizer)


def test_where_a_template_comes_from(tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(CHATML, encoding="utf-8")
    assert read_template(str(file)) == CHATML == read_template(CHATML)
    with pytest.raises(ValueError, match="'absent.jinja' is no file, and as a template"):
        read_template("absent.jinja")
    file.write_bytes(b"\xff{{ x }}")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_template(str(file))


# ------------------------------------------------------------------------------------- the date


def test_the_date_is_the_runs(tokenizer: Any) -> None:
    tokenizer.chat_template = '{{ strftime_now("%d %b %Y") if strftime_now is defined }}' + LLAMA
    assert asks_for_date(tokenizer)
    day, other = datetime.date(2024, 2, 29), datetime.date(2024, 3, 1)
    before, after = (ours(CHATS[:1], tokenizer, day=d)[0] for d in (day, other))
    assert before[0] != after[0] and before[1:] == after[1:]
    assert (
        before[0][: len(tokenizer("29 Feb 2024")["input_ids"])]
        == (tokenizer("29 Feb 2024")["input_ids"])
    )
    assert ours(CHATS[:1], tokenizer)[0] == trl_ids(CHATS[0], tokenizer)  # today
    tokenizer.chat_template = LLAMA
    assert not asks_for_date(tokenizer)


@pytest.mark.parametrize("call", ["strftime_now('%Y')", 'strftime_now( format = "%Y" )'])
def test_calls_for_the_date(call: str) -> None:
    assert dated("a {{ " + call + " }} b", datetime.date(1999, 1, 2)) == 'a {{ "1999" }} b'
