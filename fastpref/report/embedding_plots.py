"""The figure of `fastpref reproduce embeddings`: features as points, before and after training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastpref.report.pictures import BLUE, INK, ORANGE, SOFT, picture_style, write_picture
from fastpref.report.tables import shorten


def draw_embeddings(
    folder: Path,
    behavior: str,
    planes: Mapping[str, Mapping[str, np.ndarray]],  # method -> before, after -> (P, 2)
    answers: Sequence[str],  # (P,) of two kinds, or more
    numbers: Mapping[str, Mapping[str, Any]],
) -> list[Path]:
    """A row per method: the same axes before and after, a cross at each class's mean."""
    kinds = sorted(set(answers))
    colors = dict(zip(kinds, (ORANGE, BLUE, SOFT), strict=False))
    which = np.array(answers)
    with picture_style() as plt:
        height = 0.75 + 3.9 * len(planes)
        figure, grid = plt.subplots(len(planes), 2, figsize=(9.6, height), squeeze=False)
        figure.subplots_adjust(
            0.075, 0.5 / height, 0.985, 1 - 0.72 / height, wspace=0.14, hspace=0.3
        )
        for row, (method, plane) in zip(grid, planes.items(), strict=True):
            low, high = _limits(list(plane.values()))
            for axes, (when, points) in zip(row, plane.items(), strict=True):
                for kind in kinds:
                    own = points[which == kind]
                    axes.plot(*own.T, "o", color=colors.get(kind, SOFT), ms=2.6, alpha=0.45, mew=0)
                for kind in kinds:
                    axes.plot(
                        *points[which == kind].mean(axis=0), "X", ms=10,
                        color=colors.get(kind, SOFT), markeredgecolor="white",
                    )  # fmt: skip
                axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
                axes.set(title=_title(method, when, numbers[when]), xlabel=f"{method} 1")
            row[0].set_ylabel(f"{method} 2")
        line = plt.Line2D
        handles = [
            line([], [], marker="o", linestyle="", color=colors.get(k, SOFT), label=f"{k} chosen")
            for k in kinds
        ]
        handles.append(
            line([], [], marker="X", linestyle="", color=INK, ms=8, label="mean of its class")
        )
        figure.text(
            0.012, 1 - 0.3 / height, shorten(behavior, 70), fontsize=10, color=INK, va="center"
        )
        figure.legend(
            handles=handles,
            loc="upper right",
            ncols=len(handles),
            frameon=False,
            bbox_to_anchor=(0.995, 1 - 0.12 / height),
        )
        return write_picture(figure, folder, "embeddings")


def _title(method: str, when: str, numbers: Mapping[str, Any]) -> str:
    title = f"{when.capitalize()} training: delta {numbers['delta']:.3g}"
    if method == "PCA":
        first, second = (100 * share for share in numbers["explained_variance"])
        title += f"; axes: {first:.0f} + {second:.0f} % of the variance"
    return title


def _limits(sets: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Corners that hold all points, and a margin."""
    both = np.concatenate(sets)
    low, high = both.min(axis=0), both.max(axis=0)
    pad = 0.04 * np.where(high > low, high - low, 1.0)
    return low - pad, high + pad
