"""Pictures that are files of their own, on white, as PNG and SVG: style and writing."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fastpref.report.files import write_whole
from fastpref.report.svg import style

INK, SOFT, GRID = "#22262b", "#8a929b", "#e6e9ed"
BLUE, ORANGE = "#0072b2", "#d55e00"  # Wong, Nature Methods 8:441


@contextmanager
def picture_style() -> Iterator[Any]:
    """pyplot in the report's style, with colours of its own since no page's style gives them."""
    import matplotlib

    own: dict[Any, Any] = {
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.titlecolor": INK,
        "axes.edgecolor": SOFT,
        "grid.color": GRID,
        "xtick.color": SOFT,
        "ytick.color": SOFT,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "figure.facecolor": "white",
        "axes.titlesize": 9.5,
        "axes.titlelocation": "left",
    }
    with style() as plt, matplotlib.rc_context(own):
        yield plt


def write_picture(figure: Any, folder: Path, name: str) -> list[Path]:
    """``folder``/``name``.png and .svg, each whole; the same figure gives the same bytes."""
    written = []
    for kind in ("png", "svg"):
        buffer = io.BytesIO()
        about = {"Date": None} if kind == "svg" else None
        figure.savefig(buffer, format=kind, dpi=160, metadata=about)
        written.append(folder / f"{name}.{kind}")
        write_whole(written[-1], buffer.getvalue())
    return written


def number_points(figure: Any, axes: Any, x: np.ndarray, y: np.ndarray) -> None:
    """1, 2, ... beside the points, each where it covers the fewest others."""
    figure.canvas.draw()
    points = axes.transData.transform(np.column_stack([x, y])) * 72 / figure.dpi
    taken = [points]
    for k, point in enumerate(points):
        around = [
            np.array([np.cos(turn), np.sin(turn)]) * radius
            for radius in (9.0, 14.0)
            for turn in np.arange(8) * np.pi / 4
        ]
        others = np.concatenate(taken)
        space = [np.sort(np.linalg.norm(others - (point + way), axis=1))[0] for way in around]
        good = next((w for w, s in zip(around, space, strict=True) if s > 8.5), None)
        way = around[int(np.argmax(space))] if good is None else good
        taken.append((point + way)[None])
        axes.annotate(
            str(k + 1),
            (x[k], y[k]),
            way,
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=7,
        )
