"""Pictures that are files of their own, on white, as PNG and SVG: style and writing."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
