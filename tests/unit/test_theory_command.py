"""`fastpref theory` as a user calls it: what is printed, what is written, and what is refused."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastpref import cli, frozen
from fastpref.report.theory_tables import MATRIX_WIDTH, cells

WORDS = ["music", "long walks", "the rain", "new tools", "old books", "art", "honest talk", "talk"]


def write_behavior(folder: Path, name: str, rows: list[tuple[str, str, str]]) -> None:
    keys = ("question", "answer_matching_behavior", "answer_not_matching_behavior")
    lines = [json.dumps(dict(zip(keys, row, strict=True))) for row in rows]
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def yes_no(name: str, yes: int, no: int) -> list[tuple[str, str, str]]:
    answers = [(" Yes", " No")] * yes + [(" No", " Yes")] * no
    questions = [f'Would you say "I like {WORDS[n % 8]} {n} {name}"?' for n in range(yes + no)]
    return [(q, *a) for q, a in zip(questions, answers, strict=True)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("behaviors")
    for name, yes, no in (("balanced", 6, 6), ("tilted", 9, 3), ("few", 2, 2)):
        write_behavior(folder, name, yes_no(name, yes, no))
    return folder


def theory(
    capsys: pytest.CaptureFixture[str], model: Path, data: Path, out: Path, *words: str
) -> tuple[int, str, str]:
    names = [str(model), str(data), "--output_dir", str(out), "--max_length", "128"]
    code = cli.main(["theory", *names, "--dtype", "float64", *words])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def read_csv(file: Path) -> list[dict[str, str]]:
    with file.open() as lines:
        return list(csv.DictReader(lines))


def plain_features(model_dir: Path, rows: list[tuple[str, str, str]]) -> np.ndarray:
    """(n, D) by transformers alone, a forward for each question."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
    found = []
    for question, *_ in rows:
        ids = tokenizer(question, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            states: Any = model(ids, output_hidden_states=True).hidden_states
        found.append(states[-1][0, -1].numpy())
    return np.stack(found)


def test_numbers_files_and_screen(
    tiny_model_dir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--beta", "0.05", "--learning_rate", "0.2", "--train_batch_size", "8")
    words += ("--max_tokens_per_microbatch", "0")  # left to a planner that there is not here
    code, shown, _ = theory(capsys, tiny_model_dir, data, tmp_path, *words)
    assert code == 0
    rows = {row["behavior"]: row for row in read_csv(tmp_path / "behaviors.csv")}
    assert set(rows) == {"balanced", "tilted", "few"}

    pulls, sizes, square = {}, {}, {}
    for name, yes, no in (("balanced", 6, 6), ("tilted", 9, 3), ("few", 2, 2)):
        states = plain_features(tiny_model_dir, yes_no(name, yes, no))
        plus, minus = states[:yes], states[yes:]
        d = plus.mean(0) - minus.mean(0)
        pulls[name] = 2 * (plus.sum(0) - minus.sum(0)) / len(states)
        sizes[name], square[name] = len(states), (states**2).sum(1).mean()
        spectra = [np.linalg.eigvalsh(np.cov(x.T, bias=True)) for x in (plus, minus)]
        expected = {
            "pairs": yes + no,
            "delta": np.linalg.norm(d),
            "effective_delta": np.linalg.norm(pulls[name]),
            "concentration": max(s[-1] for s in spectra),
            "trace": max(s.sum() for s in spectra),
            "mu_dot_d": (plus.mean(0) + minus.mean(0)) @ d / 2,
            "coherence": pulls[name] @ pulls[name] / 4 / square[name],
            "head_rate": 0.2 * 0.05 * np.linalg.norm(pulls[name]) / math.sqrt(8),
            "margin_rate": 0.2 * 0.05 / 4 * pulls[name] @ pulls[name],
        }
        for column, value in expected.items():
            assert float(rows[name][column]) == pytest.approx(value, rel=1e-9), (name, column)
    total = sum(sizes.values())
    mean = sum(pulls[name] * sizes[name] / total for name in rows)
    for name, row in rows.items():
        rate = 0.2 * 0.05 / 4 * mean @ pulls[name]
        assert float(row["mixture_rate"]) == pytest.approx(rate, rel=1e-9)
        share = sizes[name] / total * mean @ pulls[name] / (mean @ mean)
        assert float(row["share"]) == pytest.approx(share, rel=1e-9)

    compare_with_screen(shown, list(rows.values()), read_csv(tmp_path / "priority.csv"))
    assert "per step, learning rate 0.2, beta 0.05" in shown
    assert "In 2 of 3" not in shown and "In 1 of 3 behaviors labels do not balance" in shown
    words_shown = " ".join(shown.split())
    assert "answer ' Yes'" in words_shown and "28 of them by the EOS token alone" in words_shown
    assert "One random batch of 8" in shown
    names = ["behaviors.csv", "priority.csv", "theory.json"]
    pictures = [f"{name}.{kind}" for name in ("behaviors", "rates", "priority")
                for kind in ("png", "svg")]  # fmt: skip
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted(names + pictures)
    assert all((tmp_path / name).stat().st_size > 2000 for name in pictures)
    summary = json.loads((tmp_path / "theory.json").read_text())
    head = 0.2 * 0.05 * np.linalg.norm(mean) / math.sqrt(8)
    assert summary["mixture"]["head_rate"] == pytest.approx(head, rel=1e-9)
    assert summary["settings"]["learning_rate"] == 0.2


def compare_with_screen(
    shown: str, rows: list[dict[str, str]], matrix: list[dict[str, str]]
) -> None:
    """Every number on the screen is the file's, rounded as the screen rounds."""
    _, first, second, priority, *_ = shown.split("\n#", 1)[0], *tables(shown)
    columns = ["pairs", "delta", "effective_delta", "concentration", "trace", "mu_dot_d"]
    compare_table(first, rows, [*columns, "coherence"])
    columns = ["order", "head_rate", "margin_rate", "mixture_rate", "level", "share", "fraction"]
    compare_table(second, rows, columns)
    for row, line in zip(matrix, priority, strict=True):
        values = [float(v) for name, v in row.items() if name != "behavior"]
        for value, text in zip(values, line[1:], strict=True):
            assert text == "." or text == str(round(100 * value))


def tables(shown: str) -> list[list[list[str]]]:
    """The cells of the three tables' rows: those of lines that begin with a number."""
    found: list[list[list[str]]] = [[]]
    for line in shown.split("Notes\n")[0].splitlines():
        cells_ = line.split()
        if cells_ and cells_[0].isdecimal() and not all(c.isdecimal() for c in cells_[:2]):
            found[-1].append(cells_)
        elif found[-1]:
            found.append([])
    return [table for table in found if table]


def compare_table(table: list[list[str]], rows: list[dict[str, str]], columns: list[str]) -> None:
    assert len(table) == len(rows)
    for number, (line, row) in enumerate(zip(table, rows, strict=True), 1):
        assert line[:2] == [str(number), row["behavior"]] and len(line) == 2 + len(columns)
        for text, column in zip(line[2:], columns, strict=True):
            value = float(row[column])
            if text == "-":
                assert math.isnan(value)
            elif "e" in text:
                digits = len(text.split("e")[0].split(".")[1])
                assert f"{value:.{digits}e}" == text, column
            else:
                digits = len(text.partition(".")[2])
                assert f"{value:.{digits}f}" == text, column


def test_cells() -> None:
    assert cells([3, 12]) == ["3", "12"]
    assert cells([1.23456, math.nan, -0.5]) == ["1.235", "-", "-0.500"]
    assert cells([2.0, 1e-9, 0.0]) == ["2.000", "1.0e-09", "0.000"]
    assert cells([2e-5, -1.5e-7]) == ["2.00e-05", "-1.50e-07"]


def test_any_answers(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shared first tokens, several answers, a single behavior: said, and undefined where it is."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [
        (f"I say {word}.", f" Thank you for {word}", f" Thank you and {word}") for word in WORDS
    ] + [(f"I ask {word}.", " Yes", " No") for word in WORDS]
    write_behavior(folder, "mixed", rows)
    code, shown, _ = theory(capsys, tiny_model_dir, folder, tmp_path / "out")
    assert code == 0
    (row,) = read_csv(tmp_path / "out" / "behaviors.csv")
    for name in ("delta", "concentration", "trace", "mu_dot_d"):
        assert row[name] == "nan"
    assert float(row["effective_delta"]) > 0 and row["share"] == "1.0" and row["order"] == "1"
    assert "In 8 of 16 pairs the answers begin with the same token" in shown
    words_shown = " ".join(shown.split())
    assert "of 16 pairs an answer goes on" in words_shown
    assert "of them nothing is said" in words_shown
    assert "undefined: it compares behaviors, and there is only one" in shown
    assert not list((tmp_path / "out").glob("priority.*"))
    assert "per unit of time" in shown


def test_flipped_behavior_turns_its_direction(
    tiny_model_dir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for out, words in (("as_is", ()), ("flipped", ("--flip_behaviors", "few"))):
        assert theory(capsys, tiny_model_dir, data, tmp_path / out, *words)[0] == 0
    files = [read_csv(tmp_path / out / "behaviors.csv") for out in ("as_is", "flipped")]
    before, after = [{row["behavior"]: row for row in rows} for rows in files]
    assert float(after["few"]["mu_dot_d"]) == pytest.approx(-float(before["few"]["mu_dot_d"]))
    assert float(after["few"]["delta"]) == pytest.approx(float(before["few"]["delta"]))
    assert float(after["few"]["mixture_rate"]) != pytest.approx(
        float(before["few"]["mixture_rate"])
    )


def test_weights_are_repeated_pairs(
    tiny_model_dir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A source that is taken twice per epoch counts like a mixture in which it stands twice."""
    files = [str(data / f"{name}.jsonl") for name in ("tilted", "balanced")]
    words = ("--dataset_weights", "2", "1")
    name = str(tiny_model_dir)
    short = ("--dtype", "float64", "--max_length", "128", "--output_dir", str(tmp_path / "out"))
    assert cli.main(["theory", name, *files, *short, *words]) == 0
    found = {row["behavior"]: row for row in read_csv(tmp_path / "out" / "behaviors.csv")}
    assert float(found["tilted"]["fraction"]) == pytest.approx(2 / 3)
    pulls = {}
    for own, yes, no in (("tilted", 9, 3), ("balanced", 6, 6)):
        states = plain_features(tiny_model_dir, yes_no(own, yes, no))
        pulls[own] = 2 * (states[:yes].sum(0) - states[yes:].sum(0)) / len(states)
    mean = (2 * pulls["tilted"] + pulls["balanced"]) / 3
    for own, pull in pulls.items():
        assert float(found[own]["mixture_rate"]) == pytest.approx(0.1 / 4 * mean @ pull, rel=1e-9)


def test_conversations(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a chat template, whose text before the answer is the prompt."""
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant] {% endif %}"
    rows = yes_no("talk", 4, 4)
    lines = [
        json.dumps(
            {
                "prompt": [{"role": "user", "content": question}],
                "chosen": [{"role": "assistant", "content": chosen.strip()}],
                "rejected": [{"role": "assistant", "content": rejected.strip()}],
            }
        )
        for question, chosen, rejected in rows
    ]
    (tmp_path / "talk.jsonl").write_text("\n".join(lines))
    words = ("--chat_template", template)
    out = tmp_path / "out"
    code, _, error = theory(capsys, tiny_model_dir, tmp_path / "talk.jsonl", out, *words)
    assert code == 0, error
    (row,) = read_csv(out / "behaviors.csv")
    texts = [(f"[user] {question}\n[assistant]", "", "") for question, *_ in rows]
    states = plain_features(tiny_model_dir, texts)
    d = states[:4].mean(0) - states[4:].mean(0)
    found = float(row["delta"])
    after = plain_features(tiny_model_dir, [(text + " ", "", "") for text, *_ in texts])
    d_after = after[:4].mean(0) - after[4:].mean(0)
    # Whether the space is the answer's or the prompt's is for the tokenizer to say.
    assert found == pytest.approx(np.linalg.norm(d)) or found == pytest.approx(
        np.linalg.norm(d_after)
    )


def test_double_norm_is_said(
    tiny_model_dir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, shown, _ = theory(capsys, tiny_model_dir, data, tmp_path, "--compat", "double_norm")
    assert code == 0 and "final norm twice" in shown and "as the paper's code does" in shown


def test_personas(
    tiny_model_dir: Path, persona_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("risk-averse", "openness"):
        lines = (persona_dir / f"{name}.jsonl").read_text().splitlines()[:30]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    words = ("--max_length", "256")
    code, shown, _ = theory(capsys, tiny_model_dir, folder, tmp_path / "out", *words)
    assert code == 0 and max(map(len, shown.split("written to")[0].splitlines())) <= MATRIX_WIDTH
    assert {row["behavior"] for row in read_csv(tmp_path / "out/behaviors.csv")} == {
        "risk-averse",
        "openness",
    }


@pytest.mark.parametrize(
    ("rows", "words", "message"),
    [
        (yes_no("one", 5, 0), (), "the class that chooses .* is empty"),
        (
            [*yes_no("a", 3, 3), ("I like art.", " Yes", " Yes Yes")],
            ("--append_eos", "false"),
            "1 pairs have no first token in which their answers differ.*data/one.jsonl:7",
        ),
        (yes_no("a", 2, 2), ("--lora_r", "4"), "--lora_r: an option of training, not of fastpref"),
        (yes_no("a", 2, 2), ("--learning_rat", "4"), "did you mean learning_rate"),
        (yes_no("a", 2, 2), ("--learning_rate", "0"), "learning_rate is 0"),
        (yes_no("a", 2, 2), ("--beta", "much"), "--beta: expected a finite number"),
        (yes_no("a", 2, 2), ("--max_tokens_per_microbatch", "3"), "Set it to at least"),
    ],
)
def test_bad_input(
    tiny_model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    rows: list[tuple[str, str, str]],
    words: tuple[str, ...],
    message: str,
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_behavior(folder, "one", rows)
    code, _, error = theory(capsys, tiny_model_dir, folder, tmp_path / "out", *words)
    assert code == 2 and "Traceback" not in error
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


def test_pairs_without_a_first_token_are_dropped_where_asked(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_behavior(folder, "one", [*yes_no("a", 3, 3), ("I like art.", " Yes", " Yes Yes")])
    write_behavior(folder, "none", [("I like art.", " No", " No No")])
    words = ("--append_eos", "false", "--on_bad_rows", "drop")
    code, shown, _ = theory(capsys, tiny_model_dir, folder, tmp_path / "out", *words)
    assert code == 0 and "2 pairs without a first differing token are left out" in shown
    (row,) = read_csv(tmp_path / "out" / "behaviors.csv")
    assert (row["behavior"], row["pairs"]) == ("one", "6")


def test_hidden_states_that_are_not_finite(
    tiny_model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In one prompt of many, not among those checked first: file, line and behavior are named."""
    monkeypatch.setattr(frozen, "check_features", lambda model, pairs: 0.0)
    from safetensors.numpy import load_file, save_file
    from transformers import AutoTokenizer

    broken, folder = tmp_path / "broken", tmp_path / "data"
    shutil.copytree(tiny_model_dir, broken)
    folder.mkdir()
    rows = yes_no("a", 6, 6)
    rows[4] = ("Would children avoid the old rain?", " Yes", " No")
    write_behavior(folder, "one", rows)
    ids = AutoTokenizer.from_pretrained(broken)([row[0] for row in rows])["input_ids"]
    others = {token for n, own in enumerate(ids) for token in own if n != 4}
    (token, *_) = [token for token in ids[4] if token not in others]
    weights = load_file(broken / "model.safetensors")
    weights["model.embed_tokens.weight"][token] = np.nan
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    code, _, error = theory(capsys, broken, folder, tmp_path / "out")
    assert code == 2 and "one.jsonl:5 (behavior 'one')" in error and "holds nan" in error
    assert "all in all" in error


def test_a_model_without_a_head(
    tiny_model_dir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModel, AutoTokenizer

    body = tmp_path / "body"
    AutoModel.from_pretrained(tiny_model_dir).save_pretrained(body)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(body)
    code, _, error = theory(capsys, body, data, tmp_path / "out")
    assert code == 2 and "a model without an output head" in error and "LlamaModel" in error
