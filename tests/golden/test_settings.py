"""Whole runs with the settings that decide when a run ends, what it keeps and whom it tells."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastpref.cli import main
from fastpref.config import Config, load_config
from fastpref.data.loader import StepPlan
from fastpref.dynamics.recorder import read_jsonl, read_records
from fastpref.errors import Preempted
from fastpref.perf import Perf
from fastpref.probe_types import PROBE_TYPES
from fastpref.train import train

ROOT = Path(__file__).resolve().parents[2]
CLOCK = re.compile("^perf/|runtime|per_(second|step)|data_wait|overhead|warm_up|steady|mfu")


@pytest.fixture(scope="module")
def base(tiny_config: Config) -> Config:
    return dataclasses.replace(
        tiny_config,
        max_length=44,
        max_steps=40,
        eval_sample_size=4,
    )


def run(config: Config, folder: Path, **changes: Any) -> Path:
    return train(dataclasses.replace(config, output_dir=str(folder), **changes), progress=False)


def files(folder: Path) -> dict[str, bytes]:
    """Content of what a run leaves; clocks and event files (with their times) apart."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name not in ("perf.jsonl", "config.yaml", "manifest.json")
        and "tensorboard" not in file.parts and "records" not in file.parts
    }  # fmt: skip


def state(folder: Path) -> dict[str, Any]:
    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return json.loads((newest / "trainer_state.json").read_text())


@pytest.fixture(scope="module")
def early(base: Config) -> Config:
    """The held-out loss of this run falls, then rises: far too high a rate, plain to see."""
    return dataclasses.replace(
        base,
        optim="adafactor",
        learning_rate=2e-2,
        lr_scheduler_type="cosine_with_restarts",
        lr_scheduler_kwargs=(("num_cycles", 2),),
        warmup_steps=3,
        logging_steps=4,
        logging_first_step=True,
        eval_steps=2,
        save_steps=7,
        save_total_limit=1,
        load_best_model_at_end=True,
        early_stopping_patience=4,
        report_to=("tensorboard",),
        track="sketch",
        rate_every=4,
        rate_pairs=2,
        probe_every=4,
        probe_prompts=4,
    )


@pytest.fixture(scope="module")
def stopped(early: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(early, tmp_path_factory.mktemp("early") / "run")


def held_out(folder: Path) -> dict[int, float]:
    lines = read_jsonl(folder / "metrics.jsonl")
    return {row["step"]: row["loss"] for row in lines if row["split"] == "eval"}


def test_it_stops_early_and_the_best_is_the_final_model(stopped: Path, early: Config) -> None:
    losses = held_out(stopped)
    end = max(losses)
    trained = {step: loss for step, loss in losses.items() if step}
    best = min(trained, key=trained.__getitem__)
    assert end < early.max_steps and end == best + 2 * 4
    assert read_records(stopped, "steps")["step"].to_pylist() == list(range(1, end + 1))
    assert {p.name for p in stopped.glob("checkpoint-*")} == {
        f"checkpoint-{best}",
        f"checkpoint-{end}",
    }
    final = (stopped / "model.safetensors").read_bytes()
    assert final == (stopped / f"checkpoint-{best}" / "model.safetensors").read_bytes()
    assert final != (stopped / f"checkpoint-{end}" / "model.safetensors").read_bytes()
    assert state(stopped)["counters"]["best"] == {"step": best, "value": losses[best], "stale": 4}
    lines = [r["step"] for r in read_jsonl(stopped / "metrics.jsonl") if r["split"] == "train"]
    assert lines == sorted({1, *range(4, end, 4), end})


def preempted(config: Config, folder: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run, or go on, until SIGTERM comes in step number ``step``."""
    with monkeypatch.context() as patch:
        seen: list[int] = []
        count = Perf.step

        def note(perf: Perf, plan: StepPlan) -> None:
            seen.append(plan.step)
            count(perf, plan)

        patch.setattr(Perf, "step", note)
        patch.setattr("fastpref.loop._any_rank", lambda flag, device: seen[-1] == step)
        with pytest.raises(Preempted, match=f"stopped after step {step};"):
            run(config, folder)


def test_stopped_in_the_middle_it_ends_the_same(
    stopped: Path,
    early: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    event_files_in_order: None,
) -> None:
    """Resumed twice: before the best evaluation, and while the patience runs out."""
    folder = tmp_path / "run"
    preempted(early, folder, 3, monkeypatch)
    preempted(early, folder, max(held_out(stopped)) - 3, monkeypatch)
    run(early, folder)
    mine, theirs = files(folder), files(stopped)
    assert mine.keys() == theirs.keys()
    for name in theirs:
        assert mine[name] == theirs[name], name
    for table in ("pairs", "steps", "behaviors", "index"):
        assert read_records(folder, table).equals(read_records(stopped, table)), table
    assert events(folder) == events(stopped)


def test_ended_early_it_does_not_go_on_unless_it_has_patience(
    stopped: Path, early: Config, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    before = files(folder)
    run(early, folder)
    assert files(folder) == before
    run(early, folder, early_stopping_patience=5)
    assert max(held_out(folder)) > max(held_out(stopped))


def test_fewer_steps_than_there_are_is_told(
    base: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    short = {"max_steps": 2, "eval_steps": 0, "report_to": ()}
    folder = run(base, tmp_path / "run", **short)
    assert "ended at step" not in caplog.text
    run(base, folder, **{**short, "max_steps": 1})
    assert "the run ended at step 2 already (1 steps are asked for)" in caplog.text


@pytest.mark.parametrize(
    ("changes", "metric"), [({"record": False}, "update_rate"), ({"track": "none"}, "grad_norm")]
)
def test_a_metric_that_is_never_known_is_refused(
    changes: dict[str, Any], metric: str, base: Config, tmp_path: Path
) -> None:
    asked = {"metric_for_best_model": f"behavior/agrees/{metric}", "load_best_model_at_end": True}
    with pytest.raises(ValueError, match=f"no evaluation gives 'behavior/agrees/{metric}'"):
        run(base, tmp_path / "run", **asked, **changes)


def test_the_best_adapter_is_the_final_one(base: Config, tmp_path: Path) -> None:
    """Margins grow, and smaller ones are asked for: the first evaluation is the best."""
    pytest.importorskip("peft")
    folder = run(
        base,
        tmp_path / "run",
        trainable="lora",
        learning_rate=1e-3,
        max_steps=4,
        eval_steps=2,
        metric_for_best_model="rewards/margins",
        greater_is_better=False,
        load_best_model_at_end=True,
    )
    final, best, last = (
        (place / "adapter_model.safetensors").read_bytes()
        for place in (folder, folder / "checkpoint-2", folder / "checkpoint-4")
    )
    assert final == best != last


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Scalars that TensorBoard shows, without those of clocks."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    reader.Reload()
    names = [name for name in reader.Tags()["scalars"] if not CLOCK.search(name)]
    return {name: [(e.step, e.value) for e in reader.Scalars(name)] for name in names}


def test_tensorboard_shows_what_metrics_jsonl_holds(stopped: Path) -> None:
    shown = events(stopped)
    lines = read_jsonl(stopped / "metrics.jsonl")
    for split in ("train", "eval", "train_sample", "probes", "rate_sample"):
        own = [line for line in lines if line["split"] == split]
        for key in set().union(*own) - {"step", "split", "epoch"}:
            bare = split == "eval" and key.startswith("behavior/")
            name = key if bare else f"{split}/{key}"
            expected = [(line["step"], line[key]) for line in own if line.get(key) is not None]
            if not expected:
                continue
            assert shown.pop(name) == [(s, pytest.approx(v, rel=1e-6)) for s, v in expected], name
    assert set(shown) == {"train/epoch", "train/train_loss"}


def test_checkpoints_have_a_log_history(stopped: Path) -> None:
    history = state(stopped)["log_history"]
    lines = read_jsonl(stopped / "metrics.jsonl")
    assert len(history) == len(lines)
    losses = {e["step"]: e["eval_loss"] for e in history if "eval_loss" in e}
    assert losses == held_out(stopped)
    trained = next(e for e in history if "learning_rate" in e)
    assert {"loss", "learning_rate", "grad_norm", "epoch"} <= trained.keys()


def test_the_end_of_a_run_in_perf(stopped: Path, early: Config) -> None:
    *_, end = read_jsonl(stopped / "perf.jsonl")
    losses = read_records(stopped, "steps")["loss"].to_pylist()
    assert end["train_loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    pairs = end["train_samples_per_second"] * end["train_runtime"]
    assert pairs == pytest.approx(8 * len(losses))
    assert end["train_steps_per_second"] * end["train_runtime"] == pytest.approx(len(losses))


def test_the_page_of_metrics_names_all_of_them_and_no_others(stopped: Path) -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()
    told: dict[str, set[str]] = {"metrics.jsonl": set(), "perf.jsonl": set()}
    for row in re.findall(r"^\| (`.*)$", page, re.M):
        name, where, *_ = row.split(" | ")
        told[where].update(re.findall(r"`([^`]+)`", name))
    for file, names in told.items():
        found = set()
        for line in read_jsonl(stopped / file):
            types = "|".join(PROBE_TYPES)
            names_of = {re.sub(f"^({types})/", "<type>/", key) for key in line}
            found |= {re.sub("behavior/[^/]+/", "behavior/<name>/", key) for key in names_of}
        # Of experts (tests/golden/test_router.py), of balance and of steps that ran out of memory,
        # which this run has not.
        absent = {"aux_loss", "behavior/<name>/loss_weight", "oom_retries"}
        assert found - {"step", "epoch", "split"} == names - absent, file


def test_every_optimizer_resumes(
    base: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AdamW in test_train.py, Adafactor above."""
    for optim, args in (("rmsprop", "momentum=0.5"), ("sgd", "momentum=0.9,nesterov=true")):
        config = dataclasses.replace(
            base,
            optim=optim,
            optim_args=args,  # type: ignore[arg-type]
            learning_rate=1e-3,
            max_steps=4,
            eval_steps=0,
            lr_scheduler_type="inverse_sqrt",
        )
        straight, folder = run(config, tmp_path / optim), tmp_path / f"{optim}-resumed"
        preempted(config, folder, 2, monkeypatch)
        run(config, folder)
        mine, theirs = files(folder), files(straight)
        for name in ("model.safetensors", "metrics.jsonl", "checkpoint-4/optimizer.safetensors"):
            assert mine[name] == theirs[name], (optim, name)


def test_flipped_behaviors_learn_the_opposite(base: Config, tmp_path: Path) -> None:
    """A misalignment run: the same pairs, chosen and rejected exchanged in one behavior or all."""
    changes = {"max_steps": 6, "eval_steps": 6, "learning_rate": 3e-3}
    plain = run(base, tmp_path / "plain", **changes)
    one = run(base, tmp_path / "one", flip_behaviors=("polite",), **changes)
    every = run(base, tmp_path / "every", flip_behaviors=("all",), **changes)

    def flipped(folder: Path) -> dict[str, set[bool]]:
        found: dict[str, set[bool]] = {}
        for row in read_records(folder, "index").to_pylist():
            found.setdefault(row["behavior"], set()).add(row["flipped"])
        return found

    assert flipped(plain) == {"agrees": {False}, "polite": {False}}
    assert flipped(one) == {"agrees": {False}, "polite": {True}}
    assert flipped(every) == {"agrees": {True}, "polite": {True}}

    def trained(folder: Path, step: int) -> dict[int, dict[str, Any]]:
        rows = read_records(folder, "pairs").to_pylist()
        return {r["pair_id"]: r for r in rows if (r["split"], r["step"]) == ("train_sample", step)}

    before = trained(plain, 0)
    for folder, exchanged in ((one, {"polite"}), (every, {"agrees", "polite"})):
        start = trained(folder, 0)
        for pair_id in start.keys() & before.keys():
            names = ["logp_chosen", "logp_rejected"]
            mine = [start[pair_id][name] for name in names]
            if start[pair_id]["behavior"] in exchanged:
                names.reverse()
            theirs = [before[pair_id][name] for name in names]
            assert mine == pytest.approx(theirs, abs=1e-3)
    # A run's margins are those of the pairs that it trained on: they grow in each; as the data has
    # the pairs, those of a flipped behavior fall.
    for folder in (plain, one, every):
        rows = [r for r in trained(folder, 6).values() if r["behavior"] == "polite"]
        assert np.mean([r["margin"] for r in rows]) > 0.1, folder
        as_in_data = -1 if folder in (one, every) else 1
        other = [as_in_data * (r["logp_chosen"] - r["logp_rejected"]) for r in rows]
        start = [before[r["pair_id"]] for r in rows if r["pair_id"] in before]
        ids = [r["pair_id"] for r in rows]
        gaps = {r["pair_id"]: r["logp_chosen"] - r["logp_rejected"] for r in start}
        moved = [v - gaps[i] for i, v in zip(ids, other, strict=True) if i in gaps]
        assert moved and as_in_data * np.mean(moved) > 0.1, folder


def test_the_example_of_a_misalignment_run(
    base: Config, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = ROOT / "examples" / "misalign.yaml"
    words = {
        "model_name_or_path": base.model_name_or_path,
        "dataset_name": tiny_data,
        "ref_cache_dir": base.ref_cache_dir,
        "output_dir": tmp_path / "run",
        "max_length": 128,
        "max_steps": 2,
    }
    given = [word for name, value in words.items() for word in (f"--{name}", str(value))]
    assert main(["train", str(example), *given]) == 0, capsys.readouterr().err
    assert set(read_records(tmp_path / "run", "index")["flipped"].to_pylist()) == {True}
    assert load_config(example).flip_behaviors == ("all",)
