"""The benchmarks' own machinery: what they count, what they refuse, what they write."""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import measure, results, train, train_cases
from bench.__main__ import PLANNED, main
from bench.contenders import Fastpref, Job, Trl, disagreement
from bench.flops import Shape, Work
from fastpref.data.formats import read_pairs
from fastpref.data.pack import pack_pairs


@pytest.fixture
def job(tiny_model_dir: Path, tiny_data: Path, tmp_path: Path) -> Job:
    pairs, _ = read_pairs([str(tiny_data)])
    return Job(pairs[::3], 4, str(tiny_model_dir), tmp_path, max_length=256)


@pytest.fixture
def quiet() -> Iterator[None]:
    with train.quiet():
        yield


@pytest.mark.parametrize("name", [*PLANNED, "trian"])
def test_front_refuses_what_is_not_there_and_says_what_is(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([name])
    assert stopped.value.code == 2
    assert "train" in capsys.readouterr().err


def test_quantiles() -> None:
    found = measure.Quantiles.of([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert (found.q20, found.q50, found.q80, found.count) == (2.0, 3.5, 5.0, 6)
    with pytest.raises(ValueError, match="no values"):
        measure.Quantiles.of([])


def test_interleaved_gives_everyone_every_place() -> None:
    turns = list(measure.interleaved("abc", 3))
    assert [repeat for repeat, _ in turns] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    rounds = ["".join(who for r, who in turns if r == repeat) for repeat in range(3)]
    assert sorted(map(sorted, rounds)) == [list("abc")] * 3
    assert sorted(names[0] for names in rounds) == list("abc")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_that_of_the_measured_call() -> None:
    mib = 2**20

    def allocate(size: int) -> int:
        return int(torch.ones(size * mib, dtype=torch.uint8)[::4096].sum())

    def build(size: int) -> Callable[[], object]:
        allocate(192)  # gone again: no part of the measured call
        return lambda: allocate(size)

    for size in (16, 96):
        found = measure.peak_memory(lambda size=size: build(size))
        assert found["used"] == found["peak"] - found["baseline"]
        assert (size - 8) * mib < found["used"] < (size + 32) * mib


def test_commit_is_dirty_only_by_what_no_benchmark_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.setattr(measure, "ROOT", tmp_path)
    git("init")
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "code.py").write_text("1")
    git("add", ".")
    git("commit", "-m", "one")
    (tmp_path / "bench" / "results" / "cpu.jsonl").write_text("{}")
    (tmp_path / "bench" / "RESULTS.md").write_text("#")
    found = measure.commit()
    assert len(found["commit"]) == 40 and found["dirty"] is False
    (tmp_path / "code.py").write_text("2")
    assert measure.commit()["dirty"] is True
    monkeypatch.setattr(measure, "ROOT", tmp_path / "nowhere")
    assert measure.commit() == {"commit": None, "dirty": None}


def test_verdicts(tmp_path: Path) -> None:
    targets = tmp_path / "targets.toml"
    targets.write_text("[x]\nfast = {at_least = 5.0}\nsmall = {at_most = 1.0}\n")
    for fast, small, met in (
        (5.0, 1.0, [True, True]),
        (4.999, 1.001, [False, False]),
        (None, None, [False, False]),
    ):
        found = results.verdicts("x", {"fast": fast, "small": small}, targets)
        assert [check.met for check in found] == met
    assert results.verdicts("other", {}, targets) == []
    targets.write_text("[x]\nfast = 5.0\n")
    with pytest.raises(ValueError, match="fast"):
        results.verdicts("x", {}, targets)


def test_targets_are_those_of_the_issue() -> None:
    wanted = {
        "train_5m_persona": ("at least 5", "at least 4"),
        "train_30m_persona": ("at least 4", "at least 3.2"),
        "train_5m_hh": ("at least 5", "at least 4"),
        "train_30m_hh": ("at least 5", "at least 4"),
    }
    assert [case.name for case in train_cases.CASES] == list(wanted)
    for case, (default, tuned) in wanted.items():
        names = {check.name: check.target for check in results.verdicts(case, {})}
        memory = {name: "at most 1" for name in names if name.startswith("memory")}
        timed = {"train_vs_trl_default": default, "train_vs_trl_tuned": tuned}
        assert names == timed | memory
        assert len(memory) == (2 if case == "train_5m_persona" else 0)


def test_targets_of_the_head_are_those_of_the_issue() -> None:
    names = {check.name: check.target for check in results.verdicts("head", {})}
    assert names == {"head_vs_all": "at least 20", "head_vs_all_one_token": "at least 20"}


def _record(time: str, speed: float, memory: float | None) -> results.Record:
    values = {
        "speed_vs_x": {"value": speed, "q20": speed - 0.5, "q80": speed + 0.5, "bound": 7.25},
        "memory_vs_x": None if memory is None else {"value": memory},
    }
    check = results.Verdict("speed_vs_x", speed, "at least 3", speed >= 3)
    where = {
        "time": time,
        "device": "A CPU (R) @ 2.50GHz x2",
        "threads": 2,
        "load_before": 0.1,
        "versions": {"torch": "2.13.0", "trl": None},
        "commit": "0123456789abcdef",
        "dirty": True,
    }
    return results.record_of("case", where, {"pairs_per_step": 32}, {}, values, [check])


def test_results_keep_everything_and_say_what_we_lose(tmp_path: Path) -> None:
    folder, page = tmp_path / "results", tmp_path / "RESULTS.md"
    results.keep(_record("2026-01-02T00:00:00+00:00", 2.5, 1.25), folder, page)
    path = results.keep(_record("2026-01-03T00:00:00+00:00", 4.0, 0.5), folder, page)
    assert path.name == "a-cpu-r-2.50ghz-x2.jsonl"
    assert len(path.read_text().splitlines()) == 2
    text = page.read_text()
    assert text.index("2026-01-03") < text.index("2026-01-02")
    assert "| speed_vs_x | 4.00 | 3.50 to 4.50 | 7.25 | at least 3: met |" in text
    assert "What we lose: nothing of the above." in text
    assert "0123456789 (changed)" in text and "torch 2.13.0" in text and "trl None" not in text

    lost = results.losses(_record("2026-01-04T00:00:00+00:00", 0.5, 1.25))
    assert len(lost) == 3  # missed, slower than the other, more memory than the other
    results.keep(_record("2026-01-04T00:00:00+00:00", 0.5, None), folder, page)
    text = page.read_text()
    assert "MISSED" in text and "not measured" in text and "nothing of the above" not in text
    assert [r["time"][:10] for r in results.read_all(folder)] == [
        "2026-01-02",
        "2026-01-03",
        "2026-01-04",
    ]


def _flash_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return 4 * query[0] * query[1] * query[2] * key[2] * query[3]


def _flash_backward_flops(grad: Any, query: Any, key: Any, *_: Any, **__: Any) -> int:
    return 10 * query[0] * query[1] * query[2] * key[2] * query[3]


def counted(call: Callable[[], object]) -> int:
    """Operations that torch's own counter sees; the CPU's attention and addmm_ are added to it."""
    from torch.utils.flop_counter import FlopCounterMode

    aten = torch.ops.aten
    extra = {
        aten._scaled_dot_product_flash_attention_for_cpu: _flash_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _flash_backward_flops,
        aten.addmm_: lambda out, a, b, *_, **__: 2 * a[0] * a[1] * b[1],
    }
    with FlopCounterMode(display=False, custom_mapping=extra) as counter:
        call()
    return int(counter.get_total_flops())


def test_arithmetic_of_fastpref_is_what_torch_counts(job: Job, quiet: None) -> None:
    contender = Fastpref(job)
    (work,) = contender.work(2, 1)
    batch = pack_pairs(contender._pairs(2, 1))
    body = counted(lambda: contender.model.hidden(batch, scored_only=True).sum().backward())
    without_head = Work(work.tokens, work.scores, 0, 0, 1, 1, 0, 0, work.unread)
    assert body == without_head.flops(contender.shape)
    assert work.tokens == batch.num_tokens and work.rows == batch.rows.numel()
    assert 0 < work.unread < work.tokens
    rows = torch.bincount(batch.segment_id // 3)
    assert work.gram == sum(n * n for n in rows.tolist()) > 0
    reference = contender.reference_work(2, 1)
    with torch.no_grad():
        forward = counted(lambda: contender.model.hidden(batch, scored_only=True))
    head = 2 * reference.rows * contender.shape.hidden * contender.shape.vocab
    # Its plan may cut the pairs into other attention blocks, with other padding.
    assert reference.flops(contender.shape) == pytest.approx(forward + head, rel=0.02)


def test_the_head_of_fastpref_is_three_products() -> None:
    """By torch's profiler, which looks inside the custom op."""
    from fastpref_kernels import linear_logprob
    from torch.profiler import profile

    rows, dim, vocab = 30, 16, 101
    hidden = torch.randn(rows, dim, requires_grad=True)
    weight = torch.randn(vocab, dim, requires_grad=True)
    target, segment = torch.randint(vocab, (rows,)), (torch.arange(rows) // 5).int()
    with profile(with_flops=True, record_shapes=True) as profiled:
        linear_logprob(hidden, weight, target, segment, num_segments=6).logp.sum().backward()
    found = sum(event.flops for event in profiled.key_averages() if "mm" in event.key)
    assert found == Work(0, 0, rows, 0, 1, 1, 0, 3).flops(Shape(1, 0, 0, 0, dim, vocab))


def test_the_head_alone_computes_no_body_and_agrees_with_one_that_does(
    job: Job, quiet: None
) -> None:
    head = Fastpref(job, name="head", trainable="head")
    frozen = Fastpref(job, name="frozen", trainable="head", body=True)
    assert disagreement([frozen, head], 3, 1e-5) is None
    (work,) = head.work(2, 1)
    (whole,) = frozen.work(2, 1)
    assert (work.tokens, work.passes, work.head_products) == (0, 0, 2)
    assert (work.rows, work.gram) == (whole.rows, whole.gram) and whole.tokens > 0
    # Other weights learn: another trajectory.
    assert disagreement([Fastpref(job, name="all"), head], 3, 1e-5) is not None


def test_the_head_bench_forms_ratios_and_checks_them(
    tiny_model_dir: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["head", *_arguments(tiny_model_dir, tiny_data)[1:], "--head_steps", "2"]
    command.remove("--no_memory")
    main(command)
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(line["values"]) == {"head_vs_all", "head_vs_all_one_token"}
    assert [c["seconds"]["count"] for c in line["contenders"].values()] == [2, 4, 2, 4]
    assert line["ok"] == all(check["met"] for check in line["checks"])


@pytest.mark.parametrize("tuned", [False, True])
def test_arithmetic_of_trl_is_what_torch_counts(job: Job, quiet: None, tuned: bool) -> None:
    """So TRL does repeat forwards, run the reference model, and score all positions on a CPU."""
    pytest.importorskip("trl")
    contender = Trl(job, tuned=tuned, micro=2)  # two forwards a step
    found: list[int] = []
    step = contender.trainer.training_step

    def counting(*arguments: Any, **keywords: Any) -> Any:
        out: list[Any] = []
        found.append(counted(lambda: out.append(step(*arguments, **keywords))))
        return out[0]

    contender.trainer.training_step = counting
    contender.run(1, 2)
    steps = [work.flops(contender.shape) for work in contender.work(1, 2)]
    assert [a + b for a, b in zip(found[::2], found[1::2], strict=True)] == steps


def test_shape_counts_every_weight_of_the_products() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    module = LlamaForCausalLM(config)
    shape = Shape.of(config)
    products = sum(p.numel() for n, p in module.model.named_parameters() if "_proj" in n)
    assert shape.layers * shape.layer_weights == products
    assert shape.attention_width == 32
    assert shape.hidden * shape.vocab == module.lm_head.weight.numel()


def test_contenders_agree_and_a_difference_is_seen(job: Job, quiet: None) -> None:
    pytest.importorskip("trl")
    same = [Fastpref(job), Trl(job, tuned=False, micro=2), Trl(job, tuned=True)]
    assert disagreement(same, 3, 1e-5) is None
    # Each keeps its weights: they still agree, on other pairs, after slices of unlike histories.
    other = dataclasses.replace(job, beta=0.11)
    wrong = disagreement([Fastpref(job), Trl(other, tuned=True)], 3, 1e-5)
    assert wrong is not None and "loss" in wrong and "trl_tuned" in wrong


def test_a_slice_times_all_steps_but_the_first_and_keeps_the_weights(job: Job, quiet: None) -> None:
    contender = Fastpref(job)
    before = contender.model.head.weight.detach().clone()
    found = contender.run(0, 4)
    assert len(found.seconds) == 3 and min(found.seconds) > 0 and found.metrics == []
    moved = contender.model.head.weight.detach().clone()
    assert not torch.equal(before, moved)
    seen = contender.run(3, 2, observe=True)
    assert [line["step"] for line in seen.metrics] == [1, 2]
    assert not torch.equal(moved, contender.model.head.weight)
    assert not list(job.scratch.iterdir())


def test_a_perfect_step_is_the_useful_part_of_ours(job: Job, quiet: None) -> None:
    contender = Fastpref(job)
    (ideal,), (work,) = contender.ideal(2, 1), contender.work(2, 1)
    blank = dataclasses.replace(work, gram=0, scores=0)
    assert blank.flops(contender.shape) < ideal < work.flops(contender.shape)


def test_cases_are_chosen_and_take_the_command_lines_numbers() -> None:
    def chosen(*line: str) -> list[train_cases.Case]:
        parser = argparse.ArgumentParser()
        train.add_arguments(parser)
        return train.chosen_cases(parser.parse_args(line))

    assert chosen() == list(train_cases.CASES)
    (one,) = chosen("--model", "30m", "--data", "hh", "--repeats", "2")
    assert (one.name, one.repeats, one.pairs) == ("train_30m_hh", 2, 16)
    (own,) = chosen("--dataset_name", "x", "--pairs_per_step", "4")
    assert own.name == "train_own" and own.pairs == 4


def test_made_up_dialogues_have_the_lengths_of_hh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTPREF_DATA", str(tmp_path / "nowhere"))
    pairs, source = train_cases.find_pairs("hh", tmp_path, 0)
    assert "made-up" in source and len({p.prompt for p in pairs}) > 1950
    for name, (mean, deviation) in (
        ("prompt", train_cases.HH_PROMPT),
        ("chosen", train_cases.HH_CHOSEN),
        ("rejected", train_cases.HH_REJECTED),
    ):
        logs = np.log([len(getattr(p, name)) for p in pairs])
        assert logs.mean() == pytest.approx(mean, abs=0.1)
        assert logs.std() == pytest.approx(deviation, abs=0.12)


@pytest.mark.slow
def test_a_case_of_the_30m_model_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With whom it is compared left out: the whole comparison takes minutes."""
    command = ["train", "--model", "30m", "--data", "hh", "--against", "nothing", "--no_record"]
    assert main([*command, "--pairs_per_step", "2", "--repeats", "1"]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["bench"] == "train_30m_hh" and line["setting"]["parameters"] == 30_303_744


def test_spans_rotate_through_whole_batches() -> None:
    job = Job([None] * 23, 4, "", Path())  # type: ignore[list-item]
    assert job.batches == 5
    spans = [list(job.span(first, 2)) for first in range(6)]
    assert all(len(span) == 8 and max(span) < 20 for span in spans)
    assert spans[0] == list(range(8)) and spans[3] == list(range(12, 20)) and spans[4] == spans[0]


def _arguments(tiny_model_dir: Path, tiny_data: Path) -> list[str]:
    return [
        "train",
        *("--model_name_or_path", str(tiny_model_dir), "--dataset_name", str(tiny_data)),
        *("--pairs_per_step", "4", "--repeats", "2", "--steps", "1", "--max_length", "256"),
        "--no_memory",
        "--no_record",
    ]


def test_check_fails_without_the_contender_it_needs(
    tiny_model_dir: Path,
    tiny_data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(measure, "version_of", lambda name: None)
    command = _arguments(tiny_model_dir, tiny_data)
    assert main([*command, "--check"]) == 1
    out = capsys.readouterr().out
    line = json.loads(out.splitlines()[-1])
    assert line["missing"] == ["trl"] and line["ok"] is False
    assert line["contenders"]["fastpref"]["seconds"]["count"] == 2
    assert "trl is not installed" in out
    assert main(command) == 0


def test_nothing_is_timed_where_contenders_disagree(
    tiny_model_dir: Path,
    tiny_data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("bench.contenders.disagreement", lambda *_: "step 0: loss is off")
    monkeypatch.setattr(train, "_times", lambda *_: pytest.fail("timed"))
    assert main([*_arguments(tiny_model_dir, tiny_data), "--against", "nothing"]) == 1
    assert "step 0: loss is off" in capsys.readouterr().out


def test_too_few_pairs_are_refused(tiny_model_dir: Path, tiny_data: Path) -> None:
    command = _arguments(tiny_model_dir, tiny_data)
    command[command.index("--pairs_per_step") + 1] = "64"
    with pytest.raises(SystemExit, match="80 pairs"):
        main(command)


def test_values_form_ratios_within_a_repeat_and_count_our_reference_pass() -> None:
    def timing(seconds: list[list[float]], flops: float) -> train.Timing:
        return train.Timing(seconds, flops, 1.0, 1)

    timings = {
        "fastpref": timing([[1.0, 3.0], [10.0, 30.0]], 2.0),
        "reference": timing([[0.5], [5.0]], 1.0),
        "trl_default": timing([[10.0, 10.0], [100.0, 300.0]], 12.0),
        "trl_tuned": timing([[6.0, 6.0], [80.0, 80.0]], 8.0),
    }
    memory: dict[str, dict[str, int] | None] = {
        "fastpref": {"used": 30},
        "trl_default": {"used": 60},
        "trl_tuned": None,
    }
    found = train._values(timings, memory, 1.5)
    default, tuned = found["train_vs_trl_default"], found["train_vs_trl_tuned"]
    assert default is not None and tuned is not None
    assert default["value"] == pytest.approx((10 / 2.5 + 200 / 25) / 2)
    assert default["bound"] == pytest.approx(12 / 3)
    assert (default["perfect"], tuned["perfect"]) == pytest.approx((12 / 1.5, 8 / 1.5))
    assert tuned["value"] == pytest.approx((6 / 2 + 80 / 20) / 2)
    assert tuned["bound"] == pytest.approx(8 / 2)
    assert found["memory_vs_trl_default"] == {"value": 0.5}
    assert found["memory_vs_trl_tuned"] is None
