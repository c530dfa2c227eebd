"""All weights of the model learn, each behavior by itself."""

from __future__ import annotations

from dataclasses import replace

from fastpref.reproduce.finetune import compare
from fastpref.reproduce.outcome import Outcome
from fastpref.reproduce.settings import DPO_TRAINING, Settings

# DPO_training.py, plotted by plot_log_data.py: AdamW, constant rate, one epoch.
OFFICIAL = replace(DPO_TRAINING, behaviors=(108, 84, 88, 54, 100))


def run(settings: Settings) -> Outcome:
    """See `finetune.compare`."""
    return compare(settings, "full", OFFICIAL)
