"""`balance` in a run: off it is not there, on it is the weighted loss, and a run stays one run."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastpref.cli import main
from fastpref.config import Config
from fastpref.data.dataset import load_dataset
from fastpref.data.pack import pack_pairs
from fastpref.dynamics.balancing import ShareController
from fastpref.dynamics.recorder import read_records
from fastpref.loading import load_model
from fastpref.losses import LOSSES
from fastpref.refcache import with_reference
from fastpref.step import backward
from fastpref.train import train

NAMES = ("agrees", "polite")


@pytest.fixture(scope="module")
def base(tiny_config: Config) -> Config:
    return dataclasses.replace(
        tiny_config,
        max_length=96,
        max_steps=12,
        learning_rate=3e-3,
        logging_steps=1,
        eval_steps=6,
        eval_sample_size=4,
        save_steps=5,
        balance="margins",
        balance_every=3,
        balance_limit=3.0,
    )


def run(config: Config, folder: Path, **changes: Any) -> Path:
    return train(dataclasses.replace(config, output_dir=str(folder), **changes), progress=False)


@pytest.fixture(scope="module")
def balanced(base: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(base, tmp_path_factory.mktemp("balanced") / "run")


def same_bits(a: Path, b: Path) -> bool:
    one, other = (load_file(folder / "model.safetensors") for folder in (a, b))
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def lines(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == split]


def weights(folder: Path) -> np.ndarray:
    """(steps, K) as logged."""
    return np.array([[r[f"behavior/{n}/loss_weight"] for n in NAMES] for r in lines(folder)])


def test_weights_of_one_are_the_plain_loss_to_the_bit(base: Config, tmp_path: Path) -> None:
    """Off, and on before its first update."""
    plain = {"balance": "none", "balance_every": 10, "balance_limit": 4.0}
    off = run(base, tmp_path / "off", max_steps=4, **plain)
    on = run(base, tmp_path / "on", max_steps=4, balance_every=5)
    assert same_bits(off, on)
    assert (weights(on) == 1).all()
    assert not any("loss_weight" in key for row in lines(off) for key in row)
    for table in ("pairs", "behaviors"):
        assert set(read_records(off, table)["loss_weight"].to_pylist()) == {None}


def test_the_gradient_is_that_of_the_weighted_mean(
    tiny_model_dir: Path, tiny_data: Path, tmp_path: Path
) -> None:
    config = Config(
        model_name_or_path=str(tiny_model_dir),
        dataset_name=(str(tiny_data),),
        ref_cache_dir=str(tmp_path),
        max_length=96,
        dtype="float64",
        beta=0.4,
    )
    model = load_model(config)
    pairs = load_dataset(config, model.tokenizer).train[::9]
    pairs = with_reference(model, pairs, cache_dir=str(tmp_path))
    with torch.no_grad():
        for p in model.module.parameters():
            p.add_(0.05 * torch.randn_like(p))
    own = torch.linspace(0.3, 2.5, len(pairs), dtype=torch.float64)

    batch = dataclasses.replace(pack_pairs(pairs), loss_weight=own)
    seen = backward(model, batch, LOSSES["sigmoid"], config, len(pairs))
    grads = [p.grad.clone() for p in model.module.parameters()]
    model.module.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for weight, pair in zip(own, pairs, strict=True):
        logp = model.logp(pack_pairs([pair])).logp.double()
        margin = (logp[1] - logp[2]) - (pair.ref_chosen - pair.ref_rejected)
        total = total + weight * torch.nn.functional.softplus(-config.beta * margin) / len(pairs)
    total.backward()
    for p, grad in zip(model.module.parameters(), grads, strict=True):
        assert (p.grad - grad).norm() <= 1e-6 * grad.norm()
    margin = seen.x.margin.double()
    torch.testing.assert_close(
        seen.loss.double(), own * torch.nn.functional.softplus(-config.beta * margin)
    )
    sigma = torch.sigmoid(-config.beta * margin)
    torch.testing.assert_close(seen.weight.double(), own * config.beta * sigma)


def test_weights_are_bounded_logged_and_recorded(balanced: Path, base: Config) -> None:
    logged = weights(balanced)
    assert len(logged) == 12
    for start in range(0, 12, 3):  # they change with an update, and with nothing else
        assert (logged[start : start + 3] == logged[start]).all()
    assert (logged[0] == 1).all() and np.abs(np.diff(logged[::3], axis=0)).max() > 0.05
    assert logged.min() >= 1 / 3 and logged.max() <= 3
    share = np.array([0.5, 0.5])  # as many pairs of each
    assert logged @ share == pytest.approx(1, abs=1e-9)

    trained = [r for r in read_records(balanced, "pairs").to_pylist() if r["split"] == "train"]
    for r in trained:
        own = logged[r["step"] - 1][NAMES.index(r["behavior"])]
        assert r["loss_weight"] == pytest.approx(own, rel=1e-6)
        plain = np.log1p(np.exp(-base.beta * r["margin"]))
        assert r["loss"] == pytest.approx(own * plain, rel=1e-5)
        sigma = 1 / (1 + np.exp(base.beta * r["margin"]))
        assert r["weight"] == pytest.approx(own * base.beta * sigma, rel=1e-5)
    for step, row in zip(range(1, 13), lines(balanced), strict=True):
        own_rows = [r["loss"] for r in trained if r["step"] == step]
        assert row["loss"] == pytest.approx(np.mean(own_rows), rel=1e-5)

    for r in read_records(balanced, "behaviors").to_pylist():
        at = max(r["step"], 1)
        assert r["loss_weight"] == logged[at - 1][NAMES.index(r["behavior"])]
    evaluated = [r for r in read_records(balanced, "pairs").to_pylist() if r["split"] != "train"]
    for r in evaluated:
        plain = np.log1p(np.exp(-base.beta * r["margin"]))
        assert r["loss_weight"] is None and r["loss"] == pytest.approx(plain, rel=1e-5)


def test_the_slower_behavior_gets_the_larger_weight(balanced: Path) -> None:
    rows = [r for r in read_records(balanced, "behaviors").to_pylist() if r["step"] == 12]
    margin = {r["behavior"]: r["margin"] for r in rows if r["split"] == "train_sample"}
    slower = min(margin, key=lambda name: margin[name])
    assert weights(balanced)[-1][NAMES.index(slower)] > 1


def test_resumed_equals_straight(base: Config, balanced: Path, tmp_path: Path) -> None:
    """Stopped after 5 of 12 steps, in the midst of a window of 3."""
    folder = tmp_path / "run"
    shutil.copytree(balanced, folder)
    for later in (10, 12):
        shutil.rmtree(folder / f"checkpoint-{later}")
    (folder / "model.safetensors").unlink()
    resumed = run(base, folder)
    assert same_bits(balanced, resumed)
    assert (resumed / "metrics.jsonl").read_bytes() == (balanced / "metrics.jsonl").read_bytes()
    for table in ("pairs", "steps", "behaviors"):
        assert read_records(resumed, table).equals(read_records(balanced, table)), table


def test_rates_are_those_of_the_rate_sample(base: Config, tmp_path: Path) -> None:
    """Weights by rates follow from what the records say of the rate sample, step by step; resumed
    in the midst of a window or not."""
    changes: dict[str, Any] = {
        "balance": "rates", "balance_every": 4, "track": "sketch", "rate_every": 2,
        "rate_pairs": 5, "eval_steps": 0,
    }  # fmt: skip
    folder = run(base, tmp_path / "run", **changes)
    rows = [r for r in read_records(folder, "behaviors").to_pylist() if r["split"] == "rate_sample"]
    at = {(r["step"], r["behavior"]): r for r in rows}
    own = ShareController(np.full(2, 0.5), np.full(2, 0.5), gain=0.5, lead=0.0, limit=3.0)
    first = [at[1, n]["margin"] - at[1, n]["rate_obs"] for n in NAMES]
    then = np.array(first)
    assert then == pytest.approx(0, abs=1e-5)  # before training
    logged = weights(folder)
    for step in (4, 8):
        now = np.array([at[step, n]["margin"] for n in NAMES])
        own.update((now - then) / 4, np.array([at[step, n]["rate_obs_error"] for n in NAMES]))
        then = now
        assert (logged[step : step + 4] == own.weights).all()
        assert at[step + 2, "polite"]["loss_weight"] == own.weights[1]
    assert np.ptp(logged[-1]) > 0.05

    for later in (10, 12):
        shutil.rmtree(folder / f"checkpoint-{later}")
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    resumed = load_file(run(base, folder, **changes) / "model.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert (weights(folder) == logged).all()


def test_micro_batches_are_invisible(base: Config, balanced: Path, tmp_path: Path) -> None:
    cut = run(base, tmp_path / "run", max_tokens_per_microbatch=200)
    assert min(read_records(cut, "steps")["micro_batches"].to_pylist()) >= 2
    np.testing.assert_allclose(weights(cut), weights(balanced), rtol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_share": "agress=0.5"}, "behavior 'agress'. Did you mean 'agrees'"),
        ({"target_share": "agrees=0.5,polite=0.4"}, "sum to 0.9, not to 1"),
        ({"target_share": "agrees=-0.5"}, "agrees: expected a share, 0 < value <= 1, got -0.5"),
        ({"target_share": "agrees=lots"}, "agrees: expected a share, 0 < value <= 1, got 'lots'"),
        ({"loss_type": "aot"}, "is one of sorted pairs of several behaviors"),
        ({"loss_type": "simpo"}, "loss_type simpo has none; set balance: rates"),
        ({"balance": "rates"}, "got record: true, track: head"),
        ({"balance": "rates", "track": "sketch", "record": "false"}, "got record: false"),
        ({"balance": "rates", "track": "sketch", "rate_every": "2"}, "a multiple of rate_every, 2"),
        (
            {"balance": "rates", "track": "sketch", "rate_every": "0"},
            "0 (never); got 3",
        ),
        ({"sync_ref_model": "true"}, "sync_ref_model moves what they are measured from"),
        ({"balance": "none"}, "balance_every: 3 is read with balance: margins or rates alone"),
        ({"balance_limit": "1"}, "balance_limit: expected more than 1"),
        ({"balance": "margin"}, "did you mean margins"),
    ],
)
def test_bad_input_is_named(
    base: Config,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, str],
    message: str,
) -> None:
    options = {
        "model_name_or_path": base.model_name_or_path,
        "dataset_name": base.dataset_name[0],
        "output_dir": str(tmp_path / "run"),
        "max_length": "96",
        "balance": "margins",
        "balance_every": "3",
    } | changes
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    assert main(["train", *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_balance_needs_company(base: Config, tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'polite' is the only one that is trained"):
        run(base, tmp_path / "run", dataset_name=(str(tiny_data / "polite.jsonl"),))
