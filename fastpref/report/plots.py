"""The figures of a run: curves per behavior, distributions over pairs, the optimizer's steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastpref.dynamics import schema
from fastpref.report.dynamics_plots import rate_figures
from fastpref.report.svg import FEW, MUTED, TEXT, Figure, finish, shared_power, stand_in, style
from fastpref.report.tables import SPLITS, RunFiles, Summary, shorten

_MAX_LABELS, _MAX_PANELS, _MAX_POINTS = 40, 30, 1000
_WIDTH = 9.6


@dataclass(frozen=True, slots=True)
class _Quantity:
    """A column of the behaviors table that is drawn over the steps."""

    column: str
    title: str
    unit: str
    caption: str


_MARGIN = _Quantity(
    "margin",
    "Margin",
    "mean margin, nats",
    "Mean margin (log-ratio of chosen minus rejected, without beta) of each behavior's evaluated "
    "pairs, in nats",
)
_ACCURACY = _Quantity(
    "reward_accuracy",
    "Accuracy",
    "fraction with margin > 0",
    "Fraction of each behavior's evaluated pairs whose margin is above 0",
)
_RATE = _Quantity(
    "rate_obs",
    "Update rate",
    "nats per optimizer step",
    "Change of each behavior's mean margin per optimizer step since the previous evaluation, in "
    "nats per step",
)
_LOSS = _Quantity(
    "loss", "Loss", "mean loss, nats", "Mean loss of each behavior's evaluated pairs, in nats"
)


def all_figures(run: RunFiles, rows: Sequence[Summary]) -> list[Figure]:
    """Every figure that the run's files allow; `rows` orders and colours the behaviors.

    Up to FEW behaviors share one plot per quantity. More share one where curves keep their order
    (margin, loss), and have a panel each where they would be one tangle (accuracy, update rate).
    """
    order = [row.behavior for row in rows]
    order += sorted(name for name in run.pairs if name not in order)
    if len(order) <= FEW:
        curves = [_curves(run, order, q) for q in (_MARGIN, _ACCURACY, _RATE, _LOSS)]
    else:
        curves = [_curves(run, order, _MARGIN)]
        curves += [_curve_panels(run, order, q) for q in (_MARGIN, _ACCURACY, _RATE)]
        curves += [_curves(run, order, _LOSS)]
    others = [_head_norms(run, order), _margin_histograms(run, order), _optimizer(run)]
    figures = [*curves, *rate_figures(run.rates, order), *others]
    return [figure for figure in figures if figure is not None]


def _drawable(run: RunFiles, order: Sequence[str], column: str) -> list[str]:
    """The behaviors with a known value of `column` in some split, in their order."""
    known = {
        name
        for curves in run.curves.values()
        for name, curve in curves.items()
        if np.isfinite(curve[column]).any()
    }
    return [name for name in order if name in known]


def _curves(run: RunFiles, order: Sequence[str], quantity: _Quantity) -> Figure | None:
    """One curve per behavior and split over the steps, named at its right end."""
    names = _drawable(run, order, quantity.column)
    if not names:
        return None
    with style() as plt:
        labelled = _ends(names, _MAX_LABELS)
        height = max(3.4, 0.175 * len(labelled) + 0.75)
        figure, axes = plt.subplots(figsize=(_WIDTH, height))
        figure.subplots_adjust(0.075, 0.5 / height, 0.68, 1 - 0.32 / height)
        ends: dict[str, float] = {}
        for name in names:
            for split in SPLITS:
                curve = run.curves.get(split, {}).get(name)
                if curve is None:
                    continue
                color = stand_in(order.index(name))
                line = _line(split, len(names))
                axes.plot(*_points(curve, quantity), color=color, **line)
                known = curve[quantity.column][np.isfinite(curve[quantity.column])]
                if known.size and name not in ends:
                    ends[name] = float(known[-1])
        axes.set(xlabel="optimizer step", ylabel=quantity.unit)
        _scale(axes, quantity)
        _split_legend(axes, run)
        _label_ends(axes, {name: ends[name] for name in labelled}, order, height)
        caption = f"{quantity.caption}; train sample solid, held-out dashed"
        if len(labelled) < len(names):
            caption += f"; named: the {_shown(len(labelled), len(names))}"
        return finish(
            figure, quantity.column, quantity.title, f"{caption}. From records/behaviors."
        )


def _points(curve: dict[str, np.ndarray], quantity: _Quantity) -> tuple[np.ndarray, np.ndarray]:
    """What to draw of a curve; a rate belongs to the interval that ends at its step."""
    step, values = curve["step"], curve[quantity.column]
    if quantity is not _RATE:
        return step, values
    return np.repeat(step, 2)[:-1], np.repeat(values, 2)[1:]


def _scale(axes: Any, quantity: _Quantity) -> None:
    axes.margins(x=0)
    axes.set_xlim(left=0)
    if quantity is _RATE:
        axes.axhline(0, color=MUTED, linewidth=0.8, zorder=1)
    if quantity is _ACCURACY:
        axes.set_ylim(-0.02, 1.04)


def _label_ends(axes: Any, ends: dict[str, float], order: Sequence[str], height: float) -> None:
    """Name the curves right of the axes, beside their ends and apart from each other."""
    names = sorted(ends, key=lambda name: ends[name])
    low, high = axes.get_ylim()
    wanted = np.array([(ends[name] - low) / (high - low) for name in names])
    size = 8.5 if len(names) <= FEW else 7.5
    places = spread(np.clip(wanted, 0, 1), size * 1.3 / (72 * (height - 0.82)))
    for name, end, place in zip(names, wanted, places, strict=True):
        color = stand_in(order.index(name))
        axes.plot(
            [1.002, 1.02, 1.03],
            [end, place, place],
            transform=axes.transAxes,
            color=color,
            linewidth=0.7,
            clip_on=False,
        )
        axes.text(
            1.036,
            place,
            shorten(name, 46),
            transform=axes.transAxes,
            color=color,
            fontsize=size,
            va="center",
        )


def spread(wanted: np.ndarray, gap: float) -> np.ndarray:
    """Places in [0, 1] at least `gap` apart and nearest to `wanted` (n,), ascending.

    Least squares by pooling adjacent violators: places minus i*gap must not decrease. Where
    n labels do not fit, the gap is made smaller.
    """
    count = len(wanted)
    gap = min(gap, 1 / max(count - 1, 1))
    blocks: list[tuple[float, int]] = []
    for value in wanted - gap * np.arange(count):
        mean, size = float(value), 1
        while blocks and blocks[-1][0] > mean:
            before, members = blocks.pop()
            mean = (mean * size + before * members) / (size + members)
            size += members
        blocks.append((mean, size))
    pooled = np.concatenate([np.full(size, mean) for mean, size in blocks] or [np.zeros(0)])
    return np.clip(pooled, 0, 1 - gap * max(count - 1, 0)) + gap * np.arange(count)


def _curve_panels(run: RunFiles, order: Sequence[str], quantity: _Quantity) -> Figure | None:
    """One small plot per behavior, all with the same axes, the mean of all behaviors in grey."""
    found = _drawable(run, order, quantity.column)
    if not found:
        return None
    names = _ends(found, _MAX_PANELS)
    reference = _mean_curve(run, quantity.column)
    with style() as plt:
        figure, panels = _panels(plt, len(names), sharey=True)
        for axes, name in zip(panels, names, strict=True):
            axes.plot(*_points(reference, quantity), color=MUTED, linewidth=0.8)
            for split in SPLITS:
                curve = run.curves.get(split, {}).get(name)
                if curve is not None:
                    axes.plot(
                        *_points(curve, quantity),
                        color=stand_in(order.index(name)),
                        **_line(split, 1),
                    )
            axes.set_title(shorten(name, 30), fontsize=7, pad=3)
            _scale(axes, quantity)
        figure.supxlabel("optimizer step", fontsize=8.5)
        figure.supylabel(f"{quantity.unit}{shared_power(panels)}", x=0.0, fontsize=8.5)
        caption = (
            f"{quantity.caption}; train sample solid, held-out dashed, in grey the mean of all "
            "behaviors; fastest update rate first"
        )
        if len(names) < len(found):
            caption += f"; shown: the {_shown(len(names), len(found))}"
        return finish(
            figure,
            f"{quantity.column}-panels",
            f"{quantity.title}, behavior by behavior",
            f"{caption}. From records/behaviors.",
        )


def _mean_curve(run: RunFiles, column: str) -> dict[str, np.ndarray]:
    """A curve of the mean over the behaviors evaluated at a step, of the first split there is."""
    curves = run.curves[next(s for s in SPLITS if s in run.curves)].values()
    values = np.concatenate([curve[column] for curve in curves])
    steps, which = np.unique(
        np.concatenate([curve["step"] for curve in curves]), return_inverse=True
    )
    known = np.isfinite(values)
    count = np.bincount(which[known], minlength=steps.size)
    total = np.bincount(which[known], values[known], minlength=steps.size)
    mean = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return {"step": steps, column: mean}


def _head_norms(run: RunFiles, order: Sequence[str]) -> Figure | None:
    """Quantiles of the pairs' head-gradient norms, one bar per behavior."""
    norms = {n: p["head_gnorm_m"][np.isfinite(p["head_gnorm_m"])] for n, p in run.pairs.items()}
    found = [name for name in order if name in norms and norms[name].size]
    if not found:
        return None
    names = _ends(found, _MAX_LABELS)
    with style() as plt:
        height = 0.21 * len(names) + 0.75
        figure, axes = plt.subplots(figsize=(_WIDTH, height))
        figure.subplots_adjust(0.32, 0.5 / height, 0.98, 1 - 0.1 / height)
        for place, name in enumerate(names):
            color = stand_in(order.index(name))
            p5, p25, p50, p75, p95 = np.quantile(norms[name], (0.05, 0.25, 0.5, 0.75, 0.95))
            axes.plot([p5, p95], [place, place], color=color, linewidth=1)
            axes.barh(place, p75 - p25, left=p25, height=0.6, color=color, alpha=0.45)
            axes.plot([p50, p50], [place - 0.3, place + 0.3], color=color, linewidth=2)
        axes.set_yticks(range(len(names)), [shorten(name, 44) for name in names])
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlim(left=0)
        axes.set_xlabel("norm of the margin's gradient over the head's weight")
        axes.grid(axis="y", visible=False)
        caption = (
            "Norm of the gradient of the margin over the output head's weight, per trained pair "
            "(nats per unit of weight): 5 to 95 % line, 25 to 75 % bar, median mark, over all "
            "recorded steps; fastest update rate first"
        )
        if len(names) < len(found):
            caption += f"; shown: the {_shown(len(names), len(found))}"
        return finish(
            figure,
            "head-norms",
            "Head-gradient norm of the pairs",
            f"{caption}. From records/pairs.",
        )


def _margin_histograms(run: RunFiles, order: Sequence[str]) -> Figure | None:
    """Margins of the trained pairs in the first and in the last fifth of the steps."""
    found = [n for n in order if n in run.pairs and np.isfinite(run.pairs[n]["margin"]).any()]
    last = max((float(run.pairs[name]["step"].max()) for name in found), default=0.0)
    if last < 5:
        return None
    names = _ends(found, _MAX_PANELS)
    every = np.concatenate([run.pairs[name]["margin"] for name in names])
    low, high = np.quantile(every[np.isfinite(every)], (0.002, 0.998))
    edges = np.linspace(min(low, 0.0), max(high, 1e-6), 31)
    with style() as plt:
        figure, panels = _panels(plt, len(names), sharey=False)
        for axes, name in zip(panels, names, strict=True):
            pairs = run.pairs[name]
            windows = (
                (pairs["step"] <= last / 5, MUTED),
                (pairs["step"] > last * 4 / 5, stand_in(order.index(name))),
            )
            for inside, color in windows:
                margins = np.clip(pairs["margin"][inside], edges[0], edges[-1])
                counts, _ = np.histogram(margins[np.isfinite(margins)], edges)
                axes.stairs(
                    counts / max(counts.sum(), 1),
                    edges,
                    fill=True,
                    color=color,
                    alpha=0.55,
                    linewidth=0,
                )
            axes.axvline(0, color=MUTED, linewidth=0.8)
            axes.set_title(shorten(name, 30), fontsize=7, pad=3)
            axes.set_yticks([])
            axes.margins(x=0)
        figure.supxlabel("margin, nats", fontsize=8.5)
        figure.supylabel("fraction of pairs", x=0.0, fontsize=8.5)
        caption = (
            "Distribution of the margins of trained pairs, in nats (the outermost bins hold what "
            "lies beyond): first fifth of the steps grey, last fifth in colour, each panel with "
            "its own height"
        )
        if len(names) < len(found):
            caption += f"; shown: the {_shown(len(names), len(found))}"
        return finish(
            figure,
            "margin-histograms",
            "Margins of the pairs, early and late",
            f"{caption}. From records/pairs.",
        )


def _optimizer(run: RunFiles) -> Figure | None:
    """Loss, gradient norm and learning rate of the optimizer steps."""
    if not len(run.steps.get("step", ())):
        return None
    labels = {"loss": "loss, nats", "grad_norm": "gradient norm", "lr": "learning rate"}
    shown = [name for name in labels if np.isfinite(run.steps[name]).any()]
    with style() as plt:
        figure, panels = plt.subplots(
            len(shown), 1, figsize=(_WIDTH, 1.55 * len(shown) + 0.5), sharex=True, squeeze=False
        )
        for axes, name in zip(panels[:, 0], shown, strict=True):
            step, values, bins = _thin(run.steps["step"], run.steps[name])
            axes.plot(step, values, color=stand_in(0), linewidth=1.1)
            axes.set_ylabel(labels[name])
            axes.margins(x=0)
            if name == "lr":
                axes.set_ylim(bottom=0)
        panels[-1, 0].set_xlabel("optimizer step")
        figure.align_ylabels()
        figure.subplots_adjust(0.085, 0.5 / (1.55 * len(shown) + 0.5), 0.985, 0.98, hspace=0.15)
        caption = (
            "Mean loss of the step's pairs in nats, norm of its gradient before clipping, and "
            "learning rate"
        )
        caption += f", each point the mean of up to {bins} steps" if bins > 1 else ""
        return finish(figure, "optimizer", "Optimizer steps", caption + ". From records/steps.")


def _thin(step: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Means over equal runs of steps, at most _MAX_POINTS of them, and the length of a run."""
    bins = -(-step.size // _MAX_POINTS)
    starts = np.arange(0, step.size, bins)
    sizes = np.diff(np.append(starts, step.size))
    return np.add.reduceat(step, starts) / sizes, np.add.reduceat(values, starts) / sizes, bins


def _ends(names: Sequence[str], most: int) -> list[str]:
    """The names, or the first and the last of them where there are more than `most`."""
    if len(names) <= most:
        return list(names)
    return [*names[: most // 2], *names[-(most // 2) :]]


def _shown(shown: int, of: int) -> str:
    return f"{shown // 2} fastest and {shown - shown // 2} slowest of {of} behaviors"


def _line(split: str, count: int) -> dict[str, Any]:
    if split == schema.TRAIN_SAMPLE:
        return {"linewidth": 1.6 if count <= FEW else 1.2}
    return {"linewidth": 1.1, "dashes": (3.5, 2.0), "alpha": 1.0 if count <= FEW else 0.5}


def _split_legend(axes: Any, run: RunFiles) -> None:
    names = {schema.TRAIN_SAMPLE: "train sample", schema.HELD_OUT: "held-out"}
    for split, name in names.items():
        if split in run.curves:
            axes.plot([], [], color=TEXT, label=name, **_line(split, 1))
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.01, 0.995),
        ncols=2,
        frameon=False,
        fontsize=8,
        borderpad=0.2,
        handlelength=2.6,
        labelcolor=TEXT,
    )


def _panels(plt: Any, count: int, *, sharey: bool) -> tuple[Any, list[Any]]:
    """A grid of small axes, `count` of them visible, with room for a common label on each side."""
    columns = min(5, count)
    lines = -(-count // columns)
    height = 1.22 * lines + 0.45
    figure, grid = plt.subplots(
        lines, columns, figsize=(_WIDTH, height), sharex=True, sharey=sharey, squeeze=False
    )
    figure.subplots_adjust(0.072, 0.48 / height, 0.99, 1 - 0.2 / height, wspace=0.12, hspace=0.38)
    flat = list(grid.flat)
    for number, axes in enumerate(flat):
        axes.tick_params(labelsize=7)
        # The last visible axes of a column carry its tick labels.
        axes.xaxis.set_tick_params(labelbottom=number + columns >= count)
        axes.set_visible(number < count)
    return figure, flat[:count]
