"""What a user gets for bad input: exit code 2 before any training, and where, what, what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastpref.cli import main

GOOD = {"prompt": "I value art", "chosen": " Yes", "rejected": " No"}
BAD_ROWS = {
    "missing column": (json.dumps({"prompt": "I", "chosen": " Yes"}), "rejected"),
    "wrong type": (json.dumps({**GOOD, "chosen": 7}), "7"),
    "null": (json.dumps({**GOOD, "rejected": None}), "null|None"),
    "empty completion": (json.dumps({**GOOD, "chosen": ""}), "empty"),
    "equal": (json.dumps({**GOOD, "rejected": " Yes"}), "equal|same"),
    "broken JSON": ('{"prompt": "I val', "JSON"),
    "prompt too long": (json.dumps({**GOOD, "prompt": "I value honest talk. " * 60}), "max_length"),
}


@pytest.fixture
def train(tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    def run(rows: list[str], *words: str) -> tuple[int, str]:
        (tmp_path / "mixed.jsonl").write_text("\n".join(rows) + "\n")
        options = {
            "model_name_or_path": tiny_model_dir,
            "dataset_name": tmp_path / "mixed.jsonl",
            "ref_cache_dir": tmp_path / "reference",
            "output_dir": tmp_path / "run",
            "max_length": 64,
            "max_steps": 2,
            "train_batch_size": 4,
            "eval_steps": 2,
        }
        given = [w for name, value in options.items() for w in (f"--{name}", str(value))]
        code = main(["train", *given, *words])
        return code, capsys.readouterr().err

    return run


def good_rows() -> list[str]:
    return [json.dumps({**GOOD, "prompt": f"I value art ({n})"}) for n in range(20)]


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_stops_the_run_before_training(name: str, train, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    line, said = BAD_ROWS[name]
    rows = good_rows()
    rows.insert(6, line)
    code, errors = train(rows)
    assert code == 2
    assert "mixed.jsonl:7" in errors
    assert any(word in errors for word in said.split("|")), errors
    assert "--on_bad_rows drop" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "run").exists()


def test_drop_counts_and_lists_them_and_trains(train, tmp_path: Path, caplog) -> None:  # type: ignore[no-untyped-def]
    rows = good_rows()
    for line, _ in BAD_ROWS.values():
        rows.insert(3, line)
    with caplog.at_level("INFO"):
        code, _ = train(rows, "--on_bad_rows", "drop")
    assert code == 0
    assert f"{len(BAD_ROWS)} bad rows dropped" in caplog.text
    for number in range(4, 4 + len(BAD_ROWS)):
        assert f"mixed.jsonl:{number}: " in caplog.text
    assert (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--learning_rat", "1"), "learning_rate"),
        (("--beta", "much"), "beta"),
        (("--loss_type", "sigmoyd"), "sigmoid"),
        (("--model_name_or_path", "nowhere/at-all"), "nowhere/at-all"),
        (("--dataset_name", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--max_length", "4096"), "at most 256"),
        (("--max_tokens_per_microbatch", "3"), "at least"),
        (("--flip_behaviors", "mixd"), "mixed"),
        (("--attn_implementation", "flash"), "sdpa"),
        (("--resume_from_checkpoint", "nowhere"), "nowhere"),
    ],
)
def test_a_wrong_setting_says_what_to_set(words, said, train, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    code, errors = train(good_rows(), *words)
    assert code == 2
    assert said in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_non_finite_has_its_own_exit_code(train) -> None:  # type: ignore[no-untyped-def]
    code, errors = train(
        good_rows(), "--learning_rate", "1e20", "--max_grad_norm", "0", "--warmup_ratio", "0"
    )
    assert code == 3
    assert "step 2" in errors
