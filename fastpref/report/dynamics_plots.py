"""Figures of update rates: observed beside predicted, shares of the step, who teaches whom."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastpref.report.rate_tables import Rates
from fastpref.report.svg import FEW, MUTED, TEXT, Figure, finish, shared_power, stand_in, style
from fastpref.report.tables import shorten

_WIDTH, _MOST = 9.6, 30
_COLOURS = "RdBu"  # blue: teaches, red: unteaches


def rate_figures(rates: Rates, order: Sequence[str]) -> list[Figure]:
    """All that ``rates`` allow; ``order`` gives a behavior its colour, fastest first."""
    names = [name for name in order if name in rates.curves]
    if not names:
        return []
    found = [_curves(rates, names, order), _agreement(rates, names, order)]
    found += [_shares(rates, names, order), _gamma(rates, names)]
    return [figure for figure in found if figure is not None]


def _shown(names: Sequence[str]) -> tuple[list[str], str]:
    """As many as a figure holds, and what its caption says of it."""
    if len(names) <= _MOST:
        return list(names), ""
    half = _MOST // 2
    text = f"; shown: the {half} fastest and {half} slowest of {len(names)} behaviors"
    return [*names[:half], *names[-half:]], text


def _curves(rates: Rates, names: Sequence[str], order: Sequence[str]) -> Figure | None:
    """Observed and predicted rates over the steps, a panel per behavior."""
    shown, more = _shown(names)
    with style() as plt:
        columns = min(4, len(shown))
        lines = -(-len(shown) // columns)
        height = 1.35 * lines + 0.62
        figure, grid = plt.subplots(
            lines, columns, figsize=(_WIDTH, height), sharex=True, sharey=True, squeeze=False
        )
        figure.subplots_adjust(
            0.085, 0.48 / height, 0.99, 1 - 0.42 / height, wspace=0.1, hspace=0.34
        )
        for number, axes in enumerate(grid.flat):
            axes.set_visible(number < len(shown))
            axes.tick_params(labelsize=7)
            axes.xaxis.set_tick_params(labelbottom=number + columns >= len(shown))
        for axes, name in zip(grid.flat, shown, strict=False):
            curve, color = rates.curves[name], stand_in(order.index(name))
            step, predicted = curve["step"], curve["rate_pred_opt"]
            error = np.nan_to_num(curve["rate_pred_opt_error"])
            axes.fill_between(
                step, predicted - error, predicted + error, color=color, alpha=0.2, linewidth=0
            )
            axes.plot(step, predicted, color=color, linewidth=1.1, dashes=(3.5, 2.0))
            axes.plot(step, curve["rate_obs"], color=color, linewidth=1.5)
            axes.plot(step, curve["rate_pred_sgd"], color=MUTED, linewidth=0.9)
            axes.axhline(0, color=MUTED, linewidth=0.6, zorder=1)
            axes.set_title(shorten(name, 34), fontsize=7, pad=3)
            axes.margins(x=0.02)
        figure.supxlabel("optimizer step", fontsize=8.5)
        power = shared_power(list(grid.flat))
        figure.supylabel(f"nats per step{power}", x=0.0, fontsize=8.5)
        line = plt.Line2D
        figure.legend(
            handles=[
                line([], [], color=TEXT, linewidth=1.5, label="observed"),
                line([], [], color=TEXT, linewidth=1.1, dashes=(3.5, 2.0), label="predicted"),
                line([], [], color=MUTED, linewidth=0.9, label="plain gradient descent"),
            ],
            loc="upper left",
            bbox_to_anchor=(0.07, 1.0),
            ncols=3,
            frameon=False,
            fontsize=8,
            labelcolor=TEXT,
        )
        return finish(
            figure,
            "rates",
            "Update rates, observed and predicted",
            "Change of each behavior's mean margin in the measured steps, in nats per step, on a "
            "fixed sample of training pairs: observed; predicted by the gradients and what the "
            "optimizer did to the weights (band: one standard error of the sketch); and what plain "
            f"gradient descent at the same learning rate would have done{more}. From "
            "records/behaviors, split rate_sample.",
        )


def _agreement(rates: Rates, names: Sequence[str], order: Sequence[str]) -> Figure | None:
    """Every behavior and step: predicted against observed."""
    observed = np.concatenate([rates.curves[n]["rate_obs"] for n in names])
    predicted = np.concatenate([rates.curves[n]["rate_pred_opt"] for n in names])
    known = np.isfinite(observed) & np.isfinite(predicted)
    if not known.any() or not np.abs(observed[known]).max():
        return None
    with style() as plt:
        figure, axes = plt.subplots(figsize=(_WIDTH, 4.4))
        figure.subplots_adjust(0.1, 0.11, 0.6, 0.98)  # as wide as it is high, on a page as the rest
        for name in names:
            curve = rates.curves[name]
            axes.errorbar(
                curve["rate_obs"],
                curve["rate_pred_opt"],
                np.nan_to_num(curve["rate_pred_opt_error"]),
                fmt="o",
                markersize=2.6,
                linewidth=0.6,
                color=stand_in(order.index(name)),
            )
        low = min(observed[known].min(), predicted[known].min())
        high = max(observed[known].max(), predicted[known].max())
        axes.plot([low, high], [low, high], color=MUTED, linewidth=0.9, zorder=1)
        axes.set(xlabel="observed, nats per step", ylabel="predicted, nats per step")
        axes.locator_params(nbins=6)
        apart = np.abs(predicted - observed)[known].sum() / np.abs(observed[known]).sum()
        return finish(
            figure,
            "rate-agreement",
            "Does the prediction hold?",
            "Each point one behavior in one measured step, the line where both are equal; bars: "
            f"one standard error of the sketch. Mean difference {100 * apart:.2g} % of the mean "
            "rate: sketch error where the bars reach the line, else what is beyond first order. "
            "From records/behaviors, split rate_sample.",
        )


def _shares(rates: Rates, names: Sequence[str], order: Sequence[str]) -> Figure | None:
    """Stacked shares over the steps: those above 0 upwards, those below 0 downwards."""
    steps = [rates.curves[name]["step"] for name in names]
    alike = all(np.array_equal(step, steps[0]) for step in steps)
    if not alike or len(steps[0]) < 2:
        return None
    step, share = steps[0], np.stack([rates.curves[name]["share"] for name in names])
    share = np.nan_to_num(share)
    with style() as plt:
        figure, axes = plt.subplots(figsize=(_WIDTH, 3.4))
        figure.subplots_adjust(0.075, 0.15, 0.68 if len(names) <= FEW else 0.985, 0.96)
        for side in (1, -1):
            base = np.zeros(len(step))
            for name, own in zip(names, share, strict=True):
                top = base + np.where(side * own > 0, own, 0.0)
                color = stand_in(order.index(name))
                axes.fill_between(step, base, top, color=color, alpha=0.75, linewidth=0)
                base = top
        axes.axhline(0, color=TEXT, linewidth=0.8)
        axes.axhline(1, color=MUTED, linewidth=0.8, dashes=(3.5, 2.0))
        axes.set(xlabel="optimizer step", ylabel="share of the step's gradient")
        axes.margins(x=0)
        if len(names) <= FEW:
            patch: Any = plt.Rectangle
            axes.legend(
                handles=[
                    patch(
                        (0, 0),
                        1,
                        1,
                        color=stand_in(order.index(n)),
                        alpha=0.75,
                        label=shorten(n, 40),
                    )
                    for n in reversed(names)
                ],
                loc="center left",
                bbox_to_anchor=(1.01, 0.5),
                frameon=False,
                fontsize=8,
                labelcolor=TEXT,
            )
        return finish(
            figure,
            "shares",
            "Shares of the step",
            "Part of each behavior's pairs in the gradient of the measured steps, "
            "<G_k, G> / |G|^2; all shares of a step sum to 1 (dashed), one below 0 pulls against "
            "the others. From records/behaviors, split rate_sample.",
        )


def _gamma(rates: Rates, names: Sequence[str]) -> Figure | None:
    """Mean interaction matrices of the earlier and the later half of the measured steps."""
    if not len(rates.step):
        return None
    shown, more = _shown(names)
    matrices = rates.ordered(shown)
    half = len(matrices) // 2
    parts = [("all measured steps", matrices)]
    if half:
        last = f"steps {rates.step[half]:.0f} to {rates.step[-1]:.0f}"
        parts = [
            (f"steps {rates.step[0]:.0f} to {rates.step[half - 1]:.0f}", matrices[:half]),
            (last, matrices[half:]),
        ]
    means = [(title, part.mean(axis=0)) for title, part in parts]
    limit = max(float(np.abs(mean).max()) for _, mean in means) or 1.0
    count = len(shown)
    with style() as plt:
        cell = min(0.42, 3.3 / count)
        size = cell * count
        left, gap, bottom = 2.55, 0.28, 0.42
        width = left + len(means) * size + (len(means) - 1) * gap + 0.75
        height = size + bottom + 0.34
        figure = plt.figure(figsize=(width, height))
        for number, (title, mean) in enumerate(means):
            place = (left + number * (size + gap)) / width
            axes = figure.add_axes((place, bottom / height, size / width, size / height))
            mesh = axes.pcolormesh(
                mean, cmap=_COLOURS, vmin=-limit, vmax=limit, rasterized=count > _MOST / 2
            )
            axes.set_ylim(count, 0)
            axes.set_xticks(np.arange(count) + 0.5, range(1, count + 1), fontsize=6.5)
            axes.set_yticks(np.arange(count) + 0.5, [""] * count)
            if not number:
                labels = [f"{shorten(name, 34)}  {i}" for i, name in enumerate(shown, 1)]
                axes.set_yticklabels(labels, fontsize=7.5 if count < 20 else 6)
            axes.tick_params(length=0)
            axes.grid(visible=False)
            axes.set_title(title, fontsize=8)
            axes.set_xlabel("teacher l", fontsize=8)
        bar = figure.add_axes((1 - 0.62 / width, bottom / height, 0.11 / width, size / height))
        figure.colorbar(mesh, cax=bar)
        bar.tick_params(labelsize=7)
        bar.grid(visible=False)
        return finish(
            figure,
            "gamma",
            "Who teaches whom",
            "Interaction matrix Gamma_kl = <M_k, G_l>, mean over measured steps, in nats per unit "
            "of learning rate: how fast the pairs of l (column) in a step raise the margins of k "
            f"(row) under plain gradient descent; below 0 they lower them{more}. From "
            "records/gram.",
        )
