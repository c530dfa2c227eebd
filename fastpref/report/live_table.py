"""The live table of a run's behaviors: its columns, its order, and how it fits a terminal."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rich.cells import cell_len
from rich.text import Text

from fastpref.dynamics import schema
from fastpref.report.characters import sparkline
from fastpref.report.live import LiveRun, Series
from fastpref.report.tables import decimals

COLORS = ("cyan", "yellow", "green", "magenta", "blue", "red", "bright_cyan", "bright_yellow")
LETTERS = "abcdefgh"
_NAME_MIN, _SPARK = 14, 8


@dataclass(frozen=True, slots=True)
class Quantity:
    """A column of the table: `columns` of the records, the first that is known; `rank` says how
    early it is left out where room is short, the highest first."""

    key: str
    head: tuple[str, str]
    columns: tuple[str, ...]
    rank: int
    kind: str = "number"  # number, percent, count, rate: of the step, with the others' factor
    meaning: str = ""


QUANTITIES = (
    Quantity("margin", ("margin", "nat"), ("margin",), 0, meaning="mean margin, without beta"),
    Quantity("reward", ("reward", "margin"), ("reward_margin",), 0, meaning="beta x margin"),
    Quantity(
        "accuracy",
        ("rew", "acc"),
        ("reward_accuracy",),
        1,
        "percent",
        "pairs whose chosen reward is the higher one",
    ),
    Quantity(
        "output",
        ("out", "acc"),
        ("output_accuracy",),
        2,
        "percent",
        "pairs whose chosen log-prob is the higher one",
    ),
    Quantity("rate", ("rate", "seen"), ("rate_obs",), 3, "rate", "change of the margin per step"),
    Quantity(
        "predicted",
        ("rate", "predicted"),
        ("rate_pred_opt",),
        4,
        "rate",
        "<M_k, change of the weights>: what the gradients say the step changes",
    ),
    Quantity("share", ("share", ""), ("share",), 5, "percent", "part of the update"),
    Quantity(
        "norm", ("grad", "norm"), ("gnorm_m", "head_gnorm_m"), 6, meaning="mean |grad m| of a pair"
    ),
    Quantity("sgd", ("rate", "SGD"), ("rate_pred_sgd",), 9, "rate", "first order, of plain SGD"),
    Quantity(
        "coherence", ("cohe-", "rence"), ("coherence",), 8, meaning="|mean|^2 / mean |grad m|^2"
    ),
    Quantity("delta", ("delta", ""), ("delta",), 10, meaning="distinguishability"),
    Quantity("chosen", ("logp", "chosen"), ("logp_chosen",), 11, meaning="mean, nat"),
    Quantity(
        "displaced",
        ("dis-", "placed"),
        ("displaced_frac",),
        12,
        "percent",
        "pairs whose chosen log-prob is below the reference's",
    ),
    Quantity("loss", ("loss", ""), ("loss",), 13, meaning="mean loss"),
    Quantity("flips", ("flips", ""), ("flips",), 14, "count", "output answers that changed"),
    Quantity("n", ("pairs", ""), ("n",), 15, "count", "evaluated"),
)
SORT_KEYS = ("name", *(q.key for q in QUANTITIES))


@dataclass(frozen=True)
class View:
    """What the user chose. ``split`` None: the training sample's, else the held-out pairs'."""

    sort: str = "rate"
    reverse: bool = False
    split: str | None = None
    behaviors: tuple[str, ...] = ()  # names, or parts of names; none: all
    curves: bool = True
    offset: int = 0  # rows scrolled away

    def __post_init__(self) -> None:
        if self.sort not in SORT_KEYS:
            raise ValueError(f"sort {self.sort!r}: {_nearest(self.sort, SORT_KEYS)}")

    def next_sort(self, by: int, known: Sequence[str]) -> View:
        """Sorted by the next of the keys that are ``known``, or the one before (by = -1)."""
        keys = [key for key in SORT_KEYS if key in known or key == self.sort]
        at = keys.index(self.sort) + by
        return replace(self, sort=keys[at % len(keys)], offset=0)


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    inside = [k for k in known if name.lower() in k.lower()][:3]
    found = list(dict.fromkeys(near + inside))
    if found:
        return f"did you mean {' or '.join(found)}?"
    shown = ", ".join(known[:12]) + (f", ... ({len(known)} in all)" if len(known) > 12 else "")
    return f"expected one of {shown}"


def demand_behaviors(names: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """The ``known`` behaviors that ``names`` ask for, each whole or as the one it is a part of.

    Raises ValueError, with the nearest names, for one that is none of them.
    """
    found = []
    for name in names:
        own = [name] if name in known else [k for k in known if name.lower() in k.lower()]
        if not own or not name:
            raise ValueError(f"no behavior {name!r} in this run; {_nearest(name, known)}")
        found += own
    return tuple(dict.fromkeys(found))


def splits_of(run: LiveRun) -> list[str]:
    """The splits that a table can be of, the training sample first."""
    first = (schema.TRAIN_SAMPLE, schema.HELD_OUT, schema.RATE_SAMPLE)
    shown = [
        split
        for split, behaviors in run.curves.items()
        if any(_TABLED & own.keys() for own in behaviors.values())
    ]
    return [s for s in first if s in shown] + [s for s in shown if s not in first]


_TABLED = {"margin", "reward_margin", "rate_obs"}  # of which probes, say, have none


def demand_split(run: LiveRun, split: str | None) -> str | None:
    """The split to show; None while there is none. ValueError for one that was not evaluated."""
    known = splits_of(run)
    if split is None or not known:
        return known[0] if known else None
    if split not in known:
        raise ValueError(f"split {split!r} is not evaluated in this run; {_nearest(split, known)}")
    return split


@dataclass
class Row:
    """A behavior: the newest value of every column of the records, the curves of its margin and of
    its chosen log-prob."""

    name: str
    values: dict[str, float | None]
    margin: Series
    chosen: Series

    def of(self, quantity: Quantity) -> float | None:
        """The value of a column of the table."""
        known = (self.values.get(column) for column in quantity.columns)
        return next((value for value in known if value is not None), None)


def rows_of(run: LiveRun, split: str, view: View) -> list[Row]:
    """The behaviors of ``split`` in the order of the view.

    What is measured at the optimizer step itself, the rates and the share, is taken from the sample
    of pairs that it is measured on, where the run has one.
    """
    own, measured = run.curves.get(split, {}), run.curves.get(schema.RATE_SAMPLE, {})
    rows = []
    for name in sorted(set(own) | set(measured)) if split == schema.RATE_SAMPLE else sorted(own):
        if view.behaviors and name not in view.behaviors:
            continue
        curves = own.get(name, {})
        step_values = measured.get(name, {})
        if "rate_pred_opt" in step_values:
            curves = curves | {c: s for c, s in step_values.items() if c in _OF_STEP}
        values = {c: series.last for c, series in curves.items() if _belongs(c, curves)}
        margin = curves.get("margin") or curves.get("reward_margin") or Series()
        rows.append(Row(name, values, margin, curves.get("logp_chosen", Series())))
    return _sorted(rows, view)


_OF_STEP = {
    f"{name}{end}"
    for name in ("rate_obs", "rate_pred_opt", "rate_pred_sgd", "share", "coherence", "gnorm_m")
    for end in ("", "_error")
}


def _belongs(column: str, curves: Mapping[str, Series]) -> bool:
    """Whether a column is not the error of an older value: errors come with the records alone,
    values with every line of metrics."""
    value = curves.get(column.removesuffix("_error"))
    return value is None or curves[column].steps[-1] == value.steps[-1]


def sortable(rows: Sequence[Row]) -> list[str]:
    """The keys that the rows have values of."""
    return ["name", *(q.key for q in QUANTITIES if any(row.of(q) is not None for row in rows))]


def _sorted(rows: list[Row], view: View) -> list[Row]:
    if view.sort == "name":
        return rows[::-1] if view.reverse else rows
    quantity = next(q for q in QUANTITIES if q.key == view.sort)
    known = [row for row in rows if row.of(quantity) is not None]
    known.sort(key=lambda row: row.of(quantity) or 0.0, reverse=not view.reverse)
    return known + [row for row in rows if row.of(quantity) is None]


def fit_apart(texts: Sequence[str], width: int, unicode: bool = True) -> list[str]:
    """`fit` of each; those that come out alike show so much of their start that they do not, where
    there is such a place to cut."""
    found = [fit(text, width, unicode) for text in texts]
    for cut in sorted({x for x in found if found.count(x) > 1}):
        alike = [i for i, x in enumerate(found) if x == cut]
        for head in sorted(range(width), key=lambda n: abs(n - width // 2)):
            tried = [fit(texts[i], width, unicode, head) for i in alike]
            if len(set(tried)) == len(alike) and not set(tried) & set(found):
                for i, text in zip(alike, tried, strict=True):
                    found[i] = text
                break
    return found


def fit(text: str, width: int, unicode: bool = True, start: int | None = None) -> str:
    """``text`` on one line in exactly ``width`` cells of a terminal, its middle left out if need
    be (after ``start`` cells; None: half); what a terminal would obey, or cannot show, is a
    question mark."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    if not unicode:
        line = line.encode("ascii", "replace").decode()
    if cell_len(line) <= width:
        return line + " " * (width - cell_len(line))
    gap = "…" if unicode else "~"
    head, tail = "", ""
    room = width - 1
    start = (room + 1) // 2 if start is None else start
    while line and cell_len(head + line[0]) <= start:
        head, line = head + line[0], line[1:]
    while line and cell_len(head + line[-1] + tail) <= room:
        tail, line = line[-1] + tail, line[:-1]
    cut = head + gap + tail
    return cut + " " * (width - cell_len(cut))


def rate_factor(rows: Sequence[Row]) -> tuple[float, str]:
    """What rates are multiplied by to be readable, and the unit that they then have."""
    rates = [row.of(q) for row in rows for q in QUANTITIES if q.kind == "rate"]
    largest = max((abs(r) for r in rates if r), default=0.0)
    power = min(0, 3 * math.floor(math.log10(largest) / 3)) if largest else 0
    return 10.0**-power, f"1e{power} nat/step" if power else "nat/step"


def table_lines(rows: Sequence[Row], width: int, unicode: bool) -> tuple[list[Text], str]:
    """Two lines of heads and one line a row, each of at most ``width`` cells, and a note on units.

    Columns that no row has a value of are left out, then those that there is no room for.
    """
    factor, unit = rate_factor(rows)
    cells = {q.key: _cells(rows, q, factor, unicode) for q in QUANTITIES}
    shown = [q for q in QUANTITIES if any(cell.strip("- ") for cell in cells[q.key])]
    if any(q.key == "margin" for q in shown):
        shown = [q for q in shown if q.key != "reward"]
    widths = {q.key: max(len(h) for h in (*q.head, *cells[q.key])) for q in shown}
    spark = any(len(row.margin.steps) > 1 for row in rows)
    longest = max((cell_len(row.name) for row in rows), default=0)
    left_out = sorted(shown, key=lambda q: -q.rank)
    mark = 2  # the letter of the behavior's curve

    def room() -> int:
        return width - mark - sum(widths[q.key] + 1 for q in shown) - (_SPARK + 1) * spark

    # Columns that a wide terminal has on top go before names are cut, the main ones after.
    while shown and left_out and room() < (min(longest, 30) if left_out[0].rank > 6 else _NAME_MIN):
        shown.remove(left_out.pop(0))
    name_width = max(min(longest, room()), min(len("behavior"), width - mark))
    lines = [
        _line(width, ["  " + fit(first, name_width, unicode)], heads, widths, style)
        for first, heads, style in (
            ("", [(q, q.head[0]) for q in shown] + [(None, "margin")] * spark, "bold"),
            ("behavior", [(q, q.head[1]) for q in shown] + [(None, "curve")] * spark, "bold"),
        )
    ]
    names = fit_apart([row.name for row in rows], name_width, unicode)
    for i, row in enumerate(rows):
        letter = LETTERS[i] if i < len(LETTERS) else " "
        line = Text(letter + " ", style=COLORS[i] if i < len(COLORS) else "")
        line.append(names[i], style="default")
        for q in shown:
            value = row.of(q)
            negative = value is not None and value < 0
            line.append(
                " " + cells[q.key][i].rjust(widths[q.key]), "red" if negative else "default"
            )
        if spark:
            drawn = sparkline(row.margin.steps, row.margin.values, _SPARK, unicode)
            line.append(" " + drawn.rjust(_SPARK))
        line.truncate(width)
        lines.append(line)
    rates = any(q.kind == "rate" for q in shown)
    return lines, f"rates in {unit}" if rates else ""


def _line(
    width: int,
    start: list[str],
    heads: Sequence[tuple[Quantity | None, str]],
    widths: dict[str, int],
    style: str,
) -> Text:
    parts = [text.rjust(widths[q.key] if q else _SPARK) for q, text in heads]
    line = Text(" ".join(start + parts).rstrip(), style=style)
    line.truncate(width)
    return line


def _cells(rows: Sequence[Row], quantity: Quantity, factor: float, unicode: bool) -> list[str]:
    values = [row.of(quantity) for row in rows]
    if quantity.kind == "percent":
        return ["-" if v is None else f"{100 * v:.0f}%" for v in values]
    if quantity.kind == "count":
        return ["-" if v is None else f"{v:,.0f}" for v in values]
    if quantity.kind == "rate":
        values = [None if v is None else v * factor for v in values]
    # Three digits each: behaviors differ by powers of ten, and the small ones matter as well.
    rounded = [None if v is None else float(f"{v:.3g}") for v in values]
    places = [min(decimals([v]), 3) for v in rounded]
    errors = [row.values.get(f"{quantity.columns[0]}_error") for row in rows]
    scale = factor if quantity.kind == "rate" else 1.0
    sign = "±" if unicode else "+-"
    return [
        ("-" if v is None else f"{v:.{p}f}") + ("" if e is None else f"{sign}{e * scale:.{p}f}")
        for v, e, p in zip(values, errors, places, strict=True)
    ]
