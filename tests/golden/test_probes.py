"""A run that follows probes: against plain float64 forwards of full logits, and beside one that
follows none; resumed; from a file; in micro-batches; on two ranks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastpref.config import Config
from fastpref.data.dataset import load_dataset
from fastpref.dynamics.recorder import read_records
from fastpref.train import train
from tests.golden.test_ranks import run_on_two

TYPES = (
    "chosen",
    "rejected",
    "initial",
    "irr_train",
    "irr_test",
    "random_permute",
    "random_tokens",
)
PROMPTS = 12


@pytest.fixture(scope="module")
def base(tiny_config: Config) -> Config:
    return dataclasses.replace(
        tiny_config,
        dtype="float64",
        max_length=44,
        max_steps=8,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        warmup_steps=0,
        logging_steps=4,
        eval_steps=0,
        save_steps=5,
        probe_every=3,
        probe_prompts=PROMPTS,
        probe_types=TYPES,
    )


@pytest.fixture(scope="module")
def straight(base: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(base, tmp_path_factory.mktemp("straight") / "run")


def run(config: Config, folder: Path, **changes: Any) -> Path:
    return train(dataclasses.replace(config, output_dir=str(folder), **changes), progress=False)


def same_bits(a: Path, b: Path) -> bool:
    one, other = (load_file(folder / "model.safetensors") for folder in (a, b))
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def rows(folder: Path, table: str = "probes") -> list[dict[str, Any]]:
    return read_records(folder, table).to_pylist()


def lines(folder: Path) -> list[dict[str, Any]]:
    every = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in every if line["split"] == "probes"]


def prompts_of(base: Config, tokenizer: Any) -> dict[int, np.ndarray]:
    return {pair.pair_id: pair.prompt for pair in load_dataset(base, tokenizer).train}


@torch.no_grad()
def plain_logp(module: Any, prompt: np.ndarray, response: list[int]) -> Tensor:
    """(scored, V) log-softmax of one sequence's own forward, in float64."""
    ids = torch.tensor([[*prompt.tolist(), *response]])
    return module(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize("which", ["first", "last"])
def test_records_equal_plain_forwards_of_full_logits(
    which: str, straight: Path, base: Config, tiny_model_dir: Path, tiny_tokenizer: Any
) -> None:
    from transformers import AutoModelForCausalLM

    first = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float64)
    trained = AutoModelForCausalLM.from_pretrained(straight, dtype=torch.float64)
    module = first if which == "first" else trained
    step = 0 if which == "first" else base.max_steps
    prompts = prompts_of(base, tiny_tokenizer)
    index = {r["probe_id"]: r for r in rows(straight, "probe_index")}
    own = [r for r in rows(straight) if r["step"] == step]
    assert len(own) == len(index) > 5 * PROMPTS
    for row in own:
        prompt, response = prompts[row["prompt_id"]], index[row["probe_id"]]["response"]
        logp = plain_logp(module, prompt, response)
        target = torch.tensor(response)[:, None]
        prob, at_target = logp.exp(), logp.gather(1, target)[:, 0]
        one_hot = torch.zeros_like(prob).scatter_(1, target, 1.0)
        a = torch.eye(logp.shape[1], dtype=torch.float64) - prob[:, None, :]  # I - 1 p^T
        before = plain_logp(first, prompt, response).argmax(1)
        expected = {
            "tokens": len(response),
            "logp": at_target.sum(),
            "argmax_logp": logp.amax(1).sum(),
            "argmax_changed": (logp.argmax(1) != before).double().mean(),
            "entropy": -(prob * logp).sum(1).mean(),
            "sum_sq_prob": prob.square().sum(1).mean(),
            "log1m_pmax": torch.log1p(-prob.amax(1)).mean(),
            "energy": (1 - at_target.exp()).mean(),
            "residual": (prob - one_hot).norm(dim=1).mean(),
            "a_norm": torch.linalg.matrix_norm(a).mean(),
        }
        for name, value in expected.items():
            # Records are float32; transformers computes norms and angles in float32.
            assert row[name] == pytest.approx(float(value), rel=2e-6, abs=1e-6), name
        assert row["argmax_id"] == logp.argmax(1).tolist()
    if which == "last":
        assert sum(row["argmax_changed"] for row in own) > 1


def test_what_is_probed(straight: Path, base: Config, tiny_tokenizer: Any) -> None:
    dataset = load_dataset(base, tiny_tokenizer)
    pairs = {pair.pair_id: pair for pair in dataset.train}
    index = rows(straight, "probe_index")
    prompts = {r["prompt_id"] for r in index}
    assert len(prompts) == PROMPTS and prompts <= pairs.keys()
    behaviors = [dataset.behaviors[pairs[i].behavior] for i in prompts]
    assert behaviors.count("agrees") == behaviors.count("polite") == PROMPTS // 2
    by_type: dict[str, list[dict[str, Any]]] = {kind: [] for kind in TYPES}
    for row in index:
        by_type[row["response_type"]].append(row)
    for kind in ("chosen", "rejected", "initial"):
        assert len(by_type[kind]) == PROMPTS
    train = {tuple(pair.chosen.tolist()) for pair in dataset.train}
    held = {tuple(pair.chosen.tolist()) for pair in dataset.held_out}
    for kind, own in by_type.items():
        assert own, kind
        for row in own:
            pair, response = pairs[row["prompt_id"]], row["response"]
            assert row["behavior"] == dataset.behaviors[pair.behavior]
            assert row["prompt_len"] == len(pair.prompt)
            assert row["text"] == tiny_tokenizer.decode(response)
            assert len(pair.prompt) + len(response) <= base.max_length
            sides = [pair.chosen.tolist(), pair.rejected.tolist()]
            if kind in ("chosen", "rejected"):
                assert response == sides[kind == "rejected"]
            elif kind != "initial":
                assert response not in sides
            if kind == "random_permute":
                assert sorted(response) == sorted(sides[0]) and len(response) > 2
                assert (response[-1] == tiny_tokenizer.eos_token_id) == (
                    sides[0][-1] == tiny_tokenizer.eos_token_id
                )
            if kind == "random_tokens":
                assert len(response) == len(sides[0])
            if kind in ("irr_train", "irr_test"):
                starts = train if kind == "irr_train" else held
                assert any(start[: len(response)] == tuple(response) for start in starts)


def test_initial_answers_are_the_first_models_likeliest_tokens(
    straight: Path, base: Config, tiny_model_dir: Path, tiny_tokenizer: Any
) -> None:
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float64)
    prompts = prompts_of(base, tiny_tokenizer)
    pairs = {pair.pair_id: pair for pair in load_dataset(base, tiny_tokenizer).train}
    for row in rows(straight, "probe_index"):
        if row["response_type"] == "initial":
            response = row["response"]
            logp = plain_logp(module, prompts[row["prompt_id"]], response)
            assert response == logp.argmax(1).tolist()
            pair = pairs[row["prompt_id"]]
            longest = max(len(pair.chosen), len(pair.rejected))
            assert len(response) == longest or (
                len(response) < longest and response[-1] == tiny_tokenizer.eos_token_id
            )
            assert tiny_tokenizer.eos_token_id not in response[:-1]


def test_metrics_are_means_of_the_records(straight: Path, base: Config) -> None:
    shown, recorded = lines(straight), rows(straight)
    assert [line["step"] for line in shown] == [0, 3, 6, 8]
    assert {row["step"] for row in recorded} == {0, 3, 6, 8}
    for line in shown:
        for kind in TYPES:
            own = [r for r in recorded if (r["step"], r["response_type"]) == (line["step"], kind)]
            for name in ("logp", "argmax_logp", "entropy", "log1m_pmax", "energy"):
                mean = np.mean([r[name] for r in own])
                assert line[f"{kind}/{name}"] == pytest.approx(mean, rel=1e-5)
    changes = {(r["step"], r["behavior"]): r for r in rows(straight, "squeezing")}
    assert changes.keys() == {(s, b) for s in (3, 6, 8) for b in ("agrees", "polite")}
    total = 0
    for before, line in zip(shown, shown[1:], strict=False):
        for name in ("agrees", "polite"):
            row = changes[line["step"], name]
            for kind, column in (
                ("chosen", "logp"),
                ("rejected", "logp"),
                ("chosen", "argmax_logp"),
            ):
                means = [
                    np.mean(
                        [
                            r[column]
                            for r in recorded
                            if (r["step"], r["response_type"], r["behavior"]) == (s, kind, name)
                        ]
                    )
                    for s in (before["step"], line["step"])
                ]
                ours = row["argmax" if column == "argmax_logp" else kind]
                assert ours == pytest.approx(means[1] - means[0], abs=2e-5)
            alarm = row["argmax"] > 0 and row["chosen"] < 0 and row["rejected"] < 0
            assert row["alarm"] == alarm == bool(line[f"behavior/{name}/squeezing"])
            total += alarm
        assert line["squeezing_total"] == total


def test_training_is_the_same_bits_without_probes(
    straight: Path, base: Config, tmp_path: Path
) -> None:
    without = run(base, tmp_path / "without", probe_every=0)
    assert same_bits(straight, without)
    names = [p.name for p in (without / "records").iterdir()]
    assert "probes" not in names and "probe_index" not in names


@pytest.mark.parametrize("stop", [3, 4])
def test_a_resumed_run_is_the_straight_one(
    stop: int, straight: Path, base: Config, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    run(base, folder, max_steps=stop, save_steps=5)
    # The end of the shorter run is an evaluation that the straight one has not, at step 4.
    run(base, folder)
    assert same_bits(straight, folder)
    for table in ("probes", "probe_index", "squeezing"):
        if stop == 3 or table == "probe_index":
            assert rows(folder, table) == rows(straight, table)
    if stop == 3:
        assert lines(folder) == lines(straight)
    else:
        kept = [r for r in rows(folder) if r["step"] != 4]
        assert kept == rows(straight)


def test_small_micro_batches_score_the_same(straight: Path, base: Config, tmp_path: Path) -> None:
    small = run(base, tmp_path / "small", max_tokens_per_microbatch=90, max_steps=1)
    ours = {r["probe_id"]: r for r in rows(small) if r["step"] == 0}
    theirs = {r["probe_id"]: r for r in rows(straight) if r["step"] == 0}
    assert ours.keys() == theirs.keys()
    for probe_id, row in ours.items():
        for name, value in row.items():
            other = theirs[probe_id][name]
            close = isinstance(value, float)
            assert value == (pytest.approx(other, rel=1e-6) if close else other), name


def test_influence_in_a_run(straight: Path, base: Config, tmp_path: Path) -> None:
    """Every row there, the same weights, and a resumed run has the same rows."""
    changes: dict[str, Any] = {"probe_influence": True, "track": "sketch", "track_every": 4}
    folder = run(base, tmp_path / "run", **changes)
    assert same_bits(straight, folder)
    assert rows(folder) == rows(straight)
    found = rows(folder, "influence")
    assert {r["step"] for r in found} == {3, 6}  # those of probe_every; 8 is only the last step
    trained = {
        s: {r["behavior"] for r in rows(folder, "pairs") if (r["step"], r["split"]) == (s, "train")}
        for s in (3, 6)
    }
    by_place = {(r["step"], r["behavior"], r["response_type"], r["other"]): r for r in found}
    assert by_place.keys() == {
        (s, b, t, o)
        for s in (3, 6)
        for b in ("agrees", "polite")
        for t in TYPES
        for o in (None, *trained[s])
        if any((r["behavior"], r["response_type"]) == (b, t) for r in rows(folder, "probe_index"))
    }
    scores = [
        (r["change_opt"] - r["change_obs"]) / r["change_opt_error"]
        for r in found
        if r["other"] is None
    ]
    assert np.mean(np.abs(scores) < 2) > 0.5  # a step of AdamW at 3e-3 is not a small one
    signs = [r["change_opt"] * r["change_obs"] > 0 for r in found if r["other"] is None]
    assert np.mean(signs) > 0.6
    again = tmp_path / "again"
    run(base, again, max_steps=5, **changes)
    run(base, again, **changes)
    assert [r for r in rows(again, "influence") if r["step"] != 5] == found


@pytest.mark.slow
def test_two_ranks_score_as_one(base: Config, tmp_path: Path) -> None:
    """The same bits at step 0, whoever scores a batch; later what the weights' rounding gives."""
    changes: dict[str, Any] = {
        "probe_influence": True, "track": "sketch", "max_tokens_per_microbatch": 300,
        "max_steps": 3, "probe_prompts": 4,
    }  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    run(base, one, **changes)
    settings = dataclasses.replace(base, output_dir=str(two), **changes)
    (tmp_path / "config.yaml").write_text(settings.to_yaml())
    run_on_two({}, two, tmp_path / "config.yaml")
    assert rows(two, "probe_index") == rows(one, "probe_index")
    for ours, theirs in zip(rows(two), rows(one), strict=True):
        if ours["step"] == 0:
            assert ours == theirs
        else:
            assert ours["logp"] == pytest.approx(theirs["logp"], rel=1e-5)
    assert len(rows(one, "influence")) > 10
    for ours, theirs in zip(rows(two, "influence"), rows(one, "influence"), strict=True):
        assert [ours[n] for n in ("behavior", "response_type", "other", "n")] == [
            theirs[n] for n in ("behavior", "response_type", "other", "n")
        ]
        assert ours["dot"] == pytest.approx(theirs["dot"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("trainable", ["head", "lora"])
def test_other_ways_to_train(trainable: str, straight: Path, base: Config, tmp_path: Path) -> None:
    """A frozen body, and adapters: the first evaluation is that of the plain model."""
    if trainable == "lora":
        pytest.importorskip("peft")
    changes = {"feature_cache_dir": str(tmp_path), "max_steps": 3}
    folder = run(base, tmp_path / "run", trainable=trainable, **changes)
    first, theirs = ([r for r in rows(f) if r["step"] == 0] for f in (folder, straight))
    for row, other in zip(first, theirs, strict=True):
        assert row["logp"] == pytest.approx(other["logp"], rel=1e-6)
        assert row["argmax_id"] == other["argmax_id"]
    last = [r for r in rows(folder) if r["step"] == 3]
    assert any(abs(a["logp"] - b["logp"]) > 1e-3 for a, b in zip(first, last, strict=True))
