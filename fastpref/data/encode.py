"""Texts -> token ids, exactly as the tokenizer gives them, without encoding a word twice.

Most tokenizers of today cut a text into words by a regular expression and encode each word by
itself (byte-level BPE: GPT-2, Llama 3, Qwen, ...). For those a text's ids are its pieces' ids,
wherever it is cut between a printable ASCII character and a single space with another one behind
it, and the ids of a piece need to be computed once. `works_by_words` demands what the proof needs:

1. Added tokens are looked for in the whole text first. None holds a printable character followed by
   a space, none swallows spaces behind it, none asks what stands around it: so none is found across
   a cut, and those on either side are found as before.
2. The normalizer is none or NFC, and a space composes with nothing.
3. No alternative of the expression (`PATTERNS`) matches a printable ASCII character followed by a
   space, so a match ends at the cut and one begins there. They look behind nowhere, and ahead only
   from the end of white space, which a cut never follows: the matches on either side are what
   they are without the other side. Splitting digits off first changes nothing in this.
4. BPE without dropout encodes each match by itself.
5. What is added around a text (BOS, EOS) stands in a template.

Any other tokenizer gets whole texts.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

CUT = re.compile(r"(?<=[!-~])(?= [!-~])")
KEPT_CHARACTERS = 2_000_000  # of remembered pieces, some 100 MB; then they are forgotten

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_ONE_CASE = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
    r"|%s| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _SPACES
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PATTERNS = {
    GPT2,  # also what a ByteLevel step with use_regex splits by
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    + _SPACES,  # cl100k, Llama 3, OLMo 2
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    + _SPACES,  # Qwen 2 and 3
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _SPACES,  # Qwen 3.5
    _ONE_CASE % ("", "", r"\p{N}"),  # Tekken
    _ONE_CASE % (_CONTRACTION + "?", _CONTRACTION + "?", r"\p{N}{1,3}"),  # o200k, Llama 4
}
_PROBES = (
    "Two and two?  Four.\n\n It's 1234 o'clock,\tsaid\r\n e\u0301t\u00e9 (he)  \n",
    " <|x|> a </s> b <s>c  d\u212b \u1ed9\u0323 :) don't 3.14 \u4f60 \u597d\n",
)


class Halves(NamedTuple):
    """Ids of a prompt and of two texts: each is `head` and its own tail."""

    head: list[int]
    prompt: list[int]
    first: list[int]
    second: list[int]


class CannotEncode(Exception):
    """The tokenizer raised an error; the message is its own."""


class Encoder:
    """Ids of texts. ``tokenizer`` is a Hugging Face one; the fast kind works by lists and words.
    ``backend``, a `tokenizers.Tokenizer`, takes the place of its own."""

    def __init__(self, tokenizer: Any, backend: Any = None) -> None:
        self.tokenizer = tokenizer
        self.backend = backend or backend_of(tokenizer)
        self.serialized = ""
        self.by_words = False
        self.known: dict[str, list[int]] = {}  # of pieces
        self.characters = 0  # of all known pieces
        if self.backend is not None:
            self.backend.no_truncation()
            self.backend.no_padding()
            self.backend.encode_special_tokens = bool(tokenizer.split_special_tokens)
            self.serialized = self.backend.to_str()
            spec = json.loads(self.serialized)
            if works_by_words(spec):
                self.opening, self.closing = _added_around(spec) or ([], [])
                self.by_words = True
                self.by_words = all(self._agrees(text) for text in _PROBES)

    def digest(self) -> str:
        """Hex digest of the tokenizer: of its serialized form, or of the files that it saves."""
        if self.backend is not None:
            text = f"{self.serialized}{self.tokenizer.split_special_tokens}"
            return hashlib.sha256(text.encode()).hexdigest()
        digest = hashlib.sha256(f"{type(self.tokenizer)}".encode())
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer.save_pretrained(folder)
            for file in sorted(Path(folder).iterdir()):
                digest.update(f"{file.name} {file.stat().st_size}\n".encode() + file.read_bytes())
        return digest.hexdigest()

    def triples(
        self, triples: Sequence[tuple[str, str, str]], special: Sequence[bool]
    ) -> list[Halves]:
        """Ids of (prompt, first, second) texts. ``special`` says for each triple whether the tokens
        that the tokenizer adds by itself, such as BOS, are added.

        Raises CannotEncode where the tokenizer fails on one of the texts.
        """
        cut = [self._cut(*triple) for triple in triples]
        ids = {
            flag: self._ids(
                chain.from_iterable(
                    chain.from_iterable(parts)
                    for parts, own in zip(cut, special, strict=True)
                    if own == flag
                ),
                flag,
            )
            for flag in set(special)
        }
        found = []
        for parts, flag in zip(cut, special, strict=True):
            get = ids[flag].__getitem__
            head, *tails = (list(chain.from_iterable(map(get, pieces))) for pieces in parts)
            if self.by_words and flag:
                head = self.opening + head
                tails = [tail + self.closing for tail in tails]
            found.append(Halves(head, *tails))
        return found

    def _cut(self, prompt: str, first: str, second: str) -> list[list[str]]:
        """Pieces of the common head, and of the three tails."""
        if not self.by_words:
            return [[], [prompt], [first], [second]]
        *head, last = CUT.split(prompt)
        if not (first.startswith(prompt) and second.startswith(prompt)):
            return [[], [*head, last], CUT.split(first), CUT.split(second)]
        # Cuts depend on three characters: those inside the prompt are the same in every text.
        at = len(prompt)
        return [head, [last], CUT.split(last + first[at:]), CUT.split(last + second[at:])]

    def _ids(self, pieces: Iterable[str], special: bool) -> Mapping[str, list[int]]:
        """Ids of every piece; by words, without what is added around a text."""
        if not self.by_words:
            texts = list(set(pieces))
            return dict(zip(texts, self._encode(texts, special), strict=True))
        wanted = set(pieces)
        if self.characters > KEPT_CHARACTERS:
            self.known, self.characters = {}, 0
        new = list(wanted - self.known.keys())
        self.known.update(zip(new, self._encode(new, False), strict=True))
        self.characters += sum(map(len, new))
        return self.known

    def _encode(self, texts: list[str], special: bool) -> list[list[int]]:
        if not texts:
            return []
        try:
            if self.backend is None:
                return list(self.tokenizer(texts, add_special_tokens=special)["input_ids"])
            batch = self.backend.encode_batch_fast(texts, add_special_tokens=special)
        except Exception as error:
            raise CannotEncode(f"{type(error).__name__}: {error}") from None
        return [encoding.ids for encoding in batch]

    def _agrees(self, text: str) -> bool:
        whole = self.backend.encode(text, add_special_tokens=True).ids
        (halves,) = self.triples([(text, text, text)], [True])
        return bool(halves.head + halves.first == whole)


def backend_of(tokenizer: Any) -> Any:
    """The `tokenizers.Tokenizer` whose ids are those of calling ``tokenizer``, or None."""
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    kind = type(tokenizer)
    plain = (
        isinstance(tokenizer, PreTrainedTokenizerFast)
        and kind.__call__ is PreTrainedTokenizerBase.__call__
        and kind._encode_plus is PreTrainedTokenizerFast._encode_plus
    )
    return tokenizer.backend_tokenizer if plain else None


def works_by_words(spec: Mapping[str, Any]) -> bool:
    """Whether the proof above holds for a tokenizer, ``spec`` being its tokenizer.json."""
    return (
        spec["model"].get("type") == "BPE"
        and not spec["model"].get("dropout")
        and all(step["type"] == "NFC" for step in _steps(spec["normalizer"], "normalizers"))
        and _splits_at_cuts(_steps(spec["pre_tokenizer"], "pretokenizers"))
        and all(_stays_on_its_side(token) for token in spec["added_tokens"])
        and _added_around(spec) is not None
    )


def _steps(part: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    """A part of tokenizer.json as a flat list of steps."""
    if part is None:
        return []
    return list(part[inner]) if part["type"] == "Sequence" else [part]


def _splits_at_cuts(steps: Sequence[Mapping[str, Any]]) -> bool:
    """[digits,] one known expression, bytes."""
    kinds = [step["type"] for step in steps]
    while kinds[:1] == ["Digits"]:
        kinds, steps = kinds[1:], steps[1:]
    if kinds not in (["ByteLevel"], ["Split", "ByteLevel"]):
        return False
    if steps[-1]["add_prefix_space"] or steps[-1]["use_regex"] != (len(steps) == 1):
        return False
    split = steps[0]
    return len(steps) == 1 or (
        split["pattern"].get("Regex") in PATTERNS
        and (split["behavior"], split["invert"]) in (("Isolated", False), ("Removed", True))
    )


def _stays_on_its_side(token: Mapping[str, Any]) -> bool:
    texts = (token["content"], unicodedata.normalize("NFC", token["content"]))
    return not (
        token["single_word"] or token["rstrip"] or any(re.search("[!-~] ", text) for text in texts)
    )


def _added_around(spec: Mapping[str, Any]) -> tuple[list[int], list[int]] | None:
    """Ids that the tokenizer adds before and behind a text; None where no template says so."""
    steps = _steps(spec["post_processor"], "processors")
    templates = [step for step in steps if step["type"] == "TemplateProcessing"]
    if len(templates) > 1 or any(
        step["type"] not in ("TemplateProcessing", "ByteLevel") for step in steps
    ):
        return None
    around: tuple[list[int], list[int]] = ([], [])
    texts = 0
    for item in templates[0]["single"] if templates else []:
        if "Sequence" in item:
            texts += 1
        else:
            own = templates[0]["special_tokens"][item["SpecialToken"]["id"]]["ids"]
            around[min(texts, 1)].extend(own)
    return around if texts == len(templates) else None
