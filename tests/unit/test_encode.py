"""Ids word by word against whole texts, for tokenizers to which the proof applies and others."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, pre_tokenizers

from fastpref.data.encode import CUT, PATTERNS, CannotEncode, Encoder, backend_of, works_by_words

Spec = dict[str, Any]

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GPT2_STEP = BYTES | {"use_regex": True}
BOS = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "<|pad|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "<|end|>", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {
        "<|end|>": {"id": "<|end|>", "ids": [0], "tokens": ["<|end|>"]},
        "<|pad|>": {"id": "<|pad|>", "ids": [1], "tokens": ["<|pad|>"]},
    },
}


def split_step(pattern: str, behavior: str = "Isolated", invert: bool = False) -> Spec:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}


def sequence(key: str, *steps: Spec) -> Spec:
    return {"type": "Sequence", key: list(steps)}


def added(content: str, **flags: bool) -> Spec:
    rule = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": 600, "content": content, "special": True, **rule, **flags}


@pytest.fixture(scope="module")
def spec(tiny_tokenizer: Any) -> Spec:
    found: Spec = json.loads(tiny_tokenizer.backend_tokenizer.to_str())
    return found


def variants(spec: Spec) -> dict[str, Spec]:
    """Tokenizers as in use today, all with the vocabulary of ``spec``."""
    kinds: dict[str, Spec] = {"gpt2": {"pre_tokenizer": GPT2_STEP}}
    for n, pattern in enumerate(sorted(PATTERNS)):
        step = split_step(pattern) if n % 2 else split_step(pattern, "Removed", True)
        kinds[f"split {n}"] = {"pre_tokenizer": sequence("pretokenizers", step, BYTES)}
    kinds["digits"] = {
        "pre_tokenizer": sequence(
            "pretokenizers", {"type": "Digits", "individual_digits": True}, GPT2_STEP
        )
    }
    kinds["nfc"] = kinds["split 1"] | {"normalizer": {"type": "NFC"}}
    kinds["bos"] = kinds["split 1"] | {"post_processor": sequence("processors", BYTES, BOS)}
    spaces = [added("   ", normalized=True), added(" lead") | {"id": 601}]
    kinds["spaces"] = {"pre_tokenizer": GPT2_STEP, "added_tokens": [*spec["added_tokens"], *spaces]}
    return {name: copy.deepcopy(spec) | changes for name, changes in kinds.items()}


def built(spec: Spec) -> Any:
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(json.dumps(spec))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


@pytest.fixture(scope="module")
def encoders(spec: Spec) -> dict[str, Encoder]:
    return {name: Encoder(built(changed)) for name, changed in variants(spec).items()}


# Pieces of which texts are made that strain the rules: white space of every kind, runs of it,
# contractions, digits, marks that compose, special tokens inside words and at spaces.
SPACE = [" ", " ", " ", "  ", "   ", "\n", "\r\n", "\t", "\u00a0", "\u2028", "\x85", "\x1c"]
WORDS = [
    "a",
    "Ab",
    "like",
    "don't",
    "'s",
    "'",
    "\u2019ve",
    "lead",
    " lead",
    "_",
    ".",
    "!?",
    "/",
    "{",
]
DIGITS = ["12", "3456", "\u0663", "~"]
MARKS = [
    "\u00e9",
    "e\u0301",
    "\u0301",
    "\u212a",
    "\u037e",
    "\u00f9\u0323",
    "\u4f60",
    "\U0001f642",
    "\u200b",
]
PIECES = [*SPACE, *WORDS, *DIGITS, *MARKS, "<|end|>", "<|pad|>"]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)


@settings(deadline=None, max_examples=150)
@given(prompt=TEXTS, first=TEXTS, second=TEXTS, special=st.booleans())
def test_by_words_is_whole(
    encoders: dict[str, Encoder], prompt: str, first: str, second: str, special: bool
) -> None:
    for name, encoder in encoders.items():
        assert encoder.by_words, name
        texts = (prompt, prompt + first, prompt + second)
        (halves,) = encoder.triples([texts], [special])
        for text, tail in zip(texts, halves[1:], strict=True):
            whole = encoder.tokenizer(text, add_special_tokens=special)["input_ids"]
            assert halves.head + tail == whole, (name, text)


@settings(deadline=None, max_examples=150)
@given(TEXTS)
def test_the_expressions_end_a_match_at_every_cut(text: str) -> None:
    pieces = CUT.split(text)
    for pattern in PATTERNS:
        step = pre_tokenizers.Split(Regex(pattern), "isolated")
        apart = [word for piece in pieces for word, _ in step.pre_tokenize_str(piece)]
        assert apart == [word for word, _ in step.pre_tokenize_str(text)]


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
UNFIT: dict[str, Spec] = {
    "lower case": {"normalizer": {"type": "Lowercase"}},
    "words of sentencepiece": {"pre_tokenizer": METASPACE},
    "no words": {"pre_tokenizer": BYTES},
    "prefix space": {"pre_tokenizer": GPT2_STEP | {"add_prefix_space": True}},
    "another expression": {
        "pre_tokenizer": sequence("pretokenizers", split_step(r"\w+ \w+"), BYTES)
    },
    "words thrown away": {
        "pre_tokenizer": sequence("pretokenizers", split_step(min(PATTERNS), "Removed"), BYTES)
    },
    "an added token with a space": {"added_tokens": [added("ic and")]},
    "an added token that ends in a space": {"added_tokens": [added("ike ")]},
    "an added token that takes spaces": {"added_tokens": [added("ike", rstrip=True)]},
    "an added token that looks around": {"added_tokens": [added(" l", single_word=True)]},
    "specials without a template": {
        "post_processor": {"type": "BertProcessing", "sep": ["<|end|>", 0], "cls": ["<|pad|>", 1]}
    },
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_other_tokenizers_get_whole_texts(spec: Spec, name: str) -> None:
    changed = copy.deepcopy(spec) | UNFIT[name]
    if "added_tokens" in UNFIT[name]:
        changed["added_tokens"] = [*spec["added_tokens"], *UNFIT[name]["added_tokens"]]
    assert works_by_words(spec) and not works_by_words(changed)
    encoder = Encoder(built(changed))
    assert not encoder.by_words
    text = "I like music and art.\n\nHuman: I like  the rain"
    (halves,) = encoder.triples([("I like", text, "I like it")], [True])
    assert halves.head + halves.first == encoder.tokenizer(text)["input_ids"]
    assert halves.head + halves.prompt == encoder.tokenizer("I like")["input_ids"]


@pytest.mark.parametrize(
    "name", ["an added token with a space", "an added token that takes spaces", "no words"]
)
def test_the_conditions_are_needed(spec: Spec, name: str) -> None:
    """Without them ids would be wrong: the same tokenizers, taken to work by words."""
    changed = copy.deepcopy(spec) | UNFIT[name]
    if "added_tokens" in UNFIT[name]:
        changed["added_tokens"] = [*spec["added_tokens"], *UNFIT[name]["added_tokens"]]
    else:  # a merge across the space
        changed["model"]["vocab"]["eĠ"] = 600
        changed["model"]["merges"].insert(0, ["e", "Ġ"])
    encoder = Encoder(built(changed))
    encoder.opening, encoder.closing, encoder.by_words = [], [], True
    text = "I like music and art."
    (halves,) = encoder.triples([("", text, text)], [False])
    whole = encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert halves.head + halves.first != whole


def test_texts_that_do_not_begin_with_the_prompt(spec: Spec) -> None:
    encoder = Encoder(built(spec))
    (halves,) = encoder.triples([("I like music <", "I like art", "It is so")], [False])
    assert halves.head == []
    assert halves.second == encoder.tokenizer("It is so")["input_ids"]


def test_memory_is_bounded(spec: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastpref.data.encode.KEPT_CHARACTERS", 40)
    encoder = Encoder(built(spec))
    for n in range(9):
        text = f"I like music {n} times and walks"
        (halves,) = encoder.triples([(text, text, text)], [False])
        assert halves.head + halves.first == encoder.tokenizer(text)["input_ids"]
        assert encoder.characters < 100


def test_settings_of_the_tokenizer(spec: Spec) -> None:
    """Truncation and padding of earlier calls play no part, special tokens as text do."""
    tokenizer = built(spec)
    text = "I like music.<|end|> And the rain"
    whole = tokenizer(text)["input_ids"]
    before = Encoder(tokenizer).digest()
    tokenizer.pad_token = "<|pad|>"
    tokenizer(["I like music", "I"], truncation=True, max_length=2, padding=True)
    assert Encoder(tokenizer).digest() == before
    (halves,) = Encoder(tokenizer).triples([(text, text, text)], [True])
    assert halves.head + halves.first == whole
    tokenizer.split_special_tokens = True
    encoder = Encoder(tokenizer)
    assert encoder.digest() != before
    (halves,) = encoder.triples([(text, text, text)], [True])
    assert halves.head + halves.first == tokenizer(text)["input_ids"] != whole


def test_tokenizers_in_python(tmp_path: Any) -> None:
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    assert backend_of(tokenizer) is None
    encoder = Encoder(tokenizer)
    (halves,) = encoder.triples([("I like", "I like art", "I like it")], [True])
    assert halves.first == tokenizer("I like art")["input_ids"] and halves.head == []
    other = ByT5Tokenizer(extra_ids=3)
    assert Encoder(ByT5Tokenizer()).digest() == encoder.digest() != Encoder(other).digest()


def test_a_tokenizer_that_fails_says_so(spec: Spec) -> None:
    changed = copy.deepcopy(spec)
    changed["model"] = {"type": "WordLevel", "vocab": {"I": 0}, "unk_token": "absent"}
    changed["pre_tokenizer"] = {"type": "Whitespace"}
    encoder = Encoder(built(changed))
    with pytest.raises(CannotEncode, match="absent|unk|UNK"):
        encoder.triples([("I", "I like", "I I")], [False])
