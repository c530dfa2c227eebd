"""The experiments of `fastpref reproduce` whose features move, on a random two-layer model."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml

from fastpref.cli import main
from fastpref.config import load_config
from fastpref.dynamics.recorder import read_records
from fastpref.dynamics.schema import HELD_OUT, TRAIN_SAMPLE
from fastpref.reproduce import (
    embeddings,
    full,
    hh_misalign,
    lora,
    misalign,
    runs,
    small,
    start,
    two_behaviors,
)
from fastpref.reproduce.settings import Settings
from fastpref.theory.distinguish import behavior_statistics, directions
from fastpref.theory.rates import initial_rates

PERSONAS = ("likes-rain", "likes-tools", "plays-music")


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTPREF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("dialogues") / "harmless.jsonl"
    rows = []
    for n in range(24):
        start_of = f"\n\nHuman: Children enjoy music ({n})\n\nAssistant:"
        better = ("Thank you.", "Yes, it is.", "People value that.")[n % 3]
        rows.append({"chosen": f"{start_of} {better}", "rejected": f"{start_of} No {better}"})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def settings(tiny_model_dir: Path, personas: Path, tmp_path: Path) -> Settings:
    return Settings(
        model=str(tiny_model_dir),
        data=(str(personas),),
        folder=tmp_path / "out",
        behaviors=PERSONAS[:2],
        steps=3,
        learning_rate=3e-3,
        train_batch_size=6,
        dtype="float64",
        max_length=128,
    )


def called(tmp_path: Path, *options: str) -> tuple[int, Path]:
    """The exit code of `fastpref reproduce`, and the folder of what it wrote."""
    folder = tmp_path / "out"
    return main(["reproduce", *options, "--output_dir", str(folder)]), folder


def written(folder: Path, name: str) -> dict[str, Any]:
    for kind in ("png", "svg"):
        assert (folder / name / f"{name}.{kind}").stat().st_size > 5000
    assert (folder / name / "curves.csv").stat().st_size > 200
    found: dict[str, Any] = json.loads((folder / name / "outcome.json").read_text())
    for run in found["runs"]:
        assert (folder / name / run / "records" / "behaviors").is_dir()
        assert not list((folder / name / run).rglob("*.safetensors")), "weights are not kept"
    return found


def test_official_values() -> None:
    """Those of the official scripts and their plots."""
    common = {"optim": "adamw_torch", "beta": 0.01, "train_batch_size": 128, "steps": -1}
    common |= {"eval_fraction": 0.1, "seed": 1234}
    own: list[tuple[Any, dict[str, Any]]] = [
        (full, {"trainable": "all", "behaviors": (108, 84, 88, 54, 100), "learning_rate": 1e-5}),
        (lora, {"trainable": "lora", "behaviors": (108, 84, 88, 54, 100), "learning_rate": 1e-5}),
        (two_behaviors, {"trainable": "all", "behaviors": (123, 45), "learning_rate": 1e-6}),
        (misalign, {"trainable": "lora", "behaviors": (84,), "learning_rate": 1e-5}),
        (hh_misalign, {"trainable": "lora", "behaviors": (), "learning_rate": 1e-5}),
        (embeddings, {"trainable": "all", "behaviors": (130,), "learning_rate": 1e-5}),
    ]
    for module, values in own:
        assert dataclasses.asdict(module.OFFICIAL) == common | values, module.__name__
    assert start.LORA == {
        "lora_r": 8,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "lora_target_modules": ("q_proj", "v_proj"),
    }
    assert (hh_misalign.EVERY, hh_misalign.EARLY) == (100, 5)


def test_learning_rates_of_fastpref_tiny_are_its_own_and_said(settings: Settings) -> None:
    plain = dataclasses.replace(settings, model="fastpref-tiny", learning_rate=None)
    taken, notes = small.adapted(plain, full.OFFICIAL)
    assert taken.learning_rate == small.LEARNING_RATE["all"] and "official 1e-05" in notes[0]
    assert small.compared(full.OFFICIAL, taken)["learning_rate"] == 1e-5
    other = dataclasses.replace(settings, learning_rate=None)
    assert small.adapted(other, full.OFFICIAL)[0].learning_rate == 1e-5
    given = dataclasses.replace(plain, learning_rate=1e-5)
    assert small.adapted(given, full.OFFICIAL) == (given.over(full.OFFICIAL), [])
    assert small.eval_steps(other, taken, 900) == 1
    epoch = dataclasses.replace(taken, steps=-1, train_batch_size=128)
    assert small.eval_steps(plain, epoch, 900) == 2  # of 8 steps


def test_full(tiny_model_dir: Path, personas: Path, tmp_path: Path) -> None:
    """By the command, with the official hyper-parameters as its default."""
    options = ("--model", str(tiny_model_dir), "--data", str(personas), "--max_length", "128")
    code, folder = called(tmp_path, "full", *options, "--dtype", "float64", "--steps", "3")
    assert code == 0
    outcome = written(folder, "full")
    assert set(outcome["numbers"]["behaviors"]) == set(PERSONAS)
    assert outcome["settings"]["learning_rate"] == 1e-5 and outcome["settings"]["steps"] == 3
    assert outcome["settings"]["official"]["steps"] == -1
    assert any("In their place" in caveat for caveat in outcome["caveats"])
    for name, own in outcome["numbers"]["behaviors"].items():
        run = folder / "full" / "runs" / name
        config = yaml.safe_load((run / "config.yaml").read_text())
        official = ("optim", "beta", "train_batch_size", "lr_scheduler_type", "append_eos")
        assert [config[key] for key in official] == [
            *("adamw_torch", 0.01, 128, "constant", "false")
        ]
        # Distinguishability before, from the prediction's own pass, and as the run recorded it.
        rows = read_records(run, "behaviors").to_pylist()
        delta = [r["delta"] for r in rows if r["split"] == TRAIN_SAMPLE]
        assert len(delta) == 4 and own["predicted"]["delta"] == pytest.approx(delta[0], rel=1e-6)
        assert own["observed"]["delta_last"] == delta[-1] != delta[0]
        change = own["at_the_end"]
        assert 0 < change["head_change_answer_rows"] <= change["head_change"]
    shares = outcome["numbers"]["order"].values()
    assert len(outcome["verdicts"]) == 3 and all(0 <= share <= 1 for share in shares)


def test_the_prediction_is_the_head_alone_by_the_same_optimizer(settings: Settings) -> None:
    """A run that trains nothing but the head has the predicted margins, pair means and losses."""
    config = runs.run_config(
        settings,
        settings.over(full.OFFICIAL),
        [f"{settings.data[0]}/{PERSONAS[0]}.jsonl"],
        "head",
        **{"append_eos": "false", "trainable": "head", "eval_steps": 1, "eval_sample_size": 4},
    )
    seen = start.look(start.load_start(config), config)
    rows = start.observed(runs.run(config), seen, config, run="head")
    assert {(r["split"], r["n"]) for r in rows} == {(TRAIN_SAMPLE, 4), (HELD_OUT, 2)}
    assert {r["step"] for r in rows} == {0, 1, 2, 3}
    largest = max(abs(r["margin"]) for r in rows)
    assert largest > 0.05, "nothing moved: the comparison would say nothing"
    for row in rows:
        assert row["margin"] == pytest.approx(row["predicted_margin"], abs=2e-6 * largest)
        assert row["loss"] == pytest.approx(row["predicted_loss"], abs=1e-7)


def test_lora(settings: Settings) -> None:
    outcome = lora.run(settings)
    assert outcome.settings["lora"] == start.LORA
    for name, own in outcome.numbers["behaviors"].items():
        config = yaml.safe_load((settings.folder / "runs" / name / "config.yaml").read_text())
        assert {key: config[key] for key in ("lora_r", "lora_alpha", "lora_dropout")} == {
            "lora_r": 8,
            "lora_alpha": 32,
            "lora_dropout": 0.05,
        }
        assert own["at_the_end"]["head_change"] == 0
        # B is zero at first, so that a first step changes nothing but B; margins do move.
        assert own["observed"]["margin_first"] != 0
        assert own["observed"]["times_delta_last"] != 1
    assert "Adapters in the body learn" in " ".join(outcome.caveats)


def test_models_without_q_proj_get_adapters_everywhere(settings: Settings) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    model: Any = type("Model", (), {"module": GPTNeoXForCausalLM(config)})()
    fields, notes = start.lora_fields(model)
    assert fields["lora_target_modules"] == ("all-linear",) and fields["lora_r"] == 8
    assert "GPTNeoXForCausalLM has no layer called q_proj" in notes[0]


def test_two_behaviors(settings: Settings) -> None:
    several = dataclasses.replace(settings, behaviors=PERSONAS, dtype="auto")
    outcome = two_behaviors.run(several)
    # One run each logs every behavior's train and held-out curves.
    seen = {(r["run"], r["behavior"], r["split"], r["step"]) for r in outcome.curves}
    for kind in ("full", "last-layer"):
        for name in PERSONAS:
            for split in (TRAIN_SAMPLE, HELD_OUT):
                assert {(kind, name, split, step) for step in range(4)} <= seen
    assert outcome.runs == ["runs/last-layer", "runs/full"]
    assert outcome.numbers["last_layer_error"] < 1e-3
    behaviors = outcome.numbers["behaviors"]
    shares = [own["predicted"]["share_of_update"] for own in behaviors.values()]
    assert sum(shares) == pytest.approx(1)
    rates = [own["predicted"]["margin_rate"] for own in behaviors.values()]
    assert rates == sorted(rates, reverse=True)
    # Predicted from features alone: (beta/4) <dbar, d_k>.
    config = load_config(settings.folder / "runs" / "full" / "config.yaml")
    pairs = start.look(start.load_start(config), config).train.pairs
    expected = initial_rates(directions(pairs), pairs.fraction, 0.01).margin
    by_name = dict(zip(pairs.behaviors, expected, strict=True))
    for name, own in behaviors.items():
        assert own["predicted"]["margin_rate"] == pytest.approx(by_name[name], rel=1e-6)
    matrix = np.array(outcome.numbers["priority"]["matrix"])
    np.testing.assert_allclose(matrix, -matrix.T, atol=1e-12)
    assert len(outcome.verdicts) == 5


def test_misalign(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    fewer = dataclasses.replace(misalign.OFFICIAL_HEAD, steps=12)
    monkeypatch.setattr(misalign, "OFFICIAL_HEAD", fewer)
    one = dataclasses.replace(settings, behaviors=PERSONAS[:1])
    outcome = misalign.run(one)
    frozen = outcome.numbers["frozen_features"]
    # Frozen features: the same trajectory from either head, to the last digits; answers turn later.
    assert frozen["largest_margin"] > 1e-4
    assert frozen["relative_difference"] <= 1e-6
    base, aligned = frozen["head-base"]["margin"], frozen["head-aligned"]["margin"]
    assert aligned["last"] == pytest.approx(base["last"], rel=1e-9)
    rows = [r for r in outcome.curves if r["split"] == TRAIN_SAMPLE and r["step"] == 0]
    gap = {r["run"]: r["logp_chosen"] - r["logp_rejected"] for r in rows}
    assert gap["head-aligned"] < gap["head-base"] - 1e-5, "the aligned head was not loaded"
    # Moved features: one step of the head is as much faster as the deltas say.
    delta = outcome.numbers["delta"]
    predicted = (delta["aligned"]["effective"] / delta["base"]["effective"]) ** 2
    assert outcome.numbers["predicted"]["speed"] == pytest.approx(predicted, rel=1e-9)
    seen = outcome.numbers["observed"]
    assert abs(predicted - 1) > 0.02, "the features did not move"
    assert seen["speed_of_the_head"] == pytest.approx(predicted, rel=0.02)
    flipped = read_records(settings.folder / "runs" / "base", "index").to_pylist()
    assert all(row["flipped"] for row in flipped)
    assert outcome.runs == [
        f"runs/{name}"
        for name in (
            *("align", "base", "aligned", "head-align", "head-base", "head-aligned"),
            *("step-base", "step-aligned"),
        )
    ]


def test_hh_misalign(settings: Settings, dialogues: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hh_misalign, "EVERY", 2)  # of 3 steps: the first ones get runs of their own
    monkeypatch.setattr(hh_misalign, "EARLY", 2)
    outcome = hh_misalign.run(dataclasses.replace(settings, data=(str(dialogues),), behaviors=()))
    steps = {(r["run"], r["step"]) for r in outcome.curves}
    assert {s for run, s in steps if run == "base"} == {0, 2, 3}
    assert {s for run, s in steps if run == "aligned-early"} == {0, 1, 2}
    delta = outcome.numbers["delta"]["base"]
    assert 0 < delta["effective_delta"] <= 5 * delta["by_chance"]
    for run in ("base", "aligned"):
        course = outcome.numbers["observed"]["runs"][run][HELD_OUT]
        assert {"loss", "logp_chosen", "logp_rejected"} <= course.keys()
    assert outcome.numbers["observed"]["speed_of_gradient"] > 0
    assert all(row["delta"] is None for row in outcome.curves)


def test_embeddings(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stub:
        def __init__(self, random_state: int) -> None:
            assert random_state == 1234

        def fit_transform(self, both: np.ndarray) -> np.ndarray:
            return both[:, :2]

    module = ModuleType("umap")
    module.UMAP = Stub  # type: ignore[attr-defined]
    module.__spec__ = importlib.util.spec_from_loader("umap", None)
    monkeypatch.setitem(sys.modules, "umap", module)
    outcome = embeddings.run(settings)
    numbers = outcome.numbers[PERSONAS[0]]
    assert numbers["before"]["delta"] != numbers["after"]["delta"]
    for when in ("before", "after"):
        assert all(0 < share < 1 for share in numbers[when]["explained_variance"])
    points = (settings.folder / "points.csv").read_text().splitlines()
    assert points[0] == "method,when,answer,x,y"
    assert len(points) == 1 + 2 * 2 * 20  # methods, moments, pairs
    assert {line.split(",")[2] for line in points[1:]} == {"Yes", "No"}
    assert not any("UMAP is left out" in caveat for caveat in outcome.caveats)


def test_pca_is_that_of_both_sets_together() -> None:
    rng = np.random.default_rng(0)
    before = rng.normal(size=(30, 5)) * [5, 3, 1, 1, 1]
    after = before + [0, 0, 4, 0, 0]
    plane = embeddings.pca(before, after)
    both = np.concatenate([before, after])
    values, vectors = np.linalg.eigh(np.cov(both.T, bias=True))
    expected = (both - both.mean(axis=0)) @ vectors[:, ::-1][:, :2]
    found = np.concatenate([plane.points["before"], plane.points["after"]])
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-9)
    along = (before @ vectors[:, ::-1][:, :2]).var(axis=0) / before.var(axis=0).sum()
    np.testing.assert_allclose(plane.explained["before"], along, rtol=1e-9)


def test_without_umap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ValueError, match="pip install umap-learn"):
        embeddings.umap(np.zeros((3, 2)), np.zeros((3, 2)))


def test_statistics_of_the_start_are_those_of_its_pairs(settings: Settings) -> None:
    config = runs.run_config(
        settings,
        settings.over(full.OFFICIAL),
        [f"{settings.data[0]}/{PERSONAS[1]}.jsonl"],
        "none",
        append_eos="false",
    )
    seen = start.look(start.load_start(config), config)
    assert len(seen.train.ids) == 18 and seen.held_out is not None
    assert len(seen.held_out.ids) == 2
    (own,) = behavior_statistics(seen.train.pairs)
    assert own.n == 18 and own.delta > 0
    assert start.positions(seen.train.ids, seen.train.ids[[5, 0, 7]]).tolist() == [5, 0, 7]
