"""The benchmark of whole models on a GPU, as far as a CPU goes: every path, with tiny models."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import e2e_cases, e2e_contenders, gpu_e2e, measure, results
from bench.__main__ import main
from bench.e2e_cases import Case
from bench.e2e_contenders import Fastpref, Padded, Shared, with_reference

CPU = torch.device("cpu")
PARTS_OF_A_CONTENDER = {"seconds", "tokens_per_second", "pairs_per_second", "useful_tflop_s"}


def _dry(output: Path, *more: str) -> tuple[int, list[dict[str, Any]]]:
    command = ["gpu", "--part", "e2e", "--dry", "--repeats", "1", "--output", str(output)]
    status = main([*command, *more])
    return status, [json.loads(line) for line in output.read_text().splitlines()[1:]]


def test_cases_begin_with_the_targets_and_are_those_of_the_issue() -> None:
    cases = e2e_cases.cases()
    assert tuple(case.name for case in cases[:3]) == gpu_e2e.HEADLINES
    found = {(c.size, c.data, c.trainable, c.recipe) for c in cases}
    assert len(found) == len(cases) == len({c.name for c in cases})
    tuned = {(s, d, t, "tuned") for s in e2e_cases.SIZES for d in e2e_cases.DATA
             for t in ("all", "lora")}  # fmt: skip
    default = {(s, d, t, "default") for s in ("1b", "3b") for d in e2e_cases.DATA
               for t in ("all", "lora")}  # fmt: skip
    assert found == tuned | default  # its 8B default needs 160 GB


def test_targets_of_e2e_are_those_of_the_issue() -> None:
    found = {check.name: check.target for check in results.verdicts("gpu_e2e", {})}
    assert found == {
        "e2e_3b_512_256_vs_trl_default": "at least 2.4",
        "e2e_8b_full_512_256_vs_trl_tuned": "at least 1.6",
        "e2e_8b_lora_512_256_vs_trl_tuned": "at least 1.6",
        "e2e_8b_full_512_256_mfu": "at least 0.45",
        "e2e_8b_full_512_256_sketch_share": "at most 0.02",
    }
    assert set(found) <= set(gpu_e2e.NAMES)


@pytest.mark.parametrize(
    ("size", "parameters"), [("1b", 1_235_814_400), ("3b", 3_212_749_824), ("8b", 8_030_261_248)]
)
def test_models_are_of_the_published_sizes(size: str, parameters: int) -> None:
    module = e2e_cases.make_module(Case(size, "hh"), "meta", seed=0)
    assert sum(p.numel() for p in module.parameters()) == parameters
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("data", e2e_cases.DATA)
def test_pairs_have_their_lengths_and_end_at_the_longest(data: str) -> None:
    steps = e2e_cases.make_pairs(Case("1b", data), 4)
    assert len(steps) == 4 and {len(own) for own in steps} == {e2e_cases.DATA[data].pairs}
    pairs = [pair for own in steps for pair in own]
    longest = max(len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in pairs)
    assert longest <= e2e_cases.MAX_LENGTH
    if data in ("512_256", "128_512"):
        sizes = {(len(p.prompt), len(p.chosen), len(p.rejected)) for p in pairs}
        prompt, completion = map(int, data.split("_"))
        assert sizes == {(prompt, completion, completion)}
    assert all(min(len(p.prompt), len(p.chosen), len(p.rejected)) > 0 for p in pairs)


def test_micro_batches_hold_every_pair() -> None:
    for case in e2e_cases.cases():
        own = e2e_cases.DATA[case.data]
        assert own.pairs % case.trl_micro(own) == 0


@pytest.mark.parametrize("trainable", ["all", "lora"])
@pytest.mark.parametrize("recipe", ["tuned", "default"])
def test_the_recipe_in_plain_transformers_agrees_in_float64(trainable: str, recipe: str) -> None:
    """The stand-in for TRL against fastpref, beyond what bfloat16 can show."""
    if trainable == "lora":
        pytest.importorskip("peft")
    case = Case("1b", "hh", trainable, recipe)
    steps = e2e_cases.make_pairs(case, 2, dry=True)
    other = None
    if trainable == "all":
        other = e2e_cases.make_module(case, CPU, seed=1, dry=True).double()
    shared = Shared(case, e2e_cases.make_module(case, CPU, seed=0, dry=True), CPU)
    shared.module.double()
    shared.model = dataclasses.replace(shared.model, dtype=torch.float64)
    steps, _ = with_reference(shared, other, steps)
    ours = Fastpref(shared, steps, "head")
    padded = Padded(shared, steps, e2e_cases.DRY_DATA["hh"], other)
    for turn in range(2):
        shared.clear()
        (a,) = ours.run(turn, 1)
        shared.clear()
        (b,) = padded.run(turn, 1)
        assert b.metrics == pytest.approx(a.metrics, rel=1e-5)
        if trainable == "all":
            assert abs(a.metrics["loss"] - 0.6931) > 1e-3  # another model is the reference


@pytest.mark.slow
def test_a_dry_run_writes_every_kind_of_case(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("trl")
    names = ["8b_full_512_256_tuned", "3b_full_hh_default", "1b_lora_persona_default"]
    status, lines = _dry(tmp_path / "cases.jsonl", "--only", *names)
    assert status == 0, capsys.readouterr().out
    assert [line["case"] for line in lines] == names
    for line in lines:
        other = "trl_tuned" if line["case"].endswith("tuned") else "trl_default"
        for who in ("ours", other):
            assert set(line["contenders"][who]) >= PARTS_OF_A_CONTENDER, line
        assert {f"vs_{other}", f"vs_{other}_with_reference"} <= set(line["values"])
        assert line["reference_seconds"] > 0
    assert "sketch_share" in lines[0]["values"] and "sketch_share" not in lines[1]["values"]


def test_without_trl_its_recipe_stands_in_and_no_target_is_judged_met(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    version = measure.version_of
    monkeypatch.setattr(
        measure, "version_of", lambda n: None if n in ("trl", "peft") else version(n)
    )
    names = ["3b_full_512_256_default", "8b_lora_512_256_tuned"]
    status, lines = _dry(tmp_path / "cases.jsonl", "--only", *names)
    out = capsys.readouterr().out
    assert status == 0, out
    (line,) = lines
    assert set(line["contenders"]) == {"ours", "padded_default"}
    assert "vs_padded_default" in line["values"]
    record = json.loads(out.splitlines()[-1])
    assert record["values"]["e2e_3b_512_256_vs_trl_default"] is None
    assert "trl is missing" in out and record["not_reached"] == [
        "8b_lora_512_256_tuned (needs peft)"
    ]


def test_no_case_begins_when_time_is_nearly_up(tmp_path: Path) -> None:
    session = _session(tmp_path, budget=gpu_e2e.RESERVE - 1)
    values = gpu_e2e.run(session)
    assert session.not_reached == [case.name for case in e2e_cases.cases()]
    assert set(values.values()) == {None}


def test_a_case_that_there_is_not_is_refused_with_the_names(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no case 8b_nosuch\. Cases: 8b_full_512_256_tuned, "):
        gpu_e2e.run(dataclasses.replace(_session(tmp_path), only=("8b_nosuch",)))


def test_a_case_that_fails_takes_no_other_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(session: Any, case: Case, trl: bool) -> dict[str, Any]:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(gpu_e2e, "measure_case", fail)
    status, lines = _dry(tmp_path / "cases.jsonl", "--only", *gpu_e2e.HEADLINES[:2])
    assert status == 1 and len(lines) == 2 and "no kernel image" in lines[1]["why"]


def test_what_disagrees_has_no_ratio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = e2e_contenders.Padded._step

    def off(self: Padded, pairs: Any) -> Any:
        step = real(self, pairs)
        metrics = step.metrics | {"logps/chosen": step.metrics["logps/chosen"] * 1.02}
        return dataclasses.replace(step, metrics=metrics)

    monkeypatch.setattr(e2e_contenders.Padded, "_step", off)
    session = _session(tmp_path, dry=True)
    line = gpu_e2e.measure_case(session, Case("1b", "hh"), trl=False)
    assert not line["values"] and session.failed and "logps/chosen" in session.failed[0]


def test_out_of_memory_halves_the_micro_batch_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = e2e_contenders.Padded._step, []

    def short(self: Padded, pairs: Any) -> Any:
        calls.append(self.micro)
        if self.micro > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, pairs)

    monkeypatch.setattr(e2e_contenders.Padded, "_step", short)
    line = gpu_e2e.measure_case(_session(tmp_path, dry=True), Case("1b", "hh"), trl=False)
    assert line["contenders"]["padded_tuned"]["notes"] == [
        "out of memory, so 1 pairs in a micro-batch"
    ]
    assert "vs_padded_tuned" in line["values"] and calls[0] == 2 and set(calls[1:]) == {1}


def _session(tmp_path: Path, *, dry: bool = False, budget: float = 500.0) -> Any:
    from bench.gpu import Session

    where = {"device": "a CPU"}
    return Session(CPU, dry, budget, 1, None, tmp_path / "cases.jsonl", where)


@pytest.mark.slow
def test_every_case_runs_dry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All 40, against TRL itself."""
    pytest.importorskip("trl")
    pytest.importorskip("peft")
    status, lines = _dry(tmp_path / "cases.jsonl")
    out = capsys.readouterr().out
    assert status == 0, out
    assert [line["case"] for line in lines] == [case.name for case in e2e_cases.cases()]
    assert all(f"vs_{who}" in line["values"] for line in lines
               for who in line["contenders"] if who.startswith("trl"))  # fmt: skip
