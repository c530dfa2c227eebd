"""The cache of token ids: what its key holds and what not, and files that are not whole."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import json
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from fastpref.data import tokencache
from fastpref.data.coder import Coder, row_digest, row_of
from fastpref.data.formats import Pair
from fastpref.data.tokencache import cache_key
from fastpref.data.tokenize import Tokenized, tokenize_pairs

DAY = datetime.date(2024, 2, 29)
TEMPLATE = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def pair(n: int, **changes: Any) -> Pair:
    own = Pair(f"I like {n} walks", " Yes", " No", "", "b", "", False, "f.jsonl", n + 1, n)
    return dataclasses.replace(own, **changes)


def chat(n: int, **changes: Any) -> Pair:
    texts = (f"I like {n}", "Yes, the rain", "No art")
    turns = [({"role": "user", "content": text},) for text in texts]
    return pair(n, **dict(zip(("prompt", "chosen", "rejected"), turns, strict=True)) | changes)


@pytest.fixture
def tokenizer(tiny_tokenizer: Any) -> Any:
    return remade(tiny_tokenizer, {})


def remade(tokenizer: Any, changes: dict[str, Any]) -> Any:
    """A tokenizer like ``tokenizer`` with parts of its tokenizer.json changed."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    spec = copy.deepcopy(json.loads(tokenizer.backend_tokenizer.to_str())) | changes
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)), eos_token="<|end|>"
    )
    made.chat_template = TEMPLATE
    return made


def key(tokenizer: Any, pairs: list[Pair], append_eos: str = "auto", day: Any = DAY) -> str:
    kinds = {isinstance(p.prompt, str) for p in pairs}
    coder = Coder(tokenizer, append_eos, day, strings=True in kinds, conversations=False in kinds)
    return cache_key(coder, [row_digest(row_of(p)[0]) for p in pairs])


def test_what_changes_the_key(tokenizer: Any) -> None:
    strings, chats = [pair(n) for n in range(4)], [chat(n) for n in range(4)]
    found = {"strings": key(tokenizer, strings), "chats": key(tokenizer, chats)}
    found["both"] = key(tokenizer, strings + chats)
    found["one less"] = key(tokenizer, strings[:3])
    found["a prompt"] = key(tokenizer, [pair(0, prompt="I like 0 walk"), *strings[1:]])
    found["a completion"] = key(tokenizer, [pair(0, chosen=" Yes."), *strings[1:]])
    found["no EOS"] = key(tokenizer, strings, "false")
    found["EOS for chats"] = key(tokenizer, chats, "true")
    found["tools"] = key(tokenizer, [chat(0, tools=({"a": 1, "b": 2},)), *chats[1:]])
    found["order of a tool"] = key(tokenizer, [chat(0, tools=({"b": 2, "a": 1},)), *chats[1:]])
    found["variables"] = key(tokenizer, [chat(0, template_kwargs={"x": 1}), *chats[1:]])
    other = remade(tokenizer, {"normalizer": {"type": "NFC"}})
    found["normalizer"] = key(other, strings)
    other = remade(tokenizer, {})
    other.add_tokens(["walks"])
    found["vocabulary"] = key(other, strings)
    other = remade(tokenizer, {})
    other.split_special_tokens = True
    found["special tokens as text"] = key(other, strings)
    other = remade(tokenizer, {})
    other.chat_template = TEMPLATE + "{# same text #}"
    found["template"] = key(other, chats)
    other.chat_template = TEMPLATE
    other.bos_token = "<|pad|>"
    found["special tokens of the template"] = key(other, chats)
    other.eos_token = "<|pad|>"
    found["EOS text"] = key(other, strings)
    other.chat_template = TEMPLATE + "{{ strftime_now('%d') }}"
    found["date asked for"] = key(other, chats)
    found["another day"] = key(other, chats, day=datetime.date(2024, 3, 1))
    assert len(set(found.values())) == len(found), found


def test_what_does_not_change_the_key(tokenizer: Any) -> None:
    strings, chats = [pair(n) for n in range(4)], [chat(n) for n in range(4)]
    before = key(tokenizer, strings), key(tokenizer, chats)

    def same(strings: list[Pair], chats: list[Pair]) -> bool:
        return before == (key(tokenizer, strings), key(tokenizer, chats))

    assert same(strings[::-1], chats[2:] + chats[:2])  # their order
    assert same(strings + strings[:2], chats * 2)  # how often one comes
    apart = {"id": "x", "behavior": "c", "label": "Yes", "source": "g", "line": 7, "pair_id": 8}
    apart |= {"ref_chosen": -1.0, "ref_rejected": -2.0, "origin": 3}
    other = [dataclasses.replace(p, **apart) for p in strings + chats]
    assert same(other[:4], other[4:])
    flipped = [
        dataclasses.replace(p, chosen=p.rejected, rejected=p.chosen) for p in strings + chats
    ]
    assert same(flipped[:4], flipped[4:])
    day = datetime.date(2025, 1, 1)  # no template asks for it
    assert before == (key(tokenizer, strings, day=day), key(tokenizer, chats, day=day))
    assert before[0] == key(tokenizer, strings, "true")  # of strings the same as auto
    assert before[1] == key(tokenizer, chats, "false")  # of conversations the same as auto
    tokenizer.chat_template = None
    assert before[0] == key(tokenizer, strings)  # which have no template
    tokenizer.pad_token = "<|pad|>"
    tokenizer(["a b c", "d"], padding=True, truncation=True, max_length=2)
    assert before[0] == key(tokenizer, strings)  # nor padding


def tokens(tokenized: Tokenized) -> list[tuple[object, ...]]:
    return [
        (t.pair_id, t.prompt.tolist(), t.chosen.tolist(), t.rejected.tolist(), t.truncated)
        for t in tokenized.pairs
    ] + [(row.line, row.reason, row.value) for row in tokenized.bad]


def made(tokenizer: Any, pairs: list[Pair], folder: Path | None, **more: Any) -> list[Any]:
    given = {"max_length": 64, "on_bad_rows": "drop", **more}
    return tokens(tokenize_pairs(pairs, tokenizer, cache_dir=folder, **given))


@pytest.fixture
def pairs() -> list[Pair]:
    """All kinds, equal texts and bad rows among them."""
    some = [pair(n) for n in range(20)] + [chat(20 + n) for n in range(20)]
    some += [pair(40, prompt="I like 5 walks", chosen=" No", rejected=" Yes")]
    some += [pair(41, prompt="I like 3 walks")]
    broken = chat(42, chosen=({"role": "user"},))
    return [*some, broken, pair(43, prompt="\ud800"), pair(44, chosen=" No")]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows that are tokenised from here on, spot checks left out."""
    seen: list[int] = []
    before = Coder.ids
    monkeypatch.setattr(
        Coder, "ids", lambda self, rows: seen.append(len(rows)) or before(self, rows)
    )
    monkeypatch.setattr(tokencache, "_spot_check", lambda *_: None)
    return seen


def test_kept_ids_are_the_same(
    tokenizer: Any, pairs: list[Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = made(tokenizer, pairs, None)
    assert made(tokenizer, pairs, tmp_path) == plain
    (file,) = tmp_path.iterdir()
    assert pq.read_table(file).num_rows == 43  # 45 pairs; two have the texts of another
    seen = counted(monkeypatch)
    assert made(tokenizer, pairs, tmp_path) == plain
    # Other limits, flips and order use the same file.
    other = made(tokenizer, pairs, tmp_path, max_length=8, truncation_mode="keep_completion")
    assert other == made(tokenizer, pairs, None, max_length=8, truncation_mode="keep_completion")
    del seen[:]
    flipped = [dataclasses.replace(p, chosen=p.rejected, rejected=p.chosen) for p in pairs[::-1]]
    assert len(made(tokenizer, flipped, tmp_path)) == len(pairs)
    assert not seen and list(tmp_path.iterdir()) == [file]
    made(tokenizer, pairs[:3], tmp_path)
    assert seen == [3]


def test_no_pairs_are_kept_too(tokenizer: Any, tmp_path: Path) -> None:
    assert made(tokenizer, [], tmp_path) == made(tokenizer, [], tmp_path) == []


def test_damaged_files_are_never_believed(
    tokenizer: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tokencache, "_spot_check", lambda *_: None)  # the file itself must tell
    pairs = [pair(n) for n in range(40)]
    plain = made(tokenizer, pairs, tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    rng = random.Random(0)
    broken = [whole[:n] for n in (0, 4, len(whole) // 2, len(whole) - 1)]
    for _ in range(200):
        at = rng.randrange(len(whole))
        broken.append(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
    for content in broken:
        file.write_bytes(content)
        assert made(tokenizer, pairs, tmp_path) == plain
        assert list(tmp_path.iterdir()) == [file]
    assert caplog.text.count("is not used") > 150 and "it is made again" in caplog.text


def test_incomplete_and_foreign_files_are_made_again(
    tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = [pair(n) for n in range(40)]
    plain = made(tokenizer, pairs, tmp_path)
    (file,) = tmp_path.iterdir()
    table = pq.read_table(file)
    for changed, why in (
        (table.slice(1), "holds 39 rows, not the 40"),
        (table.drop_columns(["alone"]), "alone"),
        (table.set_column(1, "prompt", [np.full(40, 99, np.int32)]), "contradict"),
        (table.set_column(1, "prompt", [np.zeros(40, np.int32)]), "gives other ids now"),
    ):
        pq.write_table(changed, file)
        caplog.clear()
        assert made(tokenizer, pairs, tmp_path) == plain
        assert why in caplog.text
        caplog.clear()
        assert made(tokenizer, pairs, tmp_path) == plain
        assert "is not used" not in caplog.text


def test_files_of_another_format_are_let_alone(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [pair(0)]
    monkeypatch.setattr(tokencache, "FORMAT", 0)
    made(tokenizer, pairs, tmp_path)
    monkeypatch.undo()
    (old,) = tmp_path.iterdir()
    old.write_bytes(b"of an old version")
    assert made(tokenizer, pairs, tmp_path) == made(tokenizer, pairs, None)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_write_that_fails_leaves_nothing(
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    pairs = [pair(0)]
    monkeypatch.setattr(tokencache.pq, "write_table", fails)
    with caplog.at_level(logging.WARNING):
        assert made(tokenizer, pairs, tmp_path) == made(tokenizer, pairs, None)
    assert "not kept for another run" in caplog.text and "No space left" in caplog.text
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    assert made(tokenizer, pairs, tmp_path / "file" / "folder") == made(tokenizer, pairs, None)


def test_processes_of_one_number_share_a_folder(
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Containers have the same process ids: what one writes aside is not the other's."""
    write, inside = tokencache.pq.write_table, [False, True]

    def meanwhile(*given: Any, **named: Any) -> None:
        write(*given, **named)
        if inside.pop():
            made(tokenizer, [pair(0)], tmp_path)

    monkeypatch.setattr(tokencache.pq, "write_table", meanwhile)
    with caplog.at_level(logging.WARNING):
        made(tokenizer, [pair(0)], tmp_path)
    assert not inside and "not kept" not in caplog.text and len(list(tmp_path.iterdir())) == 1
