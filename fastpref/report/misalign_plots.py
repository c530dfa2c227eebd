"""Figures of `fastpref reproduce misalign` and `hh-misalign`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastpref.dynamics.schema import HELD_OUT, TRAIN_SAMPLE
from fastpref.report.pictures import BLUE, INK, ORANGE, SOFT, picture_style, write_picture
from fastpref.report.training_plots import LINES, PREDICTED, Rows

STARTS = {"base": BLUE, "aligned": ORANGE}
SPLITS = (TRAIN_SAMPLE, HELD_OUT)


def mean_points(rows: Rows, run: str, split: str, value: Any) -> tuple[np.ndarray, np.ndarray]:
    """Steps and means over all evaluated pairs of ``value``: a column, or a function of a row."""
    read = value if callable(value) else (lambda row: row[value])
    found: dict[int, list[tuple[int, float]]] = {}
    for row in rows:
        if row["run"] == run and row["split"] == split and read(row) is not None:
            found.setdefault(row["step"], []).append((row["n"], read(row)))
    steps = sorted(found)
    means = [sum(n * v for n, v in found[s]) / sum(n for n, _ in found[s]) for s in steps]
    return np.array(steps), np.array(means)


def draw_misalign(folder: Path, name: str, rows: Rows, numbers: Mapping[str, Any]) -> list[Path]:
    """LoRA from both starts above, the head alone on frozen features below."""
    with picture_style() as plt:
        figure, axes = plt.subplots(2, 3, figsize=(11.0, 6.6))
        figure.subplots_adjust(0.07, 0.145, 0.985, 0.955, wspace=0.32, hspace=0.4)
        (loss, accuracy, delta), (margin, turned, bars) = axes
        loss_panel(loss, rows, numbers["predicted"]["speed"])
        _both(accuracy, rows, "output_accuracy", STARTS)
        accuracy.axhline(0.5, color=SOFT, linewidth=0.8)
        accuracy.set(title="LoRA: answers turned", ylabel="share with π(chosen) > π(rejected)")
        for run, color in (("align", SOFT), *STARTS.items()):
            step, values = mean_points(rows, run, TRAIN_SAMPLE, "delta")
            delta.plot(step, values, color=color, linewidth=1.6)
        delta.set(title="LoRA: distinguishability", ylabel="delta, training pairs")
        delta.set_ylim(bottom=0)
        heads = {"head-base": BLUE, "head-aligned": ORANGE}
        for width, (run, color) in zip((4.5, 1.4), heads.items(), strict=True):
            step, values = mean_points(rows, run, TRAIN_SAMPLE, "margin")
            alpha = 0.45 if width > 2 else 1.0
            margin.plot(step, values, color=color, linewidth=width, alpha=alpha)
        margin.set(title="Head alone, frozen features: margin", ylabel="mean margin, nats")
        _both(turned, rows, "output_accuracy", heads)
        turned.axhline(0.5, color=SOFT, linewidth=0.8)
        turned.set(title="Head alone: answers turned", ylabel="share with π(chosen) > π(rejected)")
        for panel in (loss, accuracy, delta, margin, turned):
            panel.set_xlabel("optimizer step")
            panel.margins(x=0.02)
        seen = numbers["observed"]
        speed_panel(
            bars,
            {
                "predicted, (δ\u2032/δ)²": numbers["predicted"]["speed"],
                "head, one full step": seen["speed_of_the_head"],
                "LoRA, first evaluation": seen["speed"]["first"],
                "LoRA, end of the run": seen["speed"]["last"],
            },
        )
        start_legend(plt, figure, aligning=True)
        return write_picture(figure, folder, name)


def loss_panel(axes: Any, rows: Rows, speed: float) -> None:
    """Losses from both starts, and the base's fall times the predicted ratio of slopes."""
    _both(axes, rows, "loss", STARTS)
    step, values = mean_points(rows, "base", TRAIN_SAMPLE, "loss")
    expected = values[0] - speed * (values[0] - values)
    axes.plot(step, expected, color=INK, linestyle=PREDICTED, linewidth=1.3)
    axes.set(title="LoRA: loss on exchanged labels", ylabel="mean loss, nats")


def _both(axes: Any, rows: Rows, column: Any, runs: Mapping[str, str]) -> None:
    for run, color in runs.items():
        for split in SPLITS:
            step, values = mean_points(rows, run, split, column)
            axes.plot(step, values, color=color, linestyle=LINES[split], linewidth=1.6)


def speed_panel(axes: Any, values: Mapping[str, float]) -> None:
    """How many times as fast the loss falls from the aligned start: predicted and observed."""
    known = [v if np.isfinite(v) else 0.0 for v in values.values()]
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
    axes.axvline(1, color=BLUE, linewidth=1.4, zorder=0.5)
    for place, (name, value) in enumerate(values.items()):
        color = SOFT if name.startswith("predicted") else ORANGE
        axes.barh(place, known[place], 0.42, color=color)
        text = f"{value:.3g}" if np.isfinite(value) else "undefined"
        # Above its bar: beside it there is no room between two panels.
        axes.text(
            *(0.02, place - 0.26, f"{name}: {text}"), va="bottom", fontsize=8, color=INK, bbox=paper
        )
    axes.set(
        title="Aligned start over base: fall of the loss",
        xlabel="times as far (1: the base)",
        yticks=[],
        ylim=(len(values) - 0.6, -0.75),
        xlim=(min(0.0, *known), 1.08 * max(1.0, *known)),
    )
    axes.grid(False, axis="y")


def start_legend(plt: Any, figure: Any, aligning: bool) -> None:
    """At the figure's foot: starts, splits, prediction."""
    line = plt.Line2D
    handles: Sequence[Any] = [
        line([], [], color=BLUE, linewidth=2.2, label="from the base"),
        line([], [], color=ORANGE, linewidth=2.2, label="from the aligned model"),
        *([line([], [], color=SOFT, linewidth=2.2, label="while aligning")] if aligning else []),
        line([], [], color=INK, linewidth=1.5, label="training pairs"),
        line([], [], color=INK, linewidth=1.5, linestyle=LINES[HELD_OUT], label="held-out pairs"),
        line(
            [], [], color=INK, linewidth=1.3, linestyle=PREDICTED,
            label="predicted: the base\u2019s fall times (δ\u2032/δ)²",
        ),
    ]  # fmt: skip
    figure.legend(
        handles=handles, loc="lower center", ncols=len(handles), frameon=False, columnspacing=1.4
    )


def draw_dialogues(folder: Path, name: str, rows: Rows, numbers: Mapping[str, Any]) -> list[Path]:
    """Losses, differences of log-probs and accuracy from both starts; the first steps apart where
    they are runs of their own."""
    early = {f"{run}-early": color for run, color in STARTS.items()}
    apart = any(row["run"] in early for row in rows)
    with picture_style() as plt:
        figure, axes = plt.subplots(2, 3 if apart else 2, figsize=(11.0 if apart else 8.6, 6.6))
        figure.subplots_adjust(
            0.07 if apart else 0.09, 0.145, 0.985, 0.955, wspace=0.32, hspace=0.4
        )
        loss_panel(axes[0, 0], rows, numbers["predicted"]["speed"])
        _both(axes[0, 1], rows, "margin", STARTS)
        axes[0, 1].set(
            title="LoRA: chosen minus rejected, since the start", ylabel="log-probability, nats"
        )
        panels = [axes[0, 0], axes[0, 1]]
        if apart:
            _both(axes[0, 2], rows, "loss", early)
            _both(axes[1, 2], rows, "margin", early)
            axes[0, 2].set(title="First steps: loss", ylabel="mean loss, nats")
            axes[1, 2].set(
                title="First steps: chosen minus rejected", ylabel="log-probability, nats"
            )
            panels += [axes[0, 2], axes[1, 2]]
        _both(axes[1, 0], rows, _accuracy, STARTS)
        axes[1, 0].set(title="LoRA: accuracy of the reward", ylabel="share with a margin above 0")
        for panel in (*panels, axes[1, 0]):
            panel.set_xlabel("optimizer step")
            panel.margins(x=0.02)
        seen = numbers["observed"]
        speed_panel(
            axes[1, 1],
            {
                "predicted, (δ\u2032/δ)²": numbers["predicted"]["speed"],
                "squared gradient": seen["speed_of_gradient"],
                "first evaluation": seen["speed"]["first"],
                "end of the run": seen["speed"]["last"],
            },
        )
        start_legend(plt, figure, aligning=False)
        return write_picture(figure, folder, name)


def _accuracy(row: Mapping[str, Any]) -> float | None:
    """Before training every margin is 0 but for rounding, and says nothing."""
    return None if row["step"] == 0 else row["reward_accuracy"]
