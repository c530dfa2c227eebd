"""`fastpref reproduce balance` on a random two-layer model: what is run, measured and written."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from fastpref.cli import main
from fastpref.dynamics.inequality import gini
from fastpref.reproduce import balance

PERSONAS = ("likes-rain", "likes-tools", "plays-music")


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTPREF_CACHE", str(tmp_path / "cache"))


def test_balance(
    monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, personas: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(balance, "SEEDS", 2)
    monkeypatch.setattr(balance, "UPDATES", 4)
    monkeypatch.setattr(balance, "EVALUATIONS", 4)
    options = ("--steps", "8", "--learning_rate", "1e-2", "--train_batch_size", "12")
    where = ("--model", str(tiny_model_dir), "--data", str(personas), "--max_length", "128")
    out = tmp_path / "out"
    assert main(["reproduce", "balance", *where, *options, "--output_dir", str(out)]) == 0
    folder = out / "balance"
    assert all((folder / f"balance.{kind}").stat().st_size > 5000 for kind in ("png", "svg"))
    outcome = json.loads((folder / "outcome.json").read_text())
    assert set(outcome["runs"]) == {f"runs/{a}-{s}" for a in balance.ARMS for s in (1, 2)}
    delta = outcome["numbers"]["delta"]
    assert set(delta) == set(PERSONAS)
    assert list(delta.values()) == sorted(delta.values(), reverse=True)
    assert len(outcome["verdicts"]) == 8

    with (folder / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = outcome["numbers"]["runs"]
    for arm in balance.ARMS:
        for place, seed in enumerate(("1", "2")):
            config = yaml.safe_load((folder / "runs" / f"{arm}-{seed}" / "config.yaml").read_text())
            assert config["balance"] == ("none" if arm == "plain" else arm)
            assert config["seed"] == int(seed)
            own = [r for r in rows if (r["run"], r["seed"]) == (arm, seed)]
            assert {r["step"] for r in own} == {"0", "2", "4", "6", "8"}
            weights = {r["loss_weight"] for r in own}
            assert weights == {""} if arm == "plain" else len(weights) > 3
            for split in ("train_sample", "eval"):
                last = {
                    r["behavior"]: float(r["margin"])
                    for r in own
                    if (r["split"], r["step"]) == (split, "8")
                }
                seen = {name: found[arm][f"{split}_margins"][place][name] for name in PERSONAS}
                assert seen == pytest.approx(last)
                assert found[arm][f"{split}_total_margin"][place] == pytest.approx(
                    sum(last.values())
                )
                times = []
                for name in PERSONAS:
                    above = [
                        int(r["step"])
                        for r in own
                        if (r["behavior"], r["split"]) == (name, split) and float(r["margin"]) > 1
                    ]
                    times.append(min(above, default=8))
                assert found[arm][f"{split}_gini_of_times"][place] == pytest.approx(gini(times))
    arrived = [own["train_sample_arrived"] for own in found.values()]
    assert np.max(arrived) > 0, "no margin grew: the test would say nothing"


def test_balance_compares(
    tiny_model_dir: Path, personas: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--model", str(tiny_model_dir), "--data", str(personas), "--max_length", "128")
    options = ("--behaviors", "likes-rain", "--output_dir", str(tmp_path / "out"))
    assert main(["reproduce", "balance", *where, *options]) == 2
    assert "there is one alone, likes-rain" in capsys.readouterr().err
