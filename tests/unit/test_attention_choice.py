"""`attn_implementation` in config.yaml: what was chosen stands there, and is taken again."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fastpref import attention_backends, attention_reference, runfolder
from fastpref.attention_backends import Backend
from fastpref.config import Config
from fastpref.prepare import resolved, with_attention
from tests.architectures import packed, tiny_model


def config(folder: Path, **changes: object) -> Config:
    return Config(
        model_name_or_path="somewhere", dataset_name=("pairs.jsonl",), output_dir=str(folder),
        device="cpu", **changes,
    )  # fmt: skip


def test_what_the_model_got_is_written_down(tmp_path: Path) -> None:
    model = packed(tiny_model("llama"))
    assert with_attention(config(tmp_path), model).attn_implementation == "sdpa"
    other = dataclasses.replace(model, attention=Backend("varlen", attention_reference.varlen))
    assert with_attention(config(tmp_path), other).attn_implementation == "varlen"


def test_auto_goes_on_with_what_the_run_had_where_that_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = dataclasses.replace(resolved(config(tmp_path)), attn_implementation="varlen")
    (tmp_path / "config.yaml").write_text(begun.to_yaml())
    again = config(tmp_path)
    assert resolved(again).attn_implementation == "auto"  # no GPU here: chosen afresh
    runfolder.check(resolved(again))  # and it may be another one
    monkeypatch.setattr(
        attention_backends, "find_backend", lambda name, device, dtype: Backend(name)
    )
    monkeypatch.setattr("fastpref.prepare.find_backend", attention_backends.find_backend)
    assert resolved(again).attn_implementation == "varlen"
    anew = dataclasses.replace(again, overwrite_output_dir=True)
    assert resolved(anew).attn_implementation == "auto"


def test_a_backend_that_cannot_be_here_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="varlen: it needs an NVIDIA GPU.* auto or sdpa"):
        resolved(config(tmp_path, attn_implementation="varlen"))
