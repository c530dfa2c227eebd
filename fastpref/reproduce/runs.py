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
from fastpref.dynamics.schema import HELD_OUT, TRAIN, TRAIN_SAMPLE
from fastpref.errors import Preempted
from fastpref.reproduce.settings import Official, Settings
from fastpref.runfolder import remove_final
from fastpref.theory.dual import dpo_loss
from fastpref.train import train

RUNS = "runs"  # folder of the runs within an experiment's
LENGTH = 256  # tokens; persona statements take less
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
    Raises as `train`.
    """
    try:
        folder = train(config, progress=False)
    except Preempted:
        raise Preempted(
            f"stopped in the run {config.output_dir}; the same command begins its experiment anew."
        ) from None
    if not keep_weights:
        drop_weights(folder)
    return folder


def drop_weights(folder: Path) -> None:
    """Remove every copy of the weights that a run wrote; records, logs and all else stay."""
    remove_final(folder)
    for other in folder.glob("checkpoint-*"):
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


def loss_falls(folder: Path, beta: float, split: str = TRAIN_SAMPLE) -> np.ndarray:
    """(E,) by how much the mean loss of the evaluated pairs has fallen since step 0, in nats.

    From the margins: the records keep losses in float32, whose steps near ln 2 are 6e-8, and first
    steps move them by hardly more.
    """
    table = read_records(folder, "pairs", ["step", "split", "margin"])
    table = table.filter(pc.equal(table["split"].cast("string"), split))
    step, margin = table["step"].to_numpy(), table["margin"].to_numpy().astype(np.float64)
    means = np.array([dpo_loss(margin[step == n], beta).mean() for n in np.unique(step)])
    return means[:1] - means


def curves(folder: Path, more: Sequence[str] = (), **labels: Any) -> list[dict[str, Any]]:
    """Rows for curves.csv: every evaluation of every behavior and split of a run, after
    ``labels``; ``more`` columns of `behaviors` beside the usual ones."""
    table = read_records(folder, "behaviors", ["step", "split", "behavior", *CURVES, *more])
    rows = table.to_pylist()
    return [labels | row for row in rows if row["split"] in (TRAIN_SAMPLE, HELD_OUT)]


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
