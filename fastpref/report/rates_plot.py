"""The figure of `fastpref reproduce rates`: first rates, predicted and observed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastpref.report.pictures import (
    BLUE,
    INK,
    ORANGE,
    SOFT,
    number_points,
    picture_style,
    write_picture,
)
from fastpref.report.tables import shorten

LISTED = 36  # names that fit beside the panels
GREEN = "#009e73"  # Wong, as the others
RATE = "per unit of learning rate"


@dataclass(frozen=True)
class RatesFigure:
    """K behaviors; rates of ||W - W0|| and, in the mixtures, of mean margins in nats, per unit of
    learning rate."""

    names: list[str]
    delta: np.ndarray  # (K,)
    beta: float
    full: np.ndarray  # (K,) observed, all pairs of the behavior in the step
    stratified: np.ndarray  # (K,) observed, one batch with the labels in their proportion
    random: np.ndarray  # (K, N) observed, random batches
    batch_rate: np.ndarray  # (K,) predicted root mean square of these
    batch_size: int
    mixtures: Mapping[str, tuple[np.ndarray, np.ndarray]]  # name -> (K,) predicted, observed
    course_steps: int


def write_rates(folder: Path, data: RatesFigure) -> list[Path]:
    """rates.png and .svg in ``folder``; behaviors are numbered by delta, the largest first."""
    folder.mkdir(parents=True, exist_ok=True)
    order = np.argsort(-data.delta, kind="stable")
    with picture_style() as plt:
        figure, axes = plt.subplots(2, 2, figsize=(12.4, 7.6))
        figure.subplots_adjust(0.06, 0.07, 0.69, 0.95, wspace=0.27, hspace=0.34)
        (alone, batch), (mixed, course) = axes
        _alone(alone, data)
        _batches(batch, data)
        _mixtures(mixed, data)
        _course(course, data)
        for axis in axes.flat:
            if axis.get_legend_handles_labels()[1]:
                axis.legend(frameon=False, fontsize=7.8, loc="upper left")
        if len(order) <= LISTED:
            scale = _scale(data.full)[0]
            number_points(figure, alone, data.delta[order], scale * data.full[order])
            _names(figure, [data.names[k] for k in order], data.delta[order])
        return write_picture(figure, folder, "rates")


def _scale(values: np.ndarray) -> tuple[float, str]:
    """Factor and words that make ticks short numbers: a power of 1000."""
    largest = float(np.nanmax(np.abs(values), initial=0.0))
    power = 3 * min(0, math.floor(math.log10(largest) / 3)) if largest else 0
    return 10.0**-power, f"1e{power} " if power else ""


def _against_delta(axis: Any, data: RatesFigure, values: np.ndarray, title: str) -> float:
    """The straight line and the labels; the factor that rates are drawn with."""
    scale, unit = _scale(values)
    top = 1.05 * float(data.delta.max()) or 1.0
    slope = scale * data.beta / np.sqrt(8)
    axis.plot([0, top], [0, slope * top], color=SOFT, linewidth=1.3, label="β δ / (2√2)")
    axis.set(
        title=title,
        xlim=(0, top),
        xlabel="distinguishability δ, feature units",
        ylabel=f"initial rate of ||W - W0||, {unit}{RATE}",
    )
    return scale


def _alone(axis: Any, data: RatesFigure) -> None:
    title = "Each behavior alone, all its pairs in the step"
    scale = _against_delta(axis, data, data.full, title)
    axis.plot(data.delta, scale * data.full, "o", color=BLUE, ms=4.5, label="observed")
    axis.set_ylim(bottom=0)


def _batches(axis: Any, data: RatesFigure) -> None:
    """A step on one batch, random and stratified, and what (E13) says of random ones."""
    title = f"Each behavior alone, one batch of {data.batch_size}"
    scale = _against_delta(axis, data, data.random, title)
    size = np.sqrt((data.random**2).mean(axis=1))
    axis.plot(
        np.repeat(data.delta, data.random.shape[1]),
        scale * data.random.ravel(),
        *(".",),
        color=ORANGE,
        alpha=0.3,
        ms=4.5,
        mew=0,
        label="random batches",
    )
    for rate, mark, color, face, label in (
        (size, "o", ORANGE, ORANGE, "their root mean square"),
        (data.batch_rate, "_", INK, INK, "predicted (E13)"),
        (data.stratified, "o", BLUE, "white", "a stratified batch"),
    ):
        long = 10 if mark == "_" else 4.2
        axis.plot(
            *(data.delta, scale * rate, mark), color=color, mfc=face, ms=long, mew=1.2, label=label
        )
    axis.set_ylim(0, 1.45 * scale * float(data.random.max()) or None)


def _mixtures(axis: Any, data: RatesFigure) -> None:
    """First steps on all pairs of all behaviors."""
    words = {"equal": ("equally often", BLUE), "unequal": ("1, 2, 4 times as often", ORANGE)}
    _compared(
        axis,
        {words[name]: data.mixtures[name] for name in words if name in data.mixtures},
        "All behaviors together: first step on all pairs",
    )


def _course(axis: Any, data: RatesFigure) -> None:
    """Where the prediction, of the first moment, is after many steps over batches."""
    steps = f"{data.course_steps} steps of {data.batch_size}"
    found = {
        (f"mean over {steps}", GREEN): own for n, own in data.mixtures.items() if n == "course"
    }
    _compared(axis, found, f"All behaviors together: {steps}")


def _compared(
    axis: Any, found: Mapping[tuple[str, str], tuple[np.ndarray, np.ndarray]], title: str
) -> None:
    """Label and colour -> predicted and observed rates, with the line where they are equal."""
    axis.set_title(title)
    if not found:
        axis.text(0.5, 0.5, "undefined: one behavior", ha="center", transform=axis.transAxes)
        return
    scale, unit = _scale(np.concatenate([own for pair in found.values() for own in pair]))
    for (label, color), (predicted, observed) in found.items():
        axis.plot(scale * predicted, scale * observed, "o", color=color, ms=4.5, label=label)
    low, high = axis.get_xlim()
    axis.axline((low, low), slope=1, color=SOFT, linewidth=1.2, zorder=1, label="equal")
    axis.set(
        xlim=(low, high),
        xlabel=f"predicted rate of mean margin, {unit}nats {RATE}",
        ylabel=f"observed, {unit}nats",
    )


def _names(figure: Any, names: list[str], delta: np.ndarray) -> None:
    for k, (name, own) in enumerate(zip(names, delta, strict=True)):
        height = 0.95 - 0.9 * (k + 0.5) / max(len(names), 24)
        figure.text(0.715, height, str(k + 1), fontsize=7.5, ha="right")
        figure.text(0.722, height, shorten(name, 44), fontsize=7.5)
        figure.text(0.995, height, f"{own:.2f}", fontsize=7.5, ha="right")
    figure.text(0.722, 0.965, "behavior", fontsize=7.5, color=SOFT)
    figure.text(0.995, 0.965, "δ", fontsize=7.5, ha="right", color=SOFT)
