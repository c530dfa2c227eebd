"""All weights of the model learn, each behavior by itself."""

from __future__ import annotations

from fastpref.reproduce.finetune import compare
from fastpref.reproduce.outcome import Outcome
from fastpref.reproduce.settings import Official, Settings

# DPO_training.py, plotted by plot_log_data.py: AdamW, constant rate, one epoch.
OFFICIAL = Official(
    behaviors=(108, 84, 88, 54, 100),
    trainable="all",
    optim="adamw_torch",
    learning_rate=1e-5,
    beta=1e-2,
    train_batch_size=128,
    steps=-1,
)


def run(settings: Settings) -> Outcome:
    """See `finetune.compare`."""
    return compare(settings, "full", OFFICIAL)
