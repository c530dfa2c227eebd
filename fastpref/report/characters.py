"""Curves drawn with characters: a line of blocks, and a canvas of braille dots (2 x 4 a cell).

Where a terminal has no Unicode, letters and ASCII stand in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

BLOCKS, ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.-:=+*#"
# Bits of the braille cell U+2800, by the dot's row (of 4) and column (of 2).
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


def resample(steps: Sequence[int], values: Sequence[float], width: int) -> np.ndarray:
    """(W,) values at W evenly spaced steps, W = ``width`` or less where there are fewer points."""
    if not steps:
        return np.empty(0)
    at = np.linspace(steps[0], steps[-1], min(width, len(steps)))
    return np.interp(at, steps, values)


def sparkline(steps: Sequence[int], values: Sequence[float], width: int, unicode: bool) -> str:
    """The curve in one line of at most ``width`` characters, its least value lowest."""
    points = resample(steps, values, width)
    if not points.size:
        return ""
    marks = BLOCKS if unicode else ASCII_BLOCKS
    low, high = points.min(), points.max()
    level = (points - low) / (high - low) if high > low else np.full(points.size, 0.5)
    return "".join(marks[min(int(x * len(marks)), len(marks) - 1)] for x in level)


class Canvas:
    """Cells, ``width`` x ``height``, that curves are drawn into; later curves lie above.

    x_range, y_range: the least and the largest value that have a place; y_range must not be empty.
    """

    def __init__(
        self,
        width: int,
        height: int,
        x_range: tuple[float, float],
        y_range: tuple[float, float],
        unicode: bool,
    ) -> None:
        assert width > 0 and height > 0 and y_range[1] > y_range[0]
        self.width, self.height, self.unicode = width, height, unicode
        self.x_range, self.y_range = x_range, y_range
        self.dots = np.zeros((height, width), np.int64)
        self.owner = np.full((height, width), -1)  # which curve is on top, -1 for none
        self.letters: dict[tuple[int, int], str] = {}

    def _dot_row(self, y: float) -> int:
        low, high = self.y_range
        place = (high - y) / (high - low) * (4 * self.height - 1)
        return min(max(round(place), 0), 4 * self.height - 1)

    def row_of(self, y: float) -> int:
        """The row of cells, from the top, in which the value ``y`` lies."""
        return self._dot_row(y) // 4

    def curve(self, number: int, steps: Sequence[int], values: Sequence[float]) -> None:
        """Draw curve ``number``: its points, joined by straight lines."""
        low, high = self.x_range
        wide = 2 * self.width - 1
        places = [round((x - low) / (high - low) * wide) if high > low else 0 for x in steps]
        rows = [self._dot_row(y) for y in values]
        for k, (x, y) in enumerate(zip(places, rows, strict=True)):
            before = (places[k - 1], rows[k - 1]) if k else (x, y)
            count = max(abs(x - before[0]), abs(y - before[1]), 1)
            for i in range(count + 1):
                part = i / count
                self._dot(
                    number,
                    round(before[0] + part * (x - before[0])),
                    round(before[1] + part * (y - before[1])),
                )

    def _dot(self, number: int, x: int, y: int) -> None:
        self.dots[y // 4, x // 2] |= _DOTS[y % 4][x % 2]
        self.owner[y // 4, x // 2] = number

    def letter(self, number: int, letter: str, every: int, first: int) -> None:
        """Write ``letter`` on curve ``number`` where it is on top, in column ``first`` and then
        ``every`` so many: what tells curves apart without colours."""
        for column in range(first, self.width, every):
            for row in np.flatnonzero(self.owner[:, column] == number)[:1]:
                self.letters[int(row), column] = letter

    def rows(self, letters: Sequence[str]) -> list[list[tuple[str, int]]]:
        """Rows of (character, number of its curve or -1); ``letters`` of the curves are what ASCII
        draws them with."""
        found = []
        for y in range(self.height):
            row = []
            for x in range(self.width):
                number = int(self.owner[y, x])
                if number < 0:
                    mark = " "
                elif (y, x) in self.letters:
                    mark = self.letters[y, x]
                else:
                    mark = chr(0x2800 + int(self.dots[y, x])) if self.unicode else letters[number]
                row.append((mark, number))
            found.append(row)
        return found


def axis_range(values: Sequence[float]) -> tuple[float, float]:
    """The range of an axis that shows the values; never empty."""
    known = [v for v in values if math.isfinite(v)]
    low, high = min(known, default=0.0), max(known, default=0.0)
    if low == high:
        return low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
    return low, high
