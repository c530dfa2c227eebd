"""The head alone on frozen features."""

from __future__ import annotations

from fastpref.reproduce.outcome import Outcome
from fastpref.reproduce.settings import Settings


def run(settings: Settings) -> Outcome:
    """Placeholder of the skeleton."""
    raise ValueError("not built yet")
