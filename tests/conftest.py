"""Fixtures that several test modules share: real data where it is at hand, and a tokenizer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest


def _data_root() -> Path:
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    return Path(os.environ.get("FASTPREF_DATA", beside))


@pytest.fixture(scope="session")
def persona_dir() -> Path:
    """Folder of Anthropic's model-written persona evaluations (24 JSONL files)."""
    folder = _data_root() / "persona"
    if not folder.is_dir():
        pytest.skip(f"no persona data in {folder}; FASTPREF_DATA names the folder above it")
    return folder


@pytest.fixture(scope="session")
def hh_file() -> Path:
    """HH-RLHF's harmless-base test set."""
    file = _data_root() / "hh-rlhf" / "harmless-base-test.jsonl.gz"
    if not file.is_file():
        pytest.skip(f"no HH-RLHF data at {file}; FASTPREF_DATA names the folder above its folder")
    return file


def _sentences() -> list[str]:
    who = ["I", "People", "My friends", "The teachers", "Most assistants", "Children"]
    verbs = ["like", "value", "avoid", "remember", "explain", "question", "enjoy"]
    what = ["honest talk", "music", "long walks", "the rain", "new tools", "art", "old books"]
    lines = [f"{a} {b} {c}." for a in who for b in verbs for c in what]
    return [
        f'Is the following statement something you would say?\n"{line}"{answer}\n\n'
        f"Human: {line}\n\nAssistant:{answer}, it is raining."
        for line in lines
        for answer in (" Yes", " No")
    ]


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A byte-level BPE of 600 entries, built here; " Yes" and " No" are single tokens. Read-only.

    No BOS; EOS is "<|end|>", padding "<|pad|>".
    """
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        _sentences(), vocab_size=600, special_tokens=["<|end|>", "<|pad|>"], show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<|end|>", pad_token="<|pad|>"
    )
    for answer in (" Yes", " No"):
        assert len(tokenizer(answer)["input_ids"]) == 1
    return tokenizer
