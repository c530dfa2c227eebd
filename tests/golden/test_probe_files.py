"""Probes of a file, from Parquet too; bad files and settings."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from fastpref.config import Config
from fastpref.dynamics.recorder import read_records
from fastpref.train import train


@pytest.fixture(scope="module")
def base(tiny_config: Config) -> Config:
    return dataclasses.replace(
        tiny_config,
        max_length=44,
        max_steps=3,
        learning_rate=3e-3,
        eval_steps=0,
        probe_every=3,
        probe_prompts=12,
        probe_types=("chosen", "rejected", "irr_test"),
    )


def run(config: Config, folder: Path, **changes: Any) -> Path:
    return train(dataclasses.replace(config, output_dir=str(folder), **changes), progress=False)


def rows(folder: Path, table: str = "probes") -> list[dict[str, Any]]:
    return read_records(folder, table).to_pylist()


def write(path: Path, content: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return str(path)


ROW = {"prompt": "Human: music\n\nAssistant:", "response": " Thank you.", "response_type": "chosen"}


def test_a_file_of_probes(base: Config, tmp_path: Path, tiny_tokenizer: Any) -> None:
    content = [
        ROW | {"behavior": "polite", "id": "a"},
        ROW | {"response": " Go away.", "response_type": "rejected", "behavior": "polite"},
        ROW | {"response": " Thanks!", "response_type": "chosen_gptsemantic"},
    ]
    path = write(tmp_path / "probes.jsonl", content)
    folder = run(base, tmp_path / "run", probes=path, probe_prompts=0, max_steps=3)
    index = rows(folder, "probe_index")
    assert [r["response_type"] for r in index] == ["chosen", "rejected", "chosen_gptsemantic"]
    assert [r["behavior"] for r in index] == ["polite", "polite", None]
    assert [r["id"] for r in index] == ["a", "", ""] and [r["line"] for r in index] == [1, 2, 3]
    assert len({r["prompt_id"] for r in index}) == 1
    for row, given in zip(index, content, strict=True):
        assert row["text"] == given["response"] + tiny_tokenizer.eos_token  # as in training
    assert len(rows(folder)) == 2 * 3  # steps 0 and 3
    squeezing = rows(folder, "squeezing")
    assert [(r["step"], r["behavior"]) for r in squeezing] == [(3, "polite")]
    # The same probes from Parquet have the same ids.
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(content), tmp_path / "probes.parquet")
    again = run(
        base, tmp_path / "parquet", probes=str(tmp_path / "probes.parquet"), probe_prompts=0,
        max_steps=1,
    )  # fmt: skip
    assert [r["probe_id"] for r in rows(again, "probe_index")] == [r["probe_id"] for r in index]


@pytest.mark.parametrize(
    "content,words",
    [
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], ["response_type are missing"]),
        ([ROW | {"behavior": "polit"}], ["no such behavior", "Did you mean 'polite'", ":1:"]),
        ([ROW, ROW | {"response_type": "choosen"}], ["Did you mean 'chosen'", ":2:"]),
        ([ROW | {"response_type": "Chosen one"}], ["lower-case", ":1:"]),
        ([ROW | {"response": "  "}], ["the response is empty"]),
        ([ROW | {"response": " word" * 200}], ["longer than max_length, 44", ":1:"]),
        ([ROW, ROW], ["stand twice", "line 1 too", ":2:"]),
        ([ROW | {"id": "x"}, ROW | {"id": "x", "response": " B"}], ["id 'x' stand twice"]),
        ([ROW | {"response": None}], ["'response' is null"]),
        ([ROW | {"prompt": 3}], ["not a string"]),
        ([], ["is empty"]),
    ],
)
def test_bad_files_say_what_and_where(
    content: list[dict[str, Any]], words: list[str], base: Config, tmp_path: Path
) -> None:
    path = write(tmp_path / "probes.jsonl", content)
    with pytest.raises(ValueError) as error:
        run(base, tmp_path / "run", probes=path)
    for word in words:
        assert word in str(error.value), str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_file_without_a_readable_line(base: Config, tmp_path: Path) -> None:
    (tmp_path / "probes.jsonl").write_text('{"prompt": "a", "response": " b"\n')
    with pytest.raises(ValueError, match=r"probes\.jsonl:1: the line is not JSON"):
        run(base, tmp_path / "run", probes=str(tmp_path / "probes.jsonl"))


def test_bad_settings_say_what(base: Config, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="probe_types.*did you mean chosen"):
        dataclasses.replace(base, probe_types=("choosen",))
    with pytest.raises(ValueError, match="there is no probe: probe_prompts is empty"):
        dataclasses.replace(base, probe_prompts=0)
    with pytest.raises(ValueError, match="there is no probe: probe_types is empty"):
        dataclasses.replace(base, probe_types=())
    with pytest.raises(ValueError, match="probe_every is 0"):
        dataclasses.replace(base, probes="probes.jsonl", probe_every=0)
    with pytest.raises(ValueError, match="probe_influence.*track is head"):
        dataclasses.replace(base, probe_influence=True)
    with pytest.raises(ValueError, match="probe_influence.*no probes"):
        dataclasses.replace(base, probe_influence=True, track="sketch", probe_every=0)
    with pytest.raises(ValueError, match="irr_test.*no pair is held out"):
        run(base, tmp_path / "a", eval_fraction=0.0)
    with pytest.raises(ValueError, match="probes.*nowhere.jsonl"):
        run(base, tmp_path / "b", probes="nowhere.jsonl")
