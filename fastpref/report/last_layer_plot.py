"""The figure of `fastpref reproduce last-layer`: lines are predictions, marks what was observed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastpref.dynamics.schema import HELD_OUT, TRAIN_SAMPLE
from fastpref.report.pictures import INK, picture_style, write_picture
from fastpref.report.svg import palette
from fastpref.report.tables import shorten

SIDES = {TRAIN_SAMPLE: ("-", "o", None), HELD_OUT: ("--", "o", "white")}


@dataclass(frozen=True)
class BehaviorCurves:
    """One behavior. Rows have step, split, loss, margin, output_accuracy, head_norm, each also as
    predicted_<name>; (T + 1,) arrays go by optimizer steps taken, nan is undefined."""

    name: str
    delta: float
    batches: Sequence[Mapping[str, Any]]
    batches_norm: tuple[np.ndarray, np.ndarray]  # ||W - W0||, observed and predicted
    full_norm: tuple[np.ndarray, np.ndarray]
    line: np.ndarray  # beta delta t / (2 sqrt 2)
    accuracy: np.ndarray  # reward accuracy over the training pairs, full run
    guaranteed: np.ndarray
    certain: np.ndarray


def write_last_layer(
    folder: Path, behaviors: Sequence[BehaviorCurves], batch_size: int
) -> list[Path]:
    """last-layer.png and .svg in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    with picture_style() as plt:
        rows = -(-len(behaviors) // 2)
        height = 6.7 + 0.2 * rows
        figure, axes = plt.subplots(2, 3, figsize=(11.4, height))
        bottom = (1.02 + 0.2 * rows) / height
        figure.subplots_adjust(0.065, bottom, 0.99, 1 - 0.35 / height, wspace=0.27, hspace=0.34)
        (norm, full, accuracy), (margin, loss, output) = axes
        colors = palette(len(behaviors), dark=False)
        for own, color in zip(behaviors, colors, strict=True):
            _norms(norm, own.batches_norm, color)
            _norms(full, own.full_norm, color)
            full.plot(own.line, ":", color=color, linewidth=1.1)
            _accuracy(accuracy, own, color)
            for axis, name in ((margin, "margin"), (loss, "loss"), (output, "output_accuracy")):
                _curves(axis, own.batches, name, color)
        norm.set(title=f"||W - W0||, batches of {batch_size}", ylim=(0, None))
        full.set(title="||W - W0||, all pairs in every step", ylim=(0, None))
        accuracy.set_title("Reward accuracy, all pairs in every step")
        margin.set(title=f"Mean margin, nats, batches of {batch_size}")
        loss.set(title=f"Loss, nats, batches of {batch_size}")
        output.set(title=f"Output accuracy, batches of {batch_size}")
        for axis in axes.flat:
            axis.set_xlabel("optimizer steps")
        _legends(figure, behaviors, colors, height)
        return write_picture(figure, folder, "last-layer")


def _norms(axis: Any, norm: tuple[np.ndarray, np.ndarray], color: str) -> None:
    observed, predicted = norm
    axis.plot(predicted, color=color, linewidth=1.2)
    _marks(axis, observed, color)


def _marks(axis: Any, observed: np.ndarray, color: str) -> None:
    """Every step's value is there; a mark at some twenty of them keeps the lines visible."""
    step = np.arange(0, len(observed), max(1, len(observed) // 20))
    axis.plot(step, observed[step], "o", color=color, markersize=3.2)


def _curves(axis: Any, rows: Sequence[Mapping[str, Any]], name: str, color: str) -> None:
    for split, (line, mark, face) in SIDES.items():
        own = [row for row in rows if row["split"] == split]
        step = [row["step"] for row in own]
        axis.plot(step, [row[f"predicted_{name}"] for row in own], line, color=color, linewidth=1.1)
        axis.plot(
            *(step, [row[name] for row in own], mark),
            color=color,
            markerfacecolor=face or color,
            markersize=3.2,
            markeredgewidth=0.8,
        )


def _accuracy(axis: Any, own: BehaviorCurves, color: str) -> None:
    """From the first step on: before it all margins are 0, and nothing is right."""
    step = np.arange(len(own.accuracy))
    _marks(axis, np.where(step > 0, own.accuracy, np.nan), color)
    axis.plot(step[1:], own.certain[1:], "-", color=color, linewidth=1.2)
    axis.plot(step[1:], own.guaranteed[1:], ":", color=color, linewidth=1.2)


def _legends(
    figure: Any, behaviors: Sequence[BehaviorCurves], colors: Sequence[str], height: float
) -> None:
    """Below the panels: how lines and marks are to be read, then the behaviors."""
    from matplotlib.lines import Line2D

    def line(style: str, mark: str = "", face: str | None = INK) -> Any:
        return Line2D([], [], color=INK, ls=style, marker=mark, markersize=3.6, mfc=face, lw=1.2)

    reading = {
        "predicted, training pairs": line("-"),
        "predicted, held out": line("--"),
        "observed, training pairs": line("", "o"),
        "observed, held out": line("", "o", "white"),
    }
    promises = {
        "||W - W0||: the line β δ t / (2√2)": line(":"),
        "reward accuracy, at least: from each pair (E30)": line("-"),
        "from concentration and δ alone (E29)": line(":"),
    }
    rows = -(-len(behaviors) // 2)
    for k, entries in enumerate((reading, promises)):
        figure.legend(
            list(entries.values()),
            list(entries),
            loc="lower left",
            bbox_to_anchor=(0.055, (0.1 + 0.2 * (rows + 1 - k)) / height),
            ncols=len(entries),
            frameon=False,
            fontsize=8,
            columnspacing=1.4,
            handlelength=1.8,
        )
    names = [f"{shorten(own.name, 62)}, δ {own.delta:.3g}" for own in behaviors]
    figure.legend(
        [Line2D([], [], color=color, lw=3) for color in colors],
        names,
        loc="lower left",
        bbox_to_anchor=(0.055, 0.02 / height),
        ncols=2,
        frameon=False,
        fontsize=8,
        columnspacing=2.0,
        handlelength=1.2,
    )
