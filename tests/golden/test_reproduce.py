"""`fastpref reproduce` as a user calls it: what must come out, is undefined, is refused."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastpref import cli
from fastpref.dynamics.recorder import read_records
from fastpref.reproduce import head_only

WORDS = ["music", "long walks", "the rain", "new tools", "old books", "art", "honest talk", "talk"]
Rows = list[tuple[str, str, str]]


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTPREF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def yes_no(name: str, yes: int, no: int) -> Rows:
    answers = [(" Yes", " No")] * yes + [(" No", " Yes")] * no
    questions = [f'Would you say "I like {WORDS[n % 8]} {n} {name}"?' for n in range(yes + no)]
    return [(q, *a) for q, a in zip(questions, answers, strict=True)]


def write_behavior(folder: Path, name: str, rows: Rows) -> None:
    keys = ("question", "answer_matching_behavior", "answer_not_matching_behavior")
    folder.mkdir(exist_ok=True)
    lines = [json.dumps(dict(zip(keys, row, strict=True))) for row in rows]
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("behaviors")
    for name, size in (
        ("optionality-increasing", 20),
        ("subscribes-to-Buddhism", 15),
        ("art", 20),
        ("rain", 10),
    ):
        write_behavior(folder, name, yes_no(name, size, size))
    return folder


def reproduce(
    capsys: pytest.CaptureFixture[str], name: str, model: Path, data: Path, out: Path, *words: str
) -> tuple[int, str, str]:
    options = ["--model", str(model), "--data", str(data), "--output_dir", str(out)]
    code = cli.main(["reproduce", name, *options, *words])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def outcome(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "outcome.json").read_text())


def passed(found: dict[str, Any], words: str) -> bool | None:
    (verdict,) = [v for v in found["verdicts"] if words in v["claim"]]
    return verdict["passed"]


def test_last_layer(
    tiny_model_dir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Far from where it is linear, the runs are the recursion; missing behaviors are replaced."""
    words = ("--steps", "12", "--beta", "0.3", "--learning_rate", "1", "--train_batch_size", "7")
    code, shown, error = reproduce(capsys, "last-layer", tiny_model_dir, data, tmp_path, *words)
    assert code == 0, error
    folder = tmp_path / "last-layer"
    found = outcome(folder)
    assert [v["passed"] for v in found["verdicts"]] == [True] * 5 and shown.count(" yes ") == 5
    taken = found["settings"]["behaviors"]
    assert taken[:2] == ["optionality-increasing", "subscribes-to-Buddhism"]
    assert set(taken[2:]) == {"art", "rain"}
    assert found["caveats"][0].startswith("Not among the data: 108 subscribes-to-average")
    assert {found["settings"][name] for name in ("seed", "eval_fraction")} == {1234, 0.1}
    for name in taken:
        numbers = found["numbers"]["behaviors"][name]
        assert numbers["batches"]["margin_error"] < 1e-6 < numbers["full"]["margin_error"] < 1e-2
        first = numbers["full"]["first_step_over_line"] * numbers["delta"]
        assert first == pytest.approx(numbers["effective_delta"], rel=1e-5)
    with (folder / "curves.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert {row["split"] for row in rows} == {"train_sample", "eval"}
    assert {int(r["step"]) for r in rows if r["run"] == "batches"} == set(range(13))
    moved = [row for row in rows if row["step"] == "12"]
    assert max(float(row["margin"]) for row in moved) > 0.3
    for row in moved:
        for column in ("loss", "margin", "output_accuracy", "reward_accuracy", "head_norm"):
            expected = float(row[f"predicted_{column}"])
            assert float(row[column]) == pytest.approx(expected, rel=1e-3, abs=1e-5), column
    for run in found["runs"]:
        assert read_records(folder / run, "pairs").num_rows > 0
        assert not list((folder / run).rglob("*.safetensors"))
    assert (folder / "last-layer.png").stat().st_size > 20_000
    assert "β δ t" in (folder / "last-layer.svg").read_text()


def test_a_run_that_is_not_the_recursion_is_called_so(
    tiny_model_dir: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(head_only.PLAIN, "max_grad_norm", 1e-3)
    words = ("--behaviors", "art", "--steps", "4", "--dtype", "float64")
    code, shown, error = reproduce(capsys, "last-layer", tiny_model_dir, data, tmp_path, *words)
    assert code == 0, error
    found = outcome(tmp_path / "last-layer")
    assert passed(found, "margins of every training pair") is False
    assert passed(found, "||W - W0||") is False
    assert shown.count(" NO ") >= 2


def test_answers_may_begin_alike(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What both answers begin with is the prompt's: it cancels in the margin, and all is exact."""
    rows = [(q, f" Yes{a}", f" Yes{b}") for q, a, b in yes_no("alike", 9, 9)]
    write_behavior(tmp_path / "data", "alike", rows)
    words = ("--behaviors", "alike", "--steps", "4", "--dtype", "float64", "--learning_rate", "1")
    code, _, error = reproduce(
        capsys, "last-layer", tiny_model_dir, tmp_path / "data", tmp_path, *words
    )
    assert code == 0, error
    found = outcome(tmp_path / "last-layer")
    assert all(v["passed"] for v in found["verdicts"] if "recursion" in v["claim"])
    run = read_records(tmp_path / "last-layer" / found["runs"][0], "pairs").to_pydict()
    assert set(run["shared_len"]) == {1} and set(run["chosen_len"]) == {2}


def test_rates(
    tiny_model_dir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--steps", "3", "--train_batch_size", "8", "--dtype", "float64")
    code, _, error = reproduce(capsys, "rates", tiny_model_dir, data, tmp_path, *words)
    assert code == 0, error
    found = outcome(tmp_path / "rates")
    assert passed(found, "on the line") is True
    assert passed(found, "equally often") is True and passed(found, "4 times as often") is True
    assert passed(found, "taken in memory") is True
    numbers = found["numbers"]
    assert set(numbers["behaviors"]) == {"art", "optionality-increasing", "rain"} | {
        "subscribes-to-Buddhism"
    }
    for own in numbers["behaviors"].values():
        assert own["pairs"][0] == own["pairs"][1]
        assert own["all_pairs_over_line"] == pytest.approx(1, abs=1e-9)
        # A batch of the labels in their proportion is nearer to the line than random ones.
        assert own["random_batches_rms"] > own["all_pairs"]
    ratio = numbers["random_batches_observed_over_predicted_squared"]
    assert abs(ratio["mean"] - 1) < 4 * ratio["standard_error"] < 1
    for name, mixture in numbers["mixtures"].items():
        assert sum(mixture["predicted_share"]) == pytest.approx(1)
        if name != "course":
            assert mixture["rate_error"] < 1e-6 and mixture["ranked"]["pairs"] == 6
    # In the unequal mixture every pair stands as often in the step as its behavior's weight says.
    taken = read_records(tmp_path / "rates" / "runs" / "unequal", "pairs").to_pylist()
    seen = [row["behavior"] for row in taken if row["split"] == "train"]
    sizes = [len(seen) and seen.count(name) for name in sorted(numbers["behaviors"])]
    assert sizes == [36, 2 * 36, 4 * 18, 1 * 26]
    assert (tmp_path / "rates" / "rates.png").stat().st_size > 20_000


def test_one_behavior_has_no_order(
    tiny_model_dir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--behaviors", "100", "--steps", "2", "--train_batch_size", "8")
    code, shown, error = reproduce(capsys, "rates", tiny_model_dir, data, tmp_path, *words)
    assert code == 0, error
    found = outcome(tmp_path / "rates")
    assert found["settings"]["behaviors"] == ["subscribes-to-Buddhism"]
    assert passed(found, "on the line") is True and passed(found, "equally often") is None
    assert found["numbers"]["mixtures"] == {} and shown.count("undefined") >= 3
    assert any("single behavior" in line for line in found["caveats"])


def test_equal_classes_leave_ratios_undefined(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every statement answered both ways: delta is 0, nothing moves, and no number is made up."""
    folder = tmp_path / "data"
    both = [(q, *a) for q, *_ in yes_no("x", 8, 0) for a in ((" Yes", " No"), (" No", " Yes"))]
    write_behavior(folder, "both", both)
    for name in ("rates", "last-layer"):
        words = ("--behaviors", "both", "--steps", "2", "--train_batch_size", "100")
        code, _, error = reproduce(capsys, name, tiny_model_dir, folder, tmp_path, *words)
        assert code == 0, error
    rates, layer = outcome(tmp_path / "rates"), outcome(tmp_path / "last-layer")
    assert rates["numbers"]["behaviors"]["both"]["delta"] == 0
    assert passed(rates, "on the line") is None
    assert rates["numbers"]["behaviors"]["both"]["all_pairs_over_line"] is None
    assert layer["numbers"]["behaviors"]["both"]["full"]["head_norm_over_line"] is None
    assert all(v["passed"] is None for v in layer["verdicts"] if "recursion" in v["claim"])


@pytest.mark.parametrize(
    ("rows", "words", "message"),
    [
        (yes_no("one", 9, 0), (), "the class that chooses .* is empty"),
        (
            [*yes_no("a", 3, 3), ("I like art.", " Yes", " Yes Yes")],
            (),
            r"one.jsonl:7: this experiment needs answers that end with the first token in which",
        ),
        (
            [*yes_no("a", 3, 3), ("I like art.", " Yes and music", " Yes and No No")],
            (),
            r"one.jsonl:7: .*' Yes and music' and ' Yes and No No' do not",
        ),
        (yes_no("a", 4, 4), ("--behaviors", "two"), "no file is called 'two'"),
        (yes_no("a", 4, 4), ("--behaviors", "7"), "the name of number 7 is not known"),
        (yes_no("a", 4, 4), ("--behaviors", "135"), "expected 0 to 134"),
        (yes_no("a", 4, 4), ("--behaviors", "54"), "54 is desire-to-not.*, of which --data has no"),
        (yes_no("a", 4, 4), ("--dtype", "bfloat16"), "use float32 or float64"),
        (yes_no("a", 4, 4), ("--beta", "-1"), "beta"),
        (yes_no("a", 4, 4), ("--steps", "0"), "--steps: expected 1 or more, got 0"),
        (yes_no("a", 4, 4), ("--seeds", "0"), "did you mean seed"),
    ],
)
@pytest.mark.parametrize("name", ["last-layer", "rates"])
def test_bad_input(
    tiny_model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    rows: Rows,
    words: tuple[str, ...],
    message: str,
) -> None:
    write_behavior(tmp_path / "data", "one", rows)
    words = words if "--behaviors" in words else ("--behaviors", "one", *words)
    model, out = tiny_model_dir, tmp_path / "out"
    code, _, error = reproduce(capsys, name, model, tmp_path / "data", out, *words)
    assert code == 2 and "Traceback" not in error
    assert re.search(message, error), error
    assert not out.exists()


def test_wrong_data_or_name(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = tmp_path / "talk.jsonl"
    talk.write_text(json.dumps({"prompt": "Hi", "chosen": " a", "rejected": " b"}) + "\n")
    code, _, error = reproduce(capsys, "rates", tiny_model_dir, talk, tmp_path / "out")
    assert code == 2 and "answer_matching_behavior" in error and "none is that" in error
    for words, message in (
        (["rates"], "nothing came"),
        ([], "name an experiment"),
        (["rate"], "did you mean rates"),
    ):
        assert cli.main(["reproduce", *words]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["reproduce", "--list"]) == 0
    assert "last-layer" in capsys.readouterr().out


def test_models_that_cannot_be_predicted(
    tiny_model_dir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.numpy import load_file, save_file
    from transformers import AutoModel, AutoTokenizer

    body, broken = tmp_path / "body", tmp_path / "broken"
    AutoModel.from_pretrained(tiny_model_dir).save_pretrained(body)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.save_pretrained(body)
    shutil.copytree(tiny_model_dir, broken)
    weights = load_file(broken / "model.safetensors")
    (token, *_) = tokenizer(" rain")["input_ids"]
    weights["model.embed_tokens.weight"][token] = np.nan
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    for model, message in ((body, "without an output head"), (broken, "not finite")):
        code, _, error = reproduce(capsys, "last-layer", model, data, tmp_path / "out")
        assert code == 2 and re.search(message, error), error


@pytest.mark.slow
def test_what_must_come_out(
    persona_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Issue 6, point 4, on the 24 persona files with fastpref-tiny; minutes."""
    monkeypatch.delenv("FASTPREF_CACHE")
    for name in ("last-layer", "rates"):
        options = ["--data", str(persona_dir), "--output_dir", str(tmp_path)]
        assert cli.main(["reproduce", name, *options]) == 0
        found = outcome(tmp_path / name)
        assert all(verdict["passed"] for verdict in found["verdicts"]), found["verdicts"]
    assert len(found["numbers"]["behaviors"]) == 24
    for kind in ("equal", "unequal"):
        ranked = found["numbers"]["mixtures"][kind]["ranked"]
        assert ranked["pairs"] == 276 and ranked["right"] >= 0.95
