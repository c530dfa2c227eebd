"""The figure of `fastpref reproduce balance`: margins, times and weights with and without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastpref.dynamics.groups import MARGIN_THRESHOLD
from fastpref.dynamics.schema import TRAIN_SAMPLE
from fastpref.report.pictures import INK, SOFT, picture_style, write_picture
from fastpref.report.svg import palette
from fastpref.report.tables import shorten
from fastpref.report.training_plots import Rows, points

MARKERS = ("o", "s", "D", "^")
WEIGHTS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


def draw_balance(
    folder: Path,
    name: str,
    rows: Rows,  # of curves.csv
    found: Mapping[str, Mapping[str, Sequence[Any]]],  # run -> measure -> one value per seed
    delta: Mapping[str, float],  # by behavior, in order
) -> list[Path]:
    """Above margins by run, thin per seed and thick their mean, and the times to the threshold;
    below the weights, and inequality against the total."""
    arms, order = list(found), list(delta)
    colors = dict(zip(order, palette(len(order), dark=False), strict=True))
    with picture_style() as plt:
        bottom = 0.6 + 0.19 * len(order)  # inches: the legend
        height = 5.6 + bottom
        wide = len(arms) + 1
        figure, axes = plt.subplots(2, wide, figsize=(3.0 * wide, height), squeeze=False)
        figure.subplots_adjust(
            0.05, bottom / height, 0.99, 1 - 0.3 / height, wspace=0.26, hspace=0.36
        )
        for above, below, arm in zip(axes[0], axes[1], arms, strict=False):
            for own in order:
                labels = {"run": arm, "split": TRAIN_SAMPLE, "behavior": own}
                _curves(above, rows, "margin", labels, colors[own])
                _curves(below, rows, "loss_weight", labels, colors[own])
            above.axhline(MARGIN_THRESHOLD, color=SOFT, linewidth=0.8)
            above.set(title=f"{arm}: margin", xlabel="optimizer step", ylabel="mean margin, nats")
            below.set(title=f"{arm}: weight of the loss", xlabel="optimizer step", yscale="log")
            below.axhline(1, color=SOFT, linewidth=0.8)
            below.set_xlim(above.get_xlim())  # of a run without weights too
        top = max(above.get_ylim()[1] for above in axes[0, :-1])
        for above in axes[0, :-1]:
            above.set_ylim(top=top)
        weighted = [below for below in axes[1, :-1] if len(below.lines) > 1]
        low, high = zip(*(below.get_ylim() for below in weighted), strict=True)
        for below in axes[1, :-1]:
            below.minorticks_off()
            below.set_yticks(WEIGHTS, [f"{w:g}" for w in WEIGHTS])
            below.set_ylim(min(*low, 0.5), max(*high, 2.0))
        _times(axes[0, -1], found, order, colors)
        _trade(axes[1, -1], found)
        _legends(plt, figure, order, colors, delta, arms, height)
        return write_picture(figure, folder, name)


def _curves(axes: Any, rows: Rows, column: str, labels: Mapping[str, Any], color: str) -> None:
    seeds = sorted({r["seed"] for r in rows})
    values: list[np.ndarray] = []
    for seed in seeds:
        step, own = points(rows, column, seed=seed, **labels)
        if np.isnan(own).all():
            return  # a run without weights
        axes.plot(step, own, color=color, linewidth=0.7, alpha=0.45)
        values.append(own)
    axes.plot(step, np.mean(values, axis=0), color=color, linewidth=2.0)
    axes.margins(x=0.02)


def _times(
    axes: Any,
    found: Mapping[str, Mapping[str, Sequence[Any]]],
    order: Sequence[str],
    colors: Mapping[str, str],
) -> None:
    """Steps to the threshold, a column per run; a behavior that does not arrive is not there."""
    for place, own in enumerate(found.values()):
        for k, name in enumerate(order):
            times = [run[name] for run in own[f"{TRAIN_SAMPLE}_times"]]
            x = place + 0.14 * (k - (len(order) - 1) / 2)
            axes.plot([x] * len(times), times, "o", color=colors[name], markersize=4.5, alpha=0.8)
    axes.set_xticks(range(len(found)), list(found))
    axes.set(title=f"Steps to a margin of {MARGIN_THRESHOLD:g} nat", ylabel="optimizer step")
    axes.set_ylim(bottom=0)


def _trade(axes: Any, found: Mapping[str, Mapping[str, Sequence[Any]]]) -> None:
    for marker, own in zip(MARKERS, found.values(), strict=False):
        x, y = own[f"{TRAIN_SAMPLE}_gini_of_times"], own[f"{TRAIN_SAMPLE}_total_margin"]
        axes.plot(x, y, marker, color=INK, markersize=4, alpha=0.5)
        axes.plot(np.mean(x), np.mean(y), marker, color=INK, markersize=8)
    axes.set(
        title="What equality costs",
        xlabel="Gini index of the times",
        ylabel="sum of margins at the end, nats",
    )


def _legends(
    plt: Any,
    figure: Any,
    order: Sequence[str],
    colors: Mapping[str, str],
    delta: Mapping[str, float],
    arms: Sequence[str],
    height: float,
) -> None:
    line = plt.Line2D
    named = [
        line([], [], color=colors[own], linewidth=2.2,
             label=f"{shorten(own, 72)}, delta {delta[own]:.3g}")
        for own in order
    ]  # fmt: skip
    kinds = [
        line([], [], marker=marker, color=INK, linestyle="", label=arm)
        for marker, arm in zip(MARKERS, arms, strict=False)
    ]
    place = {"frameon": False, "labelspacing": 0.35}
    figure.add_artist(
        figure.legend(
            handles=named, loc="lower left", bbox_to_anchor=(0.04, 0.02 / height), **place
        )
    )
    figure.legend(handles=kinds, loc="lower right", bbox_to_anchor=(0.99, 0.02 / height), **place)
