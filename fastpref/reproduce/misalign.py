"""Is an aligned model easier to misalign? Labels exchanged, from a base and an aligned start.

What frozen features say is checked exactly, with the head alone: from a head that was aligned the
margins are those from the base's (E35), and the answers turn later. What LoRA adds is that aligning
moves the features, so that distinguishability, and with it the loss's slope, is another (E36).
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np

from fastpref.config import Config
from fastpref.dynamics.schema import TRAIN_SAMPLE
from fastpref.lora import check_available
from fastpref.report.misalign_plots import draw_misalign
from fastpref.reproduce import runs
from fastpref.reproduce.aligning import (
    ALIGN,
    ALIGNED,
    BASE,
    FLIPPED,
    Starts,
    first_above,
    gradient_speed,
    mean_curve,
    misalign,
    speeds,
)
from fastpref.reproduce.finetune import CORRECTED, FIELDS
from fastpref.reproduce.head_only import PLAIN, behavior_files, head_only, precision
from fastpref.reproduce.outcome import Outcome, Verdict, ratio
from fastpref.reproduce.settings import DPO_TRAINING, LAST_LAYER, Official, Settings
from fastpref.reproduce.small import adapted, compared, eval_steps, rarer
from fastpref.reproduce.start import (
    LORA,
    Curve,
    Start,
    load_start,
    look,
    lora_fields,
    without_lora,
)
from fastpref.theory.boundary import Misalignment, compare_starts
from fastpref.theory.distinguish import behavior_statistics, directions
from fastpref.theory.mixture import mixture_direction

log = logging.getLogger(__name__)

# DPO_training.py --flip [--peft_base], plotted by misalign_plot.py.
OFFICIAL = dataclasses.replace(DPO_TRAINING, behaviors=(84,), trainable="lora")
# misalign_last_layer.py.
OFFICIAL_HEAD = dataclasses.replace(LAST_LAYER, behaviors=OFFICIAL.behaviors)
HEAD_ALIGN, HEAD_BASE, HEAD_ALIGNED = "head-align", "head-base", "head-aligned"
STEP_BASE, STEP_ALIGNED = "step-base", "step-aligned"  # one step of the head on all pairs
IDENTICAL = {"float64": 1e-6, "float32": 1e-2}  # of the largest margin; records are float32
SLOPE = 0.02  # of the predicted ratio of slopes, which is exact at the first moment only


def run(settings: Settings) -> Outcome:
    """Raises ValueError without peft, for unknown behaviors, one class empty, a model without a
    head."""
    check_available()
    taken, caveats = adapted(settings, OFFICIAL)
    files, notes = behavior_files(settings, OFFICIAL)
    plain = runs.run_config(settings, taken, list(files.values()), "none", **FIELDS | FLIPPED)
    model = load_start(plain)
    extra, more = lora_fields(model)
    base = look(model, plain)
    base_head = _rows(model, base)
    del model
    head = dataclasses.replace(settings, learning_rate=None, steps=None).over(OFFICIAL_HEAD)
    dtype = precision(head, settings.dtype, settings.device, fine=True)
    head_config = _head_config(settings, head, plain, dtype)
    head_only(head_config)  # refuses what the head's runs cannot be predicted for, before any run
    fields = FIELDS | extra | {"eval_steps": eval_steps(settings, taken, len(base.train.ids))}
    starts = misalign(settings, taken, list(files.values()), fields)
    moved = dataclasses.replace(plain, model_name_or_path=str(starts.aligned_model))
    model = load_start(moved)
    aligned = look(model, moved)
    aligned_head = _rows(model, aligned)
    del model
    theory = compare_starts(
        base.train.pairs, aligned.train.pairs, base_head, aligned_head, taken.beta
    )
    frozen = _head_runs(head_config, starts.aligned_model, len(base.train.ids))

    rows = [row for name, own in starts.folders.items() for row in runs.curves(own, run=name)]
    rows += [row for name, own in frozen.items() for row in runs.curves(own, run=name)]
    numbers = _numbers(base, aligned, theory, starts, frozen, rows)
    for which, times in (("base", theory.flip_time_base), ("aligned", theory.flip_time_aligned)):
        numbers["predicted"][f"flips_{which}"] = _flips(times, head.learning_rate)
    for folder in (*starts.folders.values(), *frozen.values()):
        runs.drop_weights(folder)
    figures = draw_misalign(settings.folder, "misalign", rows, numbers)
    return Outcome(
        experiment="misalign",
        settings=runs.described(settings, taken, list(files))
        | {"official": compared(OFFICIAL, taken), "run": FIELDS, "lora": LORA}
        | {"last_layer": dataclasses.asdict(head) | {"dtype": dtype}},
        numbers=numbers,
        verdicts=_verdicts(numbers, dtype),
        caveats=[*caveats, *rarer(settings), *notes, *more, *_caveats(numbers), CORRECTED],
        curves=rows,
        runs=[f"{runs.RUNS}/{name}" for name in (*starts.folders, *frozen)],
        figures=[path.name for path in figures],
    )


def _rows(model: Any, start: Start) -> np.ndarray:
    """(largest answer token + 1, D) of the head, as much as the answers need."""
    return model.head.weight[: start.train.pairs.tokens[-1] + 1].detach().cpu().double().numpy()


def _head_config(settings: Settings, head: Official, plain: Config, dtype: str) -> Config:
    """The run of the head alone from the base, on the exchanged labels of ``plain``."""
    own = {"optim": "sgd", "learning_rate": head.learning_rate, "dtype": dtype, **PLAIN}
    own |= {"max_steps": head.steps, "eval_steps": max(1, head.steps // 20)}
    folder = settings.folder / runs.RUNS / HEAD_BASE
    return without_lora(plain, trainable="head", output_dir=str(folder), **own)


def _head_runs(base: Config, aligned_model: Path, pairs: int) -> dict[str, Path]:
    """The head alone: aligned, and misaligned from either head; one step on either's features."""

    def config(name: str, **changes: Any) -> Config:
        folder = str(Path(base.output_dir).with_name(name))
        return dataclasses.replace(base, output_dir=folder, **changes)

    folders = {}
    aligning = config(HEAD_ALIGN, flip_behaviors=())
    moved = {"model_name_or_path": aligning.output_dir}
    one = {"max_steps": 1, "eval_steps": 1, "train_batch_size": pairs}
    for name, own in {
        HEAD_ALIGN: aligning,
        HEAD_BASE: base,
        HEAD_ALIGNED: config(HEAD_ALIGNED, **moved),
        STEP_BASE: config(STEP_BASE, **one),
        STEP_ALIGNED: config(STEP_ALIGNED, **one, model_name_or_path=str(aligned_model)),
    }.items():
        log.info("run %s", name)
        folders[name] = runs.run(own, keep_weights=name == HEAD_ALIGN)
    return folders


def _numbers(
    base: Start,
    aligned: Start,
    theory: Misalignment,
    starts: Starts,
    frozen: dict[str, Path],
    rows: list[Curve],
) -> dict[str, Any]:
    beta = starts.configs[BASE].beta
    margins = [runs.trained_pairs(frozen[run]) for run in (HEAD_BASE, HEAD_ALIGNED)]
    assert np.array_equal(margins[0]["pair_id"], margins[1]["pair_id"]), "the same batches"
    apart = np.abs(margins[0]["margin"].astype(float) - margins[1]["margin"]).max()
    largest = float(np.abs(margins[0]["margin"]).max())
    return {
        "delta": {
            "base": _deltas(base),
            "aligned": _deltas(aligned),
        },
        "predicted": {
            "speed": theory.speed,  # (delta' / delta)^2 of the effective deltas (E36)
        },
        "observed": {
            "speed_of_the_head": speeds(frozen[STEP_BASE], frozen[STEP_ALIGNED], beta)["first"],
            "speed_of_gradient": gradient_speed(starts.folders),
            "speed": speeds(starts.folders[BASE], starts.folders[ALIGNED], beta),
            "lora": {run: _course(rows, run) for run in (ALIGN, BASE, ALIGNED)},
        },
        "frozen_features": {
            "largest_margin": largest,
            "largest_difference": float(apart),
            "relative_difference": ratio(apart, largest),
            **{run: _course(rows, run) for run in (HEAD_ALIGN, HEAD_BASE, HEAD_ALIGNED)},
        },
    }


def _deltas(start: Start) -> dict[str, Any]:
    pairs = start.train.pairs
    pull = mixture_direction(directions(pairs), pairs.fraction)
    own = {s.behavior: s.delta for s in behavior_statistics(pairs)}
    return {"effective": float(np.linalg.norm(pull)), "behaviors": own}


def _flips(times: np.ndarray, learning_rate: float) -> dict[str, float]:
    """Of the first-order times (E33): the share of the answers that ever change side, and the
    median of their steps, of the head alone by SGD."""
    known = times[np.isfinite(times)]
    median = float(np.median(known)) / learning_rate if known.size else np.nan
    return {"share": known.size / times.size, "median_step": median}


def _course(rows: list[Curve], run: str) -> dict[str, Any]:
    """From the first to the last evaluation of a run, over its training pairs."""
    found: dict[str, Any] = {}
    for column in ("loss", "margin", "output_accuracy", "delta"):
        step, values = mean_curve(rows, run, TRAIN_SAMPLE, column)
        found[column] = {"start": values[0], "first": values[1], "last": values[-1]}
    step, values = mean_curve(rows, run, TRAIN_SAMPLE, "output_accuracy")
    return found | {"most_answers_turned": first_above(step, values, 0.5)}


def _verdicts(numbers: dict[str, Any], dtype: str) -> list[Verdict]:
    frozen, seen = numbers["frozen_features"], numbers["observed"]
    limit = IDENTICAL[dtype]
    return [
        Verdict(
            f"frozen features: margins of all pairs at all steps from the aligned head differ from "
            f"those from the base's by at most {limit:g} of the largest ({dtype})",
            frozen["relative_difference"],
            limit,
        ),
        Verdict(
            "moved features: the head's loss falls (delta'/delta)^2 times as far from the aligned "
            f"model, relative error of one full step at most {SLOPE:g}",
            abs(seen["speed_of_the_head"] / numbers["predicted"]["speed"] - 1),
            SLOPE,
        ),
        Verdict(
            "LoRA: over the run the loss falls further from the aligned model than from the base, "
            "times as far, at least 1",
            seen["speed"]["last"],
            1.0,
            at_least=True,
        ),
    ]


def _caveats(numbers: dict[str, Any]) -> list[str]:
    predicted, seen = numbers["predicted"]["speed"], numbers["observed"]
    return [
        f"(delta'/delta)^2 = {predicted:.3g} is the ratio of the slopes of the head's loss under "
        "plain SGD. Adapters in the body learn here, by AdamW, whose steps do not grow with the "
        f"gradient: the ratio of the falls is {seen['speed']['first']:.3g} at the first evaluation "
        f"and {seen['speed']['last']:.3g} at the end; the squared gradients of the adapters "
        f"themselves stand as {seen['speed_of_gradient']:.3g} to 1 at the first step.",
        "The reference of every run is the model that it starts from, so that losses begin at "
        "ln 2. The aligned start is the base with the adapter of run align added in.",
        "The head alone is trained with the official rate and steps of misalign_last_layer.py, in "
        "float64 on a CPU; its runs step-base and step-aligned take one step on all pairs.",
    ]
