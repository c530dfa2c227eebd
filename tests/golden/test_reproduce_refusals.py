"""What `fastpref reproduce` refuses, or calls undefined, and what it leaves alone."""

from __future__ import annotations

import importlib.util
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastpref.cli import main
from fastpref.reproduce import hh_misalign, lora, misalign, runs
from fastpref.reproduce.settings import Settings

FEW = ("--steps", "2", "--train_batch_size", "6", "--max_length", "128")


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTPREF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def test_without_peft(monkeypatch: pytest.MonkeyPatch, personas: Path, tmp_path: Path) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "peft" else found(name)
    )
    settings = Settings("fastpref-tiny", (str(personas),), tmp_path / "out")
    for module in (lora, misalign, hh_misalign):
        with pytest.raises(ValueError, match="needs peft"):
            module.run(settings)


def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path, *options: str) -> str:
    """What `fastpref reproduce` says; it must have written nothing."""
    code = main(["reproduce", *options, "--model", str(model), "--output_dir", str(tmp_path / "o")])
    said = capsys.readouterr().err
    assert code == 2 and "Traceback" not in said and not (tmp_path / "o").exists(), said
    return said


def test_bad_input_is_named(
    capsys: pytest.CaptureFixture[str], tiny_model_dir: Path, personas: Path, tmp_path: Path
) -> None:
    def error(*options: str, data: Path = personas) -> str:
        return refused(capsys, tmp_path, tiny_model_dir, *options, "--data", str(data))

    assert "likes-rain" in error("full", "--behaviors", "likes-rains")
    one = error("two-behaviors", "--behaviors", "likes-rain")
    assert "a priority compares behaviors, and there is one alone, likes-rain" in one
    assert "dialogues with the columns chosen and rejected" in error("hh-misalign")

    def rows(name: str, answers: list[tuple[str, str]]) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for behavior in ("first", "second"):
            lines = [
                json.dumps(
                    {
                        "question": f"{behavior} {n}?",
                        "answer_matching_behavior": a,
                        "answer_not_matching_behavior": b,
                    }
                )
                for n, (a, b) in enumerate(answers * 6)
            ]
            (folder / f"{behavior}.jsonl").write_text("\n".join(lines) + "\n")
        return folder

    empty = rows("one-class", [(" Yes", " No")])
    for name in ("full", "lora", "two-behaviors", "misalign", "embeddings"):
        found = error(name, "--behaviors", "first", "second", data=empty)
        assert "'first'" in found and "empty" in found, name
    begins = rows("begins", [(" Yes", " Yes Yes"), (" Yes Yes", " Yes")])
    assert "begins with the whole other one" in error("full", "--behaviors", "first", data=begins)


def test_a_model_without_a_head(
    capsys: pytest.CaptureFixture[str], tiny_model_dir: Path, personas: Path, tmp_path: Path
) -> None:
    from transformers import AutoModel

    body = tmp_path / "body"
    AutoModel.from_pretrained(tiny_model_dir).save_pretrained(body)
    for file in tiny_model_dir.glob("tokenizer*"):
        (body / file.name).write_bytes(file.read_bytes())
    for name in ("full", "two-behaviors"):
        behaviors = ("--behaviors", "likes-rain", "likes-tools")
        found = refused(capsys, tmp_path, body, name, "--data", str(personas), *behaviors)
        assert "without an output head" in found and "LlamaModel" in found


def changed(tiny_model_dir: Path, folder: Path, kind: str) -> Path:
    """A random model with the tiny one's tokenizer, whose head caps its logits or has a bias."""
    import torch
    from transformers import (
        AutoTokenizer,
        Gemma2Config,
        Gemma2ForCausalLM,
        PhiConfig,
        PhiForCausalLM,
    )

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "initializer_range": 0.2,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any
        if kind == "capped":
            own = {"num_key_value_heads": 1, "head_dim": 8, "final_logit_softcapping": 30.0}
            model = Gemma2ForCausalLM(Gemma2Config(**sizes, **own))
        else:
            model = PhiForCausalLM(PhiConfig(**sizes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "message"), [("capped", "caps its logits"), ("biased", "has a bias in its head")]
)
def test_a_head_that_is_not_linear(
    capsys: pytest.CaptureFixture[str],
    tiny_model_dir: Path,
    personas: Path,
    tmp_path: Path,
    kind: str,
    message: str,
) -> None:
    """Where a prediction must be exact it is refused, before any run; elsewhere it is undefined.
    What can be run is run, whatever else was asked for."""
    model = changed(tiny_model_dir, tmp_path / "model", kind)
    options = ("--data", str(personas), "--behaviors", "likes-rain", "likes-tools", *FEW)
    for name in ("last-layer", "rates", "two-behaviors", "misalign"):
        assert message in refused(capsys, tmp_path, model, name, *options), name
    out = tmp_path / "full"
    options = (*options, "--model", str(model), "--output_dir", str(out))
    assert main(["reproduce", "last-layer", "full", *options]) == 2
    said = capsys.readouterr().err
    assert "last-layer: " in said and message in said and not (out / "last-layer").exists()
    found = json.loads((out / "full" / "outcome.json").read_text())
    words = {"capped": "caps its logits at 30", "biased": "head has a bias"}
    assert any(words[kind] in caveat for caveat in found["caveats"])
    for own in found["numbers"]["behaviors"].values():
        assert (own["predicted"]["head_alone_margin_last"] is None) == (kind == "capped")
        assert own["predicted"]["delta"] > 0


def test_bfloat16_is_refused_before_anything_is_trained(
    capsys: pytest.CaptureFixture[str], tiny_model_dir: Path, personas: Path, tmp_path: Path
) -> None:
    options = ("--data", str(personas), "--behaviors", "likes-rain", "likes-tools", *FEW)
    for name in ("two-behaviors", "misalign"):
        found = refused(capsys, tmp_path, tiny_model_dir, name, *options, "--dtype", "bfloat16")
        assert "use float32 or float64" in found


@pytest.mark.parametrize("name", ["last-layer", "rates", "full", "two-behaviors", "misalign"])
def test_steps(
    capsys: pytest.CaptureFixture[str],
    tiny_model_dir: Path,
    personas: Path,
    tmp_path: Path,
    name: str,
) -> None:
    for steps in ("0", "-1"):  # -1 is an epoch to the trainer; the exact experiments know none
        options = ("--data", str(personas), "--steps", steps)
        found = refused(capsys, tmp_path, tiny_model_dir, name, *options)
        assert f"--steps: expected 1 or more, got {steps}" in found


def test_a_file_in_the_place_of_the_output(
    capsys: pytest.CaptureFixture[str], tiny_model_dir: Path, personas: Path, tmp_path: Path
) -> None:
    (tmp_path / "o").write_text("mine")
    model, data, out = str(tiny_model_dir), str(personas), str(tmp_path / "o")
    for name in ("rates", "hh-misalign"):
        words = ["--model", model, "--data", data, "--output_dir", out]
        assert main(["reproduce", name, *words]) == 2
        assert "is not a folder that you may write to" in capsys.readouterr().err
    assert (tmp_path / "o").read_text() == "mine"


def test_a_second_call_begins_anew_and_leaves_what_is_not_a_runs(
    tiny_model_dir: Path, personas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    options = ["--model", str(tiny_model_dir), "--data", str(personas), *FEW]
    options += ["--behaviors", "likes-rain", "likes-rain", "--output_dir", "~/out"]
    assert main(["reproduce", "last-layer", *options]) == 0
    folder = tmp_path / "out" / "last-layer"
    first = (folder / "curves.csv").read_bytes()
    mine = [folder / "runs" / "likes-rain-full" / name for name in ("my.safetensors", "notes.txt")]
    mine += [folder / "notes.txt"]
    for file in mine:
        file.write_text("mine")
    assert main(["reproduce", "last-layer", *options]) == 0
    assert (folder / "curves.csv").read_bytes() == first
    assert [file.read_text() for file in mine] == ["mine"] * 3
    found = json.loads((folder / "outcome.json").read_text())
    assert found["settings"]["behaviors"] == ["likes-rain"] and len(found["runs"]) == 2


def test_asked_to_end(
    capsys: pytest.CaptureFixture[str],
    tiny_model_dir: Path,
    personas: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a stopped call says must be true of this command, which resumes nothing."""
    train = runs.train

    def stopped(*args: Any, **options: Any) -> Path:
        from fastpref import loop as module

        step = module.train_step

        def last(*own: Any, **named: Any) -> Any:
            signal.raise_signal(signal.SIGTERM)
            return step(*own, **named)

        monkeypatch.setattr(module, "train_step", last)
        return train(*args, **options)

    monkeypatch.setattr(runs, "train", stopped)
    options = ["--model", str(tiny_model_dir), "--data", str(personas), *FEW]
    options += ["--behaviors", "likes-rain", "--output_dir", str(tmp_path / "out")]
    assert main(["reproduce", "last-layer", *options]) == 143
    said = capsys.readouterr().err
    assert "begins its experiment anew" in said and "overwrite" not in said
    assert not (tmp_path / "out" / "last-layer" / "outcome.json").exists()


def test_equal_classes_decide_nothing(
    tiny_model_dir: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """Every statement answered both ways: rounding must neither pass nor fail a claim."""
    for name in ("one", "two"):
        rows = [
            {"question": f"{name} {n}?", "answer_matching_behavior": a,
             "answer_not_matching_behavior": b}
            for n in range(8) for a, b in ((" Yes", " No"), (" No", " Yes"))
        ]  # fmt: skip
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    options = ["--model", str(tiny_model_dir), "--data", str(tmp_path), "--steps", "2"]
    options += ["--train_batch_size", "100", "--output_dir", str(tmp_path / "out")]
    for name in ("full", "two-behaviors"):
        assert main(["reproduce", name, *options, "--behaviors", "one", "two"]) == 0
        found = json.loads((tmp_path / "out" / name / "outcome.json").read_text())
        verdicts = found["verdicts"]
        assert len(verdicts) == {"full": 3, "two-behaviors": 5}[name]
        assert [v["passed"] for v in verdicts] == [None] * len(verdicts), verdicts
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]
