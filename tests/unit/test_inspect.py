from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest

from fastpref.commands import inspect
from fastpref.data.formats import Pair


@pytest.fixture(scope="module")
def tokenizer_dir(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer.save_pretrained(folder)
    return str(folder)


def report(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    parser = argparse.ArgumentParser()
    inspect.add_arguments(parser)
    assert inspect.run(parser.parse_args(list(argv))) == 0
    return capsys.readouterr().out


def numbers(text: str, what: str) -> list[int]:
    """The numbers on the line that holds ``what``."""
    (line,) = [line for line in text.splitlines() if what in line]
    return [int(n.replace(",", "")) for n in re.findall(r"\d[\d,]*", line.replace(what, ""))]


def test_report(
    tmp_path: Path, tokenizer_dir: str, tiny_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"question": "I like music.", "answer_matching_behavior": " Yes"}
    row["answer_not_matching_behavior"] = " No"
    swapped = {**row, "answer_matching_behavior": " No", "answer_not_matching_behavior": " Yes"}
    equal = {**row, "answer_matching_behavior": " No"}
    long = {**row, "question": "the rain " * 1100}
    plain = {"prompt": "I like", "chosen": " long walks.", "rejected": " long books."}
    (tmp_path / "kind.jsonl").write_text(
        "\n".join(json.dumps(r) for r in [row, row, swapped, equal, long])
    )
    (tmp_path / f"{'x' * 80}.jsonl").write_text(json.dumps(plain) + "\n{broken")
    text = report(capsys, str(tmp_path), "--model_name_or_path", tokenizer_dir, "--seed", "3")

    assert numbers(text, "files") == [2]
    assert numbers(text, "bad rows found while reading") == [2]  # those of the text
    assert numbers(text, "identical") == [1]
    assert numbers(text, "duplicates:") == [1]
    assert numbers(text, "contradictions:") == [1]
    assert numbers(text, "kind  ") == [4, 2 + 1, 1]  # pairs, Yes (one too long), No
    assert "Bad rows (3)" in text
    for place, reason in ((4, "are the same"), (5, "fills max_length"), (2, "not JSON")):
        assert re.search(rf"line {place}: .*{reason}", text)
    assert max(map(len, text.splitlines())) <= inspect.WIDTH + len(str(tmp_path))

    # Padded: 8 rows as long as the longest. Packed: by hand, without the package's layout code.
    def count(string: str) -> int:
        return len(tiny_tokenizer(string)["input_ids"])

    rests = [count(plain["prompt"] + plain[c] + "<|end|>") for c in ("chosen", "rejected")]
    shared = count("I like long")
    packed = 3 * (count("I like music.") + 2) + shared + sum(n - shared - 1 for n in rests)
    assert numbers(text, "padded to its longest")[0] == 8 * max(
        *rests, count("I like music. Yes<|end|>")
    )
    assert numbers(text, "packed, each prefix once")[0] == packed


def test_decoded_batch_marks_scored_tokens(
    tmp_path: Path, tokenizer_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.jsonl"
    row = {"prompt": "I like\nthe rain.", "chosen": " Yes Yes No", "rejected": " Yes No"}
    file.write_text(json.dumps(row))
    text = report(capsys, str(file), "--model_name_or_path", tokenizer_dir)
    shown = [line.strip() for line in text[text.index("One packed batch") :].splitlines()]
    parts = [shown[i + 1] for i, line in enumerate(shown) if line.endswith(" fed)")]
    assert parts == [r"I like\nthe rain.[ Yes]", "[ Yes][ No][<|end|>]", "[ No][<|end|>]"]
    assert [line for line in shown if line.startswith("chosen rest")] == ["chosen rest (2 fed)"]


def test_bad_input_is_a_value_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"prompt": "p", "chosen": " a", "rejected": " b"}))
    with pytest.raises(ValueError, match="no such file"):
        report(capsys, str(tmp_path / "b.jsonl"))
    with pytest.raises(ValueError, match="model_name_or_path .* has no tokenizer"):
        report(capsys, str(file), "--model_name_or_path", str(tmp_path))
    with pytest.raises(ValueError, match="train_batch_size is at least 1"):
        report(capsys, str(file), "--train_batch_size", "0")


def test_conversations(
    tmp_path: Path,
    tiny_tokenizer: Any,
    tokenizer_dir: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Rendered by the template that is named; kinds of truncation; what is wrong with a row."""

    def says(role: str, text: str) -> tuple[dict[str, Any], ...]:
        return ({"role": role, "content": text},)

    turns = says("user", "I like the rain.") + says("assistant", "Yes") + says("user", "And art?")
    place = ("b", "", False, "chats.jsonl")
    tools = ({"name": "add"},)
    pairs = [
        Pair(turns, says("a", "Yes Yes"), says("a", "Yes No"), "", *place, 1, 1, tools=tools),
        Pair(says("robot", "-"), says("a", "x"), says("a", "y"), "", *place, 2, 2),
    ]
    monkeypatch.setattr(inspect, "read_pairs", lambda *_, **__: (pairs, []))
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'robot' %}{{ raise_exception('no robots') }}"
        "{% endif %}{{ '\n' + m.role + ': ' + m.content + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\na:' }}{% endif %}"
    )
    options = ("--model_name_or_path", tokenizer_dir, "--token_cache_dir", str(tmp_path / "tokens"))
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        report(capsys, "chats.jsonl", *options)
    options = (*options, "--chat_template", str(template))
    text = report(capsys, "chats.jsonl", *options)
    assert "line 2: the chat template fails on the prompt (got TemplateError: no robots)" in text
    shown = [line.strip() for line in text[text.index("One packed batch") :].splitlines()]
    assert (
        r"\nuser: I like the rain.<|end|>\nassistant: Yes<|end|>\nuser: And art?<|end|>\na:[ Yes]"
        in shown
    )
    assert "[ Yes][<|end|>]" in shown and "[ No][<|end|>]" in shown
    assert len(list((tmp_path / "tokens").iterdir())) == 1

    count = len(
        tiny_tokenizer("\nuser: I like the rain.<|end|>\nassistant: Yes<|end|>")["input_ids"]
    )
    cut = report(
        capsys, "chats.jsonl", *options, "--truncation_mode", "keep_completion",
        "--max_length", str(count),
    )  # fmt: skip
    assert f"1 pair lost the start of the prompt to max_length ({count} tokens)" in cut
    assert "lost the end" not in cut
