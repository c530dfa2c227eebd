"""The progress bar's line: all its figures, in 80 columns."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fastpref.progress import Bar

RATES = {
    "tokens_per_second": 81_234.0,
    "pairs_per_second": 8192.0,
    "tflops_per_second": 400.0,
    "mfu": 0.4512,
    "data_wait": 0.001,
    "record_overhead": 0.008,
}


def line(capsys: pytest.CaptureFixture[str], rates: dict[str, Any], first: int, last: int) -> str:
    bar = Bar(last, first, show=True)
    bar.bar.start_t -= 1  # two steps in a second: 19:31 left of 2343 more
    bar.bar.mininterval = 0
    margins = [{"margin": np.array([-123.4, 1.0])}]
    view: Any = SimpleNamespace(columns=margins, scalar=lambda name: 0.6931)
    for _ in range(2):
        bar.show(view)
        bar.step(rates)
    bar.close()
    return capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1].rstrip()


def test_every_figure_up_to_mfu_is_on_a_line_of_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = line(capsys, RATES, 10000, 12345)
    assert len(shown) <= 80
    for figure in (
        "10002/12345",
        "<",
        "loss 0.6931",
        "margin -61.2",
        "acc 50%",
        "81k tok/s",
        "8.2k pair/s",
        "MFU 45%",
    ):
        assert figure in shown, shown


def test_what_does_not_fit_is_left_out_from_the_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert line(capsys, RATES, 0, 90).endswith("MFU 45% data 0% rec 1%")
    monkeypatch.setenv("COLUMNS", "60")
    shown = line(capsys, RATES, 0, 90)
    assert len(shown) <= 60 and "acc 50%" in shown and "MFU" not in shown


def test_what_is_not_known_is_not_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    shown = line(capsys, {**RATES, "mfu": None, "tokens_per_second": 0.0}, 0, 90)
    assert "MFU" not in shown and "tok/s" not in shown and "8.2k pair/s" in shown
