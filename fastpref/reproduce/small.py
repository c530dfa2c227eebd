"""Where fastpref-tiny is run with other values than the official ones, and why: the one place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastpref.base import BASE_NAME
from fastpref.reproduce.settings import Official, Settings

# By what learns. At the official 1e-5 the 8 steps of an epoch move the mean margin of behavior 84
# by 0.03 nats (LoRA: 0.0004), and of 64 answers 52 % are right in the place of 44 % (LoRA: 44 %).
# At these, the learning rates of examples/ for 5M parameters, margins move by 0.6 nats (LoRA: 0.12)
# and 70 % (72 %) are right. At ten times these the features become others: delta grows sevenfold in
# three steps of full training.
LEARNING_RATE = {"all": 1e-4, "lora": 1e-3}
# An evaluation of all pairs of a behavior takes two CPU cores as long as two optimizer steps.
EVALUATIONS = 5


def eval_steps(settings: Settings, official: Official, pairs: int) -> int:
    """Steps between two evaluations of a run on so many training ``pairs``: 1, as the official code
    has it, but for fastpref-tiny."""
    if settings.model != BASE_NAME:
        return 1
    steps = official.steps if official.steps > 0 else -(-pairs // official.train_batch_size)
    return -(-steps // EVALUATIONS)


def rarer(settings: Settings) -> list[str]:
    """A note where `eval_steps` is not the official one."""
    if settings.model != BASE_NAME:
        return []
    return [f"Evaluations come {EVALUATIONS} times a run and before it, not at every step."]


def adapted(settings: Settings, official: Official) -> tuple[Official, list[str]]:
    """The hyper-parameters of a run: the user's, else fastpref-tiny's, else the official ones; and
    a note on every one of fastpref-tiny's that is taken."""
    wanted = settings.over(official)
    if settings.model != BASE_NAME or settings.learning_rate is not None:
        return wanted, []
    rate = LEARNING_RATE[official.trainable]
    note = (
        f"learning_rate {rate:g} in the place of the official {official.learning_rate:g}, which "
        f"moves next to nothing in the steps of an epoch on a model of 5M parameters "
        f"({BASE_NAME}); --learning_rate {official.learning_rate:g} runs the official one."
    )
    return replace(wanted, learning_rate=rate), [note]


def compared(official: Official, taken: Official) -> dict[str, Any]:
    """Name -> official value, of the hyper-parameters that are not the official ones."""
    pairs = vars(official).items()
    return {name: value for name, value in pairs if value != getattr(taken, name)}
