"""Best evaluation and early stopping against transformers' own callback and bookkeeping."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastpref.best import Best
from fastpref.config import Config

CPU = torch.device("cpu")


def transformers_says(
    values: list[float], *, greater: bool, patience: int, threshold: float
) -> list[tuple[int | None, bool]]:
    """(best step, stop) after each evaluation at steps 1, 2, ..., from its Trainer's parts."""
    from transformers import EarlyStoppingCallback, Trainer
    from transformers.trainer_utils import SaveStrategy

    callback = EarlyStoppingCallback(patience, threshold)
    args = SimpleNamespace(
        metric_for_best_model="loss", greater_is_better=greater, save_strategy=SaveStrategy.STEPS
    )
    state = SimpleNamespace(best_metric=None, best_global_step=None, global_step=0)
    control = SimpleNamespace(should_training_stop=False)
    trainer: Any = SimpleNamespace(args=args, state=state)
    said = []
    for step, value in enumerate(values, 1):
        state.global_step, metrics = step, {"eval_loss": value}
        callback.on_evaluate(args, state, control, metrics)
        Trainer._determine_best_metric(trainer, metrics, None)
        said.append((state.best_global_step, control.should_training_stop))
    return said


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("greater", [True, False])
def test_same_best_and_same_stop_as_transformers(greater: bool, seed: int) -> None:
    draw = random.Random(seed)
    values = [draw.choice([math.nan, *(round(draw.gauss(0, 1), 1) for _ in range(5))])]
    values += [draw.choice([math.nan, *[draw.randint(-9, 9) / 8] * 9]) for _ in range(30)]
    patience, threshold = draw.randint(2, 6), draw.choice([0.0, 0.25])
    expected = transformers_says(values, greater=greater, patience=patience, threshold=threshold)
    best = Best(
        Config(
            metric_for_best_model="loss",
            greater_is_better=greater,
            early_stopping_patience=patience,
            early_stopping_threshold=threshold,
        )
    )
    stopped = False
    for step, value in enumerate(values, 1):
        before = best.step
        better = best.update(step, {"eval": {"loss": value}}, CPU)
        assert better == (best.step != before)
        stopped = stopped or best.stop  # their flag stays up
        assert (best.step, stopped) == expected[step - 1], (step, values[:step])
        resumed = Best(Config(early_stopping_patience=patience, early_stopping_threshold=threshold))
        resumed.load_state_dict(best.state_dict())
        assert resumed.stop == best.stop and resumed.value == best.value


@pytest.mark.parametrize(
    ("given", "metric", "greater"),
    [
        ({}, None, None),
        ({"load_best_model_at_end": True}, "loss", False),
        ({"early_stopping_patience": 2}, "loss", False),
        ({"metric_for_best_model": "eval_loss"}, "eval_loss", False),
        ({"metric_for_best_model": "rewards/accuracies"}, "rewards/accuracies", True),
        ({"metric_for_best_model": "logps/chosen", "greater_is_better": False}, "logps/chosen", 0),
    ],
)
def test_metric_and_direction_by_default(
    given: dict[str, Any], metric: str | None, greater: bool | None
) -> None:
    best = Best(Config(**given))
    assert best.metric == metric and best.greater == greater


def test_without_a_metric_nothing_is_best() -> None:
    best = Best(Config())
    best.demand_known([])
    assert not best.update(1, {}, CPU) and not best.stop and best.step is None


def test_names_that_no_evaluation_gives() -> None:
    names = ["train_sample_loss", "eval_loss", "eval_rewards/margins", "eval_behavior/a/x"]

    def demand(metric: str, known: list[str]) -> None:
        Best(Config(metric_for_best_model=metric)).demand_known(known)

    for metric in ("loss", "eval_loss", "train_sample_loss", "behavior/a/x"):
        demand(metric, names)
    with pytest.raises(ValueError, match="'rewards/margin'; did you mean rewards/margins?"):
        demand("rewards/margin", names)
    with pytest.raises(ValueError, match="there are behavior/a/x, loss, rewards/margins"):
        demand("zzz", names)
    with pytest.raises(ValueError, match="held-out pairs, and there are none; set eval_fraction"):
        demand("loss", names[:1])


def test_the_metric_may_be_of_another_split_or_not_finite() -> None:
    best = Best(Config(metric_for_best_model="train_sample_loss"))
    assert best.update(1, {"train_sample": {"loss": 2.0}, "eval": {"loss": 1.0}}, CPU)
    assert best.value == 2.0
    for odd in (math.inf, -math.inf, None):
        assert not best.update(2, {"train_sample": {"loss": odd}}, CPU)
    assert best.state_dict() == {"step": 1, "value": 2.0, "stale": 3}
