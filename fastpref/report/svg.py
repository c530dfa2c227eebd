"""How the report's figures look and become SVG: colours, style, ids of their own.

Colours are written as CSS variables, so that one figure is readable on a light and on a dark page;
texts stay texts, in the page's font. All ids carry the figure's name, so that figures on one page
do not refer to each other's parts. The same figure gives the same bytes.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

FEW = 8  # up to so many behaviors have a colour of their own, more share an ordered ramp

# Wong's colour-blind safe colours (Nature Methods 8:441), yellow and black replaced, and the same
# hues lightened for a dark page.
_FEW_LIGHT = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#882255",
    "#777777",
)
_FEW_DARK = ("#4fa9e0", "#ff8a4a", "#2fcba0", "#e6a3c8", "#f5bc3d", "#9ad7ff", "#d9739f", "#b0b0b0")

# Stand-ins that matplotlib writes and `finish` replaces.
TEXT, FAINT, MUTED = "#010203", "#010204", "#010205"


def stand_in(index: int) -> str:
    """Colour to draw behavior number `index` with; the SVG has the variable --s<index> for it."""
    return f"#fe{index:04x}"


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure: `name` is its id, `caption` one sentence or two on what, which unit, where from."""

    name: str
    title: str
    caption: str
    svg: str


def palette(count: int, dark: bool) -> list[str]:
    """Colours (hex) of `count` behaviors in their order; distinct up to FEW, then a ramp."""
    if count <= FEW:
        return list((_FEW_DARK if dark else _FEW_LIGHT)[:count])
    import matplotlib

    # Viridis without the end that vanishes on the page's background.
    low, high = (0.40, 1.0) if dark else (0.0, 0.74)
    points = matplotlib.colormaps["viridis"](np.linspace(low, high, count))
    return ["#" + "".join(f"{round(255 * c):02x}" for c in p[:3]) for p in points]


@contextmanager
def style() -> Iterator[Any]:
    """Give pyplot, on the Agg backend and in the report's style; close its figures at the end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "fastpref",
        "text.parse_math": False,
        "font.family": "DejaVu Sans",
        "font.size": 8.5,
        "text.color": TEXT,
        "axes.labelcolor": TEXT,
        "axes.edgecolor": MUTED,
        "axes.linewidth": 0.8,
        "axes.titlecolor": TEXT,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "grid.color": FAINT,
        "grid.linewidth": 0.7,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": TEXT,
        "ytick.labelcolor": TEXT,
        "lines.solid_capstyle": "round",
        "axes.formatter.useoffset": False,
        "axes.formatter.limits": (-3, 5),
    }
    with matplotlib.rc_context(settings):
        try:
            yield plt
        finally:
            plt.close("all")


def shared_power(panels: Sequence[Any]) -> str:
    """The power of ten of panels with one y axis, for the words of their common label.

    Matplotlib would write it above every one of them, over the titles; that is taken away. Call it
    when everything is drawn.
    """
    panels[0].figure.canvas.draw()
    power = panels[0].yaxis.get_offset_text().get_text()
    for axes in panels:
        axes.yaxis.get_offset_text().set_visible(False)
    return f", {power}" if power else ""


def finish(figure: Any, name: str, title: str, caption: str) -> Figure:
    """Turn the matplotlib figure into a Figure with these texts."""
    return Figure(name, title, caption, _text(figure, name, title))


def _text(figure: Any, name: str, title: str) -> str:
    """The figure as an <svg> element with CSS colours, the page's font and ids of its own."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # The browser has glyphs for the characters that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{name}-\1"', text)
    text = text.replace("'DejaVu Sans'", "var(--font, sans-serif)")
    text = text.replace(TEXT, "currentColor")
    text = text.replace(FAINT, "var(--faint, #e3e6ea)").replace(MUTED, "var(--muted, #9aa1a9)")
    text = re.sub(r"#fe([0-9a-f]{4})", lambda m: f"var(--s{int(m[1], 16)})", text)
    head, _, rest = text.partition(">")
    box = re.search(r'viewBox="[^"]+"', head)
    assert box is not None, "matplotlib writes a viewBox"
    return (
        f'<svg {box[0]} role="img" aria-label="{title}" xmlns="http://www.w3.org/2000/svg">{rest}'
    )
