"""Schedules against transformers' own, and the bits that earlier versions gave."""

from __future__ import annotations

import math
import tempfile
from typing import Any

import pytest
import torch
from torch import nn

from fastpref.config import Config
from fastpref.config_options import LR_SCHEDULER_KWARGS
from fastpref.schedule import Schedule, rate_factor, warmup_steps

KINDS: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}),
    ("cosine", {}),
    ("cosine", {"num_cycles": 1.5}),
    ("cosine_with_restarts", {"num_cycles": 3}),
    ("polynomial", {}),
    ("polynomial", {"lr_end": 1e-5, "power": 2.0}),
    ("constant", {}),
    ("constant_with_warmup", {}),
    ("inverse_sqrt", {}),
    ("inverse_sqrt", {"timescale": 7}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ("cosine_with_min_lr", {"min_lr": 1e-5, "num_cycles": 0.75}),
    ("cosine_warmup_with_min_lr", {"min_lr": 1e-5, "warmup_lr_rate": 0.2}),
    ("warmup_stable_decay", {"num_decay_steps": 11}),
    (
        "warmup_stable_decay",
        {"num_decay_steps": 5, "num_stable_steps": 9, "decay_type": "1-sqrt", "min_lr_ratio": 0.1},
    ),
]
TOTAL = 37


def optimizer(config: Config) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=config.learning_rate)


def test_every_schedule_is_compared_here() -> None:
    assert {kind for kind, _ in KINDS} == set(LR_SCHEDULER_KWARGS)


@pytest.mark.parametrize("warmup", [0, 0.1, 12])
@pytest.mark.parametrize(("kind", "kwargs"), KINDS)
@pytest.mark.filterwarnings("ignore:Both num_training_steps")
def test_schedule_equals_transformers(kind: str, kwargs: dict[str, Any], warmup: float) -> None:
    from transformers import TrainingArguments, get_scheduler

    config = Config(
        lr_scheduler_type=kind,
        lr_scheduler_kwargs=kwargs,  # type: ignore[arg-type]
        warmup_steps=warmup,
        learning_rate=3e-4,
    )
    args = TrainingArguments(output_dir=tempfile.mkdtemp(), warmup_steps=warmup, use_cpu=True)
    mine_optimizer, theirs_optimizer = optimizer(config), optimizer(config)
    name = "constant_with_warmup" if kind == "constant" else kind
    rises = args.get_warmup_steps(TOTAL)
    theirs = get_scheduler(name, theirs_optimizer, rises, TOTAL, scheduler_specific_kwargs=kwargs)
    mine = Schedule(mine_optimizer, config, TOTAL)
    assert warmup_steps(config, TOTAL) == rises
    for step in range(TOTAL):
        rates = {group["lr"] for group in mine_optimizer.param_groups}
        assert rates == {mine.learning_rate} == {mine.rate(step)}
        expected = theirs.get_last_lr()[0]
        if kind == "linear":
            assert mine.learning_rate == pytest.approx(expected, rel=1e-12, abs=1e-18), step
        else:
            assert mine.learning_rate == expected, step
        theirs_optimizer.step()
        theirs.step()
        mine.step()


@pytest.mark.parametrize("ratio", [None, 0.0, 0.33, 1.0])
@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_bits_of_version_0_1(kind: str, ratio: float | None) -> None:
    """Written as fastpref 0.1.0 computed them: runs that began then go on with the same bits."""
    shape = {
        "linear": lambda p: 1.0 - p,
        "cosine": lambda p: 0.5 * (1.0 + math.cos(math.pi * p)),
        "constant": lambda p: 1.0,
    }[kind]
    config = Config(lr_scheduler_type=kind, warmup_ratio=ratio, learning_rate=3e-4)
    for total in (1, 10, 37, 250):
        rises = math.ceil((0.1 if ratio is None else ratio) * total)
        schedule = Schedule(optimizer(config), config, total)
        for step in range(total + 1):
            expected = 3e-4 * max(0.0, shape(min(1.0, (step - rises) / max(1, total - rises))))
            if step < rises:
                expected = 3e-4 * (step / rises)
            assert schedule.rate(step) == expected, (total, step)


def test_warmup_in_steps_or_as_a_part() -> None:
    def rises(**given: Any) -> int:
        return warmup_steps(Config(**given), 250)

    assert rises() == rises(warmup_ratio=0.1) == rises(warmup_steps=0.1) == 25
    assert rises(warmup_steps=1) == 1 and rises(warmup_ratio=1) == 250
    assert rises(warmup_steps=0) == 0 and rises(warmup_steps="40") == 40


def test_what_does_not_fit_into_the_run() -> None:
    def factor(total: int, **given: Any) -> Any:
        return rate_factor(Config(**given, learning_rate=1e-3), total)

    stages = {"num_decay_steps": 6, "num_stable_steps": 3}
    with pytest.raises(ValueError, match=r"warm-up \(1 steps\).*more than the run's 9 steps"):
        factor(9, lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs=stages)
    with pytest.raises(ValueError, match="polynomial needs steps after the warm-up"):
        factor(4, lr_scheduler_type="polynomial", warmup_steps=4)
    with pytest.raises(ValueError, match="at least 1 step, got 0"):
        factor(0)


def test_a_warm_up_that_outlasts_the_run_is_told(caplog: pytest.LogCaptureFixture) -> None:
    config = Config(warmup_steps=40)
    factor = rate_factor(config, 20)  # which a run asks before it makes its schedule
    Schedule(optimizer(config), config, 20)
    assert caplog.text.count("rises from 0 for 40 steps and the run has 20") == 1
    assert factor(10) == 0.25


def test_schedule_goes_on_after_its_state() -> None:
    config = Config(learning_rate=1e-3)
    straight, resumed = (Schedule(optimizer(config), config, 20) for _ in range(2))
    for _ in range(7):
        straight.step()
    resumed.load_state_dict(straight.state_dict())
    assert resumed.optimizer.param_groups[0]["lr"] == straight.learning_rate > 0
