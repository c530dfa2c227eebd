"""A run on a terminal: header, alarms, the table of behaviors, curves. Text in, text out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.text import Text

from fastpref.report.characters import Canvas, axis_range
from fastpref.report.live import LiveRun, span
from fastpref.report.live_table import (
    COLORS,
    LETTERS,
    Row,
    View,
    demand_split,
    fit,
    rows_of,
    sortable,
    table_lines,
)
from fastpref.report.tables import decimals

_CURVE_ROWS, _LEAST_CURVE_ROWS = 14, 6
_KEYS = "q quit  s/S sort  r reverse  t split  c curves  up/down scroll"


def screen(run: LiveRun, view: View, width: int, height: int | None, unicode: bool) -> list[Text]:
    """The lines of the view, none wider than ``width`` cells, at most ``height`` of them.

    ``height`` None is a print that stays: all rows, no keys. Raises ValueError for a split that
    the run does not evaluate.
    """
    split = demand_split(run, view.split)
    lines = header(run, width, unicode)
    rows = rows_of(run, split, view) if split else []
    lines += [clip(Text(f"! {text}", "bold red"), width) for text in alarms(run, rows, width - 2)]
    lines.append(Text())
    if not rows:
        return lines + [clip(Text(text), width) for text in _why_empty(run)] + _foot(height, width)
    table, unit = table_lines(rows, width, unicode)
    order = f"{view.sort}, the smallest first" if view.reverse else view.sort
    if view.sort not in sortable(rows):
        order += " (not known here)"
    step = max((row.margin.steps[-1] for row in rows if row.margin.steps), default=0)
    heads, body = table[:2], table[2:]
    foot = _foot(height, width)
    room = None if height is None else height - len(lines) - len(heads) - 1 - len(foot)
    curve_rows, which = _CURVE_ROWS, f"{len(body)} behaviors"
    if room is not None:
        needed = min(len(body), max(room - _LEAST_CURVE_ROWS - 2, 3)) if view.curves else len(body)
        curve_rows = min(room - needed - 2, _CURVE_ROWS * 2)
        shown = max(needed if curve_rows >= _LEAST_CURVE_ROWS and view.curves else room, 1)
        first = min(view.offset, max(len(body) - shown, 0))
        if shown < len(body):
            which = f"rows {first + 1}-{first + shown} of {len(body)}"
        body = body[first : first + shown]
    note = "; ".join(filter(None, (f"{split} after step {step:,}, {which} by {order}", unit)))
    lines += [*heads, *body, clip(Text(note, "dim"), width)]
    if view.curves and curve_rows >= _LEAST_CURVE_ROWS:
        lines += curves(rows[: len(LETTERS)], width, curve_rows, unicode)
    lines += foot
    return lines if height is None else lines[:height]


def clip(line: Text, width: int) -> Text:
    """The line cut to ``width`` cells."""
    line.truncate(width)
    return line


def header(run: LiveRun, width: int, unicode: bool) -> list[Text]:
    """Two or three lines: what it is and how it stands, how far and how fast, how well."""
    config = run.config
    state = run.state()
    style = {"finished": "green", "running": "cyan"}.get(state, "yellow")
    what = [_listed(config[k]) for k in ("model_name_or_path", "loss_type") if config.get(k)]
    what += [f"{s} {config[k]:g}" for k, s in _NUMBERS if isinstance(config.get(k), int | float)]
    first = Text(fit(str(run.path), min(len(str(run.path)), width // 2), unicode), "bold")
    first.append("  ").append(state, style).append("  " + fit_plain(", ".join(what), unicode))
    total = run.total_steps
    parts = [f"step {run.step:,}" + (f" of {total:,} ({run.step / total:.0%})" if total else "")]
    parts.append(f"epoch {run.epoch:.2f}")
    for key, name in (("tokens_per_second", "tokens/s"), ("pairs_per_second", "pairs/s")):
        if run.perf.get(key):
            parts.append(f"{run.perf[key]:,.0f} {name}")
    if run.seconds_left is not None:
        parts.append(f"left {span(run.seconds_left)}")
    second = "  ".join(parts)
    train = []
    for key, name, form in _TRAIN:
        value = run.train[key].last if key in run.train else None
        if value is not None:
            train.append(f"{name} {value:{form}}")
    lines = [first, Text(second)] + ([Text("  ".join(train))] if train else [])
    return [clip(line, width) for line in lines]


def _listed(value: object) -> str:
    return "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


_NUMBERS = (("beta", "beta"), ("learning_rate", "lr"))
_TRAIN = (
    ("loss", "loss", ".4f"),
    ("rewards/accuracies", "acc", ".2f"),
    ("rewards/margins", "reward margin", ".3g"),
    ("grad_norm", "grad norm", ".3g"),
    ("learning_rate", "lr", ".3g"),
)


def fit_plain(text: str, unicode: bool) -> str:
    """``text`` on one line, without what a terminal would obey."""
    return fit(text, len(text) * 2, unicode).rstrip()


def alarms(run: LiveRun, rows: Sequence[Row], width: int = 120) -> list[str]:
    """What should be looked at, a line each; nothing where all is well."""
    kinds: tuple[tuple[str, Callable[[Row], bool]], ...] = (
        (
            "squeezing: chosen and rejected fall, the argmax rises",
            lambda row: run.squeezed.get(row.name, False),
        ),
        ("margin falls, three evaluations in a row", _falls),
        ("logp chosen fell by more than the margin rose", _displaced),
    )
    found = []
    for what, holds in kinds:
        if names := [row.name for row in rows if holds(row)]:
            found.append(_named(f"{what}: {len(names)} of {len(rows)}", names, width))
    return found


def _falls(row: Row) -> bool:
    last = row.margin.values[-3:]
    return len(last) == 3 and last[0] > last[1] > last[2]


def _displaced(row: Row) -> bool:
    if row.chosen.last is None or row.margin.last is None:
        return False
    fall = row.chosen.values[0] - row.chosen.last
    return fall > max(row.margin.last - row.margin.values[0], _LEAST_FALL)


_LEAST_FALL = 0.1  # nats that are not worth an alarm


def _named(what: str, names: Sequence[str], width: int) -> str:
    """``what``, and in brackets as many of the names as there is room for."""
    text = what
    for count in range(1, len(names) + 1):
        more = ", ..." if count < len(names) else ""
        longer = f"{what} ({', '.join(fit_plain(n, True) for n in names[:count])}{more})"
        if len(longer) > width:
            break
        text = longer
    return text


def curves(rows: Sequence[Row], width: int, height: int, unicode: bool) -> list[Text]:
    """The mean margin of each behavior over the steps, with its letter where the curve ends."""
    drawn = [(i, row.margin) for i, row in enumerate(rows) if len(row.margin.steps) > 1]
    if not drawn or width < 40:
        return []
    steps = (min(s.steps[0] for _, s in drawn), max(s.steps[-1] for _, s in drawn))
    low, high = axis_range([0.0, *(v for _, s in drawn for v in s.values)])
    places = decimals([low, high])
    labels = {y: f"{y:.{places}f}" for y in (high, 0.0, low) if low <= y <= high}
    margin = max(map(len, labels.values())) + 1
    inner = height - 1  # the last line is the axis of the steps
    canvas = Canvas(width - margin - len(drawn) - 1, inner, steps, (low, high), unicode)
    for i, series in drawn:
        canvas.curve(i, series.steps, series.values)
    for place, (i, _) in enumerate(drawn):
        canvas.letter(i, LETTERS[i], every=12, first=2 + place)
    ends: dict[int, list[int]] = {}
    for i, series in drawn:
        ends.setdefault(canvas.row_of(series.values[-1]), []).append(i)
    at = {canvas.row_of(y): text for y, text in reversed(labels.items())}
    lines = []
    for y, row in enumerate(canvas.rows(LETTERS)):
        line = Text(at.get(y, "").rjust(margin - 1) + ("┤" if unicode else "|"), "dim")
        for mark, number in row:
            line.append(mark, COLORS[number] if number >= 0 else "")
        line.append(" ")
        for i in ends.get(y, []):
            line.append(LETTERS[i], COLORS[i])
        lines.append(line)
    first, last = f"step {steps[0]:,}", f"{steps[1]:,}"
    gap = max(canvas.width - len(first) - len(last), 1)
    title = " mean margin, nat " if gap > 24 else ""
    middle = title.center(gap)
    lines.append(Text(" " * margin + first + middle + last, "dim"))
    return [clip(line, width) for line in lines]


def _why_empty(run: LiveRun) -> list[str]:
    if any(run.curves.values()):
        return ["no behavior of those asked for is evaluated (yet)"]
    if run.config.get("eval_steps") == 0:
        return ["eval_steps is 0 in this run: no behavior is evaluated, so there is no table"]
    return ["no evaluation yet: the table of behaviors comes with the first one"]


def _foot(height: int | None, width: int) -> list[Text]:
    return [] if height is None else [clip(Text(_KEYS, "dim"), width)]
