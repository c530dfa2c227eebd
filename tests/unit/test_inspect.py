from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest

from fastpref.commands import inspect


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
