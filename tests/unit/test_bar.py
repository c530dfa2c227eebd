"""The progress bar's line: all its figures, in 80 columns."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fastpref.batch import PairBatch
from fastpref.data.loader import StepPlan
from fastpref.data.pack import pack_pairs
from fastpref.data.tokenize import TokenPair
from fastpref.losses import PairLogp
from fastpref.progress import Bar
from fastpref.step import PairResult, StepResult


def batch() -> PairBatch:
    ids = [np.array(x, np.int32) for x in ([1, 2], [3], [4, 5])]
    return pack_pairs([TokenPair(1, 0, "", *ids, truncated=False)])


def test_every_figure_is_on_a_line_of_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    zero = torch.zeros(1)
    pairs = PairResult(batch(), PairLogp(*[zero] * 6), *[zero] * 4, norms={}, stats={})
    result = StepResult([pairs], torch.tensor(0.6931), zero[0], zero[0])
    bar = Bar(12345, 10000, show=True)
    bar.bar.mininterval = 0
    margins = [{"margin": np.array([-123.4, 1.0])}]
    view: Any = SimpleNamespace(columns=margins, scalar=lambda name: 0.6931)
    for step in (10001, 10002):
        plan = StepPlan(step, 0.5, 4096, 10**6, [])
        bar.show(view)
        bar.step(plan, result, seconds=0.5)
    bar.close()
    line = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1].rstrip()
    assert len(line) <= 80
    for figure in (
        "10002/12345",
        "<",
        "loss 0.6931",
        "margin -61.2",
        "acc 0.50",
        "tok/s",
        "pairs/s",
    ):
        assert figure in line, line
    assert bar.window()["pairs_per_second"] == pytest.approx(8192 / 1.0)
