"""`fastpref.theory.overview` as tables: for a terminal, and as CSV with every digit."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

from fastpref.report.files import write_csv
from fastpref.report.tables import decimals, shorten
from fastpref.theory.overview import Overview

WIDTH = 100  # columns of the tables of behaviors
MATRIX_WIDTH = 120
UNDEFINED = "-"
Values = Sequence[float | int]
Column = tuple[str, str, Values]  # title, its second line, one value per behavior


def overview_text(view: Overview) -> str:
    """Both tables of behaviors, the mixture in words, and the priority matrix."""
    parts = [
        _heading("The behaviors, those that training will teach fastest first"),
        _table(view, _statistics(view)),
        _heading(f"Predicted rates {_unit(view)}"),
        _table(view, _rates(view)),
        "\n".join(wrapped(line) for line in _mixture(view)),
        _heading("Priority: lead of the row over the column when just these two are trained, in %"),
        _priority(view),
    ]
    return "\n\n".join(parts)


def wrapped(text: str) -> str:
    """``text`` in lines of at most WIDTH."""
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def cells(values: Values) -> list[str]:
    """The values with one number of decimals, or all with exponents where they are small; "-" for
    nan; 1e-9, not 0.000, for what is not 0."""
    largest = max((abs(value) for value in values if not math.isnan(value)), default=0.0)
    if 0 < largest < 1e-3:
        return [UNDEFINED if math.isnan(value) else f"{value:.2e}" for value in values]
    places = 0 if all(isinstance(v, int) for v in values) else decimals(values, 4)
    shown = []
    for value in values:
        text = UNDEFINED if math.isnan(value) else f"{value:.{places}f}"
        if value and not math.isnan(value) and float(text) == 0:
            text = f"{value:.1e}"
        shown.append(text)
    return shown


def behavior_rows(view: Overview) -> list[dict[str, str | int | float]]:
    """Every number of every behavior by name, in order: the rows of behaviors.csv."""
    rows: list[dict[str, str | int | float]] = []
    for own in view.behaviors:
        known = own.statistics
        rows.append(
            {
                "behavior": known.behavior,
                "order": own.order or math.nan,
                "pairs": known.n,
                "pairs_plus": known.n_plus if known.n_plus >= 0 else math.nan,
                "pairs_minus": known.n_minus if known.n_minus >= 0 else math.nan,
                "positive_token": known.positive_token if known.positive_token >= 0 else math.nan,
                **{
                    name: getattr(known, name)
                    for name in (
                        *("delta", "effective_delta", "concentration", "concentration_plus"),
                        *("concentration_minus", "trace", "mu_dot_d", "mu_norm", "spread_plus"),
                        *("spread_minus", "second_moment", "coherence"),
                    )
                },
                **{
                    name: getattr(own, name)
                    for name in (
                        *("fraction", "head_rate", "margin_rate", "mixture_rate", "level"),
                        "share",
                    )
                },
            }
        )
    return rows


def write_tables(folder: Path, view: Overview) -> list[Path]:
    """behaviors.csv and, for two or more behaviors, priority.csv; nan stands for undefined."""
    rows = behavior_rows(view)
    written = [write_csv(folder / "behaviors.csv", list(rows[0]), [list(r.values()) for r in rows])]
    stale = folder / "priority.csv"
    stale.unlink(missing_ok=True)  # of an earlier call with other behaviors
    if view.priority is not None:
        names = [own.statistics.behavior for own in view.behaviors]
        lines = [[name, *row] for name, row in zip(names, view.priority.tolist(), strict=True)]
        written.append(write_csv(stale, ["behavior", *names], lines))
    return written


def _heading(text: str) -> str:
    return f"{text}\n{'-' * len(text)}"


def _unit(view: Overview) -> str:
    if view.learning_rate is None:
        return f"per unit of time (steps x learning rate), beta {view.beta:g}"
    return f"per step, learning rate {view.learning_rate:g}, beta {view.beta:g}"


def _statistics(view: Overview) -> list[Column]:
    of = [own.statistics for own in view.behaviors]
    return [
        ("", "pairs", [s.n for s in of]),
        ("", "delta", [s.delta for s in of]),
        ("effective", "delta", [s.effective_delta for s in of]),
        ("concen-", "tration", [s.concentration for s in of]),
        ("", "trace", [s.trace for s in of]),
        ("", "mu.d", [s.mu_dot_d for s in of]),
        ("", "coherence", [s.coherence for s in of]),
    ]


def _rates(view: Overview) -> list[Column]:
    def of(name: str) -> list[float]:
        return [getattr(own, name) for own in view.behaviors]

    return [
        ("", "order", [own.order or math.nan for own in view.behaviors]),
        ("alone:", "head", of("head_rate")),
        ("alone:", "margin", of("margin_rate")),
        ("mixture:", "margin", of("mixture_rate")),
        ("", "level", of("level")),
        ("share of", "update", of("share")),
        ("share of", "pairs", of("fraction")),
    ]


def _table(view: Overview, columns: Sequence[Column]) -> str:
    texts = [_own_cells(second, values) for _, second, values in columns]
    widths = [
        max(len(top), len(second), *map(len, own))
        for (top, second, _), own in zip(columns, texts, strict=True)
    ]
    number = max(2, len(str(len(view.behaviors))))
    room = max(12, WIDTH - number - 1 - sum(width + 2 for width in widths))
    names = [shorten(own.statistics.behavior, room) for own in view.behaviors]
    room = max(len("behavior"), *map(len, names))

    def line(first: str, name: str, own: Sequence[str]) -> str:
        right = "".join(f"  {text:>{width}}" for text, width in zip(own, widths, strict=True))
        return f"{first:>{number}} {name:<{room}}{right}".rstrip()

    tops, seconds = [c[0] for c in columns], [c[1] for c in columns]
    head = [line("", "", tops)] if any(tops) else []
    head.append(line("#", "behavior", seconds))
    body = [line(str(k + 1), name, [own[k] for own in texts]) for k, name in enumerate(names)]
    return "\n".join([*head, *body])


def _own_cells(title: str, values: Values) -> list[str]:
    if title == "order":
        return [UNDEFINED if math.isnan(v) else f"{v:.0f}" for v in values]
    return cells(values)


def _mixture(view: Overview) -> list[str]:
    mixture = view.mixture
    if math.isnan(mixture.head_rate):
        return []
    if not mixture.pull:
        return [
            "The behaviors' pulls cancel: the first full step moves nothing, and levels, shares "
            "and order are undefined."
        ]
    time = "of time" if view.learning_rate is None else "steps"
    lines = [
        f"All pairs together: effective delta {mixture.pull:.4g}, head rate {mixture.head_rate:.4g}"
        f", loss rate {mixture.loss_rate:.4g}; after the first full step "
        f"{100 * mixture.accuracy:.1f} % of the pairs have a margin above 0.",
        f"The head moves at least 90 % as far as its first rate says for {mixture.window:.3g} "
        f"{time}; steps on all pairs are stable up to learning rate "
        f"{mixture.max_learning_rate:.3g}.",
    ]
    if mixture.batch_size:
        lines.append(
            f"One random batch of {mixture.batch_size} moves the head "
            f"{mixture.batch_rate / mixture.head_rate:.3g} times as far as a step on all pairs "
            "(root mean square): the rest is labels that do not balance within the batch."
        )
    return lines


def _priority(view: Overview) -> str:
    if view.priority is None:
        return "undefined: it compares behaviors, and there is only one"
    percent = [[_percent(value) for value in row] for row in view.priority.tolist()]
    size, first = len(percent), len(str(len(percent)))
    widths = [
        1 + max(len(str(k + 1)), *(len(row[k]) for row in percent if row is not percent[k]))
        for k in range(size)
    ]
    shown = list(range(size))
    while first + sum(widths[k] for k in shown) > MATRIX_WIDTH:
        shown.pop(len(shown) // 2)  # the first and the last ones say most
    lines = [" " * first + "".join(f"{k + 1:>{widths[k]}}" for k in shown)]
    for k in shown:
        row = ("." if k == other else percent[k][other] for other in shown)
        texts = (f"{text:>{widths[other]}}" for text, other in zip(row, shown, strict=True))
        lines.append(f"{k + 1:>{first}}{''.join(texts)}")
    if len(shown) < size:
        lines.append(
            f"{len(shown)} of {size} behaviors shown, first and last; priority.csv has all"
        )
    return "\n".join(lines)


def _percent(value: float) -> str:
    return UNDEFINED if math.isnan(value) else str(round(100 * value))
