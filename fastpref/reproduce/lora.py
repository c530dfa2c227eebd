"""LoRA adapters learn, each behavior by itself; `start.LORA` holds their official settings."""

from __future__ import annotations

from fastpref.lora import check_available
from fastpref.reproduce.finetune import compare
from fastpref.reproduce.outcome import Outcome
from fastpref.reproduce.settings import Official, Settings

# DPO_training.py --peft, plotted by plot_log_data.py.
OFFICIAL = Official(
    behaviors=(108, 84, 88, 54, 100),
    trainable="lora",
    optim="adamw_torch",
    learning_rate=1e-5,
    beta=1e-2,
    train_batch_size=128,
    steps=-1,
)


def run(settings: Settings) -> Outcome:
    """See `finetune.compare`. Raises ValueError where peft is not installed."""
    check_available()
    return compare(settings, "lora", OFFICIAL)
