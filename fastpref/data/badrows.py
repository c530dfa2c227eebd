"""Rows that cannot be used: where each is, why, what stood there; and short texts for messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SHOWN_BAD_ROWS = 5


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used: where it is, why, and what stood there."""

    source: str
    line: int
    reason: str
    value: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line}: {self.reason} (got {self.value})"


class Unusable(Exception):
    """Why a row cannot be used, without its place, which the caller knows.

    ``reason`` is the same text for every row with the same fault, so that faults can be counted;
    what differs from row to row stands in ``value``.
    """

    def __init__(self, reason: str, value: object) -> None:
        super().__init__(reason)
        self.reason = reason
        self.value = value if isinstance(value, Words) else shown(value)

    def at(self, source: str, line: int) -> BadRow:
        """The bad row, now that its place is known."""
        return BadRow(source, line, self.reason, self.value)


class Words(str):
    """A description, printed as it is; any other value is printed as a short repr."""


def check_bad_rows(bad: Sequence[BadRow], total: int, on_bad_rows: str) -> None:
    """Raise ValueError, showing the first few, if bad rows are an error or no good row is left."""
    if not bad or (on_bad_rows == "drop" and len(bad) < total):
        return
    first = min(len(bad), SHOWN_BAD_ROWS)
    what = "no row can be used:" if len(bad) == total else ""
    lines = [f"{what} {len(bad)} of {total} rows are bad, the first {first}:".strip()]
    lines += [f"  {row}" for row in bad[:first]]
    if len(bad) < total:
        lines.append("Correct them, or leave such rows out with --on_bad_rows drop.")
    else:
        lines.append("Correct the rows, or name other files in dataset_name.")
    raise ValueError("\n".join(lines))


def shown(value: object, limit: int = 60) -> str:
    """A short repr of ``value`` for a message."""
    try:
        text = repr(value)
    except RecursionError:
        return f"a {type(value).__name__} of very many levels"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def listed(names: Iterable[object]) -> str:
    """The names of columns, for messages."""
    return ", ".join(shown(name) for name in names) or "(none)"


def nearest(name: str, known: Sequence[str]) -> str:
    """A sentence that names the known name closest to ``name``, or "" if none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
