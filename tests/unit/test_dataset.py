"""From a configuration to token pairs: sources, sets of held-out pairs, templates, what is said."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from fastpref.config import Config
from fastpref.config_rules import eval_set
from fastpref.data.dataset import load_dataset
from fastpref.data.loader import Loader


def write(file: Path, *texts: str) -> str:
    rows = ({"prompt": text, "chosen": " Yes", "rejected": " No", "kind": "k"} for text in texts)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_entries_of_eval_dataset_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert eval_set("data/x.jsonl") == ("", "data/x.jsonl")
    assert eval_set("help=data/x.jsonl") == ("help", "data/x.jsonl")
    assert eval_set("v1.0_a-b=org/name=y") == ("v1.0_a-b", "org/name=y")
    assert eval_set("data/split=test/x.jsonl") == ("", "data/split=test/x.jsonl")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "split=test").mkdir()
    assert eval_set("split=test") == ("", "split=test")


def test_sets_of_held_out_pairs(tmp_path: Path, tiny_tokenizer: Any) -> None:
    train = [write(tmp_path / f"{n}.jsonl", f"I like {n}", f"art {n}") for n in range(2)]
    held = [write(tmp_path / "eval" / f"{n}.jsonl", f"rain {n}", f"walks {n}") for n in range(4)]
    config = Config(
        dataset_name=tuple(train),
        eval_dataset_name=(f"a={held[0]}", held[1], f"b={held[2]}", f"a={held[3]}"),
        behavior_column="kind",
    )
    found = load_dataset(config, tiny_tokenizer)
    assert [pair.origin for pair in found.train] == [0, 0, 1, 1]
    sets = found.held_out_sets()
    assert list(sets) == ["", "a", "b"]
    files = {row["pair_id"]: row["file"] for row in found.index}
    assert {files[pair.pair_id] for pair in sets["a"]} == {held[0], held[3]}
    assert {files[pair.pair_id] for pair in sets[""]} == {held[1]}
    assert {row["split"] for row in found.index if row["file"] in held} == {"eval"}
    without = dataclasses.replace(config, eval_dataset_name=(), eval_fraction=0.0)
    assert load_dataset(without, tiny_tokenizer).held_out_sets() == {}


def test_a_held_out_pair_that_is_trained_on_is_refused(tmp_path: Path, tiny_tokenizer: Any) -> None:
    train = write(tmp_path / "a.jsonl", "I like", "art")
    held = write(tmp_path / "b.jsonl", "rain", "art")
    config = Config(dataset_name=(train,), eval_dataset_name=(f"x={held}",))
    with pytest.raises(
        ValueError, match=r"b.jsonl:2: this held-out pair is also training pair .*a.jsonl:2"
    ):
        load_dataset(config, tiny_tokenizer)
    same = dataclasses.replace(config, eval_dataset_name=(f"x={train}",))
    with pytest.raises(ValueError, match="would be trained on and held out"):
        load_dataset(same, tiny_tokenizer)
    with pytest.raises(ValueError, match="is in dataset_name too"):
        dataclasses.replace(same, eval_dataset_split="train")


def test_weights_belong_to_entries(tmp_path: Path, tiny_tokenizer: Any) -> None:
    folder = tmp_path / "folder"
    for n in range(3):
        write(folder / f"{n}.jsonl", *(f"I like {n} {m}" for m in range(4)))
    other = write(tmp_path / "other.jsonl", *(f"art {m}" for m in range(4)))
    config = Config(dataset_name=(str(folder), other), dataset_weights=(0.25, 3), eval_fraction=0.0)
    pairs = load_dataset(config, tiny_tokenizer).train
    loader = Loader(pairs, seed=0, batch_size=4, max_tokens=99, weights=config.dataset_weights)
    assert loader.num_pairs == 3 + 12
    for wrong in ((1,), (1, 2, 3)):
        with pytest.raises(ValueError, match="one number for each of the 2 entries"):
            dataclasses.replace(config, dataset_weights=wrong)
    for wrong in ((1, 0), (1, -2.0), (1, float("nan"))):
        with pytest.raises(ValueError, match="dataset_weights: expected (more than 0|a finite)"):
            dataclasses.replace(config, dataset_weights=wrong)


TEMPLATE = (
    "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ '\n' + m.role }}: {{ m.content }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '\nassistant:' }}{% endif %}"
)


@pytest.fixture
def chats(tmp_path: Path) -> str:
    """A file of conversations."""
    file = tmp_path / "chats.jsonl"
    texts = {"prompt": "I like {n}", "chosen": "Yes, the rain", "rejected": "No art."}
    with file.open("w") as out:
        for n in range(6):
            turn = {
                name: [{"role": "user" if name == "prompt" else "assistant", "content": text}]
                for name, text in texts.items()
            }
            out.write(json.dumps(turn).replace("{n}", str(n)) + "\n")
    return str(file)


def test_template_and_date_come_from_the_configuration(
    chats: str, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="<|end|>"
    )
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        load_dataset(Config(dataset_name=(chats,)), tokenizer)
    file = tmp_path / "chat.jinja"
    file.write_text(TEMPLATE)
    config = Config(dataset_name=(chats,), chat_template=str(file), template_date="2024-02-29")
    pair = load_dataset(config, tokenizer).train[0]
    assert tokenizer.decode(pair.prompt).startswith("29 Feb 2024\nuser: I like")
    assert tokenizer.decode(pair.chosen) == " Yes, the rain"
    assert tokenizer.chat_template == TEMPLATE  # as it is saved: it asks for the date
    other = dataclasses.replace(config, chat_template=TEMPLATE)
    assert load_dataset(other, tokenizer).train[0].prompt.tolist() == pair.prompt.tolist()


def test_the_log_tells_what_was_lost(
    tmp_path: Path, tiny_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "a.jsonl"
    row = {"prompt": "I like mus", "chosen": "ic" * 20, "rejected": "eums and the rain"}
    file.write_text(json.dumps(row) + "\n" + json.dumps(row | {"prompt": "art " * 20}))
    config = Config(dataset_name=(str(file),), max_length=12, eval_fraction=0.0)
    config = dataclasses.replace(config, truncation_mode="keep_completion")
    with caplog.at_level(logging.INFO):
        load_dataset(config, tiny_tokenizer)
    text = caplog.text
    assert "2 pairs lost the start of the prompt to max_length (12 tokens)" in text
    assert "2 pairs lost the end of the chosen completion to max_length" in text
    assert "1 pair lost the end of the rejected completion to max_length" in text
    assert "2 pairs with a prompt that does not stand whole before its completions" in text
