"""`Table`: what every reader returns, whatever the format of the file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastpref.data.badrows import BadRow

# Columns of what fastpref does not train on. A row says only whether it has any.
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
# Columns of numbers, which in formats of text alone are parsed: reference log-probs of a pair, or
# of a row of one completion (TRL's names).
NUMBERS = ("ref_chosen_logps", "ref_rejected_logps", "ref_logps")


@dataclass
class Table:
    """The rows of one source in their order, its columns, and the rows that could not be read."""

    names: dict[str, None] = field(default_factory=dict)  # of all columns, read or not, in order
    rows: list[tuple[int, dict[str, Any]]] = field(default_factory=list)  # (line or number, row)
    bad: list[BadRow] = field(default_factory=list)

    def add(self, line: int, row: dict[str, Any]) -> None:
        """One row of a format in which every row brings columns of its own."""
        self.names.update(dict.fromkeys(row))
        self.rows.append((line, row))
