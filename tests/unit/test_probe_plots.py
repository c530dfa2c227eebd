"""The report's figures of probes, from records written by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastpref.dynamics.recorder import Recorder
from fastpref.report.html import write_report
from fastpref.report.probe_plots import probe_figures, read_curves

KINDS = ("chosen", "rejected", "irr_train", "my_own")


def write(run: Path) -> None:
    """Two behaviors, a probe without one; `likes-rain` is squeezed at step 4."""
    recorder = Recorder(run, 0, ["likes-rain", "<odd> & name"], part_steps=10)
    for step in (0, 2, 4):
        rows = []
        for number, behavior in enumerate(("likes-rain", "<odd> & name", None)):
            for kind in KINDS:
                logp = -10.0 - number - step * (1 + KINDS.index(kind))
                own = {"probe_id": len(rows), "behavior": behavior, "response_type": kind}
                rows.append(own | {"logp": logp, "argmax_logp": -3.0 + step, "log1m_pmax": -1.0})
        recorder.rows("probes", step, rows)
        if step:
            change = {"behavior": "likes-rain", "chosen": -1.0, "rejected": -2.0, "argmax": 1.0}
            recorder.rows("squeezing", step, [change | {"alarm": step == 4}])
        recorder.flush(step)
    recorder.close(4)


def test_curves_are_means_of_the_records(tmp_path: Path) -> None:
    write(tmp_path)
    curves = read_curves(tmp_path)
    assert curves is not None
    assert curves.step.tolist() == [0, 2, 4]
    assert list(curves.by_type) == ["chosen", "rejected", "irr_train", "my_own", "argmax"]
    np.testing.assert_allclose(curves.by_type["rejected"], [-11, -15, -19])
    np.testing.assert_allclose(curves.by_type["argmax"], [-3, -1, 1])
    assert set(curves.by_behavior) == {"likes-rain", "<odd> & name"}
    np.testing.assert_allclose(curves.by_behavior["likes-rain"]["chosen"], [-10, -12, -14])
    assert curves.alarms == {"likes-rain": [4]}


def test_the_report_shows_them(tmp_path: Path) -> None:
    write(tmp_path)
    figures = probe_figures(tmp_path)
    assert [figure.name for figure in figures] == ["probes", "probe-behaviors"]
    assert "my_own" in figures[0].svg and "likeliest tokens" in figures[0].svg
    assert "&lt;odd&gt; &amp; name" in figures[1].svg and "squeezing alarm" in figures[1].svg
    page = write_report(tmp_path).read_text()
    assert "Probes by response type" in page and "Probes by behavior" in page


def test_a_run_without_probes_has_none(tmp_path: Path) -> None:
    Recorder(tmp_path, 0, ["b"], part_steps=10).close(0)
    assert probe_figures(tmp_path) == []
