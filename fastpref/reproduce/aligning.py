"""Misalignment: the same pairs with labels exchanged, from the model as it comes and from one that
was aligned on them first. Each run's reference is the model that it starts from."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastpref.config import Config
from fastpref.reproduce import runs
from fastpref.reproduce.outcome import ratio
from fastpref.reproduce.settings import Official, Settings
from fastpref.reproduce.start import Curve
from fastpref.runfolder import MERGED

log = logging.getLogger(__name__)

ALIGN, BASE, ALIGNED = "align", "base", "aligned"  # names of the runs
FLIPPED = {"flip_behaviors": ("all",)}
RESOLVED = 1e-6  # nats of a mean margin; below it, float32 log-probs leave nothing but rounding


@dataclass(frozen=True)
class Starts:
    """The configurations of the three runs; the aligned model stands in `aligned_model`."""

    configs: dict[str, Config]
    folders: dict[str, Path]
    aligned_model: Path


def misalign(
    settings: Settings,
    official: Official,
    files: Sequence[str],
    fields: dict[str, Any],  # of `Config`, for all three
) -> Starts:
    """Align by LoRA, then train towards the opposite from the base and from the aligned model."""
    first = runs.run_config(settings, official, files, ALIGN, save_merged=True, **fields)
    folder = Path(first.output_dir)
    aligned_model = folder / MERGED
    own = {"model_name_or_path": str(aligned_model)}
    configs = {
        ALIGN: first,
        BASE: runs.run_config(settings, official, files, BASE, **fields, **FLIPPED),
        ALIGNED: runs.run_config(settings, official, files, ALIGNED, **fields, **FLIPPED | own),
    }
    folders = {}
    for name, config in configs.items():
        log.info("run %s", name)
        folders[name] = runs.run(config, keep_weights=name == ALIGN)
    return Starts(configs, folders, aligned_model)


def mean_curve(
    rows: Sequence[Curve], run: str, split: str, column: str
) -> tuple[np.ndarray, np.ndarray]:
    """(E,) steps and means over all evaluated pairs of ``run``, behaviors by their number."""
    own = [r for r in rows if r["run"] == run and r["split"] == split]
    steps = sorted({r["step"] for r in own})
    means = []
    for step in steps:
        here = [r for r in own if r["step"] == step and r[column] is not None]
        total = sum(r["n"] for r in here)
        means.append(sum(r["n"] * r[column] for r in here) / total if total else np.nan)
    return np.array(steps), np.array(means)


def speeds(base: Path, aligned: Path, beta: float) -> dict[str, float]:
    """How many times as far the loss falls in the run ``aligned`` as in ``base``: after the first
    evaluated step, and over the run; nan where the base's margins are rounding."""
    falls = [runs.loss_falls(folder, beta) for folder in (base, aligned)]
    least = beta * RESOLVED / 2
    return {
        when: ratio(falls[1][e], falls[0][e]) if abs(falls[0][e]) > least else np.nan
        for when, e in (("first", 1), ("last", -1))
    }


def first_above(step: np.ndarray, values: np.ndarray, threshold: float) -> float:
    """First evaluated step at which ``values`` are above ``threshold``; inf: none."""
    above = np.flatnonzero(values > threshold)
    return float(step[above[0]]) if above.size else np.inf


def gradient_speed(folders: dict[str, Path]) -> float:
    """Squared norm of the first step's gradient, of the aligned start over the base: how many times
    as fast plain SGD on the same weights would lower the loss, at first order."""
    base, aligned = (
        runs.step_columns(folders[run], ["grad_norm"])["grad_norm"][0] for run in (BASE, ALIGNED)
    )
    return ratio(aligned, base) ** 2
