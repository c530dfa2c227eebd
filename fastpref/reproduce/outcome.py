"""What an experiment leaves: outcome.json, curves.csv, and lines for the screen."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastpref.report.files import write_csv, write_whole
from fastpref.reproduce.settings import Settings

OUTCOME_FILE, CURVES_FILE = "outcome.json", "curves.csv"


@dataclass(frozen=True)
class Verdict:
    """A number that had to come out, and whether it did."""

    claim: str  # a sentence, with unit and limit in it
    value: float  # what came; nan: undefined
    limit: float
    at_least: bool = False  # the value must reach the limit; otherwise it must not pass it

    @property
    def passed(self) -> bool | None:
        """None where the value is undefined."""
        if math.isnan(self.value):
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit


@dataclass(frozen=True)
class Outcome:
    """Everything that an experiment found. Numbers may be nan: undefined, null in the file."""

    experiment: str
    settings: dict[str, Any]  # model, data, behaviors, hyper-parameters
    numbers: dict[str, Any]  # predicted and observed, nested as is clearest
    verdicts: list[Verdict]
    caveats: list[str]  # where theory departs, which defects were corrected, what was missing
    curves: list[dict[str, Any]]  # the rows of curves.csv, all with the same keys
    runs: list[str] = field(default_factory=list)  # run folders, relative to the experiment's
    figures: list[str] = field(default_factory=list)  # file names in the experiment's folder


def write_outcome(settings: Settings, outcome: Outcome) -> None:
    """outcome.json and curves.csv in the experiment's folder, each whole."""
    settings.folder.mkdir(parents=True, exist_ok=True)
    content = {
        "experiment": outcome.experiment,
        "settings": outcome.settings,
        "verdicts": [
            {
                "claim": v.claim,
                "value": v.value,
                "limit": v.limit,
                "passed": v.passed,
            }
            for v in outcome.verdicts
        ],
        "numbers": outcome.numbers,
        "caveats": outcome.caveats,
        "runs": outcome.runs,
        "figures": outcome.figures,
    }
    text = json.dumps(plain(content), indent=1, ensure_ascii=False, allow_nan=False)
    write_whole(settings.folder / OUTCOME_FILE, (text + "\n").encode())
    header = list(outcome.curves[0]) if outcome.curves else []
    rows = [[row[name] for name in header] for row in outcome.curves]
    write_csv(settings.folder / CURVES_FILE, header, rows)


def summary(outcome: Outcome) -> str:
    """The verdicts, one a line, for the screen."""
    word = {True: "yes", False: "NO", None: "undefined"}
    lines = [f"{outcome.experiment}:"]
    lines += [f"  {word[v.passed]:>9}  {v.claim}: {v.value:.3g}" for v in outcome.verdicts]
    return "\n".join(lines)


def ratio(value: float, over: float) -> float:
    """``value`` / ``over``; nan, undefined, where that is 0."""
    return float(value) / float(over) if over else math.nan


def plain(value: Any) -> Any:
    """`value` as JSON has it: numpy's numbers and arrays as Python's, not finite ones as null."""
    if isinstance(value, Mapping):
        return {str(key): plain(own) for key, own in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [plain(own) for own in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
