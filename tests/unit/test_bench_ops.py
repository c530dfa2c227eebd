"""The benchmarks of the kernels: their truth, gate and clock, what they write and refuse."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu_op, head_ops, kernels, results
from bench.__main__ import main

CPU = torch.device("cpu")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


def small(**options: Any) -> head_ops.Problem:
    return head_ops.make_problem(48, 12, 200, 4, dtype=torch.float32, device=CPU, **options)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_truth_is_what_autograd_gives_in_float64(softcap: float | None) -> None:
    problem = small(softcap=softcap)
    truth = head_ops.truth_of(problem, block=13)
    leaves = [x.double().requires_grad_() for x in (problem.hidden, problem.weight)]
    rows = head_ops.eager_rows(*leaves, problem.target, softcap)
    assert rows.dtype == torch.float32  # eager's own rounding; the gradients stay comparable
    loss = head_ops.dpo_loss(rows.double(), problem.pairs)
    grads = torch.autograd.grad(loss, leaves)
    torch.testing.assert_close(truth.loss, loss.detach(), rtol=1e-6, atol=1e-6)
    for name, grad in zip(("hidden", "weight"), grads, strict=True):
        torch.testing.assert_close(truth.grads[name].double(), grad, rtol=1e-4, atol=1e-7)


def test_problems_have_the_entropy_of_real_text() -> None:
    problem = head_ops.make_problem(64, 64, 4096, 4, dtype=torch.float32, device=CPU)
    prob = torch.softmax(problem.hidden @ problem.weight.t(), -1)
    assert 1.0 < float(torch.special.entr(prob).sum(-1).mean()) < 3.5
    likely = prob.gather(1, problem.target[:, None]).mean()
    assert float(likely) > 0.05  # targets are drawn from it, not at random


def test_the_gate_sees_a_wrong_gradient_a_wrong_value_and_nan() -> None:
    problem = small()
    truth = head_ops.truth_of(problem)
    within = {"rows": 1e-4, "hidden": 1e-4, "weight": 1e-4}

    def gate(change: Any) -> str | None:
        def rows(hidden: Any, weight: Any, target: Any, softcap: Any) -> Any:
            return change(head_ops.eager_rows(hidden, weight, target, softcap), hidden)

        op = head_ops.HeadOp("x", "x", rows)
        return head_ops.wrong(head_ops.errors_of(op, problem, truth, "full"), within)

    assert gate(lambda rows, hidden: rows) is None
    assert "rows is off" in str(gate(lambda rows, hidden: rows + 1e-3))
    leak = gate(lambda rows, hidden: rows + 1e-2 * (hidden - hidden.detach()).sum(1))
    assert "hidden is off" in str(leak)
    assert gate(lambda rows, hidden: rows * float("nan")) is not None


def test_what_is_missing_is_said() -> None:
    ops, missing = head_ops.load(["ours", "cce"])
    assert [op.name for op in ops][:1] == ["ours"]
    if "cce" in missing:
        assert "cut-cross-entropy" in missing["cce"]


def test_ratios_are_formed_within_a_repeat() -> None:
    seconds = {"ours": [1.0, 2.0, 4.0], "eager": [2.0, 3.0, 8.0], "trl": [3.0, 6.0, 12.0]}
    found = kernels._speed(seconds, "full")
    assert found["full_vs_eager"] == {"value": 2.0, "q20": 1.7, "q80": 2.0}
    assert found["full_vs_fastest"] == found["full_vs_eager"]
    assert found["full_vs_compile"] is None


def test_memory_against_eager_and_the_leanest() -> None:
    peaks = {
        "ours": {"full": 20},
        "ours_cache0": {"full": 11},
        "eager": {"full": 10},
        "linear_ce_chunked": {"full": 8},
    }
    found = kernels._memory(peaks)
    assert found["memory_full_vs_eager"] == {"value": 2.0}
    assert found["memory_cache0_vs_leanest"] == {"value": 11 / 8}
    assert kernels._memory({})["memory_full_vs_eager"] is None


def test_targets_are_those_of_the_issue() -> None:
    on_cpu = {check.name: check.target for check in results.verdicts("kernels", {})}
    assert on_cpu["full_vs_fastest"] == "at least 0.971"  # 1 / 1.03
    assert on_cpu["frozen_vs_fastest"] == "at least 1.1"
    assert on_cpu["memory_cache0_vs_leanest"] == "at most 1.1"
    on_gpu = {check.name: check.target for check in results.verdicts("gpu_op", {})}
    assert on_gpu == {
        "full_ms": "at most 36",
        "full_over_floor": "at most 1.1",
        "full_gb": "at most 3.5",
        "frozen_ms": "at most 24",
        "full_vs_trl": "at least 1.3",
        "full_vs_liger_dpo": "at least 1.8",
        "full_vs_quack_inplace": "at least 1",
        "head_exact_extra": "at most 0.05",
        "head_sketch_extra": "at most 0.01",
        "norms_share_512": "at most 0.12",
    }
    tracked = {check.name: check.target for check in results.verdicts("gpu_track", {})}
    assert tracked == {"track_sketch_share": "at most 0.02", "track_exact_share": "at most 0.12"}


def test_the_most_important_cases_come_first() -> None:
    order = gpu_op.cases(dry=False)
    assert [(case, mode) for case, mode in order[:3]] == [
        (gpu_op.HEADLINE, mode) for mode in ("full", "frozen", "nograd")
    ]
    assert len(order) == len(set(order)) == 3 * 5 * 3
    assert {case.rows for case, _ in order} == {1024, 8192, 32768}


def test_floor_counts_products_or_bytes() -> None:
    ceilings = {"copy_gb_s": 4300.0, "tflop_s": 790.0}
    headline = gpu_op.floor_of(gpu_op.HEADLINE, "full", ceilings)
    assert headline == pytest.approx(32.69e-3, rel=1e-3)
    one_row = gpu_op.Case(1, 4096, 128256)
    assert gpu_op.floor_of(one_row, "full", ceilings) == pytest.approx(2.1e9 / 4.3e12, rel=0.01)


@no_gpu
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="no CUDA device"):
        main(["gpu", "--part", "op"])
    with pytest.raises(SystemExit, match="no CUDA device"):
        main(["gpu", "--part", "e2e"])


@no_gpu
def test_dry_run_of_the_track_part(tmp_path: Path) -> None:
    output = tmp_path / "track.jsonl"
    call = ["gpu", "--part", "track", "--dry_run", "--repeats", "1", "--output", str(output)]
    assert main(call) == 0
    _, track = [json.loads(line) for line in output.read_text().splitlines()]
    assert track["case"] == "track, Llama dry"
    assert set(track["seconds"]) == {"none", "head", "sketch", "exact"}


@no_gpu
def test_dry_run_of_the_op_part_goes_through_every_case(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "op.jsonl"
    call = ["gpu", "--part", "op", "--dry_run", "--repeats", "1", "--output", str(output)]
    assert main([*call, "--only", "eager", "linear_ce"]) == 0
    head, *lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert head["part"] == "op" and "torch" in head["versions"]
    attention = [line for line in lines if "attention" in line["case"]]
    assert [line.pop("case") for line in attention] == [
        f"attention, {name}" for name in ("512/256", "HH-like", "persona-like")
    ]
    for line in attention:
        assert set(line["ops"]) == {"sdpa", "stand-in"}
        assert all(facts["seconds"]["count"] == 1 for facts in line["ops"].values())
        assert max(line["ops"]["stand-in"]["errors"].values()) < 1e-5
    lines = [line for line in lines if "case" in line]
    norms = [line.pop("case") for line in lines if "norms" in line["case"]]
    heads = [f"norms of the head, segments of {rows} rows" for rows in (8, 2, 64)]
    assert norms == [*heads, "norms, fastpref-tiny T=256 pairs of 64"]
    steps = [line for line in lines if "case" in line]
    assert len(steps) == 6 and {line["mode"] for line in steps} == set(gpu_op.MODES)
    for line in steps:
        ours = line["ops"]["ours"]
        assert ours["seconds"]["count"] == 1 and ours["errors"]["rows"] < 1e-5
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["ok"] is True


@no_gpu
def test_a_case_that_would_be_late_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "op.jsonl"
    call = ["gpu", "--part", "op", "--dry_run", "--budget", "0", "--output", str(output)]
    assert main([*call, "--only", "eager"]) == 0
    assert len(output.read_text().splitlines()) == 1
    assert "not reached within 0 s: R=64 D=16 V=300 full" in capsys.readouterr().out


@no_gpu
def test_a_dry_run_leaves_the_results_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    assert main(["gpu", "--part", "op", "--dry_run", "--budget", "0", "--only", "eager"]) == 0
    assert not list(tmp_path.iterdir())
    (cases,) = re.findall(r"cases in (.*)", capsys.readouterr().out)
    assert Path(cases).is_file()
    shutil.rmtree(Path(cases).parent)


@no_gpu
def test_ours_wrong_fails_the_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong() -> head_ops.HeadOp:
        right = head_ops._ours(-1)
        assert right.loss is not None
        loss = right.loss
        return dataclasses.replace(right, loss=lambda *a: 1.2 * loss(*a))

    monkeypatch.setattr(head_ops, "MAKERS", {**head_ops.MAKERS, "ours": wrong})
    call = ["gpu", "--part", "op", "--dry_run", "--repeats", "1", "--only", "eager"]
    assert main([*call, "--output", str(tmp_path / "op.jsonl")]) == 1


@no_gpu
@pytest.mark.slow
def test_dry_run_of_the_correctness_part_holds(tmp_path: Path) -> None:
    output = tmp_path / "correctness.jsonl"
    assert main(["gpu", "--part", "correctness", "--dry_run", "--output", str(output)]) == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()][1:]
    assert len(lines) == 59 and all(line["ok"] for line in lines)
