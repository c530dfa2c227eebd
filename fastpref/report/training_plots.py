"""Figures of `fastpref reproduce` where features move: curves of runs, predictions beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastpref.dynamics.schema import HELD_OUT, TRAIN_SAMPLE
from fastpref.report.pictures import INK, SOFT, picture_style, write_picture
from fastpref.report.svg import palette
from fastpref.report.tables import shorten

Rows = Sequence[Mapping[str, Any]]  # of curves.csv
LINES = {TRAIN_SAMPLE: "-", HELD_OUT: (0, (4, 2))}
PREDICTED = (0, (1, 1.6))


def points(rows: Rows, column: str, **labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of ``column`` in the rows with these labels, nan where unknown."""
    own = [r for r in rows if all(r[name] == value for name, value in labels.items())]
    values = [np.nan if r[column] is None else r[column] for r in own]
    return np.array([r["step"] for r in own]), np.array(values, np.float64)


def distance(numbers: Mapping[str, Any]) -> float:
    """delta of a behavior; where it has more than two answers, the effective one."""
    known = numbers["predicted"]
    return float(known["effective_delta"] if np.isnan(known["delta"]) else known["delta"])


def draw_behaviors(
    folder: Path, name: str, rows: Rows, numbers: Mapping[str, Mapping[str, Any]]
) -> list[Path]:
    """A run per behavior: loss, accuracy, rate against delta, and what becomes of delta."""
    order = sorted(numbers, key=lambda own: -distance(numbers[own]))
    colors = dict(zip(order, palette(len(order), dark=False), strict=True))
    with picture_style() as plt:
        bottom = 0.62 + 0.19 * len(order)  # inches: the legend
        height = 5.6 + bottom
        figure, axes = plt.subplots(2, 2, figsize=(9.6, height))
        figure.subplots_adjust(
            0.08, bottom / height, 0.985, 1 - 0.3 / height, wspace=0.24, hspace=0.34
        )
        for own in order:
            for split, line in LINES.items():
                look = {"color": colors[own], "linestyle": line, "linewidth": 1.5}
                labels = {"behavior": own, "split": split}
                axes[0, 0].plot(*points(rows, "loss", **labels), **look)
                axes[0, 1].plot(*points(rows, "output_accuracy", **labels), **look)
            step, delta = points(rows, "delta", behavior=own, split=TRAIN_SAMPLE)
            grown = delta / delta[0] if delta[0] else np.full(len(delta), np.nan)
            axes[1, 1].plot(step, grown, color=colors[own], linewidth=1.5)
            labels = {"behavior": own, "split": TRAIN_SAMPLE}
            axes[0, 0].plot(
                *points(rows, "predicted_loss", **labels),
                color=colors[own],
                linestyle=PREDICTED,
                linewidth=1.3,
            )
        axes[0, 0].set(title="Loss", ylabel="mean loss, nats")
        axes[0, 1].set(title="Accuracy of the output", ylabel="share with π(chosen) > π(rejected)")
        _rate_panel(axes[1, 0], numbers, order, colors)
        axes[1, 1].axhline(1, color=SOFT, linewidth=0.8)
        axes[1, 1].set(title="Distinguishability along the run", ylabel="delta / delta before")
        for panel in (axes[0, 0], axes[0, 1], axes[1, 1]):
            panel.set_xlabel("optimizer step")
            panel.margins(x=0.02)
        _legends(plt, figure, order, colors, numbers, height)
        return write_picture(figure, folder, name)


def _rate_panel(
    axes: Any, numbers: Mapping[str, Any], order: Sequence[str], colors: Mapping[str, str]
) -> None:
    """The mean margin of the first evaluation against delta, with that of the head alone."""
    delta = np.array([distance(numbers[own]) for own in order])
    alone = np.array([numbers[own]["predicted"]["head_alone_margin_first"] for own in order])
    seen = np.array([numbers[own]["observed"]["margin_first"] for own in order])
    axes.plot(delta, alone, color=SOFT, linestyle=PREDICTED, linewidth=1.2)
    for x, low, high, own in zip(delta, alone, seen, order, strict=True):
        axes.plot([x, x], [low, high], color=SOFT, linewidth=0.8)
        axes.plot(x, high, "o", color=colors[own], markersize=7)
        axes.plot(x, low, "o", markerfacecolor="white", markeredgecolor=colors[own], markersize=6)
    axes.set(
        title=f"After {_steps(numbers)}: margin against distinguishability",
        xlabel="delta = |mu+ - mu-| at the start, feature units",
        ylabel="mean margin, nats",
    )
    axes.set_xlim(0, 1.08 * float(np.nanmax(delta)) or 1.0)
    axes.set_ylim(bottom=min(0.0, float(np.nanmin(np.append(alone, seen)))))


def _steps(numbers: Mapping[str, Any]) -> str:
    first = {int(own["observed"]["first_evaluation"]) for own in numbers.values()}
    return "1 step" if first == {1} else f"{' or '.join(map(str, sorted(first)))} steps"


def _legends(
    plt: Any,
    figure: Any,
    order: Sequence[str],
    colors: Mapping[str, str],
    numbers: Mapping[str, Any],
    height: float,
) -> None:
    line = plt.Line2D
    kinds = [
        line([], [], color=INK, linewidth=1.5, label="training pairs"),
        line([], [], color=INK, linewidth=1.5, linestyle=LINES[HELD_OUT], label="held-out pairs"),
        line([], [], color=INK, linewidth=1.3, linestyle=PREDICTED, label="head alone, predicted"),
        line([], [], marker="o", color=INK, linestyle="", markersize=6, label="observed"),
        line(
            [], [], marker="o", markerfacecolor="white", markeredgecolor=INK, linestyle="",
            markersize=6, label="head alone, predicted",
        ),
    ]  # fmt: skip
    named = [
        line(
            [],
            [],
            color=colors[own],
            linewidth=2.2,
            label=f"{shorten(own, 72)}, delta {distance(numbers[own]):.3g}",
        )
        for own in order
    ]
    first = figure.legend(
        handles=named,
        loc="lower left",
        bbox_to_anchor=(0.07, 0.02 / height),
        frameon=False,
        labelspacing=0.35,
    )
    figure.add_artist(first)
    figure.legend(
        handles=kinds,
        loc="lower right",
        bbox_to_anchor=(0.99, 0.02 / height),
        frameon=False,
        labelspacing=0.35,
    )
