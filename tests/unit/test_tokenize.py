"""Token ids against TRL's own preprocessing: `DPOTrainer._prepare_dataset` and its collator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref.data.badrows import Unusable
from fastpref.data.coder import CHUNK
from fastpref.data.formats import Pair, read_pairs
from fastpref.data.pack import pack_pairs
from fastpref.data.tokenize import TRUNCATION_MODES, Limit, Tokenized, tokenize_pairs

END = "<|end|>"


def pair(prompt: str, chosen: str, rejected: str, pair_id: int = 0, behavior: str = "b") -> Pair:
    return Pair(prompt, chosen, rejected, "", behavior, "", False, "f.jsonl", pair_id + 1, pair_id)


@pytest.fixture(scope="module")
def bos_tokenizer(tiny_tokenizer: Any) -> Any:
    """The tiny tokenizer, but every text begins with "<|pad|>" as its BOS."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str())
    special = [("<|pad|>", tiny_tokenizer.pad_token_id)]
    backend.post_processor = TemplateProcessing(single="<|pad|> $A", special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|pad|>", eos_token=END, pad_token="<|pad|>"
    )


def trl_rows(pairs: Sequence[Pair], tokenizer: Any, max_length: int) -> dict[int, dict[str, Any]]:
    """TRL's rows by index of the pair, after its filter; `max_length` is not yet applied."""
    datasets = pytest.importorskip("datasets")
    trl = pytest.importorskip("trl")
    rows = [
        {"index": i, "prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected}
        for i, p in enumerate(pairs)
    ]
    args = SimpleNamespace(dataset_num_proc=None, max_length=max_length)
    args.truncation_mode = "keep_start"
    datasets.disable_progress_bars()
    prepared = trl.DPOTrainer._prepare_dataset(
        SimpleNamespace(_tokenizer=tokenizer),
        datasets.Dataset.from_list(rows),
        tokenizer,
        args,
        "train",
    )
    return {row["index"]: row for row in prepared}


def assert_equal_to_trl(pairs: Sequence[Pair], tokenizer: Any, max_length: int) -> int:
    """Compare every pair; returns how many were kept."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    collate = DataCollatorForPreference(tokenizer.pad_token_id, max_length)
    expected = trl_rows(pairs, tokenizer, max_length)
    got = tokenize_pairs(
        pairs, tokenizer, max_length=max_length, append_eos="auto", on_bad_rows="drop"
    )
    # TRL keeps, and trains on, pairs without a signal; all it drops are prompts too long.
    dropped = {row.line - 1: row.reason for row in got.bad}
    for index in range(len(pairs)):
        assert (index in expected) != (dropped.get(index) == "the prompt fills max_length")
    for source, tokens in zip(got.sources, got.pairs, strict=True):
        row = expected[source]
        room = max_length - len(row["prompt_ids"])
        assert tokens.pair_id == pairs[source].pair_id
        assert tokens.prompt.tolist() == row["prompt_ids"]
        assert tokens.chosen.tolist() == row["chosen_ids"][:room]
        assert tokens.rejected.tolist() == row["rejected_ids"][:room]
        cut = [n for n in ("chosen", "rejected") if len(row[f"{n}_ids"]) > room]
        assert list(tokens.truncated) == cut
        batch = collate([row])
        for k, completion in enumerate((tokens.chosen, tokens.rejected)):
            fed = batch["input_ids"][k][batch["attention_mask"][k] == 1]
            mask = batch["completion_mask"][k][batch["attention_mask"][k] == 1]
            assert fed.tolist() == [*tokens.prompt, *completion]
            assert int(mask.sum()) == len(completion)
    assert got.truncated == Counter(kind for p in got.pairs for kind in p.truncated)
    return len(got.pairs)


def synthetic() -> list[Pair]:
    texts = [
        ("I like music.", " Yes", " No"),
        ("I like mus", "ic and art.", "eums."),  # the prompt's end merges with the completions
        ("I like mus", "ic and art.", " or not."),  # with one of them only
        ("I like", f" art.{END}", " rain."),  # EOS is there already
        ("", " Yes, it is raining.", " No, it is raining."),  # an empty prompt
        ("Would you say", " honest talk", " honest talk."),  # one is the start of the other
        ("Tail space ", "word", "other"),
        ("Ünïcode 🙂", " 🙂🙂", " é"),
        (f"A prompt with {END} inside.", " Yes", " No"),
        ("word " * 60, " Yes", " No"),  # too long for the small max_length
        ("I like", " long walks" * 30, " the rain" * 30),  # truncated
    ]
    return [pair(*text, pair_id=i) for i, text in enumerate(texts)]


@pytest.mark.parametrize("max_length", [1024, 48])
@pytest.mark.parametrize("which", ["tiny_tokenizer", "bos_tokenizer"])
def test_synthetic_pairs_equal_trl(
    request: pytest.FixtureRequest, which: str, max_length: int
) -> None:
    kept = assert_equal_to_trl(synthetic(), request.getfixturevalue(which), max_length)
    assert kept == (11 if max_length == 1024 else 10)


def renumbered(pairs: Sequence[Pair]) -> list[Pair]:
    """The same texts with line = index + 1, by which `assert_equal_to_trl` knows them."""
    return [pair(p.prompt, p.chosen, p.rejected, pair_id=i) for i, p in enumerate(pairs)]


def test_persona_equals_trl(persona_dir: Path, tiny_tokenizer: Any) -> None:
    pairs, _ = read_pairs([str(persona_dir)])
    assert assert_equal_to_trl(renumbered(pairs[::60]), tiny_tokenizer, 1024) == 400


@pytest.mark.parametrize("which", ["tiny_tokenizer", "bos_tokenizer"])
def test_hh_equals_trl(hh_file: Path, request: pytest.FixtureRequest, which: str) -> None:
    pairs, _ = read_pairs([str(hh_file)], on_bad_rows="drop")
    part = renumbered(pairs[::8])
    kept = assert_equal_to_trl(part, request.getfixturevalue(which), 300)
    assert 0 < kept < len(part)  # some prompts are too long


# ------------------------------------------------------------------------------------ our rules


def test_persona_answer_is_one_token_and_the_eos(tiny_tokenizer: Any) -> None:
    got = tokenize_pairs([pair("Hi.", " Yes", " No")], tiny_tokenizer, max_length=64)
    yes, no, end = (tiny_tokenizer.convert_tokens_to_ids(t) for t in ("ĠYes", "ĠNo", END))
    assert got.pairs[0].chosen.tolist() == [yes, end]
    assert got.pairs[0].rejected.tolist() == [no, end]
    assert got.pairs[0].prompt.dtype == np.int32


@pytest.mark.parametrize(
    ("append_eos", "ends"), [("auto", [1, 1]), ("true", [1, 1]), ("false", [0, 1])]
)
def test_append_eos(tiny_tokenizer: Any, append_eos: str, ends: list[int]) -> None:
    got = tokenize_pairs(
        [pair("Hi.", " Yes", f" No{END}")], tiny_tokenizer, max_length=64, append_eos=append_eos
    )
    eos = tiny_tokenizer.eos_token_id
    assert [(ids == eos).sum() for ids in (got.pairs[0].chosen, got.pairs[0].rejected)] == ends


def test_bad_settings(tiny_tokenizer: Any) -> None:
    pairs = [pair("Hi.", " Yes", " No")]
    with pytest.raises(ValueError, match="max_length is at least 2"):
        tokenize_pairs(pairs, tiny_tokenizer, max_length=1)
    with pytest.raises(ValueError, match="append_eos is 'auto', 'true' or 'false', got 'yes'"):
        tokenize_pairs(pairs, tiny_tokenizer, max_length=8, append_eos="yes")
    with pytest.raises(ValueError, match="has no eos_token"):
        tokenize_pairs(pairs, SimpleNamespace(eos_token=None), max_length=8)


def test_bad_rows_of_the_tokens(tiny_tokenizer: Any) -> None:
    start = " the rain" * 20
    prompt_len = len(tiny_tokenizer("I like")["input_ids"])
    bad = {
        1: (pair("I like" * 20, " Yes", " No", 1), "the prompt fills max_length"),
        2: (pair("I like", start + " a", start + " b", 2), "the same tokens once truncated"),
        3: (pair("I like", " Yes", f" Yes{END}", 3), "chosen and rejected are the same tokens"),
        # Alone in its sequence, a token has nothing before it that could predict it.
        4: (pair("", END, " Yes", 4), "the chosen completion has no token to score"),
    }
    pairs = [pair("I like", " Yes", " No", 0), *(row for row, _ in bad.values())]
    got = tokenize_pairs(pairs, tiny_tokenizer, max_length=prompt_len + 8, on_bad_rows="drop")
    assert got.sources == [0]
    assert [row.line - 1 for row in got.bad] == list(bad)
    for row in got.bad:
        assert bad[row.line - 1][1] in row.reason
    with pytest.raises(ValueError, match="4 of 5 rows are bad") as caught:
        tokenize_pairs(pairs, tiny_tokenizer, max_length=prompt_len + 8)
    assert "f.jsonl:2: the prompt fills max_length" in str(caught.value)
    with pytest.raises(ValueError, match="no row can be used"):
        tokenize_pairs(pairs[1:], tiny_tokenizer, max_length=prompt_len + 8, on_bad_rows="drop")


def test_prompt_limit_is_exact(tiny_tokenizer: Any) -> None:
    row = pair("I like music.", " Yes", " No")
    prompt_len = len(tiny_tokenizer(row.prompt)["input_ids"])
    got = tokenize_pairs([row], tiny_tokenizer, max_length=prompt_len + 1)
    assert len(got.pairs[0].chosen) == 1
    assert got.pairs[0].truncated == ("chosen", "rejected")
    with pytest.raises(ValueError, match=f"{prompt_len} tokens, max_length {prompt_len}"):
        tokenize_pairs([row], tiny_tokenizer, max_length=prompt_len)


def test_counts_behaviors_and_chunks(tiny_tokenizer: Any) -> None:
    rows = [pair(f"I like {i}", "", "", i, behavior=f"k{i % 3}") for i in range(CHUNK + 5)]
    rows = [
        Pair(p.prompt, " Yes", " No", "", p.behavior, "Yes", False, "f", 1, p.pair_id, -1.0, -2.0)
        for p in rows
    ]
    rows[CHUNK + 1] = pair("I like mus", "ic", "eums", CHUNK + 1, behavior="k9")
    got = tokenize_pairs(rows, tiny_tokenizer, max_length=64)
    assert got.behaviors == ["k0", "k1", "k2", "k9"]
    assert got.sources == list(range(len(rows)))
    assert [t.pair_id for t in got.pairs] == [p.pair_id for p in rows]
    assert [got.behaviors[t.behavior] for t in got.pairs] == [p.behavior for p in rows]
    assert (got.retokenized, got.truncated) == (1, Counter())
    assert (got.pairs[0].label, got.pairs[0].ref_chosen, got.pairs[0].ref_rejected) == (
        "Yes",
        -1.0,
        -2.0,
    )


# ---------------------------------------------------------------------------------- truncation


def kept(prompt: str, chosen: str, rejected: str, limit: int, tokenizer: Any) -> Tokenized:
    rows = [pair(prompt, chosen, rejected)]
    given = {"truncation_mode": "keep_completion", "append_eos": "false", "on_bad_rows": "drop"}
    return tokenize_pairs(rows, tokenizer, max_length=limit, **given)  # type: ignore[arg-type]


def one_by_one(
    prompt: list[int], chosen: list[int], rejected: list[int], limit: int, bos: int | None
) -> tuple[list[int], list[int], list[int]]:
    """keep_completion as a person would do it by hand."""
    prompt, first = list(prompt), int(bool(prompt) and prompt[0] == bos)
    while len(prompt) > 1 and len(prompt) + max(len(chosen), len(rejected)) > limit:
        prompt.pop(first)
    room = limit - len(prompt)
    return prompt, chosen[:room], rejected[:room]


@settings(deadline=None, max_examples=300)
@given(
    prompt=st.lists(st.integers(0, 3), max_size=12),
    chosen=st.lists(st.integers(0, 3), max_size=9),
    rejected=st.lists(st.integers(0, 3), max_size=9),
    limit=st.integers(2, 16),
    bos=st.sampled_from([None, 0]),
    mode=st.sampled_from(TRUNCATION_MODES),
)
def test_truncation(
    prompt: list[int],
    chosen: list[int],
    rejected: list[int],
    limit: int,
    bos: int | None,
    mode: str,
) -> None:
    arrays = [np.array(ids, np.int32) for ids in (prompt, chosen, rejected)]
    room = limit - len(prompt)
    expected: tuple[list[int], ...] = (prompt, chosen[: max(room, 0)], rejected[: max(room, 0)])
    if mode == "keep_completion":
        expected = one_by_one(prompt, chosen, rejected, limit, bos)
    try:
        *got, cut = Limit(limit, mode, bos).fitted(*arrays)
    except Unusable:
        scored = [ids for ids in expected[1:] if len(ids) > (0 if prompt else 1)]
        assert len(scored) < 2 or expected[1] == expected[2]
        return
    assert [ids.tolist() for ids in got] == list(expected)
    whole = zip(("prompt", "chosen", "rejected"), (prompt, chosen, rejected), expected, strict=True)
    assert list(cut) == [name for name, before, after in whole if len(before) > len(after)]
    assert len(got[0]) + max(len(got[1]), len(got[2])) <= limit


def test_the_prompt_gives_way_first(tiny_tokenizer: Any, bos_tokenizer: Any) -> None:
    text, chosen, rejected = "word " * 20 + "I like", " long walks", " the rain in old books"
    for tokenizer, first in ((tiny_tokenizer, []), (bos_tokenizer, [bos_tokenizer.bos_token_id])):
        whole = kept(text, chosen, rejected, 999, tokenizer).pairs[0]
        longest = len(whole.rejected)
        cut = kept(text, chosen, rejected, longest + 4, tokenizer).pairs[0]
        assert cut.prompt.tolist() == [*first, *whole.prompt[-4 + len(first) :].tolist()]
        assert cut.truncated == ("prompt",)
        for name in ("chosen", "rejected"):
            assert getattr(cut, name).tolist() == getattr(whole, name).tolist()
        # A completion that leaves no room beside one token of the prompt loses its end.
        less = kept(text, chosen, rejected, longest, tokenizer)
        assert less.pairs[0].truncated == ("prompt", "rejected") and len(less.pairs[0].prompt) == 1
        assert less.truncated == Counter(prompt=1, rejected=1)


def test_unknown_truncation_mode(tiny_tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="keep_start or keep_completion, got 'keep_end'"):
        tokenize_pairs(synthetic(), tiny_tokenizer, max_length=9, truncation_mode="keep_end")


# ------------------------------------------------------------------------------------- rubbish

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)
SCRAPS = st.lists(
    st.sampled_from(["I like", " ", "art", "\n", "<|end|>", "<|pad|>", "é", "\ud800", "ics", "0"])
    | st.text(max_size=2),
    max_size=8,
).map("".join)
TURNS = st.lists(
    st.fixed_dictionaries(
        {}, optional={"role": st.sampled_from(["user", "system"]) | JSON_VALUES, "content": SCRAPS}
    )
    | JSON_VALUES,
    max_size=3,
).map(tuple)
NAMES = st.sampled_from(["x", "tokenize", "tools", "documents"])
TEMPLATES = [
    "{% for m in messages %}{{ m.role }}{{ m['content'] }}{{ eos_token }}{% endfor %}",
    "{{ messages[0].content + messages[-1].content * 2 }}{{ tools | tojson }}{{ 1 / x }}",
    "{% for m in messages %}{{ m.role }}{% endfor %}{% if add_generation_prompt %}?{% endif %}",
]


@pytest.fixture(scope="module")
def tokenizers(tiny_tokenizer: Any, bos_tokenizer: Any) -> list[Any]:
    """By words, with BOS, whole texts, in Python, and one that knows three words only."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

    whole = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token=END, bos_token="<|pad|>"
    )
    whole.add_tokens([AddedToken("ics", rstrip=True)])
    few = Tokenizer(models.WordLevel({"I": 0, "like": 1, "art": 2, "[?]": 3}, unk_token="[!]"))
    few.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=few, eos_token="art")
    return [tiny_tokenizer, bos_tokenizer, whole, ByT5Tokenizer(), made]


@settings(deadline=None, max_examples=150)
@given(
    texts=st.lists(st.tuples(SCRAPS, SCRAPS, SCRAPS), max_size=4),
    chats=st.lists(
        st.tuples(TURNS, TURNS, TURNS, st.none() | st.lists(JSON_VALUES, max_size=2).map(tuple),
                  st.none() | st.dictionaries(NAMES, JSON_VALUES)),
        max_size=4,
    ),
    template=st.sampled_from(TEMPLATES),
    which=st.integers(0, 4),
    limit=st.integers(0, 20),
    mode=st.sampled_from(TRUNCATION_MODES),
    rule=st.sampled_from(["auto", "true", "false"]),
)  # fmt: skip
def test_rubbish_is_a_value_error_or_a_batch(
    tokenizers: list[Any], texts: Any, chats: Any, template: str, which: int, **options: Any
) -> None:
    tokenizer = tokenizers[which]
    before = tokenizer.chat_template
    tokenizer.chat_template = template
    pairs = [pair(*text, pair_id=n) for n, text in enumerate(texts)]
    for n, (*parts, tools, variables) in enumerate(chats, len(pairs)):
        more = {"tools": tools, "template_kwargs": variables}
        pairs.append(replace(pair(*parts, pair_id=n), **more))
    try:
        got = tokenize_pairs(
            pairs,
            tokenizer,
            max_length=options["limit"],
            truncation_mode=options["mode"],
            append_eos=options["rule"],
            on_bad_rows="drop",
        )
    except ValueError as error:
        assert str(error)
        return
    finally:
        tokenizer.chat_template = before
    assert len(got.pairs) + len(got.bad) == len(pairs)
    for tokens in got.pairs:
        assert (
            len(tokens.prompt) + max(len(tokens.chosen), len(tokens.rejected)) <= options["limit"]
        )
    if got.pairs:
        pack_pairs(got.pairs).check(len(tokenizer))
