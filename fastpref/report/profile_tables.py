"""A profile of a model's gradients for a terminal: behaviors, layer groups, who teaches whom."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastpref.report.tables import decimals, shorten

WIDTH = 110
MATRIX = 12  # up to so many behaviors the matrix is printed; of more, its extremes
EXTREMES = 6
NAME_WIDTH = 34


@dataclass(frozen=True)
class ProfileView:
    """What tables, pictures and the summary show, K behaviors in one order. nan is not known."""

    settings: Mapping[str, Any]
    behaviors: Sequence[str]
    groups: Sequence[str]  # (G,) layer groups
    columns: Mapping[str, np.ndarray]  # (K,) by name; `<name>_error` is its standard error
    group_norm: np.ndarray  # (K, G) root mean square of |grad m|
    group_norm_error: np.ndarray  # (K, G)
    dot: np.ndarray  # (K, K) Gamma, [k, l]: what l's pairs do to k's margins
    dot_error: np.ndarray
    cos: np.ndarray  # (K, K)
    cos_error: np.ndarray
    noise: tuple[float, float]  # gradient noise scale of the data, and its error
    notes: Sequence[str] = field(default_factory=list)

    def ordered(self, by: str) -> ProfileView:
        """The behaviors with the largest value of the column ``by`` first, unknown ones last."""
        values = self.columns[by]
        order = np.argsort(np.where(np.isnan(values), np.inf, -values), kind="stable")
        square = np.ix_(order, order)
        return ProfileView(
            self.settings,
            [self.behaviors[i] for i in order],
            self.groups,
            {name: column[order] for name, column in self.columns.items()},
            self.group_norm[order],
            self.group_norm_error[order],
            self.dot[square],
            self.dot_error[square],
            self.cos[square],
            self.cos_error[square],
            self.noise,
            self.notes,
        )


# Heads, column, percent or number. Columns that are not known of any behavior are left out.
_COLUMNS = (
    ("", "pairs", "whole", "count"),
    ("", "looked at", "n", "count"),
    ("margin", "nat", "margin", ""),
    ("norm of", "grad m", "gnorm_m", ""),
    ("", "coherence", "coherence", ""),
    ("noise", "scale", "gradient_noise_scale", ""),
    ("", "share", "share", "percent"),
    ("rate of", "margin", "rate", ""),
    ("", "delta", "delta", ""),
    ("pairs", "d > nc^2", "displaced", "percent"),
    ("rate of", "logp chosen", "chosen_rate", ""),
)


def profile_text(view: ProfileView) -> str:
    """All tables, at most WIDTH wide where the names allow it."""
    parts = [
        _heading("Behaviors, those that plain gradient descent would teach fastest first"),
        _behaviors(view),
        _noise(view.noise),
        _heading("Norm of grad m by layer group, root mean square over pairs"),
        _groups(view),
    ]
    if len(view.behaviors) > 1:
        parts += [_heading("Who teaches whom: cosine of M_k (row) and G_l (column)"), _gamma(view)]
    return "\n\n".join(part for part in parts if part)


def _heading(text: str) -> str:
    return f"{text}\n{'-' * len(text)}"


def _numbered(view: ProfileView, width: int = NAME_WIDTH) -> list[str]:
    wide = len(str(len(view.behaviors)))
    return [f"{k:>{wide}} {shorten(name, width)}" for k, name in enumerate(view.behaviors, 1)]


def _cells(view: ProfileView, name: str, kind: str) -> list[str]:
    values, errors = view.columns[name], view.columns.get(f"{name}_error")
    if kind == "count":
        return [f"{v:,.0f}" for v in values]
    scale = 100.0 if kind == "percent" else 1.0
    cells = []
    for i, value in enumerate(values * scale):
        error = math.nan if errors is None else errors[i] * scale
        if math.isnan(value) or (name == "gradient_noise_scale" and error >= value):
            cells.append("-")
            continue
        if error > 0:
            cells.append(with_error(value, error) + "%" * (kind == "percent"))
        elif kind == "percent":
            cells.append(f"{value:.0f}%")
        else:
            cells.append(
                f"{value:.{decimals([value])}f}"
                if abs(value) >= 1e-3 or not value
                else f"{value:.1e}"
            )
    return cells


def with_error(value: float, error: float) -> str:
    """As many digits as the error leaves sense in."""
    size = max(abs(value), error)
    if not 1e-3 <= size < 1e6:
        return f"{value:.1e}±{error:.0e}"
    places = min(max(1 - math.floor(math.log10(error)), 0), 4)
    return f"{value:.{places}f}±{error:.{places}f}"


def _behaviors(view: ProfileView) -> str:
    shown = [
        (first, second, _cells(view, name, kind))
        for first, second, name, kind in _COLUMNS
        if name in view.columns
        and not np.isnan(view.columns[name]).all()
        # Of a model that is its own reference there are no margins to show.
        and not (name == "margin" and np.abs(view.columns[name]).max() < 1e-3)
    ]
    return _table(_numbered(view), shown)


def _table(names: Sequence[str], columns: Sequence[tuple[str, str, list[str]]]) -> str:
    widths = [max(map(len, (first, second, *cells))) for first, second, cells in columns]
    room = WIDTH - sum(width + 2 for width in widths)
    first = max(min(max(map(len, names)), max(room, 20)), len("behavior"))
    lines = [
        "  ".join([" " * first, *(c[0].rjust(w) for c, w in zip(columns, widths, strict=True))]),
        "  ".join(
            [
                "behavior".ljust(first),
                *(c[1].rjust(w) for c, w in zip(columns, widths, strict=True)),
            ]
        ),
    ]
    for i, name in enumerate(names):
        cells = (c[2][i].rjust(w) for c, w in zip(columns, widths, strict=True))
        lines.append("  ".join([shorten(name, first).ljust(first), *cells]))
    return "\n".join(line.rstrip() for line in lines)


def _noise(noise: tuple[float, float]) -> str:
    if math.isnan(noise[0]) or noise[1] >= noise[0]:
        return (
            "gradient noise scale of the data: not known; these pairs do not tell the mean from 0"
        )
    return (
        f"gradient noise scale of the data: {with_error(*noise)} pairs; larger batches than that "
        "bring little"
    )


def merged_groups(view: ProfileView) -> tuple[list[str], np.ndarray]:
    """(J,) kinds of layer groups and (K, J) their norms: all attentions together, all MLPs."""
    kinds = [re.sub(r"^block\.\d+\.", "", group) for group in view.groups]
    names = list(dict.fromkeys(kinds))
    square = view.group_norm**2
    merged = [square[:, [kind == name for kind in kinds]].sum(axis=1) for name in names]
    return names, np.sqrt(np.stack(merged, axis=1))


def _groups(view: ProfileView) -> str:
    names, norms = merged_groups(view)
    columns = [
        ("", name, [f"{v:.{decimals([v])}f}" for v in norms[:, j]]) for j, name in enumerate(names)
    ]
    return _table(_numbered(view), columns)


def _gamma(view: ProfileView) -> str:
    size = len(view.behaviors)
    if size <= MATRIX:
        columns = [
            ("", str(j + 1), [_cosine(view, i, j) for i in range(size)]) for j in range(size)
        ]
        table = _table(_numbered(view), columns)
        return f"{table}\n(in brackets: within two standard errors of 0; below 0 it unteaches)"
    return "\n".join(_extremes(view))


def _cosine(view: ProfileView, i: int, j: int) -> str:
    value, error = view.cos[i, j], view.cos_error[i, j]
    if math.isnan(value):
        return "-"
    return f"({value:.2f})" if abs(value) < 2 * error else f"{value:.2f}"


def _extremes(view: ProfileView) -> list[str]:
    size = len(view.behaviors)
    sure = np.abs(view.cos) > 2 * view.cos_error
    others = [(i, j) for i in range(size) for j in range(size) if i != j and sure[i, j]]
    # Where M_l is along G_l, as at the start of a run, both directions have one cosine: told once.
    both = np.isclose(view.cos, view.cos.T, atol=1e-3)
    others = [(i, j) for i, j in others if i < j or not (both[i, j] and sure[j, i])]
    others.sort(key=lambda at: -view.cos[at])
    every, beyond = size * (size - 1), int(sure.sum() - sure.trace())
    lines = [
        f"{beyond} of {every} ordered pairs of behaviors act on one another beyond two standard "
        f"errors,\n{0.046 * every:.0f} would by chance alone; the strongest (all in profile.json):"
    ]
    helping = [at for at in others if view.cos[at] > 0][:EXTREMES]
    hindering = [at for at in others[::-1] if view.cos[at] < 0][:EXTREMES]
    for title, found in (("teaches", helping), ("unteaches", hindering)):
        for i, j in found:
            number = with_error(float(view.cos[i, j]), float(view.cos_error[i, j]))
            teacher, learner = (shorten(view.behaviors[at], 40) for at in (j, i))
            how = f"and {learner}: each {title} the other"
            if not (both[i, j] and sure[j, i]):
                how = f"{title} {learner}"
            lines.append(f"  {number:>12}  {teacher} {how}")
    if not hindering:
        lines.append("  none unteaches another one")
    return lines
