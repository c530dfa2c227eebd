"""A profile's pictures and its page: who teaches whom, and where in the model the gradients are."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from fastpref.report.files import write_whole
from fastpref.report.html import CSS
from fastpref.report.pictures import INK, picture_style, write_picture
from fastpref.report.profile_tables import ProfileView, profile_text
from fastpref.report.tables import shorten

LABELLED = 12  # up to so many behaviors a cell of the matrix holds its number
NAME_WIDTH = 40
_LEFT, _TOP, _BOTTOM, _BAR = 3.4, 0.5, 0.6, 1.0  # inches around a matrix

_CAPTIONS = {
    "gamma": "Cosine of M_k (row), the direction in which a behavior's mean margin grows, and G_l "
    "(column), what the other one's pairs add to the step of plain gradient descent. Red: the "
    "column teaches the row; blue: it unteaches it. A dot: within two standard errors of 0.",
    "norms": "Root mean square over a behavior's pairs of the norm of grad m within each layer "
    "group, as part of the largest of that behavior; everything below a hundredth looks alike.",
}


def write_profile_page(folder: Path, view: ProfileView) -> list[Path]:
    """profile.html, and gamma and norms as .png and .svg; stale ones are removed."""
    written: list[Path] = []
    shown = []
    for name, draw in {"gamma": _gamma, "norms": _norms}.items():
        for kind in ("png", "svg"):
            (folder / f"{name}.{kind}").unlink(missing_ok=True)
        with picture_style() as plt:
            figure = draw(plt, view)
            if figure is not None:
                written += write_picture(figure, folder, name)
                shown.append(name)
    page = folder / "profile.html"
    write_whole(page, _page(folder, view, shown).encode())
    return [page, *written]


def _page(folder: Path, view: ProfileView, figures: list[str]) -> str:
    title = f"Profile of {view.settings['model']}"
    settings = "".join(
        f"<div><dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd></div>"
        for k, v in view.settings.items()
    )
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{CSS}pre {{ overflow-x: auto; font-size: 12px; }}",
        "img { max-width: 100%; background: #fff; }</style></head><body><main>",
        f"<h1>{escape(title)}</h1>",
        f'<section class="card"><h2>Settings</h2><dl>{settings}</dl></section>',
        f'<section class="card"><pre>{escape(profile_text(view))}</pre></section>',
    ]
    for name in figures:
        picture = base64.b64encode((folder / f"{name}.svg").read_bytes()).decode()
        parts.append(
            f'<section class="card"><figure><img alt="{name}" '
            f'src="data:image/svg+xml;base64,{picture}"><figcaption>{escape(_CAPTIONS[name])}'
            "</figcaption></figure></section>"
        )
    notes = "".join(f"<p>{escape(note)}</p>" for note in view.notes)
    parts.append(f'<section class="card"><h2>Notes</h2>{notes}</section></main></body></html>')
    return "\n".join(parts) + "\n"


def _names(view: ProfileView) -> list[str]:
    return [f"{shorten(name, NAME_WIDTH)}  {k}" for k, name in enumerate(view.behaviors, 1)]


def _matrix(plt: Any, rows: int, columns: int, cell: float) -> tuple[Any, Any, Any]:
    """A figure with axes for a matrix of cells ``cell`` inches wide, and for its colour bar."""
    wide, high = max(cell * columns, 2.0), max(cell * rows, 0.6)
    width, height = _LEFT + wide + _BAR, _TOP + high + _BOTTOM
    figure = plt.figure(figsize=(width, height))
    axes = figure.add_axes((_LEFT / width, _BOTTOM / height, wide / width, high / height))
    at = (_LEFT + wide + 0.15) / width
    bar = figure.add_axes((at, _BOTTOM / height, 0.13 / width, high / height))
    axes.tick_params(length=0, labelsize=7.5)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    return figure, axes, bar


def _gamma(plt: Any, view: ProfileView) -> Any:
    size = len(view.behaviors)
    if size < 2:
        return None
    figure, axes, bar_axes = _matrix(plt, size, size, 0.2 if size > LABELLED else 0.42)
    cmap = plt.get_cmap("RdBu_r").with_extremes(bad="#d9d9d9")
    image = axes.imshow(view.cos, cmap=cmap, vmin=-1, vmax=1, aspect="auto")
    numbers = [str(k + 1) for k in range(size)]
    axes.set(yticks=range(size), yticklabels=_names(view), xticks=range(size), xticklabels=numbers)
    axes.set(title="Who teaches whom: cosine of M_k and G_l", xlabel="behavior that teaches")
    if size > 40:
        axes.tick_params(axis="x", rotation=90)
    unsure = np.abs(view.cos) < 2 * view.cos_error
    for (k, other), value in np.ndenumerate(view.cos):
        if size <= LABELLED and np.isfinite(value):
            text = f"{value:.2f}"
            color = INK if abs(value) < 0.6 else "white"
            axes.text(other, k, text, ha="center", va="center", fontsize=6.5, color=color)
    dotted = np.argwhere(unsure)
    if len(dotted):
        down = 0.32 if size <= LABELLED else 0.0
        axes.plot(dotted[:, 1], dotted[:, 0] + down, ".", color=INK, markersize=2)
    bar = figure.colorbar(image, cax=bar_axes)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7)
    return figure


def _norms(plt: Any, view: ProfileView) -> Any:
    if len(view.groups) < 2:
        return None
    largest = view.group_norm.max(axis=1, keepdims=True)
    part = view.group_norm / np.where(largest > 0, largest, np.nan)
    rows, columns = part.shape
    figure, axes, bar_axes = _matrix(plt, rows, columns, 0.22)
    image = axes.imshow(part, cmap="viridis", norm=_log_scale(plt), aspect="auto")
    labels = [group.removeprefix("block.") for group in view.groups]
    axes.set(yticks=range(rows), yticklabels=_names(view), xticks=range(columns))
    axes.set_xticklabels(labels, rotation=90)
    axes.set_title("Norm of grad m by layer group", loc="left")
    axes.xaxis.tick_bottom()
    longest = max(map(len, labels))
    bar = figure.colorbar(image, cax=bar_axes)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7)
    bar.set_ticks([0.01, 0.1, 1.0], labels=["0.01", "0.1", "1"])  # powers would need mathtext
    _make_room_below(figure, (axes, bar_axes), 0.065 * longest)
    return figure


def _log_scale(plt: Any) -> Any:
    """From a hundredth to the whole: groups differ by powers of ten."""
    return plt.matplotlib.colors.LogNorm(vmin=0.01, vmax=1.0, clip=True)


def _make_room_below(figure: Any, all_axes: tuple[Any, ...], inches: float) -> None:
    """A taller figure, the axes as large as they were and ``inches`` further up."""
    before = figure.get_figheight()
    after = before + inches
    for axes in all_axes:
        box = axes.get_position()
        axes.set_position(
            (box.x0, (box.y0 * before + inches) / after, box.width, box.height * before / after)
        )
    figure.set_figheight(after)
