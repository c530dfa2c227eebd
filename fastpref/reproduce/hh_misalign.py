"""Misalignment on dialogues (HH-RLHF): completions of many tokens, from base and aligned start.

The theory speaks of the first token in which two completions differ. What it predicts of the others
is nothing, so the ratio of the runs' own squared gradients stands beside it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from fastpref.base import BASE_NAME
from fastpref.config import Config
from fastpref.data.dataset import load_dataset, sample_pairs
from fastpref.data.files import find_sources
from fastpref.data.readers import read_source
from fastpref.dynamics.schema import HELD_OUT, TRAIN_SAMPLE
from fastpref.frozen import freeze
from fastpref.lora import check_available
from fastpref.report.files import write_whole
from fastpref.report.misalign_plots import draw_dialogues
from fastpref.reproduce import runs
from fastpref.reproduce.aligning import (
    ALIGN,
    ALIGNED,
    BASE,
    FLIPPED,
    Starts,
    gradient_speed,
    mean_curve,
    misalign,
    speeds,
)
from fastpref.reproduce.behaviors import find_files
from fastpref.reproduce.names import DIALOGUES
from fastpref.reproduce.outcome import Outcome, Verdict
from fastpref.reproduce.settings import DPO_TRAINING, Settings
from fastpref.reproduce.small import adapted, compared
from fastpref.reproduce.start import LORA, Curve, load_start, lora_fields
from fastpref.theory.distinguish import directions
from fastpref.theory.mixture import mixture_direction

log = logging.getLogger(__name__)

# DPO_training.py -hh --flip, plotted by hhrlhf_misalign_plot.py: one epoch of 161k pairs.
OFFICIAL = dataclasses.replace(DPO_TRAINING, trainable="lora")
EVERY = 100  # steps between evaluations, as the official code logs
EARLY = 5  # steps of its --early, every one of them evaluated
LENGTH = 512  # tokens
SAMPLE = 512  # pairs of either split that evaluations look at, and training pairs of predictions
# For fastpref-tiny: dialogues, tokens, and evaluated pairs, for a minute a run on two CPU cores.
SMALL_ROWS, SMALL_LENGTH, SMALL_SAMPLE = 640, 256, 64


def run(settings: Settings) -> Outcome:
    """Raises ValueError without peft, without dialogues, for a model without a head."""
    check_available()
    taken, caveats = adapted(settings, OFFICIAL)
    files, notes = _files(settings)
    small = settings.model == BASE_NAME
    fields: dict[str, Any] = {
        "max_length": settings.max_length or (SMALL_LENGTH if small else LENGTH),
        "truncation_mode": "keep_completion",
        "on_bad_rows": "drop",  # HH-RLHF has empty completions
        "eval_sample_size": SMALL_SAMPLE if small else SAMPLE,
    }
    plain = runs.run_config(settings, taken, files, "none", **fields | FLIPPED)
    extra, effective, pairs = _look(plain)
    steps = taken.steps if taken.steps > 0 else -(-pairs // taken.train_batch_size)
    every = EVERY if steps > EVERY else 1
    starts = misalign(settings, taken, files, fields | extra[0] | {"eval_steps": every})
    folders = dict(starts.folders)
    if every > 1:
        folders |= _early(starts)
    aligned = dataclasses.replace(plain, model_name_or_path=str(starts.aligned_model))
    _, moved, _ = _look(aligned)
    for folder in folders.values():
        runs.drop_weights(folder)
    rows = [row for name, own in folders.items() for row in runs.curves(own, run=name)]
    numbers = _numbers(starts, rows, {"base": effective, "aligned": moved}, taken.beta)
    figures = draw_dialogues(settings.folder, "hh-misalign", rows, numbers)
    return Outcome(
        experiment="hh-misalign",
        settings=runs.described(settings, taken, [Path(file).name for file in files])
        | {"official": compared(OFFICIAL, taken), "run": fields, "lora": LORA, "steps": steps},
        numbers=numbers,
        verdicts=_verdicts(numbers),
        caveats=[*caveats, *notes, *extra[1], *_caveats(numbers)],
        curves=rows,
        runs=[f"{runs.RUNS}/{name}" for name in folders],
        figures=[path.name for path in figures],
    )


def _files(settings: Settings) -> tuple[list[str], list[str]]:
    """The dialogues' files; for fastpref-tiny a part of them in a file of the experiment's own."""
    files = list(find_files(settings.data, DIALOGUES).values())
    if settings.model != BASE_NAME:
        return files, []
    rows = []
    for source in find_sources(files):
        rows += [row for _, row in read_source(source, ("chosen", "rejected", "prompt")).rows]
    if len(rows) <= SMALL_ROWS:
        return files, []
    kept = [rows[i] for i in np.linspace(0, len(rows) - 1, SMALL_ROWS).round().astype(int)]
    path = settings.folder / "data" / f"{Path(files[0]).name.split('.')[0]}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(json.dumps(row) + "\n" for row in kept).encode())
    note = (
        f"{SMALL_ROWS} of {len(rows)} dialogues, evenly spread, of {SMALL_LENGTH} tokens at most, "
        f"and {SMALL_SAMPLE} pairs of a split in evaluations (other models: all, {LENGTH}, "
        f"{SAMPLE}), so that {BASE_NAME} takes minutes on two CPU cores."
    )
    return [str(path)], [note]


def _look(
    config: Config,
) -> tuple[tuple[dict[str, Any], list[str]], dict[str, float], int]:
    """The adapters that fit the model; the effective delta of the sampled training pairs' first
    differing tokens (E11), and what it would be of pairs whose gradients have nothing in common;
    the number of training pairs."""
    model = load_start(config)
    dataset = load_dataset(config, model.tokenizer)
    sample = sample_pairs(dataset.train, SAMPLE, config.seed)
    pairs = freeze(model, dataset, sample, config).pairs
    pull = mixture_direction(directions(pairs), pairs.fraction)
    square = float((pairs.features**2).sum(axis=1).mean())
    found = {
        "effective_delta": float(np.linalg.norm(pull)),
        "by_chance": float(np.sqrt(4 * square / len(pairs.features))),  # (E12), C = 1 / P
    }
    return lora_fields(model), found, len(dataset.train)


def _early(starts: Starts) -> dict[str, Path]:
    """The first steps from either start once more, every one of them evaluated."""
    found = {}
    for name in (BASE, ALIGNED):
        config = starts.configs[name]
        own = f"{name}-early"
        log.info("run %s", own)
        found[own] = runs.run(
            dataclasses.replace(
                config,
                output_dir=str(Path(config.output_dir).with_name(own)),
                max_steps=EARLY,
                eval_steps=1,
            )
        )
    return found


def _numbers(
    starts: Starts, rows: list[Curve], delta: dict[str, dict[str, float]], beta: float
) -> dict[str, Any]:
    base, aligned = (delta[run]["effective_delta"] for run in ("base", "aligned"))
    return {
        "delta": delta,
        "predicted": {"speed": (aligned / base) ** 2 if base else np.nan},
        "observed": {
            "speed_of_gradient": gradient_speed(starts.folders),
            "speed": speeds(starts.folders[BASE], starts.folders[ALIGNED], beta),
            "runs": {
                run: {split: _course(rows, run, split) for split in (TRAIN_SAMPLE, HELD_OUT)}
                for run in (ALIGN, BASE, ALIGNED)
            },
        },
    }


def _course(rows: list[Curve], run: str, split: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for column in ("loss", "margin", "output_accuracy", "logp_chosen", "logp_rejected"):
        values = mean_curve(rows, run, split, column)[1]
        if values.size:
            found[column] = {"start": values[0], "last": values[-1]}
    return found


def _verdicts(numbers: dict[str, Any]) -> list[Verdict]:
    return [
        Verdict(
            "over the run the loss on exchanged labels falls further from the aligned model than "
            "from the base, times as far, at least 1",
            numbers["observed"]["speed"]["last"],
            1.0,
            at_least=True,
        )
    ]


def _caveats(numbers: dict[str, Any]) -> list[str]:
    seen = numbers["observed"]
    return [
        f"(delta'/delta)^2 = {numbers['predicted']['speed']:.3g} is of the effective deltas of the "
        "first token in which two completions differ, and of the head's loss under plain SGD. "
        "Completions have many tokens, adapters in the body learn, by AdamW: the fall of the loss "
        f"is {seen['speed']['first']:.3g} times the base's at the first evaluation and "
        f"{seen['speed']['last']:.3g} at the end; the squared gradients of the adapters stand as "
        f"{seen['speed_of_gradient']:.3g} to 1 at the first step.",
        "Where pairs share few tokens, effective delta is little more than the length of the "
        "features over the root of the number of pairs: by_chance is that.",
        "Deltas of single evaluations are undefined: completions differ in more than two tokens.",
        "Defects of the official code that are corrected here: log files are read once, not seven "
        "times; folder names of writer and reader agree.",
    ]
