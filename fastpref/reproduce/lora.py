"""LoRA adapters learn, each behavior by itself; `start.LORA` holds their official settings."""

from __future__ import annotations

from dataclasses import replace

from fastpref.lora import check_available
from fastpref.reproduce.finetune import compare
from fastpref.reproduce.outcome import Outcome
from fastpref.reproduce.settings import DPO_TRAINING, Settings

# DPO_training.py --peft, plotted by plot_log_data.py.
OFFICIAL = replace(DPO_TRAINING, behaviors=(108, 84, 88, 54, 100), trainable="lora")


def run(settings: Settings) -> Outcome:
    """See `finetune.compare`. Raises ValueError where peft is not installed."""
    check_available()
    return compare(settings, "lora", OFFICIAL)
