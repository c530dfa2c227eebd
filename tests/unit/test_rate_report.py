"""Rates from the records to figures: every number that was written comes back in its place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastpref.dynamics.recorder import Recorder
from fastpref.report.dynamics_plots import rate_figures
from fastpref.report.rate_tables import COLUMNS, Rates, read_rates

NAMES = [f"behavior-{i}" for i in range(4)]
STEPS = (1, 5, 10)


def value(step: int, *names: str) -> float:
    """A number of its own for everything."""
    number = float(np.sin(step + sum(map(ord, "".join(names)))))
    return abs(number) if names[-1].endswith("_error") else number


@pytest.fixture
def run(tmp_path: Path) -> Path:
    recorder = Recorder(tmp_path, 0, NAMES, 4)
    for step in range(11):
        if step in STEPS:
            rows = [
                {"behavior": n, "n": 3, **{c: value(step, n, c) for c in COLUMNS}} for n in NAMES
            ]
            recorder.behaviors(step, "rate_sample", rows)
            recorder.behaviors(
                step, "eval", [{"behavior": n, "n": 9, "margin": 1.0} for n in NAMES]
            )
            gram = [
                {"behavior": k, "other": other, "dot": value(step, k, other)}
                for k in NAMES
                for other in NAMES[: 2 + step % 3]  # others had no pair in the step
            ]
            recorder.rows("gram", step, gram)
        recorder.flush(step)
    recorder.close(10)
    return tmp_path


def test_what_was_written_is_read(run: Path) -> None:
    rates = read_rates(run)
    assert list(rates.curves) == NAMES and tuple(rates.step) == STEPS
    for name, curve in rates.curves.items():
        assert tuple(curve["step"]) == STEPS
        for column in COLUMNS:
            assert curve[column].tolist() == [value(step, name, column) for step in STEPS]
    order = NAMES[::-1]
    for step, matrix in zip(STEPS, rates.ordered(order), strict=True):
        for i, k in enumerate(order):
            for j, other in enumerate(order):
                known = other in NAMES[: 2 + step % 3]
                assert matrix[i, j] == (value(step, k, other) if known else 0.0)


def test_every_figure_is_drawn_once(run: Path) -> None:
    figures = rate_figures(read_rates(run), NAMES)
    assert [f.name for f in figures] == ["rates", "rate-agreement", "shares", "gamma"]
    assert figures[0].svg == rate_figures(read_rates(run), NAMES)[0].svg
    for name in NAMES:
        assert name in figures[0].svg and name in figures[3].svg


def test_a_run_without_rates_has_no_figures(tmp_path: Path) -> None:
    assert not read_rates(tmp_path).curves
    recorder = Recorder(tmp_path, 0, NAMES, 4)
    recorder.behaviors(0, "eval", [{"behavior": NAMES[0], "n": 9, "margin": 1.0}])
    recorder.close(0)
    assert rate_figures(read_rates(tmp_path), NAMES) == []


def test_many_behaviors(tmp_path: Path) -> None:
    names = [f"b{i}" for i in range(40)]
    gamma = np.random.default_rng(0).normal(size=(2, 40, 40))
    curves = {
        n: {c: np.array([0.1, 0.2]) for c in COLUMNS} | {"step": np.array([1.0, 5.0])}
        for n in names
    }
    figures = rate_figures(Rates(curves, np.array([1, 5]), tuple(names), gamma), names)
    assert len(figures) == 4
    assert "15 fastest and 15 slowest of 40" in figures[0].caption
