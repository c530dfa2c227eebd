"""Runs that must be one trajectory: recorded or not, in micro-batches or not, resumed or not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastpref.config import Config
from fastpref.data.dataset import load_dataset
from fastpref.data.pack import parts
from fastpref.dynamics.recorder import read_records
from fastpref.errors import NonFiniteError
from fastpref.train import train


@pytest.fixture(scope="module")
def base(tiny_config: Config) -> Config:
    return dataclasses.replace(
        tiny_config,
        max_length=44,  # cuts a few of the longer completions
        max_steps=14,
        learning_rate=3e-3,
        logging_steps=3,
        eval_steps=4,
        eval_sample_size=6,
        save_steps=5,
    )


@pytest.fixture(scope="module")
def straight(base: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(base, tmp_path_factory.mktemp("straight") / "run")


def run(config: Config, folder: Path, **changes: Any) -> Path:
    return train(dataclasses.replace(config, output_dir=str(folder), **changes), progress=False)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same_bits(a: Path, b: Path) -> bool:
    one, other = weights(a), weights(b)
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def steps(folder: Path) -> dict[str, np.ndarray]:
    return read_records(folder, "steps").to_pydict()


def test_the_run_learns_and_says_so(straight: Path, base: Config) -> None:
    loss = steps(straight)["loss"]
    assert loss[0] == pytest.approx(np.log(2), abs=1e-6)
    assert np.mean(loss[-3:]) < 0.66
    rows = read_records(straight, "behaviors").to_pylist()
    assert {r["step"] for r in rows} == {0, 4, 8, 12, 14}
    assert {(r["split"], r["behavior"]) for r in rows} == {
        (split, name) for split in ("train_sample", "eval") for name in ("agrees", "polite")
    }
    last = [r for r in rows if r["step"] == 14 and r["split"] == "train_sample"]
    before = [r for r in rows if r["step"] == 12 and r["split"] == "train_sample"]
    for now, then in zip(last, before, strict=True):
        assert now["rate_obs"] == pytest.approx((now["margin"] - then["margin"]) / 2, rel=1e-9)
    for row in rows:  # "polite" has the same first differing token in all its pairs
        known = [row[name] is not None for name in ("delta", "lambda_max", "trace", "mu_dot_d")]
        assert known == [row["behavior"] == "agrees"] * 4
    pairs = read_records(straight, "pairs").to_pylist()
    trained = [r for r in pairs if r["split"] == "train"]
    assert len(trained) == 14 * 8
    assert all(r["head_gnorm_m"] > 0 for r in trained)
    for r in trained:
        expected = base.beta / (1 + np.exp(base.beta * r["margin"]))
        assert r["weight"] == pytest.approx(expected, rel=1e-5)
    index = {r["pair_id"]: r for r in read_records(straight, "index").to_pylist()}
    assert len(index) == 80
    assert {index[r["pair_id"]]["split"] for r in trained} == {"train"}


def test_columns_and_metrics_agree_with_the_data(
    straight: Path, base: Config, tiny_tokenizer: Any
) -> None:
    dataset = load_dataset(base, tiny_tokenizer)
    known = {p.pair_id: p for p in dataset.train}
    rows = read_records(straight, "pairs").to_pylist()
    trained = [r for r in rows if r["split"] == "train"]
    for r in trained:
        pair = known[r["pair_id"]]
        assert (r["prompt_len"], r["truncated"]) == (len(pair.prompt), bool(pair.truncated))
        assert r["chosen_len"] == len(pair.chosen) and r["rejected_len"] == len(pair.rejected)
        assert r["shared_len"] == parts(pair).common
        ratios = [r[f"logp_{s}"] - r[f"ref_logp_{s}"] for s in ("chosen", "rejected")]
        assert r["margin"] == pytest.approx(ratios[0] - ratios[1], abs=1e-4)
    assert {r["truncated"] for r in trained} == {True, False}

    records = steps(straight)
    lines = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["split"] == "train":
            at = records["step"].index(line["step"])
            assert line["learning_rate"] == records["lr"][at]
            first = 3 * ((line["step"] - 1) // 3)  # logging_steps
            shown = [r for r in trained if first < r["step"] <= line["step"]]
        else:
            shown = [r for r in rows if (r["step"], r["split"]) == (line["step"], line["split"])]
            for name in dataset.behaviors:
                own = [r["margin"] for r in shown if r["behavior"] == name]
                ours = line[f"behavior/{name}/rewards/margins"]
                assert ours == pytest.approx(base.beta * np.mean(own), rel=1e-6, abs=1e-9)
        margins = np.array([r["margin"] for r in shown])
        expected = base.beta * margins.mean()
        assert line["rewards/margins"] == pytest.approx(expected, rel=1e-6, abs=1e-9)
        assert line["rewards/accuracies"] == pytest.approx((margins > 0).mean())
    # The warm-up's first step has rate 0, its second the first part of the way.
    assert records["lr"][:3] == pytest.approx([0.0, base.learning_rate / 2, base.learning_rate])


def test_the_final_model_loads_as_any_other(straight: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    module = AutoModelForCausalLM.from_pretrained(straight)
    assert torch.equal(module.lm_head.weight, weights(straight)["lm_head.weight"])
    assert AutoTokenizer.from_pretrained(straight).eos_token == "<|end|>"


@pytest.mark.parametrize("changes", [{"record": False}, {"track": "none"}, {"eval_steps": 0}])
def test_watching_changes_no_bit(
    base: Config, straight: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    assert same_bits(straight, run(base, tmp_path / "run", **changes))


def test_the_same_run_twice(base: Config, straight: Path, tmp_path: Path) -> None:
    again = run(base, tmp_path / "run")
    assert same_bits(straight, again)
    assert (again / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()


def test_micro_batches_are_invisible(base: Config, straight: Path, tmp_path: Path) -> None:
    cut = run(base, tmp_path / "run", max_tokens_per_microbatch=120)
    assert min(steps(cut)["micro_batches"]) >= 2
    assert max(steps(straight)["micro_batches"]) == 1
    ours, theirs = np.array(steps(cut)["loss"]), np.array(steps(straight)["loss"])
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert abs(np.mean(ours - theirs)) < 2e-6
    start = load_file(Path(base.model_name_or_path) / "model.safetensors")
    for name, theirs in weights(straight).items():
        update = (theirs - start[name]).norm()
        assert (weights(cut)[name] - theirs).norm() < 1e-2 * update, name


def test_resumed_equals_straight(base: Config, straight: Path, tmp_path: Path) -> None:
    """Stopped after 10 of 14 steps, between two lines of metrics and two evaluations."""
    folder = run(base, tmp_path / "run")
    for later in (folder / "checkpoint-14", folder / "model.safetensors"):
        if later.is_dir():
            for file in later.iterdir():
                file.unlink()
            later.rmdir()
        else:
            later.unlink()
    resumed = run(base, folder)
    assert same_bits(straight, resumed)
    for table in ("pairs", "steps", "behaviors", "index"):
        assert read_records(resumed, table).equals(read_records(straight, table)), table
    assert (resumed / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()


def test_a_finished_run_is_left_as_it_is(base: Config, tmp_path: Path) -> None:
    folder = run(base, tmp_path / "run")
    before = (folder / "metrics.jsonl").read_bytes()
    assert same_bits(folder / "checkpoint-14", run(base, folder))
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_another_run_in_the_same_folder_is_refused(base: Config, tmp_path: Path) -> None:
    folder = run(base, tmp_path / "run", max_steps=2)
    with pytest.raises(ValueError, match="beta: 0.1 -> 0.5"):
        run(base, folder, max_steps=2, beta=0.5)
    with pytest.raises(ValueError, match="overwrite_output_dir"):
        run(base, folder, max_steps=2, resume_from_checkpoint="none")
    (folder / "notes.txt").write_text("mine")
    run(base, folder, max_steps=2, beta=0.5, overwrite_output_dir=True)
    assert (folder / "notes.txt").read_text() == "mine"
    assert steps(folder)["beta"] == [0.5, 0.5]


def test_the_old_model_does_not_outlive_its_run(base: Config, tmp_path: Path) -> None:
    """A report, or a loader, would take it for the model of the run that replaces it."""
    folder = run(base, tmp_path / "run", max_steps=2)
    with pytest.raises(NonFiniteError):
        run(base, folder, learning_rate=1e20, max_grad_norm=0.0, overwrite_output_dir=True)
    assert not list(folder.glob("*.safetensors"))


def test_output_folders_that_cannot_be(base: Config, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="output_dir=.*cannot be made or written"):
        run(base, tmp_path / "file" / "run")
    with pytest.raises(ValueError, match="also model_name_or_path"):
        run(base, Path(base.model_name_or_path))


def test_a_resumed_run_needs_its_own_data_and_a_refusal_changes_nothing(
    base: Config, tiny_data: Path, tmp_path: Path
) -> None:
    import shutil

    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    folder = run(base, tmp_path / "run", dataset_name=(str(data),), max_steps=5)
    file = data / "polite.jsonl"
    file.write_text(file.read_text().replace("Thank you", "Thanks", 1))
    with pytest.raises(ValueError, match="changed since this run began"):
        run(base, folder, dataset_name=(str(data),), max_steps=9)

    shutil.rmtree(folder / "records")
    for checkpoint in (4, 3):
        shutil.copytree(folder / "checkpoint-5", folder / f"checkpoint-{checkpoint}")
    before = sorted(p.name for p in folder.glob("checkpoint-*"))
    file.write_text(file.read_text().replace("Thanks", "Thank you", 1))
    with pytest.raises(ValueError, match="cannot resume the records"):
        run(base, folder, dataset_name=(str(data),), max_steps=9)
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == before

    (folder / "config.yaml").unlink()
    with pytest.raises(ValueError, match="no config.yaml"):
        run(base, folder, dataset_name=(str(data),), max_steps=9)


def test_references_given_for_texts_that_are_cut_are_named(
    base: Config, tiny_data: Path, tmp_path: Path, tiny_tokenizer: Any, caplog: Any
) -> None:
    import json

    from fastpref.data.dataset import load_dataset

    data = tmp_path / "polite.jsonl"
    rows = [json.loads(line) for line in (tiny_data / data.name).read_text().splitlines()]
    given = {"ref_chosen_logps": -9.0, "ref_rejected_logps": -8.0}
    for number, said in ((0, False), (len(rows), True)):
        caplog.clear()
        both = [{**row, **given} if i < number else row for i, row in enumerate(rows)]
        data.write_text("".join(json.dumps(row) + "\n" for row in both))
        dataset = load_dataset(dataclasses.replace(base, dataset_name=(str(data),)), tiny_tokenizer)
        cut = sum(bool(pair.truncated) for pair in (*dataset.train, *dataset.held_out))
        assert cut > 1
        assert (f"{cut} pairs that max_length cuts bring reference" in caplog.text) is said


@pytest.mark.parametrize("change", ["order", "reference"])
def test_a_resumed_run_needs_the_order_and_the_references_it_began_with(
    change: str, base: Config, tiny_data: Path, tmp_path: Path
) -> None:
    """Also where no records know of the rows: either would steer the coming steps otherwise."""
    import json

    data = tmp_path / "polite.jsonl"
    rows = [json.loads(line) for line in (tiny_data / data.name).read_text().splitlines()]
    rows = [{**row, "ref_chosen_logps": -9.0, "ref_rejected_logps": -8.0} for row in rows]

    def resume(rows: list[dict[str, Any]], steps: int) -> None:
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        changes = {"dataset_name": (str(data),), "record": False, "eval_steps": 0}
        run(base, tmp_path / "run", max_steps=steps, **changes)

    resume(rows, 1)
    resume(rows, 2)
    rows = rows[::-1] if change == "order" else [{**r, "ref_chosen_logps": -59.0} for r in rows]
    with pytest.raises(ValueError, match="the data.* changed since this run began"):
        resume(rows, 3)


def test_config_is_written_resolved(straight: Path) -> None:
    from fastpref.config import load_config

    written = load_config(straight / "config.yaml")
    assert (written.dtype, written.device) == ("float32", "cpu")


def test_stops_at_a_loss_that_is_not_finite(base: Config, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"step \d+: .*(pair_id|gradient norm)"):
        run(base, tmp_path / "run", learning_rate=1e18, max_grad_norm=0.0)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert all("split" in json.loads(line) for line in lines)


def test_a_loss_without_a_reference_needs_none(base: Config, tmp_path: Path) -> None:
    """No reference pass, null in the records, and rewards of beta x log-prob per token."""
    cache = tmp_path / "reference"
    folder = run(base, tmp_path / "run", loss_type=("simpo", "sft"), ref_cache_dir=str(cache))
    assert not cache.exists()
    rows = read_records(folder, "pairs").to_pylist()
    for r in rows:
        assert r["ref_logp_chosen"] is None and r["ref_logp_rejected"] is None
        assert r["margin"] == pytest.approx(r["logp_chosen"] - r["logp_rejected"], abs=1e-4)
        per_token = [r[f"logp_{s}"] / r[f"{s}_len"] for s in ("chosen", "rejected")]
        if abs(per_token[0] - per_token[1]) > 1e-5:
            assert r["reward_accuracy"] == (per_token[0] > per_token[1])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in (x for x in lines if x["split"] != "train"):
        own = [r for r in rows if (r["step"], r["split"]) == (line["step"], line["split"])]
        chosen = np.mean([base.beta * r["logp_chosen"] / r["chosen_len"] for r in own])
        assert line["rewards/chosen"] == pytest.approx(chosen, rel=1e-5)
        per_behavior = [line[f"behavior/{n}/rewards/margins"] for n in ("agrees", "polite")]
        assert min(per_behavior) <= line["rewards/margins"] <= max(per_behavior)
        # sft is the loss per token of all the pairs that were evaluated.
        n = sum(r["chosen_len"] for r in own)
        nll = -sum(r["logp_chosen"] for r in own) / n
        simpo = np.mean([
            np.log1p(np.exp(-base.beta * (r["logp_chosen"] / r["chosen_len"]
                                          - r["logp_rejected"] / r["rejected_len"]) + 0.5))
            for r in own
        ])  # fmt: skip
        assert line["loss"] == pytest.approx(simpo + nll, rel=1e-5)
    assert all(r["displaced_frac"] is None for r in read_records(folder, "behaviors").to_pylist())
    from fastpref.report.html import write_report

    assert "<dd>simpo, sft</dd>" in write_report(folder).read_text()


def test_ipo_and_smoothing_run(base: Config, tmp_path: Path) -> None:
    ipo = run(base, tmp_path / "ipo", loss_type="ipo", max_steps=2)
    assert steps(ipo)["loss"][0] == pytest.approx(0.25 / base.beta**2, rel=1e-5)
    plain = run(base, tmp_path / "plain", max_steps=4)
    smooth = run(base, tmp_path / "smooth", max_steps=4, label_smoothing=0.3)
    assert not same_bits(plain, smooth)
    with pytest.raises(ValueError, match="label_smoothing"):
        run(base, tmp_path / "x", loss_type="ipo", label_smoothing=0.3)
