"""Which behaviors an experiment takes, and the form of what it leaves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fastpref.reproduce.behaviors import choose, find_files
from fastpref.reproduce.names import (
    DIALOGUES,
    OFFICIAL_COUNT,
    OFFICIAL_NAMES,
    STATEMENTS,
)
from fastpref.reproduce.outcome import Outcome, Verdict, write_outcome
from fastpref.reproduce.settings import Official, Settings

OFFICIAL = Official((108, 54), "head", "sgd", 0.1, 0.01, 128, 100)


def never(names: list[str]) -> np.ndarray:
    raise AssertionError("nothing is missing")


def delta(names: list[str]) -> np.ndarray:
    return np.array([float(name.split("-")[1]) for name in names])


def test_official_behaviors_that_are_there_come_first_and_gaps_are_spread_by_delta() -> None:
    present = {OFFICIAL_NAMES[108]: "a", OFFICIAL_NAMES[54]: "b"}
    assert choose(present, (54, 108), (), never) == ([OFFICIAL_NAMES[54], OFFICIAL_NAMES[108]], [])
    others = {f"other-{n}": "" for n in (3, 9, 1, 7, 5)}
    names, (note,) = choose({OFFICIAL_NAMES[108]: ""} | others, (108, 45, 84, 88), (), delta)
    assert names == [OFFICIAL_NAMES[108], "other-9", "other-5", "other-1"]
    assert f"45 {OFFICIAL_NAMES[45]}" in note and "other-9, other-5, other-1" in note
    names, _ = choose(others, (108, 45), (), delta)
    assert names == ["other-9", "other-1"]
    assert choose(others, (), (), never)[0] == list(others)


def test_numbers_are_those_of_the_official_list() -> None:
    files = {f"b{n:03}": "" for n in range(OFFICIAL_COUNT - 1)} | {OFFICIAL_NAMES[54]: ""}
    assert choose(files, (), ("7", "54", "b100"), never)[0] == ["b007", OFFICIAL_NAMES[54], "b100"]
    files.pop("b000")
    with pytest.raises(ValueError, match="the name of number 7 is not known"):
        choose(files, (), ("7",), never)


def test_files_are_told_by_their_rows(tmp_path: Path) -> None:
    rows = {
        "yes": {
            "question": "q",
            "answer_matching_behavior": " Yes",
            "answer_not_matching_behavior": " No",
        },
        "talk": {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a"},
    }
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "LICENSE").write_text("text")
    folder = str(tmp_path)
    assert find_files([folder], STATEMENTS) == {"yes": str(tmp_path / "yes.jsonl")}
    assert find_files([folder], DIALOGUES) == {"talk": str(tmp_path / "talk.jsonl")}
    with pytest.raises(ValueError, match="expected dialogues .* HH-RLHF.*none is that"):
        find_files([str(tmp_path / "yes.jsonl")], DIALOGUES)


def test_options_win_over_official_numbers() -> None:
    settings = Settings("m", (), Path("x"), steps=3, beta=0.5)
    found = settings.over(OFFICIAL)
    assert (found.steps, found.beta, found.learning_rate, found.seed) == (3, 0.5, 0.1, 1234)


def test_outcome_says_what_is_undefined(tmp_path: Path) -> None:
    nan = float("nan")
    verdicts = [
        Verdict("low", 0.5, 1),
        Verdict("high", 0.5, 1, at_least=True),
        Verdict("?", nan, 1),
    ]
    assert [v.passed for v in verdicts] == [True, False, None]
    curves = [{"step": 0, "loss": 0.1}, {"step": 1, "loss": nan}]
    numbers = {"list": np.array([1.0, nan]), "one": np.float64(2)}
    settings = Settings("m", (), tmp_path / "made")
    write_outcome(settings, Outcome("name", {}, numbers, verdicts, [], curves))
    found = json.loads((tmp_path / "made" / "outcome.json").read_text())
    assert found["numbers"] == {"list": [1.0, None], "one": 2.0}
    assert [v["passed"] for v in found["verdicts"]] == [True, False, None]
    assert (tmp_path / "made" / "curves.csv").read_text() == "step,loss\n0,0.1\n1,nan\n"
