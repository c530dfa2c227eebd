"""Pictures of `fastpref.theory.overview`: files of their own, as PNG and SVG, on white."""

from __future__ import annotations

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
from fastpref.theory.overview import Overview

LABELLED = 12  # up to so many behaviors a cell of the matrix holds its number
NAME_WIDTH = 44


def write_plots(folder: Path, view: Overview) -> list[Path]:
    """behaviors, rates and, for two or more behaviors, priority; each as .png and .svg."""
    figures = {"behaviors": _bars, "rates": _scatter, "priority": _matrix}
    written = []
    for name, draw in figures.items():
        for kind in ("png", "svg"):
            (folder / f"{name}.{kind}").unlink(missing_ok=True)  # of an earlier call
        with picture_style() as plt:
            figure = draw(plt, view)
            if figure is not None:
                written += write_picture(figure, folder, name)
    return written


def _names(view: Overview) -> list[str]:
    return [
        f"{shorten(own.statistics.behavior, NAME_WIDTH)}  {k}"
        for k, own in enumerate(view.behaviors, 1)
    ]


def _bars(plt: Any, view: Overview) -> Any:
    """Distinguishability, and what share of the first update each behavior makes up."""
    size = len(view.behaviors)
    height = 0.95 + max(size, 2) * 0.21
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, height), sharey=True)
    figure.subplots_adjust(0.335, 0.5 / height, 0.985, 1 - 0.36 / height, wspace=0.06)
    place = np.arange(size)
    left.barh(place, _delta(view), 0.68, color=BLUE)
    effective = any(np.isnan(own.statistics.delta) for own in view.behaviors)
    left.set(
        title="Distinguishability delta" + (" (effective)" if effective else ""),
        xlabel="feature units",
        yticks=place,
        yticklabels=_names(view),
        ylim=(size - 0.4, -0.6),
    )
    share = np.array([own.share for own in view.behaviors])
    fraction = np.array([own.fraction for own in view.behaviors])
    if np.isfinite(share).all():
        right.barh(place, 100 * share, 0.68, color=ORANGE, label="of first update")
    right.set_title("Share")
    right.plot(100 * fraction, place, "|", color=INK, markersize=8, mew=1.6, label="of pairs")
    right.axvline(0, color=SOFT, linewidth=0.8)
    right.set_xlabel("%")
    # Above the axes, where no bar can lie under it.
    right.legend(
        *(handles[::-1] for handles in right.get_legend_handles_labels()),
        loc="lower right",
        bbox_to_anchor=(1.015, 0.99),
        ncols=2,
        columnspacing=1.2,
        handlelength=1.3,
        frameon=False,
    )
    for axes in (left, right):
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
    return figure


def _scatter(plt: Any, view: Overview) -> Any:
    """Against delta: the head's rate, each behavior alone, and the margin's rate in the mixture."""
    delta = _delta(view)
    alone = np.array([own.head_rate for own in view.behaviors])
    mixed = np.array([own.mixture_rate for own in view.behaviors])
    if not np.isfinite(mixed).all():
        return None
    unit = "unit of time" if view.learning_rate is None else f"step at {view.learning_rate:g}"
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.2))
    figure.subplots_adjust(0.085, 0.125, 0.985, 0.89, wspace=0.25)
    line = np.array([0, 1.05 * delta.max()])
    slope = view.beta / np.sqrt(8) * (view.learning_rate or 1.0)
    left.plot(line, slope * line, color=SOFT, linewidth=1.2, label="β δ / (2√2), labels balanced")
    left.plot(delta, alone, "o", color=BLUE, ms=5, label="behaviors")
    left.set(title="Trained alone", ylabel=f"initial rate of ||W - W0|| per {unit}")
    left.set_ylim(bottom=0)
    left.legend(loc="upper left", frameon=False)
    right.axhline(0, color=SOFT, linewidth=0.8)
    right.plot(delta, mixed, "o", color=ORANGE, ms=5)
    right.set(title="In this mixture", ylabel=f"initial rate of the mean margin, nat per {unit}")
    for axes, rate in ((left, alone), (right, mixed)):
        axes.set(xlabel="distinguishability delta, feature units", xlim=(0, line[1]))
        number_points(figure, axes, delta, rate)
    return figure


def _delta(view: Overview) -> np.ndarray:
    """(K,) delta; where a behavior has more than two answers, only the effective one exists."""
    delta = np.array([own.statistics.delta for own in view.behaviors])
    effective = np.array([own.statistics.effective_delta for own in view.behaviors])
    return np.where(np.isnan(delta), effective, delta)


def _matrix(plt: Any, view: Overview) -> Any:
    """Heat map of the priority matrix in the tables' order."""
    if view.priority is None:
        return None
    size = len(view.priority)
    side = max(0.2 * size, min(0.5 * size, 2.8))  # inches
    width, height = 3.4 + side + 1.0, side + 0.95
    figure = plt.figure(figsize=(width, height))
    axes = figure.add_axes((3.3 / width, 0.55 / height, side / width, side / height))
    limit = float(np.nanmax(np.abs(view.priority), initial=0.0)) or 1.0
    cmap = plt.get_cmap("RdBu_r").with_extremes(bad="#d9d9d9")  # undefined
    image = axes.imshow(view.priority, cmap=cmap, vmin=-limit, vmax=limit)
    numbers = [str(k + 1) for k in range(size)]
    axes.set(
        yticks=range(size),
        yticklabels=_names(view),
        xticks=range(size),
        xticklabels=numbers,
        xlabel="behavior of the column",
    )
    axes.tick_params(length=0, labelsize=7.5)
    if size > 40:
        axes.tick_params(axis="x", rotation=90)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_xticks(np.arange(size + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(size + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(which="minor", length=0)
    if size <= LABELLED:
        for (k, other), value in np.ndenumerate(view.priority):
            if k != other and np.isfinite(value):
                pale = abs(value) < 0.6 * limit
                axes.text(
                    *(other, k, f"{100 * value:.0f}"),
                    ha="center",
                    va="center",
                    fontsize=6.5,
                    color=INK if pale else "white",
                )
    bar_axes = figure.add_axes(
        ((3.3 + side + 0.15) / width, 0.55 / height, 0.13 / width, side / height)
    )
    bar = figure.colorbar(image, cax=bar_axes)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7)
    figure.text(
        0.12 / width,
        1 - 0.24 / height,
        "Priority: lead of the row's behavior over the column's, trained together",
        fontsize=9.5,
    )
    return figure
