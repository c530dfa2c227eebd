"""What an experiment is run with: the user's options over the official hyper-parameters."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Official:
    """Hyper-parameters of one experiment as the official code has them; an experiment's module
    holds its own, and `Settings.over` lays the user's options over them."""

    behaviors: tuple[int, ...]  # official numbers (names.OFFICIAL_NAMES); empty: all that are given
    trainable: str
    optim: str
    learning_rate: float
    beta: float
    train_batch_size: int
    steps: int  # -1: one epoch
    eval_fraction: float = 0.1
    seed: int = 1234


# DPO_training.py and last_layer_training.py, of which all experiments are variations.
DPO_TRAINING = Official(
    behaviors=(),
    trainable="all",
    optim="adamw_torch",
    learning_rate=1e-5,
    beta=1e-2,
    train_batch_size=128,
    steps=-1,
)
LAST_LAYER = Official(
    behaviors=(),
    trainable="head",
    optim="sgd",
    learning_rate=0.1,
    beta=1e-2,
    train_batch_size=128,
    steps=100,
)


@dataclass(frozen=True)
class Settings:
    """The options of `fastpref reproduce`; None or empty: the experiment's own choice."""

    model: str
    data: tuple[str, ...]  # files, folders, patterns
    folder: Path  # of this experiment alone
    behaviors: tuple[str, ...] = ()  # names, or numbers of the official list
    steps: int | None = None
    learning_rate: float | None = None
    beta: float | None = None
    train_batch_size: int | None = None
    seed: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    max_length: int | None = None

    def over(self, official: Official) -> Official:
        """The hyper-parameters of the run: the user's where given, the official ones elsewhere."""
        names = ("steps", "learning_rate", "beta", "train_batch_size", "seed")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return replace(official, **given)
