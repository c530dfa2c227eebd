"""What a run says of its speed: perf.jsonl, the trace, and that neither changes what is learned."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastpref.config import Config
from fastpref.data.dataset import load_dataset
from fastpref.errors import NonFiniteError
from fastpref.flops import Shape
from fastpref.tracing import RANGES
from fastpref.train import train


@pytest.fixture(scope="module")
def base(tiny_config: Config) -> Config:
    return dataclasses.replace(
        tiny_config,
        max_length=44,
        max_tokens_per_microbatch=200,
        max_steps=9,
        logging_steps=3,
        eval_steps=4,
        save_steps=100,
        peak_tflops=0.5,
    )


@pytest.fixture(scope="module")
def plain(base: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(base, tmp_path_factory.mktemp("plain") / "run")


def run(config: Config, folder: Path, **changes: Any) -> Path:
    return train(dataclasses.replace(config, output_dir=str(folder), **changes), progress=False)


def perf(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "perf.jsonl").read_text().splitlines()]


def test_lines_add_up(base: Config, plain: Path, tiny_model_dir: Path) -> None:
    """FLOPs of the whole run are those of its pairs, and MFU is they over time and peak."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lines = [line for line in perf(plain) if "split" not in line]
    assert [line["step"] for line in lines] == [3, 6, 9]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    dataset = load_dataset(base, tokenizer)
    shape = Shape.of(AutoModelForCausalLM.from_pretrained(tiny_model_dir))
    done = sum(line["tflops_per_second"] * line["seconds"] for line in lines) * 1e12
    per_epoch = dataset.pack(dataset.train)
    whole = shape.step(per_epoch.lengths, per_epoch.rows.numel(), per_epoch.unread)
    assert -(-len(dataset.train) // 8) == 9  # the run is an epoch
    assert done == pytest.approx(whole, rel=1e-9)
    for line in lines:
        assert line["steps"] == 3 and line["seconds"] > 0
        assert line["mfu"] == pytest.approx(line["tflops_per_second"] / 0.5)
        assert 0 < line["data_wait"] < 1 and 0 < line["record_overhead"] < 1
        assert line["data_wait"] + line["record_overhead"] < 1


def test_warm_up_and_steady_state_stand_apart(plain: Path) -> None:
    (last,) = [line for line in perf(plain) if "train_runtime" in line]
    assert (last["warm_up_steps"], last["steady_steps"]) == (4, 5)
    lines = [line for line in perf(plain) if "split" not in line]
    both = last["warm_up_seconds"] + last["steady_steps"] * last["seconds_per_step"]
    assert both == pytest.approx(sum(line["seconds"] for line in lines))
    assert last["pairs_per_second"] == pytest.approx(8 / last["seconds_per_step"])
    assert last["mfu"] == pytest.approx(last["tflops_per_second"] / 0.5)


def test_an_unknown_peak_gives_no_mfu(base: Config, tmp_path: Path, caplog: Any) -> None:
    import logging

    caplog.set_level(logging.INFO)
    folder = run(base, tmp_path / "run", peak_tflops=None, max_steps=1, eval_steps=0)
    lines = perf(folder)
    assert [line["mfu"] for line in lines] == [None, None]
    assert lines[0]["tflops_per_second"] > 0
    assert "MFU not known (peak_tflops)" in caplog.text and "useful TFLOP/s" in caplog.text


def test_a_trace_has_every_range_and_changes_no_bit(
    base: Config, plain: Path, tmp_path: Path
) -> None:
    folder = run(base, tmp_path / "run", profile=2, eval_steps=0)
    (trace,) = (folder / "profile").iterdir()
    assert trace.name == "steps-4-5.json.gz"
    with gzip.open(trace) as file:
        events = json.load(file)["traceEvents"]
    count = {name: sum(e.get("name") == name for e in events) for name in RANGES}
    assert all(count.values()), count
    assert count["optimizer"] == 2 and count["backward"] == count["forward"] >= 2
    one, other = (load_file(f / "model.safetensors") for f in (folder, plain))
    assert all(torch.equal(one[name], other[name]) for name in one)
    (last,) = [line for line in perf(folder) if "train_runtime" in line]
    assert (last["warm_up_steps"], last["steady_steps"]) == (5, 4)  # the traced ones are no rule


def test_a_step_that_nobody_waited_for_is_told_later_and_not_recorded(
    base: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: the step after a bad one is given to the device before the host knows."""
    from fastpref import step
    from fastpref.dynamics.recorder import read_records

    # On the CPU reading is free, and a step asks at once: here it does not.
    monkeypatch.setattr(step, "demand_finite", lambda result: None)
    with pytest.raises(NonFiniteError, match=r"^step \d+: .*(pair_id|gradient norm)") as caught:
        run(base, tmp_path / "run", learning_rate=1e18, max_grad_norm=0.0, logging_steps=100)
    bad = int(str(caught.value).split(":")[0].removeprefix("step "))
    assert read_records(tmp_path / "run", "steps").to_pydict()["step"] == list(range(1, bad))
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_trace_ends_with_its_run(base: Config, tmp_path: Path) -> None:
    folder = run(base, tmp_path / "run", profile=5, max_steps=2, eval_steps=0)
    assert [p.name for p in (folder / "profile").iterdir()] == ["steps-1-2.json.gz"]
