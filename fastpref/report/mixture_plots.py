"""The figure of `fastpref reproduce two-behaviors`: behaviors that are trained together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastpref.dynamics.schema import HELD_OUT, TRAIN_SAMPLE
from fastpref.report.pictures import INK, SOFT, picture_style, write_picture
from fastpref.report.svg import palette
from fastpref.report.tables import shorten
from fastpref.report.training_plots import LINES, PREDICTED, Rows, distance, points

TITLES = {"last-layer": "The head alone, SGD", "full": "All weights, AdamW"}


def draw_mixture(
    folder: Path, name: str, rows: Rows, numbers: Mapping[str, Mapping[str, Any]]
) -> list[Path]:
    """A row per run: margins, accuracy of the output, and first rates against predicted ones."""
    order = list(numbers)  # by predicted rate
    colors = dict(zip(order, palette(len(order), dark=False), strict=True))
    with picture_style() as plt:
        bottom = 0.72 + 0.19 * max(len(order), 4)  # inches: the legend
        height = 5.8 + bottom
        figure, axes = plt.subplots(2, 3, figsize=(11.0, height))
        figure.subplots_adjust(
            0.07, bottom / height, 0.985, 1 - 0.3 / height, wspace=0.3, hspace=0.38
        )
        for panels, (kind, title) in zip(axes, TITLES.items(), strict=True):
            for own in order:
                for split, line in LINES.items():
                    labels = {"behavior": own, "split": split, "run": kind}
                    look = {"color": colors[own], "linestyle": line, "linewidth": 1.5}
                    panels[0].plot(*points(rows, "margin", **labels), **look)
                    panels[1].plot(*points(rows, "output_accuracy", **labels), **look)
                labels = {"behavior": own, "split": TRAIN_SAMPLE, "run": kind}
                panels[0].plot(
                    *points(rows, "predicted_margin", **labels),
                    color=INK if kind == "last-layer" else colors[own],
                    linestyle=PREDICTED,
                    linewidth=1.3,
                )
            panels[0].set(title=f"{title}: margin", ylabel="mean margin, nats")
            panels[1].set(title=f"{title}: accuracy", ylabel="share with π(chosen) > π(rejected)")
            for panel in panels[:2]:
                panel.set_xlabel("optimizer step")
                panel.margins(x=0.02)
            _rates(panels[2], title, [numbers[own] for own in order], kind, list(colors.values()))
        _legends(plt, figure, order, colors, numbers, height)
        return write_picture(figure, folder, name)


def _rates(
    axes: Any,
    title: str,
    numbers: Sequence[Mapping[str, Any]],
    kind: str,
    colors: Sequence[str],
) -> None:
    """Observed over predicted update rates, each relative to the mean over behaviors."""
    rate = np.array([own["predicted"]["margin_rate"] for own in numbers])
    wanted = _over_mean(rate)
    axes.axhline(0, color=SOFT, linewidth=0.8)
    for what, marker, size in (("margin_first", "o", 7), ("margin_last", "D", 5)):
        seen = np.array([own["observed"][kind][what] for own in numbers])
        for x, y, color in zip(wanted, _over_mean(seen), colors, strict=True):
            axes.plot(x, y, marker, color=color, markersize=size, alpha=0.9)
    ends = np.array([min(0.0, wanted.min()), 1.1 * wanted.max()])
    axes.plot(ends, ends, color=SOFT, linestyle=PREDICTED, linewidth=1.3)
    axes.set(
        title=f"{title}: priority",
        xlabel="predicted rate of the margin / mean of behaviors",
        ylabel="observed / mean of behaviors",
    )


def _over_mean(values: np.ndarray) -> np.ndarray:
    """(K,) relative to their mean; nan, not drawn, where that is 0."""
    mean = values.mean()
    return values / mean if mean else np.full(len(values), np.nan)


def _legends(
    plt: Any,
    figure: Any,
    order: Sequence[str],
    colors: Mapping[str, str],
    numbers: Mapping[str, Any],
    height: float,
) -> None:
    line = plt.Line2D
    named = []
    for own in order:
        share = numbers[own]["predicted"]["share_of_update"]
        label = (
            f"{shorten(own, 60)}, delta {distance(numbers[own]):.3g}, "
            f"share of first update {100 * share:.0f} %"
        )
        named.append(line([], [], color=colors[own], linewidth=2.2, label=label))
    kinds = [
        line([], [], color=INK, linewidth=1.5, label="training pairs"),
        line([], [], color=INK, linewidth=1.5, linestyle=LINES[HELD_OUT], label="held-out pairs"),
        line(
            [], [], color=INK, linewidth=1.3, linestyle=PREDICTED,
            label="predicted for the head alone, training pairs",
        ),
        line([], [], marker="o", color=INK, linestyle="", label="at the first evaluation"),
        line([], [], marker="D", color=INK, linestyle="", markersize=5, label="at the end"),
    ]  # fmt: skip
    place = {"frameon": False, "labelspacing": 0.35}
    figure.add_artist(
        figure.legend(
            handles=named, loc="lower left", bbox_to_anchor=(0.06, 0.02 / height), **place
        )
    )
    figure.legend(handles=kinds, loc="lower right", bbox_to_anchor=(0.99, 0.02 / height), **place)
