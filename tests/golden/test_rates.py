"""Runs whose update rates are measured: the same weights, resumed or not, on one rank or two."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastpref.config import Config
from fastpref.data.dataset import load_dataset
from fastpref.dynamics.recorder import read_records
from fastpref.frozen import prefix_features
from fastpref.loading import load_model
from fastpref.theory.distinguish import behavior_statistics
from fastpref.theory.mixture import interaction, shares_at
from fastpref.theory.pairs import frozen_pairs
from fastpref.train import train
from tests.golden.test_ranks import run_on_two

STEPS, EVERY = 8, 3
MEASURED = [1, 3, 6]
TABLES = ("pairs", "steps", "behaviors", "gram")


@pytest.fixture(scope="module")
def base(tiny_config: Config) -> Config:
    return dataclasses.replace(
        tiny_config,
        max_length=96,
        max_tokens_per_microbatch=260,
        max_steps=STEPS,
        learning_rate=1e-3,
        logging_steps=2,
        eval_steps=4,
        eval_sample_size=6,
        save_steps=5,
        rate_every=EVERY,
        rate_pairs=4,
    )


def run(config: Config, folder: Path, **changes: Any) -> Path:
    return train(dataclasses.replace(config, output_dir=str(folder), **changes), progress=False)


@pytest.fixture(scope="module")
def plain(base: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(base, tmp_path_factory.mktemp("plain") / "run", record=False, track="none")


@pytest.fixture(scope="module", params=["sketch", "exact"])
def tracked(base: Config, request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(base, tmp_path_factory.mktemp(request.param) / "run", track=request.param)


def rows(folder: Path, table: str, **where: Any) -> list[dict[str, Any]]:
    found = read_records(folder, table).to_pylist()
    return [r for r in found if all(r[name] == value for name, value in where.items())]


def same_bits(a: Path, b: Path) -> bool:
    one, other = (load_file(folder / "model.safetensors") for folder in (a, b))
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_measuring_changes_no_bit(plain: Path, tracked: Path) -> None:
    assert same_bits(plain, tracked)


def test_what_is_recorded(tracked: Path) -> None:
    found = rows(tracked, "behaviors", split="rate_sample")
    assert sorted({r["step"] for r in found}) == MEASURED
    assert len(found) == 2 * len(MEASURED)
    lr = {r["step"]: r["lr"] for r in rows(tracked, "steps")}
    for step in MEASURED:
        own = [r for r in found if r["step"] == step]
        assert sum(r["share"] for r in own) == pytest.approx(1, abs=1e-12)
        assert all(r["n"] == 4 for r in own)
        gram = rows(tracked, "gram", step=step)
        for r in own:
            mine = [g["dot"] for g in gram if g["behavior"] == r["behavior"]]
            assert r["rate_pred_sgd"] == pytest.approx(lr[step] * math.fsum(mine), rel=1e-9)
        if lr[step] == 0:
            assert {r["rate_obs"] for r in own} == {r["rate_pred_opt"] for r in own} == {0.0}
    pairs = rows(tracked, "pairs", split="rate_sample")
    assert len(pairs) == 8 * len(MEASURED)
    for r in found:
        own = [p for p in pairs if (p["step"], p["behavior"]) == (r["step"], r["behavior"])]
        expected = np.mean([p["margin_change_predicted"] for p in own])
        assert r["margin"] == pytest.approx(np.mean([p["margin"] for p in own]), rel=1e-5)
        slack = 1e-4 * np.abs([p["margin_change_predicted"] for p in own]).max() + 1e-12
        if r["rate_pred_opt_error"] == 0:
            assert expected == pytest.approx(r["rate_pred_opt"], abs=slack)
    for r in rows(tracked, "steps"):
        assert (r["gradient_noise_scale_groups"] is not None) == (r["step"] in MEASURED)
        if r["step"] in MEASURED:
            assert (np.array(r["module_update_norm"]) > 0).all() == (r["step"] > 1)
    lines = [json.loads(line) for line in (tracked / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["split"] == "rate_sample"]
    assert [line["step"] for line in lines] == MEASURED
    for line in lines:
        for r in found:
            if r["step"] == line["step"]:
                assert line[f"behavior/{r['behavior']}/update_rate"] == r["rate_obs"]


def test_predictions_are_what_happened(tracked: Path) -> None:
    """In float32, at a learning rate that trains: as near as the first order is."""
    for r in rows(tracked, "behaviors", split="rate_sample"):
        apart = abs(r["rate_obs"] - r["rate_pred_opt"])
        assert apart <= 0.3 * abs(r["rate_obs"]) + 4 * r["rate_pred_opt_error"] + 1e-5


def test_module_update_norms_are_those_of_the_weights(base: Config, tracked: Path) -> None:
    """The last measured step's, by the sketch, against the checkpoint of a run that ends there."""
    start = load_file(Path(base.model_name_or_path) / "model.safetensors")
    (row,) = rows(tracked, "steps", step=6)
    config = (tracked / "config.yaml").read_text()
    mode = "exact" if "track: exact" in config else "sketch"
    short = run(base, tracked.parent / "six", track=mode, max_steps=6, lr_scheduler_type="constant")
    now = load_file(short / "model.safetensors")
    (row,) = rows(short, "steps", step=6)
    moved = math.sqrt(sum(float((now[n].double() - start[n]).square().sum()) for n in now))
    value = math.sqrt(sum(v * v for v in row["module_update_norm"]))
    error = math.sqrt(
        sum((v * e) ** 2 for v, e in zip(
            row["module_update_norm"], row["module_update_norm_error"], strict=True))
    ) / value  # fmt: skip
    assert abs(value - moved) < 4 * error
    assert error < 0.3 * moved


def test_flips_and_forgetting_are_those_of_the_pairs(tracked: Path) -> None:
    pairs = rows(tracked, "pairs")
    for split in ("train_sample", "eval"):
        before: dict[int, dict[str, Any]] = {}
        for step in (0, 4, 8):
            own = [p for p in pairs if (p["split"], p["step"]) == (split, step)]
            for r in rows(tracked, "behaviors", split=split, step=step):
                mine = [p for p in own if p["behavior"] == r["behavior"]]
                if step == 0:
                    assert r["flips"] is None and r["forgotten"] is None
                    continue
                then = [before[p["pair_id"]] for p in mine]
                flips = sum(
                    p["output_accuracy"] != q["output_accuracy"]
                    for p, q in zip(mine, then, strict=True)
                )
                lost = sum(q["margin"] > 0 >= p["margin"] for p, q in zip(mine, then, strict=True))
                assert (r["flips"], r["forgotten"]) == (flips, lost)
            before = {p["pair_id"]: p for p in own}
    turned = rows(tracked, "behaviors", behavior="agrees", split="eval")
    angles = [r["boundary_rotation"] for r in sorted(turned, key=lambda r: r["step"])]
    assert angles[0] == 0 and 0 < angles[1] < angles[2] < 0.5


def test_resumed_equals_straight(base: Config, tracked: Path, tmp_path: Path) -> None:
    config = (tracked / "config.yaml").read_text()
    mode = "exact" if "track: exact" in config else "sketch"
    folder = run(base, tmp_path / "run", track=mode)
    for later in folder.glob(f"checkpoint-{STEPS}/*"):
        later.unlink()
    (folder / f"checkpoint-{STEPS}").rmdir()
    (folder / "model.safetensors").unlink()
    resumed = run(base, folder, track=mode)
    assert same_bits(tracked, resumed)
    for table in TABLES:
        assert read_records(resumed, table).equals(read_records(tracked, table)), table
    assert (resumed / "metrics.jsonl").read_bytes() == (tracked / "metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_two_ranks_measure_what_one_does(base: Config, tracked: Path, tmp_path: Path) -> None:
    config = (tracked / "config.yaml").read_text()
    mode = "exact" if "track: exact" in config else "sketch"
    changed = {
        f.name: str(getattr(base, f.name))
        for f in dataclasses.fields(Config)
        if getattr(base, f.name) != f.default and f.name != "dataset_name"
    }
    two = tmp_path / "two"
    run_on_two({**changed, "dataset_name": base.dataset_name[0], "track": mode}, two)
    for table, keys in (("behaviors", ("split", "behavior")), ("gram", ("behavior", "other"))):
        sides = []
        for folder in (tracked, two):
            own = [r for r in rows(folder, table) if r["step"] in MEASURED]
            own = [r for r in own if r.get("split", "rate_sample") == "rate_sample"]
            sides.append({(r["step"], *(r[k] for k in keys)): r for r in own})
        assert sides[0].keys() == sides[1].keys() and len(sides[0])
        for key, one in sides[0].items():
            for name, value in one.items():
                other = sides[1][key][name]
                if isinstance(value, float):
                    scale = max(abs(r[name] or 0) for r in sides[0].values())
                    assert other == pytest.approx(value, rel=0.02, abs=2e-3 * scale), name
                else:
                    assert other == value, name
    ranks = {r["rank"] for r in rows(two, "pairs", split="rate_sample")}
    assert ranks == {0, 1}


@pytest.mark.parametrize("mode", ["sketch", "exact"])
def test_the_theory_says_the_same_where_it_is_exact(
    tiny_model_dir: Path, personas: Path, tmp_path: Path, mode: str
) -> None:
    """Frozen features, one-token answers, a step of all pairs, SGD: docs/theory.md E12, 17, 18."""
    config = Config(
        model_name_or_path=str(tiny_model_dir),
        dataset_name=(str(personas),),
        trainable="head",
        append_eos="false",
        dtype="float64",
        optim="sgd",
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        warmup_ratio=0.0,
        eval_steps=0,
        eval_fraction=0.1,
        max_length=128,
        ref_cache_dir=str(tmp_path / "reference"),
        feature_cache_dir=str(tmp_path / "features"),
        train_batch_size=54,
        rate_pairs=100,  # all there are
        max_steps=1,
        learning_rate=1e-3,
        track=mode,
        output_dir=str(tmp_path / "run"),
    )
    folder = train(config, progress=False)
    model = load_model(config)
    dataset = load_dataset(config, model.tokenizer)
    assert len(dataset.train) == config.train_batch_size
    features = prefix_features(model, dataset.train, max_tokens=4096)
    columns = [[getattr(p, name) for p in dataset.train] for name in ("chosen", "rejected")]
    pairs = frozen_pairs(
        features,
        *(np.array([int(c[0]) for c in column]) for column in columns),
        np.array([p.behavior for p in dataset.train]),
        behaviors=dataset.behaviors,
    )
    gamma = interaction(pairs, np.zeros(len(features)), config.beta)
    share = shares_at(pairs, np.zeros(len(features)), config.beta)
    for row in rows(folder, "gram"):
        at = [dataset.behaviors.index(row[name]) for name in ("behavior", "other")]
        assert abs(row["dot"] - gamma[*at]) < 4 * row["dot_error"]
    for row in rows(folder, "behaviors", split="rate_sample"):
        k = dataset.behaviors.index(row["behavior"])
        rate = config.learning_rate * gamma[k].sum()
        assert row["rate_obs"] == pytest.approx(rate, rel=0.02)
        assert abs(row["rate_pred_sgd"] - rate) < 4 * row["rate_pred_sgd_error"]
        assert abs(row["share"] - share[k]) < 4 * row["share_error"]
        slack = 1e-6 * abs(rate) if mode == "exact" else 4 * row["rate_pred_opt_error"]
        assert abs(row["rate_pred_opt"] - rate) < slack
        # (E12) is of the pairs at hand, whose mean is too long by their scatter within an answer.
        coherence, own = behavior_statistics(pairs)[k].coherence, pairs.behavior == k
        square = (features[own] ** 2).sum(axis=1).mean()
        for answer in set(pairs.chosen[own]):
            side = features[own & (pairs.chosen == answer)]
            part = len(side) / own.sum()
            coherence -= part**2 * side.var(axis=0, ddof=1).sum() / len(side) / square
        assert row["coherence"] == pytest.approx(coherence, abs=4 * row["coherence_error"])
