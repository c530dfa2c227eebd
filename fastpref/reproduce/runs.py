"""Starts an experiment's training runs, and reads back what they recorded."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from fastpref.config import Config
from fastpref.dynamics.recorder import read_records
from fastpref.dynamics.schema import TRAIN
from fastpref.reproduce.settings import Official, Settings
from fastpref.train import train

RUNS = "runs"  # folder of the runs within an experiment's
LENGTH = 256  # tokens; persona statements take less
MERGED = "merged"  # within a run's folder: the model with its adapter added in
CURVES = (
    *("n", "loss", "output_accuracy", "reward_accuracy", "margin", "logp_chosen", "logp_rejected"),
    *("delta", "lambda_max", "trace"),
)


def run_config(
    settings: Settings, official: Official, files: Sequence[str], name: str, **changes: Any
) -> Config:
    """The configuration of the run ``name`` on ``files``; ``changes`` are fields of `Config`.

    Constant learning rate without warm-up, as the official code has it. Runs are not resumed: a
    second call begins anew.
    """
    fields: dict[str, Any] = {
        "model_name_or_path": settings.model,
        "dataset_name": tuple(files),
        "output_dir": str(settings.folder / RUNS / name),
        "overwrite_output_dir": True,
        "device": settings.device,
        "dtype": settings.dtype,
        "max_length": settings.max_length or LENGTH,
        "seed": official.seed,
        "eval_fraction": official.eval_fraction,
        "trainable": official.trainable,
        "beta": official.beta,
        "optim": official.optim,
        "learning_rate": official.learning_rate,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0.0,
        "train_batch_size": official.train_batch_size,
        "max_steps": official.steps,
        "num_train_epochs": 1.0,
        "logging_steps": 1,
        "save_steps": 1_000_000,  # the last step's checkpoint only
        "disable_tqdm": True,
    }
    return Config(**(fields | changes))


def run(config: Config, keep_weights: bool = False) -> Path:
    """Train as ``config`` says; the run folder, without weights unless they are asked for.

    An experiment reads records. Weights, twice the model's size per run, would fill the disk.
    """
    folder = train(config, progress=False)
    if not keep_weights:
        drop_weights(folder)
    return folder


def drop_weights(folder: Path) -> None:
    """Remove every copy of the weights from a run folder; records and logs stay."""
    for file in folder.glob("*.safetensors"):
        file.unlink()
    for other in (*folder.glob("checkpoint-*"), folder / MERGED):
        shutil.rmtree(other, ignore_errors=True)


def step_columns(folder: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """(N,) float64 columns of the table `steps`; null is nan."""
    table = read_records(folder, "steps", list(names))
    return {name: table[name].cast("float64").to_numpy() for name in names}


def trained_pairs(folder: Path, names: Sequence[str] = ("margin",)) -> dict[str, np.ndarray]:
    """The pairs of the optimizer steps, before each update: step, pair_id and ``names``."""
    table = read_records(folder, "pairs", ["step", "split", "pair_id", *names])
    table = table.filter(pc.equal(table["split"].cast("string"), TRAIN))
    return {name: table[name].to_numpy() for name in ("step", "pair_id", *names)}


def curves(folder: Path, **labels: Any) -> list[dict[str, Any]]:
    """Rows for curves.csv: every evaluation of every behavior and split of a run, after
    ``labels``."""
    table = read_records(folder, "behaviors", ["step", "split", "behavior", *CURVES])
    return [labels | row for row in table.to_pylist()]


def margin_rates(folder: Path, behaviors: Sequence[str]) -> dict[str, np.ndarray]:
    """Split -> (K,) change of every behavior's mean margin from the first evaluation to the last,
    in nats; nan where a behavior has no pairs of the split."""
    rows = read_records(folder, "behaviors", ["step", "split", "behavior", "margin"]).to_pylist()
    seen = {(row["split"], row["behavior"], row["step"]): row["margin"] for row in rows}
    first, last = min(row["step"] for row in rows), max(row["step"] for row in rows)
    return {
        split: np.array(
            [
                seen.get((split, name, last), np.nan) - seen.get((split, name, first), np.nan)
                for name in behaviors
            ]
        )
        for split in sorted({row["split"] for row in rows})
    }


def described(settings: Settings, official: Official, names: Sequence[str]) -> dict[str, Any]:
    """The settings of outcome.json: what was run on what, without paths of this machine."""
    own = dataclasses.asdict(official)
    return {"model": settings.model, **own, "behaviors": list(names), "dtype": settings.dtype}
