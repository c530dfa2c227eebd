"""Loggers: TensorBoard by its real package, read back; wandb and trackio by modules that record."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastpref import config_rules, loggers
from fastpref.config import Config
from fastpref.errors import NonFiniteError
from fastpref.journal import Journal
from fastpref.loggers import STATE_FILE, Loggers, demand_packages, logged_values


class Service(types.ModuleType):
    """What fastpref calls of wandb and of trackio (0.31 and 0.43); keeps every call."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.inits: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.metrics: list[tuple[str, dict[str, Any]]] = []
        self.summary: dict[str, float] = {}
        self.finished = 0

    def init(self, **given: Any) -> Service:
        self.inits.append(given)
        self.id = given.get("id") or "abc123"
        return self

    def define_metric(self, name: str, **given: Any) -> None:
        self.metrics.append((name, given))

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self, exit_code: int = 0) -> None:
        self.finished += 1
        self.exit_code = exit_code


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    module = Service("wandb")
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    yield module


@pytest.fixture
def trackio(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    module = Service("trackio")
    monkeypatch.setitem(sys.modules, "trackio", module)
    monkeypatch.delenv("TRACKIO_PROJECT", raising=False)
    yield module


def write_steps(journal: Journal, first: int, last: int, slope: float = 1.0) -> None:
    """A training line each step, an evaluation every third, a flush every second."""
    for step in range(first, last + 1):
        loss = slope / step
        journal.metrics({"step": step, "epoch": step / 8, "split": "train", "loss": loss})
        journal.perf({"step": step, "pairs_per_second": 10.0})
        if step % 3 == 0:
            line = {"rewards/margins": slope, "behavior/a b/update_rate": None, "loss": loss}
            journal.perf({"step": step, "split": "eval", "eval_runtime": 0.5})
            journal.metrics({"step": step, "epoch": step / 8, "split": "eval", **line})
            journal.metrics({"step": step, "split": "train_sample", "loss": loss, "epoch": 1.0})
        if step % 2 == 0:
            journal.flush()


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    reader.Reload()
    return {
        name: [(e.step, e.value) for e in reader.Scalars(name)] for name in reader.Tags()["scalars"]
    }


def test_names_are_those_of_transformers_integrations() -> None:
    from transformers.integrations.integration_utils import rewrite_logs

    train = {"loss": 1.0, "rewards/chosen": 2.0, "learning_rate": 3.0, "epoch": 0.5}
    assert logged_values({"step": 3, "split": "train", **train}) == rewrite_logs(train)
    held_out = {"loss": 1.0, "rewards/margins": 2.0, "epoch": 0.5}
    theirs = {key if key == "epoch" else f"eval_{key}": v for key, v in held_out.items()}
    assert logged_values({"step": 3, "split": "eval", **held_out}) == rewrite_logs(theirs)
    clocks = {"eval_runtime": 1.0, "eval_samples_per_second": 2.0}
    assert logged_values({"step": 3, "split": "eval", **clocks}) == rewrite_logs(clocks)
    end = {"train_runtime": 1.0, "train_loss": 2.0}
    assert logged_values({"step": 3, "split": "train", **end}) == rewrite_logs(end)
    named = {f"eval_help_{key}": value for key, value in held_out.items() if key != "epoch"}
    ours = logged_values({"step": 3, "split": "eval_help", **held_out})
    assert ours == rewrite_logs(named | {"epoch": held_out["epoch"]})
    assert logged_values({"step": 1, "split": "eval", "behavior/a/x": 1.0, "y": None}) == {
        "behavior/a/x": 1.0
    }
    sample = {"step": 1, "split": "train_sample", "loss": 1.0, "train_sample_runtime": 2.0}
    assert logged_values(sample) == {"train_sample/loss": 1.0, "train_sample/runtime": 2.0}
    assert logged_values({"step": 1, "tokens_per_second": 5.0}) == {"perf/tokens_per_second": 5.0}


def test_tensorboard_reads_back_what_was_written(tmp_path: Path) -> None:
    config = Config(output_dir=str(tmp_path), report_to="tensorboard")  # type: ignore[arg-type]
    with Journal(config, 0) as journal:
        write_steps(journal, 1, 6)
        journal.finish({"step": 6, "train_runtime": 9.0, "train_loss": 0.25})
    found = events(tmp_path / "tensorboard")
    assert [step for step, _ in found["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert found["train/loss"][3] == (4, 0.25)
    assert found["eval/rewards/margins"] == [(3, 1.0), (6, 1.0)]
    assert found["eval/runtime"] == [(3, 0.5), (6, 0.5)]
    assert found["train/train_runtime"] == [(6, 9.0)]
    assert set(found) == {
        *("train/loss", "train/epoch", "train/train_runtime", "train/train_loss"),
        *("eval/loss", "eval/rewards/margins", "eval/runtime", "train_sample/loss"),
        "perf/pairs_per_second",
    }


@pytest.mark.parametrize("lost", ["nothing", "state", "events"])
def test_tensorboard_of_a_resumed_run_has_every_point_once(
    tmp_path: Path, lost: str, event_files_in_order: None
) -> None:
    """Killed after step 6, resumed from a checkpoint of step 4, with other numbers from there."""
    folder = tmp_path / "elsewhere"
    config = Config(
        output_dir=str(tmp_path),
        report_to=("tensorboard",),
        logging_dir=str(folder),
    )
    with Journal(config, 0) as journal:
        write_steps(journal, 1, 6)
    if lost == "state":  # killed between telling and noting that it was told
        (tmp_path / STATE_FILE).unlink()
    if lost == "events":
        for file in folder.iterdir():
            file.unlink()
        (tmp_path / STATE_FILE).unlink()
    with Journal(config, 4) as journal:
        write_steps(journal, 5, 8, slope=3.0)
    found = events(folder)
    expected = [(n, 1 / n) for n in range(1, 5)] + [(n, 3 / n) for n in range(5, 9)]
    assert found["train/loss"] == [(n, pytest.approx(v)) for n, v in expected]
    assert found["eval/rewards/margins"] == [(3, 1.0), (6, 3.0)]


def test_wandb_and_trackio_are_told_every_step_once(
    tmp_path: Path, wandb: Service, trackio: Service
) -> None:
    config = Config(
        output_dir=str(tmp_path / "my-run"),
        report_to=("wandb", "trackio"),
        learning_rate=3e-4,
    )
    with Journal(config, 0) as journal:
        write_steps(journal, 1, 6)
    with Journal(config, 4) as journal:
        write_steps(journal, 5, 8)
        journal.finish({"step": 8, "train_runtime": 9.0, "train_loss": 0.25})
    for service in (wandb, trackio):
        assert [step for step, _ in service.logged] == list(range(1, 9))
        step, values = service.logged[2]
        assert values["train/loss"] == pytest.approx(1 / 3) and values["train/global_step"] == 3
        assert values["eval/loss"] == values["train_sample/loss"] == pytest.approx(1 / 3)
        assert service.finished == 2
        first, second = service.inits
        assert first["project"] == second["project"] == "fastpref"
        assert first["name"] == second["name"] == "my-run"
        assert first["config"]["learning_rate"] == 3e-4
    assert [given["id"] for given in wandb.inits] == [None, "abc123"]
    assert [given["resume"] for given in wandb.inits] == [None, "allow"]
    assert [given["resume"] for given in trackio.inits] == ["never", "allow"]
    assert wandb.summary == {"train_runtime": 9.0, "train_loss": 0.25}
    assert ("*", {"step_metric": "train/global_step", "step_sync": True}) in wandb.metrics


def test_a_service_that_joins_later_is_told_the_past(tmp_path: Path, wandb: Service) -> None:
    plain = Config(output_dir=str(tmp_path))
    with Journal(plain, 0) as journal:
        write_steps(journal, 1, 6)
    config = Config(
        output_dir=str(tmp_path), report_to=("wandb",), run_name="named", project="mine"
    )
    with Journal(config, 4) as journal:
        write_steps(journal, 5, 6)
    assert [step for step, _ in wandb.logged] == list(range(1, 7))
    assert wandb.logged[0][1]["perf/pairs_per_second"] == 10.0
    assert (wandb.inits[0]["name"], wandb.inits[0]["project"]) == ("named", "mine")


def test_projects_come_from_the_environment_unless_named(
    tmp_path: Path, wandb: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "from-env")
    for project in (None, "mine"):
        config = Config(output_dir=str(tmp_path), report_to=("wandb",), project=project)
        Loggers(config, 0, []).close()
    assert [given["project"] for given in wandb.inits] == ["from-env", "mine"]


def test_a_run_that_failed_is_told_to_have(tmp_path: Path, wandb: Service) -> None:
    config = Config(output_dir=str(tmp_path), report_to=("wandb",))
    with pytest.raises(NonFiniteError), Journal(config, 0):
        raise NonFiniteError("step 3")
    assert wandb.exit_code == 1
    with Journal(config, 0):
        pass
    assert wandb.exit_code == 0


def test_a_service_that_cannot_begin_is_bad_input(
    tmp_path: Path, wandb: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**given: Any) -> None:
        raise RuntimeError("no API key")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ValueError, match="report_to: wandb could not begin a run.*no API key"):
        Journal(Config(output_dir=str(tmp_path), report_to=("wandb",)), 0)


def test_without_loggers_no_file_is_left(tmp_path: Path) -> None:
    with Journal(Config(output_dir=str(tmp_path), report_to=("none",)), 0) as journal:
        write_steps(journal, 1, 2)
    assert {file.name for file in tmp_path.iterdir()} == {"metrics.jsonl", "perf.jsonl"}


def test_only_rank_0_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with Journal(Config(output_dir=str(tmp_path), report_to=("wandb",)), 0) as journal:
        write_steps(journal, 1, 2)
        journal.finish({"step": 2})
        assert journal.log_history() == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", config_rules.LOGGERS)
def test_a_missing_package_is_told_with_its_remedy(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("torch.utils.tensorboard", "tensorboard", "wandb", "trackio"):
        monkeypatch.setitem(sys.modules, module, None)  # importing it fails
    demand_packages(Config())
    assert set(config_rules.LOGGERS) == set(loggers.LOGGERS) == set(loggers.PACKAGES)
    with pytest.raises(ValueError, match=f"report_to: {name} needs.*pip install {name}"):
        demand_packages(Config(report_to=(name,)))


def test_log_history_is_as_transformers_has_it(tmp_path: Path) -> None:
    config = Config(output_dir=str(tmp_path))
    with Journal(config, 0) as journal:
        write_steps(journal, 1, 6)
        history = journal.log_history()
    assert history[0] == {"step": 1, "epoch": 0.125, "loss": 1.0}
    assert history[3] == {"step": 3, "epoch": 0.375, "eval_rewards/margins": 1.0,
                          "eval_loss": pytest.approx(1 / 3)}  # fmt: skip
    with Journal(config, 4) as journal:
        write_steps(journal, 5, 6)
        assert journal.log_history() == history
    json.dumps(history)
